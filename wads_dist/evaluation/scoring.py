"""Scores of many images over all ranks: every rank scores its batches and keeps what the metrics need, not the images.

Batches are cut from the whole set and whole batches go to ranks, so that the network sees the same batches whatever the number
of ranks; what the ranks then put together are integers and, in the set's order, single scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wads_dist.common.ranks import Ranks
from wads_dist.config.schema import EvaluationConfig
from wads_dist.evaluation.histogram import Bounds, ScoreHistogram
from wads_dist.evaluation.metrics import BinaryMetrics, Ranked, Truth, count_normal, curves, split
from wads_dist.model.networks import Wads

T = TypeVar("T")
Curves = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Predictions:
    """Of M images: probability maps [M, H, H] float32, X̂ [M, 3, H, H] float32, codes [M, latent] float32; of a model with
    experts, ``surprises`` [M, E, H, H] of ``experts.EXPERTS``."""

    probability: Tensor
    reconstruction: Tensor
    code: Tensor
    surprises: Tensor | None = None

    def rows(self, chosen: Sequence[int]) -> "Predictions":
        """Those of these images alone, in memory of their own, without the surprises."""
        index = list(chosen)
        return Predictions(self.probability[index], self.reconstruction[index], self.code[index])

    @classmethod
    def join(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """One after the other; at least one."""
        surprises = [part.surprises for part in parts if part.surprises is not None]
        return cls(
            torch.cat([part.probability for part in parts]),
            torch.cat([part.reconstruction for part in parts]),
            torch.cat([part.code for part in parts]),
            torch.cat(surprises) if surprises else None,
        )


@torch.inference_mode()
def predict(
    model: Wads, images: Tensor, batch_size: int, device: torch.device, stored: Tensor | None = None
) -> Predictions:
    """Runs the network in fp32: half precision would tie scores, and ties move every ranking metric. Returned on the CPU.

    Args:
        images: float32 [M, 3, H, H] in [0, 1].
        stored: the same, uint8 [M, 3, S, S], which a model with a bank reads.
    """
    torch.backends.cudnn.allow_tf32 = False  # TF32 is no fp32
    parts = []
    for first in range(0, len(images), batch_size):
        part = slice(first, first + batch_size)
        seen = stored[part].to(device).float() / 255 if model.reads_stored and stored is not None else None
        scored = model.predict(images[part].to(device, memory_format=torch.channels_last), seen)
        parts.append(
            Predictions(
                scored.probability.cpu(),
                scored.reconstruction.float().cpu().contiguous(),
                scored.code.float().cpu(),
                None if scored.surprises is None else scored.surprises.cpu(),
            )
        )
    return Predictions.join(parts)


def rank_batches(total: int, batch_size: int, ranks: Ranks) -> list[range]:
    """This rank's batches of ``total`` items: a contiguous part of all batches, perhaps none."""
    batches = [range(first, min(first + batch_size, total)) for first in range(0, total, batch_size)]
    share = -(-len(batches) // ranks.world_size)
    return batches[ranks.rank * share : (ranks.rank + 1) * share]


def summed(values: Tensor, ranks: Ranks) -> Tensor:
    """``values`` (integers, of one shape) added over the ranks, in place."""
    if ranks.world_size > 1:
        dist.all_reduce(values)
    return values


def gather_first(value: T, ranks: Ranks) -> list[T]:
    """``value`` of every rank, in rank order, on the first rank; on the others, only their own."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] | None = [None] * ranks.world_size if ranks.is_first else None
    dist.gather_object(value, values)
    return [value] if values is None else values


@dataclass(frozen=True)
class PixelResult:
    """``bounds`` where the metrics are the middles of them; ``curves`` as of ``metrics.curves``, empty where undefined."""

    metrics: BinaryMetrics
    curves: Curves
    bounds: Bounds | None = None


class PixelScores(Protocol):
    """The scores of one set of maps, added batch by batch."""

    def add(self, maps: Tensor, truth: Truth) -> None:
        """Maps float32 [M, H, W] on the rank's device, in the set's order."""
        ...

    def result(self, ranks: Ranks) -> PixelResult:
        """What all ranks have added, on every rank. Collective; afterwards nothing can be added."""
        ...


class ExactScores:
    """Keeps every score: 4 bytes for each normal pixel that this rank has added, 8 for each anomalous one.

    For ``result``, this rank's normal scores are copied once (on a GPU, sorting takes another 12 bytes a score), and each
    rank holds the anomalous pixels of all, at 40 bytes. Only those travel, not the normal ones: each rank counts how many of
    its own are above each anomalous one, and the counts are added.
    """

    def __init__(self, device: torch.device) -> None:
        self.normal = [torch.zeros(0, device=device)]
        self.anomalous = [torch.zeros(0, device=device)]
        self.sizes = [torch.zeros(0, dtype=torch.int32)]
        self.components = 0

    def add(self, maps: Tensor, truth: Truth) -> None:
        anomalous, normal = split(maps, truth.masks.to(maps.device))
        self.normal.append(normal)
        self.anomalous.append(anomalous)
        self.sizes.append(truth.sizes)
        self.components += truth.components

    def ranked(self, ranks: Ranks) -> Ranked:
        """Collective. Gives the scores away."""
        normal, device = torch.cat(self.normal), self.normal[0].device
        self.normal.clear()
        everywhere = ranks.gather(
            (torch.cat(self.anomalous).cpu(), torch.cat(self.sizes), self.components, len(normal))
        )
        scores, sizes, components, normals = zip(*everywhere, strict=True)
        # The same scores in the same order on every rank and for every number of ranks, so the same result of the sort.
        anomalous, order = torch.cat(scores).to(device).sort(descending=True, stable=True)
        above, at_least = summed(count_normal(anomalous, normal), ranks).cpu().numpy()
        in_order = torch.cat(sizes).long()[order.cpu()].numpy()
        return Ranked(anomalous.cpu().numpy(), above, at_least, sum(normals), in_order, sum(components))

    def result(self, ranks: Ranks) -> PixelResult:
        ranked = self.ranked(ranks)
        return PixelResult(ranked.metrics(), {} if ranked.undefined else curves(ranked.vertices()))


class HistogramScores:
    """Keeps a ``ScoreHistogram``: 24 bytes a bin on every rank, whatever is added."""

    def __init__(self, bins: int) -> None:
        self.histogram = ScoreHistogram(bins)

    def add(self, maps: Tensor, truth: Truth) -> None:
        self.histogram.add(maps, truth)

    def result(self, ranks: Ranks) -> PixelResult:
        histogram = self.histogram
        histogram.counts = summed(histogram.counts.to(ranks.device), ranks).cpu()
        histogram.count_components(sum(ranks.gather(histogram.components)) - histogram.components)
        bounds = histogram.bounds()
        if bounds.undefined:
            return PixelResult(BinaryMetrics(undefined=bounds.undefined), {}, bounds)
        middles = {name: sum(value) / 2 for name, value in vars(bounds).items() if value is not None}
        return PixelResult(BinaryMetrics(**middles), curves(histogram.vertices()), bounds)


def pixel_scores(config: EvaluationConfig, device: torch.device) -> PixelScores:
    return ExactScores(device) if config.metrics == "exact" else HistogramScores(config.bins)
