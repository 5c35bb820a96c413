"""Does the segmenter use the reconstruction? Scores of a finished run when it is shown others.

    python benchmarks/reconstruction_use.py RUN [--json FILE] [--data.shards DIR] [--SECTION.FIELD VALUE ...]

For every category of RUN: pixel AUROC and AP of the segmenter alone (without ``model.error_weight``), with each image beside
its reconstruction, the next one's (within a batch, the last beside the first's), beside itself, and beside grey. A segmenter
that looks at the image alone scores the same. Exit code 2: the run or its settings are wrong.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wads_dist.common.errors import ConfigError, WadsError
from wads_dist.common.ranks import Ranks
from wads_dist.config.load import load_config
from wads_dist.evaluation.evaluate import MODEL, Part, score_report
from wads_dist.evaluation.metrics import binary_metrics
from wads_dist.model.networks import Scored, Wads
from wads_dist.model.weights import load_model
from wads_dist.shards.arguments import Parser, local_path
from wads_dist.shards.errors import DataError
from wads_dist.shards.source import Dataset

SHOWN = {
    "as trained": lambda image, reconstruction: reconstruction,
    "the next image's": lambda image, reconstruction: reconstruction.roll(1, 0),
    "the image itself": lambda image, reconstruction: image,
    "grey": lambda image, reconstruction: torch.full_like(reconstruction, 0.5),
}


class Shown(Wads):
    """A trained model whose segmenter sees something else in the place of the reconstruction."""

    def __init__(self, model: Wads, shown: str) -> None:
        torch.nn.Module.__init__(self)
        self.model, self.shown, self.experts = model, SHOWN[shown], None
        model.error_weight, model.experts = 0.0, None

    @torch.no_grad()
    def predict(self, image: Tensor, stored: Tensor | None = None) -> Scored:
        reconstruction, _, code, _ = self.model.predict(image)
        return Scored(reconstruction, self.model.segment(image, self.shown(image, reconstruction)), code)


def scores(run: Path, settings: Sequence[str], ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Category → what is shown → pixel AUROC and AP.

    Raises:
        ConfigError: the run cannot be read, or names no shards.
    """
    config = load_config(["--config", str(run / "config.toml"), *settings])
    if config.data.shards is None:
        raise ConfigError([f"data.shards: {run} was given data.root; add --data.shards DIR, the shards made of it"])
    dataset = Dataset.open(config.data.shards, cache=config.data.cache)
    found: dict[str, dict[str, Any]] = {}
    for folder in sorted(path.parent for path in run.glob("*/metrics.json")):
        model = load_model(folder, config, ranks.device)
        for shown in SHOWN:
            part = Part.of(Shown(model, shown), config, dataset, folder.name, ranks)
            report = score_report(part.pixels[MODEL].result(ranks), binary_metrics(*part.images(ranks)))
            found.setdefault(folder.name, {})[shown] = {name: report[name] for name in ("pixel_auroc", "pixel_ap")}
    return found


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_path, help="a run's folder")
    parser.add_argument("--json", type=local_path, help="also write the numbers there")
    given, settings = parser.parse_known_args()
    try:
        found = scores(given.run, settings, Ranks(0, 1, 0, 1, Ranks.from_environment().device))
    except (ConfigError, DataError, WadsError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    table = Table("category", *(f"{shown}: AUROC / AP" for shown in SHOWN))
    for category, of in found.items():
        table.add_row(category, *(f"{of[shown]['pixel_auroc']:.3f} / {of[shown]['pixel_ap']:.3f}" for shown in SHOWN))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
