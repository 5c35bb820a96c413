"""Whether a step may be taken: what the ranks tell each other before either engine steps, and what follows from it.

One collective a step carries all that must be agreed on: finiteness, the loss, wishes to save or to stop, and how long each
rank's own part took. Every rank then judges the same rows and comes to the same decision.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wads_dist.config.schema import TrainerConfig

NOT_FINITE, SPIKE = "not finite", "spike"


@dataclass(frozen=True)
class Requests:
    """What a rank asks for at a step: that all stop after it (any rank may), that all save after it (rank 0 may)."""

    stop: bool = False
    save: bool = False


class Report(NamedTuple):
    """One rank's row of the collective; numbers, because it travels as a tensor."""

    finite: float
    """1 if this rank's losses and gradients are all finite."""
    loss: float
    """The total loss of generator and segmenter, averaged over the rank's micro-batches; not finite if any loss is not."""
    stop: float
    save: float
    seconds: float
    """Time of the rank's own part of the last step, before it first waited for another rank."""


@dataclass(frozen=True)
class StepDecision:
    """What all ranks agreed on about one step; the same on each of them."""

    rejected: str | None
    """Why neither engine stepped: ``not finite`` or ``spike``; None if both did."""
    ranks: tuple[int, ...]
    """The ranks whose samples are to blame for a rejection."""
    loss: float
    """Mean over ranks of the total loss; not finite where a rank's is not."""
    threshold: float
    """A loss above it was a spike."""
    stop: bool
    save: bool
    seconds: tuple[float, ...]
    """Per rank: see ``Report``."""


def spike_threshold(recent: Sequence[float], config: TrainerConfig) -> float:
    """``spike_factor`` times the median of the recent accepted losses; infinite while the guard is off or still fills its
    window."""
    if not config.spike_factor or len(recent) < config.spike_window:
        return float("inf")
    return config.spike_factor * statistics.median(recent)


def decide(reports: Sequence[Report], threshold: float) -> StepDecision:
    """The decision on a step, from every rank's report in rank order."""
    loss = sum(r.loss for r in reports) / len(reports)
    rejected, bad_ranks = None, [rank for rank, r in enumerate(reports) if not r.finite]
    if bad_ranks:
        rejected = NOT_FINITE
        # Gradients are averaged over ranks by now, so that one rank's NaN is in all of them; its loss tells whose it was.
        bad_ranks = [rank for rank, r in enumerate(reports) if not math.isfinite(r.loss)] or bad_ranks
    elif loss > threshold:
        rejected = SPIKE
        bad_ranks = [rank for rank, r in enumerate(reports) if r.loss > threshold]
    return StepDecision(
        rejected=rejected,
        ranks=tuple(bad_ranks),
        loss=loss,
        threshold=threshold,
        stop=any(r.stop for r in reports),
        # Rank 0's clock decides for all: clocks that differ must not make half of the ranks save.
        save=bool(reports[0].save),
        seconds=tuple(r.seconds for r in reports),
    )


def slowness(seconds: Sequence[float]) -> list[float]:
    """Each rank's own time relative to the median rank's (the lower of two medians): 1 is ordinary, 2 takes twice as long."""
    ordinary = statistics.median_low(seconds)
    return [s / ordinary if ordinary > 0 else 1.0 for s in seconds]
