"""Exact metrics of a score against truth, and the score of a whole image.

Everything comes from one sort. Counts are int64 and ratios float64: cumulative sums in float32 go wrong above 16.8
million pixels, which is one MVTec category at full size. Scores of 16 bits are refused, because their many ties are
artefacts that move AUROC.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BinaryMetrics:
    """Threshold-free metrics of a binary decision. All four are None where the labels hold one class only."""

    auroc: float | None  # area under the ROC curve, ties counted half
    average_precision: float | None  # sum of (R_n - R_n-1) P_n, as scikit-learn defines it
    f1_max: float | None  # the best F1 over all thresholds
    threshold_at_f1_max: float | None  # predicting `score >= threshold` reaches it; the highest such threshold


def binary_metrics(scores: Tensor, labels: Tensor) -> BinaryMetrics:
    """AUROC, AP and best F1 of scores, higher meaning anomalous; computed on the tensors' device.

    Args:
        scores: float32 or float64, any shape.
        labels: bool, the same shape; True is anomalous.

    Raises:
        TypeError: scores of another dtype (16-bit ones tie too often), or labels that are not bool.
        ValueError: shapes that differ, or NaN among the scores.
    """
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores are {scores.dtype}; give float32 or float64 (ties among 16-bit scores change AUROC)")
    if labels.dtype != torch.bool:
        raise TypeError(f"labels are {labels.dtype}; give bool")
    if scores.shape != labels.shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)} but labels {tuple(labels.shape)}")
    scores, labels = scores.flatten(), labels.flatten()
    if nans := int(scores.isnan().sum()):
        raise ValueError(f"{nans} of {scores.numel()} scores are NaN")
    positives = int(labels.sum())
    negatives = labels.numel() - positives
    if not positives or not negatives:
        return BinaryMetrics(None, None, None, None)

    scores, order = scores.sort(descending=True, stable=True)
    # Thresholds lie between distinct scores only: among ties the order is arbitrary.
    last = torch.ones_like(labels)
    last[:-1] = scores[1:] != scores[:-1]
    ends = last.nonzero().squeeze(1)
    true_positives = labels[order].cumsum(0, dtype=torch.int64)[ends]
    predicted = ends + 1
    false_positives = predicted - true_positives

    # Trapezoids, doubled so that they stay integers: exact up to 4.6e18 pairs of a positive and a negative.
    zero = true_positives.new_zeros(1)
    widths = false_positives.diff(prepend=zero)
    heights = true_positives + torch.cat([zero, true_positives[:-1]])
    auroc = int((widths * heights).sum()) / (2 * positives * negatives)

    precision = true_positives.double() / predicted
    average_precision = float((true_positives.diff(prepend=zero) * precision).sum()) / positives

    f1 = 2 * true_positives.double() / (predicted + positives)
    best = int(f1.argmax())
    return BinaryMetrics(auroc, average_precision, float(f1[best]), float(scores[ends[best]]))


def image_score(probability: Tensor, window: int) -> Tensor:
    """Score of each image: the largest mean of its probability map over a square window inside it.

    The mean keeps one bright pixel from deciding; windows do not reach over the border, so no padding dilutes them.

    Args:
        probability: [N, H, W], float32.
        window: side of the window in pixels, at most H and W.

    Returns:
        [N], float32.

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions, or a window that does not fit.
    """
    if probability.dtype != torch.float32:
        raise TypeError(f"probability is {probability.dtype}; give float32")
    if probability.dim() != 3:
        raise ValueError(f"probability has shape {tuple(probability.shape)}; give [N, H, W]")
    if not 1 <= window <= min(probability.shape[1:]):
        raise ValueError(f"window {window} does not fit into {tuple(probability.shape[1:])}")
    return F.avg_pool2d(probability[:, None], window, stride=1).amax(dim=(1, 2, 3))
