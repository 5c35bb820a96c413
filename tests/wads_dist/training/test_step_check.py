"""The decision on a step, without engines: what the ranks report, and what follows."""

import math
from types import SimpleNamespace

import pytest

from wads_dist.common.errors import ConfigError
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.training.progress import Progress
from wads_dist.training.step_check import Report, decide, slowness, spike_threshold
from wads_dist.training.trainer import Trainer


def config(*more: str) -> Config:
    return load_config(["--data.shards", "x", "--trainer.spike_window", "4", *more])


def report(loss: float = 1.0, **values: float) -> Report:
    return Report(**{"finite": 1.0, "loss": loss, "stop": 0.0, "save": 0.0, "seconds": 0.1} | values)


def test_one_rank_that_is_not_finite_rejects_the_step_and_is_named() -> None:
    decision = decide([report(), report(math.nan, finite=0.0)], math.inf)
    assert (decision.rejected, decision.ranks) == ("not finite", (1,))
    assert decide([report(), report()], math.inf).rejected is None


def test_a_rank_with_a_loss_that_is_not_finite_is_to_blame_for_the_gradients_of_all() -> None:
    assert decide([report(finite=0.0), report(math.nan, finite=0.0)], math.inf).ranks == (1,)
    assert decide([report(finite=0.0), report(finite=0.0)], math.inf).ranks == (
        0,
        1,
    )  # an overflow in the backward pass


def test_a_spike_is_the_mean_over_ranks_and_names_the_ranks_that_made_it() -> None:
    decision = decide([report(1.0), report(99.0)], 10.0)
    assert (decision.rejected, decision.ranks, decision.loss) == ("spike", (1,), 50.0)
    assert decide([report(1.0), report(12.0)], 10.0).rejected is None


def test_any_rank_may_ask_to_stop_but_only_rank_0_to_save() -> None:
    decision = decide([report(), report(stop=1.0, save=1.0)], math.inf)
    assert decision.stop and not decision.save
    assert decide([report(save=1.0), report()], math.inf).save


def test_the_threshold_is_infinite_until_the_window_is_full() -> None:
    assert spike_threshold([1, 1, 1], config().trainer) == math.inf
    assert spike_threshold([1, 2, 3, 100], config().trainer) == 5 * 2.5
    assert spike_threshold([1, 2, 3, 100], config("--trainer.spike_factor", "0").trainer) == math.inf


def steps(losses: list[float], *more: str) -> tuple[Progress, list[bool]]:
    """A trainer that is given these losses: its progress, and which steps were taken."""
    trainer = SimpleNamespace(progress=Progress(), config=config(*more))
    taken = []
    for i, loss in enumerate(losses):
        finite = float(math.isfinite(loss))
        decision = decide([report(loss, finite=finite)], Trainer._spike_threshold(trainer))  # type: ignore[arg-type]
        Trainer._count(trainer, decision, 64 * i)  # type: ignore[arg-type]
        taken.append(decision.rejected is None)
    return trainer.progress, taken


def test_a_spike_is_skipped_and_counted_and_does_not_move_the_median() -> None:
    progress, taken = steps([1, 1, 1, 1, 100, 1, 1])
    assert taken == [True] * 4 + [False, True, True]
    assert (progress.spikes, progress.rejected, progress.rejected_in_a_row) == (1, 1, 0)
    assert progress.recent == [1, 1, 1, 1]


def test_a_loss_that_has_changed_for_good_is_accepted_in_the_end() -> None:
    progress, taken = steps([1] * 4 + [100] * 20, "--trainer.spike_patience", "3")
    assert taken == [True] * 4 + [False] * 3 + [True] * 17
    assert progress.recent == [100] * 4  # what came before the change is forgotten


@pytest.mark.parametrize("losses", [[100.0, math.nan] * 20, [math.nan, math.nan, 100.0] * 20])
def test_spikes_among_steps_that_are_not_finite_do_not_skip_for_ever(losses: list[float]) -> None:
    progress, taken = steps([1.0] * 4 + losses, "--trainer.spike_patience", "3")
    assert any(taken[4:]) or progress.rejected_in_a_row >= 20


def test_the_recent_losses_survive_a_restart() -> None:
    progress, _ = steps([1, 2, 3, 4])
    state = progress.state_dict()
    restored = Progress()
    restored.load_state_dict(state)
    assert restored == progress
    progress.recent.append(5.0)
    assert state["recent"] == [1, 2, 3, 4]  # a copy: it may be written later


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("--trainer.spike_factor 0.5", "above 1, or 0"),
        ("--trainer.spike_patience 20", "must be below trainer.max_rejected"),
    ],
)
def test_settings_that_would_skip_everything_are_refused(setting: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(*setting.split())


def test_slowness_is_relative_to_the_median_rank() -> None:
    assert slowness([1.0, 1.0, 3.0, 1.0]) == [1.0, 1.0, 3.0, 1.0]
    assert slowness([1.0, 4.0]) == [1.0, 4.0]  # of two, the faster is ordinary
    assert slowness([0.0, 0.0]) == [1.0, 1.0]
