"""Metrics against scikit-learn, and AUPRO against its definition, on the cases where implementations differ."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, jaccard_score, precision_recall_curve, roc_auc_score
from torch import Tensor

from wads_dist.evaluation.histogram import ScoreHistogram
from wads_dist.evaluation.metrics import (
    CURVE_POINTS,
    BinaryMetrics,
    Truth,
    binary_metrics,
    count_normal,
    curves,
    image_score,
    map_metrics,
    rank,
    thin,
)

RNG = np.random.default_rng(0)


def case(name: str) -> tuple[Tensor, Tensor]:
    count = 1_000_000 if name == "large" else 4_000
    labels = RNG.random(count) < 0.03
    scores = RNG.normal(size=count) + labels
    if name == "ties":
        scores = np.round(scores)
    elif name == "constant":
        scores[:] = 0.5
    elif name == "one positive":
        labels[:] = False
        labels[17] = True
    elif name == "one negative":
        labels[:] = True
        labels[17] = False
    elif name == "perfect":
        scores = labels.astype(float)
    elif name == "reversed":
        scores = -labels.astype(float)
    elif name == "infinite":
        scores[:50], scores[50:100] = np.inf, -np.inf
    dtype = torch.float32 if name in ("large", "float32") else torch.float64
    return torch.from_numpy(scores).to(dtype), torch.from_numpy(labels)


@pytest.mark.parametrize(
    "name",
    ["random", "float32", "ties", "constant", "one positive", "one negative", "perfect", "reversed", "large"],
)
def test_equal_to_scikit_learn(name: str) -> None:
    scores, labels = case(name)
    ours = binary_metrics(scores, labels)
    truth, score = labels.numpy(), scores.numpy()
    precision, recall, thresholds = precision_recall_curve(truth, score)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    # Both sum in float64, in another order.
    assert ours.auroc == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert ours.average_precision == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    assert ours.f1_max == pytest.approx(f1.max(), abs=1e-12)
    assert ours.threshold_at_f1_max in thresholds
    assert ours.iou_max == pytest.approx(jaccard_score(truth, score >= ours.threshold_at_f1_max), abs=1e-12)


def test_infinite_scores_are_scores() -> None:
    scores, labels = case("infinite")
    # scikit-learn refuses infinities; only the order counts, so finite extremes must give the same.
    finite = scores.clamp(-1e6, 1e6)
    assert binary_metrics(scores, labels).auroc == pytest.approx(roc_auc_score(labels, finite), abs=1e-12)


def test_threshold_reaches_the_best_f1() -> None:
    scores, labels = case("ties")
    metrics = binary_metrics(scores, labels)
    assert metrics.threshold_at_f1_max is not None
    predicted = scores >= metrics.threshold_at_f1_max
    hits = (predicted & labels).sum()
    assert float(2 * hits / (predicted.sum() + labels.sum())) == pytest.approx(metrics.f1_max)


def test_shape_and_order_do_not_matter() -> None:
    scores, labels = case("ties")
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    assert binary_metrics(scores[order].view(4, 10, -1), labels[order].view(4, 10, -1)) == binary_metrics(
        scores, labels
    )


@pytest.mark.slow
def test_counts_beyond_what_float32_holds() -> None:
    # More than 2^24 positives, all above the negatives: a cumulative sum in float32 stops counting at 2^24.
    positives, negatives = 2**24 + 2**20, 2**20
    scores = torch.cat([torch.arange(positives, 0, -1).double(), torch.zeros(negatives, dtype=torch.float64)])
    labels = torch.cat([torch.ones(positives, dtype=torch.bool), torch.zeros(negatives, dtype=torch.bool)])
    labels[positives - 1] = False  # one negative just above the others
    metrics = binary_metrics(scores, labels)
    assert metrics.auroc == 1.0
    assert metrics.average_precision == 1.0
    assert metrics.threshold_at_f1_max == 2.0


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.zeros(5), "all are normal"),
        (torch.ones(5), "all are anomalous"),
        (torch.zeros(1), "all are normal"),
        (torch.ones(1), "all are anomalous"),
        (torch.zeros(0), "no scores"),
    ],
)
def test_one_class_has_no_metrics_but_a_reason(labels: Tensor, reason: str) -> None:
    assert binary_metrics(torch.rand(len(labels)), labels.bool()) == BinaryMetrics(undefined=reason)


def test_scores_count_the_same_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wads_dist.evaluation.metrics._PIECE", 100)
    scores, labels = case("ties")
    anomalous, normal = scores[labels].sort(descending=True).values, scores[~labels]
    threads, counts = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            counts.append(count_normal(anomalous, normal.clone()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*counts)


def test_pieces_of_the_normal_scores_count_as_the_whole() -> None:
    """So it does not matter how they are spread over threads, batches or ranks."""
    scores, labels = case("ties")
    anomalous, normal = scores[labels].sort(descending=True).values, scores[~labels]
    whole = count_normal(anomalous, normal.clone())
    assert torch.equal(
        whole, sum(count_normal(anomalous, piece.clone()) for piece in normal.tensor_split([1, 2001, 2001]))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="float32 or float64"):
        binary_metrics(torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=torch.bool))


def test_labels_must_be_bool() -> None:
    with pytest.raises(TypeError, match=r"labels are torch\.float32"):
        binary_metrics(torch.zeros(4), torch.zeros(4))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shape"):
        binary_metrics(torch.zeros(2, 3), torch.zeros(6, dtype=torch.bool))


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        binary_metrics(torch.tensor([0.1, float("nan"), 0.3]), torch.tensor([True, False, True]))


# --- AUPRO ---


def maps(name: str) -> tuple[Tensor, Tensor]:
    """Score maps [6, 16, 16] float32 and masks with components that touch at corners, at borders and across images."""
    rng = np.random.default_rng(7)
    masks = rng.random((6, 16, 16)) < 0.08
    masks[0] = False
    masks[1:3, 4:7, 10:16] = True  # the same place in two images: two components
    masks[4, [2, 3, 4], [2, 3, 4]] = True  # a diagonal: one component
    scores = rng.random((6, 16, 16)) + 0.4 * masks
    if name == "ties":
        scores = np.round(scores * 8)
    elif name == "constant":
        scores[:] = 0.5
    elif name == "perfect":
        scores = masks.astype(float)
    elif name == "reversed":
        scores = -masks.astype(float)
    elif name == "one anomalous pixel":
        masks[:] = False
        masks[3, 0, 15] = True
    elif name == "one normal pixel":
        masks[:] = True
        masks[3, 0, 15] = False
    elif name == "tied at the limit":
        scores = np.where(rng.random((6, 16, 16)) < 0.5, 0.0, 1.0) + 0.0 * scores
    return torch.from_numpy(scores.astype(np.float32)), torch.from_numpy(masks)


def curve_by_definition(scores: Tensor, masks: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False-positive rate and mean overlap at every distinct score, one threshold at a time."""
    s, truth = scores.numpy(), masks.numpy()
    measure = pytest.importorskip("skimage.measure")  # not everywhere the GPU tests run
    components = []
    for i, mask in enumerate(truth):
        labels = measure.label(mask, connectivity=2)
        components += [(i, labels == k) for k in range(1, labels.max() + 1)]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(s)[::-1]:
        found = s >= threshold
        rates.append(found[~truth].sum() / (~truth).sum())
        overlaps.append(np.mean([found[i][where].mean() for i, where in components]))
    return np.array(rates), np.array(overlaps)


def aupro_by_definition(scores: Tensor, masks: Tensor, limit: float) -> float:
    rates, overlaps = curve_by_definition(scores, masks)
    end = np.interp(limit, rates, overlaps) if limit not in rates else overlaps[rates == limit][-1]
    inside = rates <= limit
    return float(np.trapezoid([*overlaps[inside], end], [*rates[inside], limit]) / limit)


MAPS = [
    "random",
    "ties",
    "constant",
    "perfect",
    "reversed",
    "one anomalous pixel",
    "one normal pixel",
    "tied at the limit",
]


@pytest.mark.parametrize("limit", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("name", MAPS)
def test_aupro_is_the_area_under_its_definition(name: str, limit: float) -> None:
    scores, masks = maps(name)
    ours = rank(scores, masks, Truth.of(masks)).aupro(limit)
    # Sums of a few hundred terms in float64.
    assert ours == pytest.approx(aupro_by_definition(scores, masks, limit), abs=1e-12)


def test_components_are_8_connected_and_end_at_their_image() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[1, 0, 0] = masks[1, 1, 1] = masks[1, 3, 3] = masks[2, 3, 3] = True
    truth = Truth.of(masks)
    assert truth.components == 3 and truth.sizes.tolist() == [2, 2, 1, 1]


def test_a_small_component_weighs_as_much_as_a_large_one() -> None:
    scores, masks = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, :8], masks[0, 12, 12] = True, True
    scores[0, :8] = 1.0  # the large one is found before any normal pixel, the small one ties with all of them
    # 1/2 from the first, and from the second the slope 1/2 · rate, whose mean up to 0.3 is 0.075.
    assert map_metrics(scores, masks).aupro == pytest.approx(0.575)


@pytest.mark.parametrize(
    ("masks", "reason"), [(torch.zeros(2, 4, 4), "all are normal"), (torch.ones(2, 4, 4), "all are anomalous"),
                          (torch.zeros(0, 4, 4), "no scores")],
)  # fmt: skip
def test_maps_of_one_class_have_no_metrics_but_a_reason(masks: Tensor, reason: str) -> None:
    assert map_metrics(torch.rand(masks.shape), masks.bool()) == BinaryMetrics(undefined=reason)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAPS)
def test_a_gpu_counts_to_the_same_bits(name: str) -> None:
    scores, masks = maps(name)
    assert map_metrics(scores.cuda(), masks.cuda()) == map_metrics(scores, masks)


# --- curves ---


def farthest(x: NDArray[np.float64], y: NDArray[np.float64], a: list[float], b: list[float]) -> float:
    """How far the farthest of the points (x, y) is from the line through the points (a, b)."""
    starts, ends = np.stack([a[:-1], b[:-1]], 1), np.stack([a[1:], b[1:]], 1)
    nearest = np.full(len(x), np.inf)
    for start, end in zip(starts, ends, strict=True):
        step, offset = end - start, np.stack([x, y], 1) - start
        along = np.clip(offset @ step / max(step @ step, 1e-300), 0, 1)
        nearest = np.minimum(nearest, np.hypot(*(offset - along[:, None] * step).T))
    return float(nearest.max())


def test_drawn_curves_have_few_points_and_stay_near_the_exact_ones() -> None:
    rng = np.random.default_rng(3)
    masks = torch.from_numpy(rng.random((8, 64, 64)) < 0.05)
    scores = torch.from_numpy((rng.random(masks.shape) + 0.5 * masks.numpy()).astype(np.float32))
    vertices = rank(scores, masks, Truth.of(masks)).vertices()
    drawn = curves(vertices)
    assert vertices.overlap is not None and len(vertices.overlap) > 10 * CURVE_POINTS
    rate, recall = vertices.false_positives / vertices.false_positives[-1], vertices.true_positives / masks.sum().item()
    precision, theirs, _ = precision_recall_curve(masks.flatten(), scores.flatten())
    for x, y, chosen in (
        (rate, recall, drawn["roc"]), (rate, vertices.overlap, drawn["pro"]), (theirs, precision, drawn["pr"])
    ):  # fmt: skip
        a, b = chosen.values()
        assert len(a) == len(b) <= CURVE_POINTS
        assert farthest(x, y, a, b) < 1e-3


def test_curves_pass_through_the_points_of_their_definition() -> None:
    scores, masks = maps("ties")
    rates, overlaps = curve_by_definition(scores, masks)
    drawn = curves(rank(scores, masks, Truth.of(masks)).vertices())
    assert farthest(rates, overlaps, drawn["pro"]["fpr"], drawn["pro"]["pro"]) < 1e-3
    for name, (first, last) in {
        "roc": ((0, 0), (1, 1)),
        "pro": ((0, 0), (1, 1)),
        "pr": ((0, 1), (1, masks.float().mean().item())),
    }.items():
        a, b = drawn[name].values()
        assert (a[0], b[0]) == first and (a[-1], b[-1]) == pytest.approx(last, abs=1e-7)


def test_the_precision_of_a_perfect_detector_is_1_from_the_first_point_on() -> None:
    """A threshold above all scores finds nothing, and is not wrong either."""
    scores, masks = maps("perfect")
    exact, histogram = rank(scores, masks, Truth.of(masks)).vertices(), ScoreHistogram(64)
    histogram.add(scores, Truth.of(masks))
    for vertices in (exact, histogram.vertices()):
        drawn = curves(vertices)["pr"]
        until_all_are_found = drawn["recall"].index(1.0) + 1
        assert drawn["recall"][0] == 0.0 and drawn["precision"][:until_all_are_found] == [1.0] * until_all_are_found


def test_the_precision_of_a_detector_that_errs_first_falls_to_0() -> None:
    drawn = curves(rank(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([True, True, False])).vertices())["pr"]
    assert (drawn["recall"][0], drawn["precision"][0]) == (0.0, 1.0) and drawn["precision"][1] == 0.0


def test_a_curve_that_needs_more_points_gets_the_most_important_ones() -> None:
    x = np.linspace(0, 1, 4001)
    y = np.where(np.arange(4001) % 2 == 0, x, 0.0)  # jumps up and down all the way
    chosen = thin(x, y, points=50)
    assert len(chosen) == 50 and chosen[0] == 0 and chosen[-1] == 4000


# --- images ---


def test_image_score_is_the_best_window() -> None:
    maps = torch.zeros(2, 8, 9)
    maps[0, 2:5, 3:6] = 0.5  # fills a window of 3
    maps[1, 0, 0] = 0.9  # one bright pixel in the corner
    assert image_score(maps, 3).tolist() == pytest.approx([0.5, 0.1])


def test_image_score_with_a_window_of_one_is_the_maximum() -> None:
    maps = torch.rand(3, 5, 5)
    assert torch.equal(image_score(maps, 1), maps.amax((1, 2)))


def test_image_score_refuses_what_it_cannot_use() -> None:
    with pytest.raises(TypeError, match="float32"):
        image_score(torch.zeros(1, 8, 8, dtype=torch.bfloat16), 3)
    with pytest.raises(ValueError, match="does not fit"):
        image_score(torch.zeros(1, 8, 8), 9)
    with pytest.raises(ValueError, match=r"\[N, H, W\]"):
        image_score(torch.zeros(1, 1, 8, 8), 3)
