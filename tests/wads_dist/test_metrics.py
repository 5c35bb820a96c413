"""Metrics against scikit-learn, on the cases where implementations differ."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor

from wads_dist.metrics import BinaryMetrics, binary_metrics, image_score

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
    # Both sum in float64; 1e-9 leaves room for another order of summation over millions of terms.
    assert ours.auroc == pytest.approx(roc_auc_score(truth, score), abs=1e-9)
    assert ours.average_precision == pytest.approx(average_precision_score(truth, score), abs=1e-9)
    assert ours.f1_max == pytest.approx(f1.max(), abs=1e-9)
    assert ours.threshold_at_f1_max in thresholds


def test_infinite_scores_are_scores() -> None:
    scores, labels = case("infinite")
    # scikit-learn refuses infinities; only the order counts, so finite extremes must give the same.
    finite = scores.clamp(-1e6, 1e6)
    assert binary_metrics(scores, labels).auroc == pytest.approx(roc_auc_score(labels, finite), abs=1e-9)


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


@pytest.mark.parametrize("labels", [torch.zeros(5), torch.ones(5), torch.zeros(0)])
def test_one_class_has_no_metrics(labels: Tensor) -> None:
    assert binary_metrics(torch.rand(len(labels)), labels.bool()) == BinaryMetrics(None, None, None, None)


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
