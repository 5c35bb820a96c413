"""What a restart needs to know besides weights and optimisers: the data position, the counts, the scores, the random state."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from wads_dist.config.schema import Config, StoppingConfig

Scores = Sequence[tuple[int, float]]
"""Samples trained on, and the score after them."""


@dataclass
class Progress:
    """What a restart needs to know besides weights and optimisers: the data position and the counts."""

    next_sample: int = 0
    step: int = 0
    rejected: int = 0
    rejected_in_a_row: int = 0
    spikes: int = 0
    spikes_in_a_row: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps taken, for the spike guard."""
    scores: list[tuple[int, float]] = field(default_factory=list)
    """Of early stopping: samples, and the score after them."""

    def state_dict(self) -> dict[str, Any]:
        return vars(self) | {"recent": list(self.recent), "scores": list(self.scores)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"scores": [(samples, score) for samples, score in state.get("scores", [])]})


def best_of(scores: Scores) -> int:
    """Index of the highest score, the first of equals."""
    return max(range(len(scores)), key=lambda i: (scores[i][1], -i))


def is_over(scores: Scores, settings: StoppingConfig) -> bool:
    """Whether ``settings.patience`` scores in a row were no higher than the best before them."""
    return bool(settings.every and scores) and len(scores) - 1 - best_of(scores) >= settings.patience


def is_due(progress: Progress, config: Config) -> bool:
    """Whether the last step has reached a multiple of ``stopping.every``, or ended the budget, and was not scored yet."""
    every, after = config.stopping.every, progress.next_sample
    if not every or not after or (progress.scores and progress.scores[-1][0] == after):
        return False
    before = after - config.trainer.global_batch_size
    return after // every > before // every or after >= config.trainer.samples


def random_state() -> dict[str, Any]:
    """State of every generator a library might draw from; the data path draws from none of them."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
