"""Does the segmenter use the reconstruction? Scores of a finished run when it is shown others.

    PYTHONPATH=. python benchmarks/reconstruction_use.py RUN [--json FILE]

For every category of RUN: pixel AUROC and AP of the model as it is, with each image beside the next one's reconstruction
(within a batch, the last beside the first's), beside itself, and beside grey. A segmenter that looks at the image alone scores
the same.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shards.source import Dataset
from wads_dist.config import load_config
from wads_dist.distributed import Ranks
from wads_dist.evaluate import MODEL, Part, load_model, score_report
from wads_dist.metrics import binary_metrics
from wads_dist.models import Wads

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
        self.model, self.shown = model, SHOWN[shown]

    @torch.no_grad()
    def predict(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reconstruction, _, code = self.model.predict(image)
        return reconstruction, self.model.segment(image, self.shown(image, reconstruction)), code


def scores(run: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Category → what is shown → pixel AUROC and AP."""
    config = load_config(["--config", str(run / "config.toml")])
    assert config.data.shards is not None, "a run of data.root: give its shards with data.shards instead"
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    given = parser.parse_args()
    found = scores(given.run, Ranks(0, 1, 0, 1, Ranks.from_environment().device))
    table = Table("category", *(f"{shown}: AUROC / AP" for shown in SHOWN))
    for category, of in found.items():
        table.add_row(category, *(f"{of[shown]['pixel_auroc']:.3f} / {of[shown]['pixel_ap']:.3f}" for shown in SHOWN))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
