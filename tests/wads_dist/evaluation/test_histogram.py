"""The bounds of a histogram hold whatever the scores are: random, tied, extreme, or in the worst order within their bins."""

import numpy as np
import pytest
import torch
from torch import Tensor

from wads_dist.evaluation.histogram import ScoreHistogram, bin_of
from wads_dist.evaluation.metrics import BinaryMetrics, Truth, curves, map_metrics

METRICS = ("auroc", "average_precision", "f1_max", "iou_max", "aupro")
SHAPE = (4, 24, 24)


def histogram_of(scores: Tensor, masks: Tensor, bins: int) -> ScoreHistogram:
    histogram = ScoreHistogram(bins)
    histogram.add(scores, Truth.of(masks))
    return histogram


def adversarial(rng: np.random.Generator, masks: Tensor, bins: int, anomalous_first: bool) -> Tensor:
    """In every bin, all anomalous scores are equal and above all normal ones, or all differ and are below: what the bounds must
    allow for."""
    base = torch.from_numpy(rng.uniform(0.01, 0.99, SHAPE).astype(np.float32))
    step = 2.0**-12  # of 16 bins, each that holds anything is wider than that
    middle = bin_of(base, bins)
    centre = torch.stack([base[middle == b].mean() for b in range(bins) if (middle == b).any()])
    index = torch.searchsorted(torch.unique(middle), middle)
    if anomalous_first:
        return (centre[index] + step * masks).float()
    return (centre[index] - step * masks * torch.from_numpy(rng.uniform(0.1, 1, SHAPE))).float()


def scores_of(name: str, rng: np.random.Generator, masks: Tensor) -> Tensor:
    scores = torch.from_numpy(rng.random(SHAPE).astype(np.float32))
    if name == "skilled":
        scores = torch.sigmoid(12 * (scores - 0.8) + 6 * masks)
    elif name == "near 0 and 1":
        scores = torch.where(scores < 0.5, scores**30, 1 - scores**30)
    elif name == "ties":
        scores = (scores * 6).round() / 6
    elif name == "constant":
        scores[:] = 0.5
    elif name == "perfect":
        scores = masks.float()
    elif name == "reversed":
        scores = 1 - masks.float()
    elif name in ("best in every bin", "worst in every bin"):
        scores = adversarial(rng, masks, 16, name.startswith("best"))
    return scores.float()


NAMES = [
    "random",
    "skilled",
    "near 0 and 1",
    "ties",
    "constant",
    "perfect",
    "reversed",
    "best in every bin",
    "worst in every bin",
]


@pytest.mark.parametrize("bins", [2, 16, 256, 65_536])
@pytest.mark.parametrize("name", NAMES)
def test_the_exact_value_lies_within_the_bounds(name: str, bins: int) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        masks = torch.from_numpy(rng.random(SHAPE) < (0.02, 0.3, 0.9)[seed % 3])
        scores = scores_of(name, rng, masks)
        exact, bounds = map_metrics(scores, masks), histogram_of(scores, masks, bins).bounds()
        for metric in METRICS:
            low, high = getattr(bounds, metric)
            assert 0 <= low <= getattr(exact, metric) <= high <= 1, (metric, seed)


@pytest.mark.parametrize("best", [True, False])
def test_no_bound_is_wider_than_it_must_be(best: bool) -> None:
    """Scores in the best and in the worst order within their bins reach the bounds of what the order decides."""
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random(SHAPE) < 0.3)
    scores = adversarial(rng, masks, 16, best)
    exact, bounds = map_metrics(scores, masks), histogram_of(scores, masks, 16).bounds()
    side = 1 if best else 0
    # A pixel's share of its component is rounded by up to 2^-40.
    for metric in ("auroc", "aupro"):
        assert getattr(exact, metric) == pytest.approx(getattr(bounds, metric)[side], abs=1e-8), metric
    # The bound of AP's sum by an integral is off by less than half a score in all.
    tolerance = 1e-8 if best else 0.5 / masks.sum().item()
    assert exact.average_precision == pytest.approx(bounds.average_precision[side], abs=tolerance)  # type: ignore[index]


def test_bounds_are_narrow_where_scores_are_as_a_network_gives_them() -> None:
    rng = np.random.default_rng(1)
    masks = torch.from_numpy(rng.random((40, 128, 128)) < 0.02)
    logits = torch.from_numpy(rng.normal(-6, 3, masks.shape).astype(np.float32)) + 6 * masks
    bounds = histogram_of(torch.sigmoid(logits), masks, 65_536).bounds()
    for metric in METRICS:
        low, high = getattr(bounds, metric)
        assert high - low < 2e-3, metric


def test_histograms_of_parts_add_up_to_that_of_the_whole() -> None:
    rng = np.random.default_rng(2)
    masks, scores = torch.from_numpy(rng.random(SHAPE) < 0.1), torch.from_numpy(rng.random(SHAPE).astype(np.float32))
    whole, parts = histogram_of(scores, masks, 64), ScoreHistogram(64)
    for i in (2, 0, 3, 1):
        parts.add(scores[i : i + 1], Truth.of(masks[i : i + 1]))
    assert torch.equal(whole.counts, parts.counts) and whole.bounds() == parts.bounds()


@pytest.mark.parametrize("bins", [2, 10, 4096, 65_536])
def test_a_higher_score_is_never_in_a_lower_bin(bins: int) -> None:
    edges = [0.0, 1e-45, 2.0**-25, 2.0**-24, 0.25, 0.5 - 2.0**-25, 0.5, 0.5 + 2.0**-24, 1 - 2.0**-24, 1.0]
    scores = torch.cat([torch.tensor(edges), torch.rand(10_000), torch.rand(1000) ** 20, 1 - torch.rand(1000) ** 20])
    index = bin_of(scores.sort().values, bins)
    assert (index.diff() >= 0).all() and index[0] == 0 and index[-1] == bins - 1


def test_curves_of_a_histogram_go_through_the_exact_ones() -> None:
    rng = np.random.default_rng(3)
    masks = torch.from_numpy(rng.random(SHAPE) < 0.1)
    scores = torch.sigmoid(torch.from_numpy(rng.normal(size=SHAPE).astype(np.float32)) + 2 * masks)
    drawn = curves(histogram_of(scores, masks, 65_536).vertices())
    assert drawn.keys() == {"roc", "pr", "pro"} and drawn["pro"]["pro"][-1] == 1.0
    area = np.trapezoid(drawn["roc"]["tpr"], drawn["roc"]["fpr"])
    assert area == pytest.approx(map_metrics(scores, masks).auroc, abs=1e-3)


def test_one_class_has_a_reason() -> None:
    bounds = histogram_of(torch.rand(SHAPE), torch.zeros(SHAPE, dtype=torch.bool), 16).bounds()
    assert bounds.undefined == "all are normal" and bounds.auroc is None
    assert map_metrics(torch.rand(SHAPE), torch.zeros(SHAPE, dtype=torch.bool)) == BinaryMetrics(
        undefined=bounds.undefined
    )


@pytest.mark.parametrize("bad", [float("nan"), -0.1, 1.1])
def test_scores_that_no_bin_holds_are_refused(bad: float) -> None:
    scores = torch.rand(SHAPE)
    scores[1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        histogram_of(scores, torch.zeros(SHAPE, dtype=torch.bool), 16)


def test_other_arguments_are_refused() -> None:
    truth = Truth.of(torch.zeros(SHAPE, dtype=torch.bool))
    with pytest.raises(TypeError, match="float32"):
        ScoreHistogram(16).add(torch.zeros(SHAPE, dtype=torch.float64), truth)
    with pytest.raises(ValueError, match="shape"):
        ScoreHistogram(16).add(torch.zeros(1, 2, 3), truth)
    with pytest.raises(ValueError, match="even"):
        ScoreHistogram(15)
