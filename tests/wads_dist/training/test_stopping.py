"""When training ends before its budget, and that the score which decides it changes nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.wads_dist.programs.common import small_config
from wads_dist.common.errors import ConfigError
from wads_dist.common.ranks import Ranks
from wads_dist.config.schema import StoppingConfig
from wads_dist.data.training import TrainingData
from wads_dist.runs.events import History
from wads_dist.shards.source import Dataset
from wads_dist.training.progress import Progress, best_of, is_due, is_over
from wads_dist.training.stopping import HeldOutScore

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    "scores, best, over",
    [
        ([0.1], 0, False),
        ([0.1, 0.2, 0.3], 2, False),
        ([0.3, 0.2, 0.3], 0, True),  # an equal one is no better
        ([0.3, 0.2, 0.4, 0.1], 2, False),
        ([0.3, 0.2, 0.4, 0.1, 0.39], 2, True),
    ],
)
def test_training_is_over_when_the_best_score_is_patience_scores_old(
    scores: list[float], best: int, over: bool
) -> None:
    points = [(100 * i, score) for i, score in enumerate(scores)]
    assert best_of(points) == best
    assert is_over(points, StoppingConfig(every=100, patience=2)) == over
    assert not is_over(points, StoppingConfig(every=100, patience=5))


def test_scores_are_due_at_multiples_of_samples_and_at_the_end() -> None:
    config = small_config("--stopping.every", "20", "--trainer.samples", "72")
    steps = [8 * (step + 1) for step in range(9)]
    assert [n for n in steps if is_due(Progress(next_sample=n), config)] == [24, 40, 64, 72]
    assert not any(is_due(Progress(next_sample=n), small_config()) for n in steps)
    # One that was stopped at such a step goes on with the score; nothing is scored twice.
    assert not is_due(Progress(next_sample=24, scores=[(24, 0.5)]), config) and not is_due(Progress(), config)
    assert not is_over([], StoppingConfig()) and not is_over([(n, 0.5) for n in range(99)], StoppingConfig(every=0))


def test_without_images_held_out_there_is_no_early_stopping() -> None:
    with pytest.raises(ConfigError, match=r"stopping\.every 8 with evaluation\.holdout 0"):
        small_config("--stopping.every", "8", "--evaluation.holdout", "0")


def test_scores_more_often_than_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"stopping\.every 4: less than one step"):
        small_config("--stopping.every", "4")


def test_anomalies_that_leave_no_mask_are_refused(demo_shards: Path) -> None:
    config = small_config("--stopping.every", "8", "--synthesis.threshold", "0.999")
    dataset = Dataset.open(demo_shards)
    data = TrainingData(config, dataset, "demo_biscuit", ALONE.device)
    with pytest.raises(ConfigError, match=r"lower synthesis\.threshold"):
        HeldOutScore(config, dataset, "demo_biscuit", data, ALONE)


def test_a_resume_takes_back_the_scores_behind_it() -> None:
    history = History()
    for event, step in (("start", 0), ("score", 2), ("score", 4), ("resume", 3), ("score", 4), ("score", 6)):
        history.add({"event": event, "step": step, "samples": 8 * step, "score": 0.1 * step})
    assert [event["step"] for event in history.scores] == [2, 4, 6]


@pytest.mark.slow
def test_scores_change_nothing_and_a_resumed_run_stops_where_the_whole_one_does(
    demo_shards: Path, run_ranks: Callable[..., list[str]], tmp_path: Path
) -> None:
    """And two ranks have nearly the scores of one: each sees its half of a batch, BatchNorm as well."""
    found = {}
    for world in (1, 2):
        printed = run_ranks("stopping.py", world, str(demo_shards), str(tmp_path / f"{world}"))
        (line,) = (line for line in printed[0].splitlines() if line.startswith("SCORES "))
        found[world] = json.loads(line.removeprefix("SCORES "))
    assert [samples for samples, _ in found[1]] == [samples for samples, _ in found[2]]
    assert [score for _, score in found[1]] == pytest.approx([score for _, score in found[2]], abs=1e-3)
