"""Exact metrics of scores against truth, their curves, and the score of a whole image.

Only the normal scores are sorted (in pieces, one a thread); for every anomalous one a binary search then says how many normal
ones are above it, and how many at least as high. Everything follows from these two counts: no threshold between two anomalous
scores can be a better one, and a curve is straight there. Counts are integers, so they may be added over pieces, batches and
ranks in any order to the same bits; what is left to do in floating point is done in one fixed order on the CPU.

Scores of 16 bits are refused, because their many ties are artefacts that move AUROC. docs/metrics.md defines every number.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

PRO_LIMIT = 0.3  # AUPRO is taken up to this false-positive rate, as Bergmann et al. (IJCV 2021) do
CURVE_POINTS = 300
CURVE_TOLERANCE = 5e-4
_PIECE = 1_000_000  # fewer scores than this are not worth a thread
_CELLS = 4096  # a curve is first reduced to one point in each of this many by this many cells that it passes

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BinaryMetrics:
    """Threshold-free metrics of a binary decision. Where ``undefined`` says why they make no sense, all others are None."""

    auroc: float | None = None  # area under the ROC curve, ties counted half
    average_precision: float | None = None  # sum of (R_n - R_n-1) P_n, as scikit-learn defines it
    f1_max: float | None = None  # the best F1 over all thresholds
    iou_max: float | None = None  # the best intersection over union, which the same threshold reaches
    threshold_at_f1_max: float | None = None  # predicting `score >= threshold` reaches both; the highest such threshold
    aupro: float | None = None  # area under the per-region overlap up to PRO_LIMIT, as a fraction of it; only of maps
    undefined: str | None = None


@dataclass(frozen=True)
class Truth:
    """The ground truth of M score maps.

    ``masks`` bool [M, H, W]; ``sizes`` int32 [P], for every anomalous pixel in order, the number of pixels of its connected
    component; ``components`` their number.
    """

    masks: Tensor
    sizes: Tensor
    components: int

    @classmethod
    def of(cls, masks: Tensor) -> "Truth":
        """Components are 8-connected: pixels that touch at a corner belong together. ``masks`` is bool [M, H, W] on the CPU.

        Takes 5 bytes a pixel of the images that have a defect, while it runs.
        """
        truth = masks.numpy()
        truth = truth[truth.any((1, 2))]
        within_an_image = np.zeros((3, 3, 3), bool)
        within_an_image[1] = True
        labels, count = ndimage.label(truth, structure=within_an_image)
        mine = labels[truth]
        return cls(masks, torch.from_numpy(np.bincount(mine)[mine].astype(np.int32)), int(count))


@dataclass(frozen=True)
class Vertices:
    """Corners of the exact ROC and PRO curves, from the highest threshold to the lowest; int64, int64 and float64 [V].

    ``overlap`` is the mean over components of the fraction that is found; None where there are none.
    """

    false_positives: Integers
    true_positives: Integers
    overlap: Floats | None


@dataclass(frozen=True)
class Ranked:
    """What every metric follows from: each anomalous score, and the normal ones that it does not exceed.

    ``scores`` [P] descending; ``above`` and ``at_least`` int64 [P], the normal scores above and at least as high; ``normal``
    the number of all of them; ``sizes`` int64 [P] and ``components`` as in ``Truth``, or None and 0.
    """

    scores: NDArray[np.floating[Any]]
    above: Integers
    at_least: Integers
    normal: int
    sizes: Integers | None = None
    components: int = 0

    @property
    def undefined(self) -> str | None:
        return one_class(self.normal, len(self.scores))

    def last_of_ties(self) -> Integers:
        """Indices at which a group of equal scores ends: between equal scores there is no threshold."""
        return np.flatnonzero(np.append(self.scores[1:] != self.scores[:-1], True))

    def metrics(self) -> BinaryMetrics:
        if self.undefined:
            return BinaryMetrics(undefined=self.undefined)
        anomalous, normal = len(self.scores), self.normal
        # Trapezoids, doubled so that they stay integers: exact up to 4.6e18 pairs of an anomalous and a normal item.
        pairs = 2 * anomalous * normal
        auroc = (pairs - int(self.above.sum()) - int(self.at_least.sum())) / pairs
        last = self.last_of_ties()
        found = last + 1
        predicted = found + self.at_least[last]
        average_precision = float((np.diff(found, prepend=0) * (found / predicted)).sum()) / anomalous
        f1 = 2 * found / (predicted + anomalous)
        best = int(f1.argmax())
        iou = float(found[best] / (predicted[best] + anomalous - found[best]))
        return BinaryMetrics(
            auroc, average_precision, float(f1[best]), iou, float(self.scores[last[best]]), self.aupro()
        )

    def aupro(self, limit: float = PRO_LIMIT) -> float | None:
        """Area under the per-region overlap over the false-positive rate, from 0 to ``limit``, divided by ``limit``.

        The overlap is the mean over components of the fraction of its pixels at or above a threshold; the rate is taken over
        all normal pixels. Between thresholds both are joined by straight lines, as for AUROC. A pixel of a component of s
        pixels adds 1/s from the rate at which it is found on (on a slope, where normal pixels tie with it), so its share of
        the area is known without the curve.
        """
        if self.sizes is None or not self.components:
            return None
        end = limit * self.normal
        found = end - (self.above + self.at_least) / 2
        cut = (self.above < end) & (self.at_least > end)
        found[cut] = (end - self.above[cut]) ** 2 / (2.0 * (self.at_least[cut] - self.above[cut]))
        found[self.above >= end] = 0.0
        return min(1.0, float((found / self.sizes).sum()) / (self.components * end))  # rounding may exceed it

    def vertices(self) -> Vertices:
        """Corners of the curves: before and after each group of equal anomalous scores. Not for undefined ones."""
        last = self.last_of_ties()
        first = np.append(0, last[:-1] + 1)
        ends = np.array([len(self.scores)])

        def corners(before: NDArray[Any], after: NDArray[Any], end: Any) -> NDArray[Any]:
            return np.concatenate([[0], np.stack([before, after], 1).ravel(), [end]])

        overlap = None
        if self.sizes is not None:
            found = np.append(0.0, np.cumsum(1 / self.sizes)) / self.components
            found[-1] = 1.0  # but for rounding
            overlap = corners(found[first], found[last + 1], 1.0)
        return Vertices(
            corners(self.above[first], self.at_least[last], self.normal), corners(first, last + 1, ends[0]), overlap
        )


def one_class(normal: int, anomalous: int) -> str | None:
    """Why there is nothing to tell apart; None if there is."""
    if normal and anomalous:
        return None
    return "no scores" if not normal + anomalous else "all are normal" if normal else "all are anomalous"


def binary_metrics(scores: Tensor, labels: Tensor) -> BinaryMetrics:
    """AUROC, AP, best F1 and best IoU of scores, higher meaning anomalous; sorted and counted on the tensors' device.

    Takes, besides its arguments, 4 bytes a normal and 28 an anomalous score (float32).

    Args:
        scores: float32 or float64, any shape.
        labels: bool, the same shape; True is anomalous.

    Raises:
        TypeError: scores of another dtype (16-bit ones tie too often), or labels that are not bool.
        ValueError: shapes that differ, or NaN among the scores.
    """
    return rank(scores, labels).metrics()


def map_metrics(scores: Tensor, masks: Tensor) -> BinaryMetrics:
    """``binary_metrics`` of score maps [M, H, W], and AUPRO. ``masks`` bool [M, H, W]. Raises as ``binary_metrics``."""
    return rank(scores, masks, Truth.of(masks.cpu())).metrics()


def rank(scores: Tensor, labels: Tensor, truth: Truth | None = None) -> Ranked:
    """Sorts and counts; arguments and errors as of ``binary_metrics``. ``truth`` is that of maps, for AUPRO."""
    anomalous, normal = split(scores, labels)
    anomalous, order = anomalous.sort(descending=True, stable=True)
    above, at_least = count_normal(anomalous, normal).cpu().numpy()
    sizes = truth.sizes.numpy().astype(np.int64)[order.cpu().numpy()] if truth else None
    return Ranked(anomalous.cpu().numpy(), above, at_least, len(normal), sizes, truth.components if truth else 0)


def split(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Anomalous and normal scores, each [K] in order, in memory of their own. Errors as of ``binary_metrics``."""
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores are {scores.dtype}; give float32 or float64 (ties among 16-bit scores change AUROC)")
    if labels.dtype != torch.bool:
        raise TypeError(f"labels are {labels.dtype}; give bool")
    if scores.shape != labels.shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)} but labels {tuple(labels.shape)}")
    if scores.numel() and scores.amax().isnan():
        raise ValueError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN")
    if scores.device.type != "cpu":
        return scores[labels], scores[~labels]
    given, truth = scores.detach().numpy(), labels.numpy()  # whose selection is six times as fast as torch's
    return torch.from_numpy(given[truth]), torch.from_numpy(given[~truth])


def count_normal(anomalous: Tensor, normal: Tensor) -> Tensor:
    """How many of ``normal`` [N] are above, and how many at least as high as, each of ``anomalous`` [P] (descending).

    Sorts ``normal`` in place on a CPU, in as many pieces as there are threads; on a GPU it takes 12 bytes a score.

    Returns:
        int64 [2, P] on their device.
    """
    if normal.device.type == "cpu":
        pieces = normal.tensor_split(min(torch.get_num_threads(), 1 + len(normal) // _PIECE))
        with ThreadPoolExecutor(len(pieces)) as pool:
            list(pool.map(lambda piece: piece.numpy().sort(), pieces))  # vectorised; torch's sort is a third as fast
    else:
        pieces = (normal.sort().values,)
    counts = anomalous.new_zeros(2, len(anomalous), dtype=torch.int64)
    for piece in pieces:
        for row, right in zip(counts, (True, False), strict=True):
            row += len(piece) - torch.searchsorted(piece, anomalous, right=right)
    return counts


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


# --- curves ------------------------------------------------------------------------------------------------------


def curves(vertices: Vertices) -> dict[str, dict[str, list[float]]]:
    """ROC, precision-recall and (where there are components) PRO, each of at most ``CURVE_POINTS`` points, to be drawn.

    All points are vertices, the two ends among them. The line through them is nowhere farther than 1e-3 from that through all
    vertices, unless that takes more points (a precision that jumps up and down all the way).
    """
    false, true = vertices.false_positives, vertices.true_positives
    fpr, recall = false / false[-1], true / true[-1]
    # Where nothing is predicted it is 1: scikit-learn's convention.
    precision = np.where(true + false > 0, true / np.maximum(true + false, 1), 1.0)
    drawn = {"roc": {"fpr": fpr, "tpr": recall}, "pr": {"recall": recall, "precision": precision}}
    if vertices.overlap is not None:
        drawn["pro"] = {"fpr": fpr, "pro": vertices.overlap}
    result = {}
    for name, axes in drawn.items():
        x, y = axes.values()
        chosen = thin(x, y)
        result[name] = {axis: values[chosen].tolist() for axis, values in axes.items()}
    return result


def thin(x: Floats, y: Floats, points: int = CURVE_POINTS, tolerance: float = CURVE_TOLERANCE) -> Integers:
    """Indices of at most ``points`` points of a curve within the unit square, the first and the last among them.

    Ramer-Douglas-Peucker: the farthest point from the line so far is added, until none is farther than ``tolerance``.
    """
    cell = np.rint(x * _CELLS) * (_CELLS + 1) + np.rint(y * _CELLS)
    keep = np.flatnonzero(np.append(cell[1:] != cell[:-1], True))
    keep = np.append(0, keep) if keep[0] else keep
    x, y = x[keep], y[keep]
    chosen, queue = {0, len(keep) - 1}, list[tuple[float, int, int, int]]()

    def look(first: int, last: int) -> None:
        if last - first < 2:
            return
        dx, dy = x[last] - x[first], y[last] - y[first]
        u, v = x[first + 1 : last] - x[first], y[first + 1 : last] - y[first]
        along = np.clip((u * dx + v * dy) / max(dx * dx + dy * dy, 1e-300), 0, 1)
        distance = np.hypot(u - along * dx, v - along * dy)
        farthest = int(distance.argmax())
        if distance[farthest] > tolerance:
            heappush(queue, (-float(distance[farthest]), first, first + 1 + farthest, last))

    look(0, len(keep) - 1)
    while queue and len(chosen) < points:
        _, first, middle, last = heappop(queue)
        chosen.add(middle)
        look(first, middle)
        look(middle, last)
    return keep[sorted(chosen)]
