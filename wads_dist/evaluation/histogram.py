"""Metrics of score maps that do not fit into memory: counts per bin of the score, and bounds of the exact values.

What is kept does not grow with the test set: three integers a bin. Histograms of batches and ranks are merged by addition, to
the same bits in any order. Within a bin nobody knows which scores are higher, so every metric is computed for the order that
is best for it and for the one that is worst: the exact value lies between them, whatever the scores were.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wads_dist.evaluation.metrics import PRO_LIMIT, Truth, Vertices, one_class

# Bins are spaced evenly in the bits of p below 1/2 and of 1 - p above, which is nearly logarithmic: a probability near 0
# or 1 differs from its neighbours by little, and most are there. Below 2^-24, the spacing of float32 below 1, is one bin.
_LOWEST, _HALF = (int(np.float32(x).view(np.int32)) for x in (2.0**-24, 0.5))
# A pixel's share of its component is kept as a whole number of 2^-40, rounded down, so that sums of them are exact.
_SHARE_BITS = 40
_MOST_COMPONENTS = 2 ** (62 - _SHARE_BITS)
_ROUNDING = 1e-12  # the bounds are widened by this, for the rounding of float64 in them and in the exact value
CHUNK = 1 << 22  # scores that are looked at together; each takes 40 bytes meanwhile

Interval = tuple[float, float]


@dataclass(frozen=True)
class Bounds:
    """Lowest and highest possible value of each metric, as named in ``BinaryMetrics``; None where that is undefined."""

    auroc: Interval | None = None
    average_precision: Interval | None = None
    f1_max: Interval | None = None
    iou_max: Interval | None = None
    aupro: Interval | None = None
    undefined: str | None = None


class ScoreHistogram:
    """Counts of normal and anomalous scores in [0, 1], and of the anomalous ones' shares of their components, per bin.

    ``counts`` is int64 [3, bins] on the CPU, ``components`` a number. Takes 24 bytes a bin, whatever is added.
    """

    def __init__(self, bins: int) -> None:
        """``bins``: an even number."""
        if bins < 2 or bins % 2:
            raise ValueError(f"bins is {bins}; give an even number")
        self.counts = torch.zeros(3, bins, dtype=torch.int64)
        self.components = 0

    def add(self, scores: Tensor, truth: Truth) -> None:
        """Counts score maps [M, H, W], float32 in [0, 1], on any device.

        Raises:
            TypeError: scores of another dtype.
            ValueError: scores outside [0, 1] (or NaN), another shape than the truth's, or 4 million components in all.
        """
        if scores.dtype != torch.float32:
            raise TypeError(f"scores are {scores.dtype}; give float32")
        if scores.shape != truth.masks.shape:
            raise ValueError(f"scores have shape {tuple(scores.shape)} but masks {tuple(truth.masks.shape)}")
        if scores.numel() and not (scores.amin() >= 0 and scores.amax() <= 1):
            raise ValueError(
                "some scores are NaN or outside [0, 1], where the bins are; give evaluation.metrics = exact"
            )
        bins = self.counts.shape[1]
        labels = truth.masks.flatten().to(scores.device)
        for part, label in zip(scores.flatten().split(CHUNK), labels.split(CHUNK), strict=True):
            index = bin_of(part, bins) + bins * label
            self.counts[:2] += torch.bincount(index, minlength=2 * bins).view(2, bins).cpu()
        index = bin_of(scores.flatten()[labels], bins).cpu()
        self.counts[2].index_add_(0, index, 2**_SHARE_BITS // truth.sizes.long())
        self.count_components(truth.components)

    def count_components(self, more: int) -> None:
        """Counts connected components, of this rank or of another.

        Raises:
            ValueError: they are so many that the sums of their shares may exceed 64 bits.
        """
        self.components += more
        if self.components > _MOST_COMPONENTS:
            raise ValueError(
                f"more than {_MOST_COMPONENTS:,} connected components: their shares can no longer be added"
            )

    def bounds(self, limit: float = PRO_LIMIT) -> Bounds:
        """Bounds of every metric; AUPRO's up to the false-positive rate ``limit``."""
        n, p, share = self.counts.flip(1).numpy()
        anomalous, normal = int(p.sum()), int(n.sum())
        if undefined := one_class(normal, anomalous):
            return Bounds(undefined=undefined)
        after_n, after_p = np.cumsum(n), np.cumsum(p)
        before_n, before_p = after_n - n, after_p - p
        pairs, exact = anomalous * normal, p.astype(object)  # Python's integers: the products may exceed 64 bits
        auroc = _interval((exact * (normal - after_n)).sum() / pairs, (exact * (normal - before_n)).sum() / pairs)

        # At the best an anomalous score has all of its bin's anomalous ones and none of its normal ones beside it; at the worst
        # all normal ones are above, and the j-th anomalous one sees j - 1 of its own: p - F sum 1/(T + F + j), where the
        # integral of 1/x over (j - 1/2, j + 1/2) is more than 1/j.
        with np.errstate(invalid="ignore"):
            best = np.where(p > 0, p * (after_p / (after_p + before_n)), 0.0)
        worst = p - after_n * np.log1p(p / (before_p + after_n + 0.5))
        ap = _interval(float(worst.sum()) / anomalous, float(best.sum()) / anomalous)

        # The edge of a bin is a threshold that can be had; within one, none is better than all anomalous and no normal ones.
        low = float((2 * after_p / (after_p + after_n + anomalous)).max())
        high = float((2 * after_p / (after_p + before_n + anomalous))[p > 0].max())
        f1 = _interval(low, high)
        iou = _interval(low / (2 - low), high / (2 - high))

        aupro = None
        if self.components:
            end = limit * normal
            area = self.components * end * 2.0**_SHARE_BITS
            least = float((share * np.maximum(end - after_n, 0)).sum()) / area
            most = float(((share + p) * np.maximum(end - before_n, 0)).sum()) / area
            aupro = _interval(least, most)
        return Bounds(auroc, ap, f1, iou, aupro)

    def vertices(self) -> Vertices:
        """Corners of curves through the bins' edges, which lie on the exact ones (but for 2^-40 of a pixel's share)."""
        n, p, share = (np.append(0, np.cumsum(row)) for row in self.counts.flip(1).numpy())
        overlap = share / share[-1] if self.components else None
        return Vertices(n, p, overlap)


def bin_of(scores: Tensor, bins: int) -> Tensor:
    """The bin of each score (float32 in [0, 1]), int64; a higher score is never in a lower bin."""
    upper = scores >= 0.5
    # 1 - p is exact there, so the order is kept. The bits of a positive float rise with it.
    nearest = torch.where(upper, 1 - scores, scores).view(torch.int32).long()
    index = (nearest - _LOWEST).clamp_(min=0) * (bins // 2) // (_HALF - _LOWEST + 1)
    return torch.where(upper, bins - 1 - index, index)


def _interval(low: float, high: float) -> Interval:
    return max(0.0, low - _ROUNDING), min(1.0, high + _ROUNDING)
