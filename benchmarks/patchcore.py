"""PatchCore (Roth et al. 2022), what people would use instead: no training, a bank of a frozen network's patches.

    python benchmarks/patchcore.py SHARDS [--categories A,B] [--image-size 64] [--mask-rule nearest] [--json FILE]

For every category: pixel AUROC, AP and AUPRO and image AUROC by this project's own metrics, of a bank of 10 % of the patches of
at most 120 normal training images, drawn at random; images read at 224², maps at strides 8 and 16, nearest neighbour, a
Gaussian of four pixels of 224. The bank of ``--preset wads_features`` (`wads_dist/model/bank.py`) is the same,
of up to 1,000 images and 10,000 patches.
Exit code 2: wrong usage or no weights; 3: the data.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from wads_dist.common.errors import ModelWeightsError
from wads_dist.common.ranks import Ranks
from wads_dist.config.schema import Config, DataConfig, EvaluationConfig, FeaturesConfig, ModelConfig
from wads_dist.data.images import TestImages
from wads_dist.evaluation.calibration import build_bank
from wads_dist.evaluation.evaluate import pixel_report
from wads_dist.evaluation.metrics import Truth, binary_metrics, image_score
from wads_dist.evaluation.scoring import pixel_scores, rank_batches
from wads_dist.model.features import IMAGENET, SOURCES, load_network
from wads_dist.shards.addresses import address_problem, public, take_credentials
from wads_dist.shards.arguments import Parser, local_path
from wads_dist.shards.errors import DataError
from wads_dist.shards.names import printable
from wads_dist.shards.source import Dataset

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
SCORES = ("pixel_auroc", "pixel_ap", "pixel_aupro", "image_auroc")


@torch.inference_mode()
def patchcore(dataset: Dataset, category: str, config: Config, imagenet: bool) -> dict[str, Any]:
    """The scores of a category, and the seconds that bank and scoring took."""
    started = time.perf_counter()
    network, source = load_network(config.model.features)
    if imagenet:
        network.mean, network.deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    _, bank = build_bank(network, config, dataset, category, dataset.manifest(category).samples("train"), ALONE)
    pixels, scores, anomalous = pixel_scores(config.evaluation, ALONE.device), [], []
    for batch in rank_batches(len(dataset.manifest(category).samples("test")), config.evaluation.batch_size, ALONE):
        part = slice(batch.start, batch.stop)
        test = TestImages.load(dataset, category, config.data, part, config.evaluation.mask_rule)
        assert test.stored is not None
        maps = bank(test.stored.float() / 255, config.data.image_size)
        masked = torch.tensor(test.has_mask)
        pixels.add(maps[masked], Truth.of(test.masks[masked]))
        scores.append(image_score(maps, config.evaluation.score_window))
        anomalous += [defect != "good" for defect in test.defects]
    images = binary_metrics(torch.cat(scores), torch.tensor(anomalous))
    found = pixel_report(pixels.result(ALONE).metrics) | {"image_auroc": images.auroc}
    return found | {"patches": len(bank.rows), "seconds": time.perf_counter() - started, "weights": source}


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", help="location of the shards")
    add("--categories", help="separated by commas (default: all)")
    add("--image-size", type=int, default=64, help="side of maps and masks (default: %(default)s)")
    add("--store-size", type=int, default=256, help="side at which images are kept before they are read at 224 (default: "
        "%(default)s)")  # fmt: skip
    add(
        "--mask-rule", choices=("area", "nearest"), default="nearest", help="default: %(default)s, as the peers have it"
    )
    add("--network", choices=list(SOURCES), default="efficientnet_lite0", help="default: %(default)s")
    add(
        "--imagenet",
        action="store_true",
        help="normalise by ImageNet's mean and deviation, not as the network was trained",
    )
    add("--images", type=int, default=120, help="normal images of the bank, at most (default: %(default)s)")
    add("--json", type=local_path, help="also write the numbers there")
    given = parser.parse_args()
    if problem := address_problem(given.shards):
        parser.error(f"argument shards: {problem}")
    if given.store_size < given.image_size:
        parser.error(f"argument --store-size: {given.store_size} is less than --image-size {given.image_size}")
    config = Config(
        data=DataConfig(
            shards=take_credentials(given.shards), image_size=given.image_size, store_size=given.store_size
        ),
        model=ModelConfig(features=given.network),
        features=FeaturesConfig(images=given.images),
        evaluation=EvaluationConfig(mask_rule=given.mask_rule, score_window=given.image_size // 16 * 2 - 1),
    )
    table, results = Table("category", *SCORES, "patches", "s"), {}
    try:
        dataset = Dataset.open(str(config.data.shards), cache=config.data.cache)
        for name in given.categories.split(",") if given.categories else dataset.categories:
            results[name] = found = patchcore(dataset, name, config, given.imagenet)
            shown = ["–" if found[score] is None else f"{found[score]:.3f}" for score in SCORES]
            table.add_row(name, *shown, str(found["patches"]), f"{found['seconds']:.0f}")
    except (DataError, ModelWeightsError) as error:
        Console(stderr=True).print(printable(public(str(error))), style="red", markup=False, soft_wrap=True)
        return 3 if isinstance(error, DataError) else 2
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
