"""Tiles of the best, median and worst images, from maps whose ranking is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wads_dist.data.images import TestImages
from wads_dist.evaluation.evaluate import Evaluation
from wads_dist.evaluation.scoring import Predictions
from wads_dist.evaluation.thresholds import Threshold
from wads_dist.reporting.figures import TILE, ranked, save_examples, save_samples

SIZE = 32


def evaluation(defects: list[str], *, threshold: float | None = None, size: int = SIZE) -> Evaluation:
    """Image i of n: of a defect at the left edge, the upper (n − i)/n has probability 0.9; all of a normal image has i/n."""
    count = len(defects)
    masks, probability = torch.zeros(count, size, size, dtype=torch.bool), torch.zeros(count, size, size)
    for i, defect in enumerate(defects):
        masks[i, :, :8] = defect not in ("good", "unmasked")
        probability[i, : size * (count - i) // count, :8] = 0.9
        if defect == "good":
            probability[i] = i / count
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    keys = [f"key-{i}" for i in range(count)]
    test = TestImages(images, masks, [d != "unmasked" for d in defects], keys, defects, [0] * count)
    chosen = None if threshold is None else Threshold(threshold, 0.5, "a test", 1, None, None, {})
    return Evaluation({}, test, Predictions(probability, images, torch.zeros(count, 4)), threshold=chosen)


def saved(folder: Path, of: Evaluation, **options: Any) -> list[dict[str, Any]]:
    save_examples(folder, "nut", of, **{"window": 3} | options)
    return json.loads((folder / "examples" / "examples.json").read_text())["examples"]


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("count", range(9))
def test_nothing_is_chosen_twice_and_the_extremes_come_first(count: int, each: int) -> None:
    order = list(range(10, 10 + count))
    chosen = ranked(order, each)
    every = [i for of in chosen.values() for i in of]
    assert len(set(every)) == len(every) == min(count, 3 * each)
    assert chosen["best"] == order[:each] and (count < 2 * each or chosen["worst"] == order[-each:])


def test_the_median_is_in_the_middle() -> None:
    assert ranked(range(9), 1)["median"] == [4] and ranked(range(10), 2)["median"] == [4, 5]


def test_a_defects_name_is_no_formula(tmp_path: Path) -> None:
    """It comes from whoever made the data; as one of matplotlib's formulas, "$x^$" ended every category that had it."""
    of = evaluation(["$x^$", "good"])
    of.metrics["pixel_auroc"] = None
    save_samples(tmp_path / "samples.png", "nut", of)
    assert (tmp_path / "samples.png").is_file()


def test_defects_are_ranked_by_their_precision(tmp_path: Path) -> None:
    found = saved(tmp_path, evaluation(["cut"] * 5), each=1)
    assert [(e["rank"], e["key"], e["place"], e["of"]) for e in found] == [
        ("best", "key-0", 1, 5),
        ("median", "key-2", 3, 5),
        ("worst", "key-4", 5, 5),
    ]
    assert found[0]["ap"] == 1.0 > found[1]["ap"] > found[2]["ap"]


def test_normal_images_are_ranked_by_their_score(tmp_path: Path) -> None:
    found = saved(tmp_path, evaluation(["good"] * 4))
    assert [(e["rank"], e["key"]) for e in found] == [("median", "key-1"), ("worst", "key-3")]
    assert found[1]["score"] == pytest.approx(0.75) and found[1]["ap"] is found[1]["iou"] is None


def test_a_defect_without_a_mask_is_left_out_where_others_have_one(tmp_path: Path) -> None:
    assert [e["key"] for e in saved(tmp_path, evaluation(["unmasked", "cut", "unmasked"]))] == ["key-1"]


def test_where_no_defect_has_a_mask_they_are_ranked_by_their_score(tmp_path: Path) -> None:
    of = evaluation(["unmasked"] * 4 + ["good"])
    of.predictions.probability[2] = 1.0
    found = [e for e in saved(tmp_path, of, each=1) if e["defect"] != "good"]
    assert [(e["rank"], e["key"]) for e in found] == [("best", "key-2"), ("median", "key-0"), ("worst", "key-3")]
    assert all(e["ap"] is e["iou"] is None and e["score"] > 0 and "truth" not in e["tiles"] for e in found)


@pytest.mark.parametrize(("threshold", "iou"), [(None, 1.0), (0.3, 1.0), (0.95, 0.0), (0.0, 0.25)])
def test_the_mask_is_that_of_the_threshold(tmp_path: Path, threshold: float | None, iou: float) -> None:
    (example,) = saved(tmp_path, evaluation(["cut"], threshold=threshold))
    assert example["iou"] == iou
    mask = np.asarray(Image.open(tmp_path / "examples" / example["tiles"]["mask"]))
    assert mask.mean() == {None: 0.25, 0.3: 0.25, 0.95: 0.0, 0.0: 1.0}[threshold]


def test_tiles_show_what_they_are_called(tmp_path: Path) -> None:
    of = evaluation(["cut"])
    (example,) = saved(tmp_path, of)
    tiles = {name: np.asarray(Image.open(tmp_path / "examples" / file)) for name, file in example["tiles"].items()}
    assert np.array_equal(tiles["truth"], of.test.masks[0].numpy())
    # Noise is the worst that JPEG can be given.
    assert abs(tiles["input"] / 255 - of.test.images[0].permute(1, 2, 0).numpy()).mean() < 0.2
    assert tiles["heat"][:, :4].mean() > 100 > 20 > tiles["heat"][:, 16:].mean()


def test_tiles_are_small(tmp_path: Path) -> None:
    (example,) = saved(tmp_path, evaluation(["cut"], size=256))
    for file in example["tiles"].values():
        assert Image.open(tmp_path / "examples" / file).size == (TILE, TILE)
        assert (tmp_path / "examples" / file).stat().st_size < 30_000


def test_examples_are_replaced(tmp_path: Path) -> None:
    saved(tmp_path, evaluation(["cut"] * 5))
    assert len(saved(tmp_path, evaluation(["cut"]))) == 1
