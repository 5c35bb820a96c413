"""Rows 3, 4 and 8 of the fault table: one run of two ranks is ended again and again, each time in another way, and goes on by
the same command. In the end its weights are bitwise those of the run that nothing happened to."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.launching import (
    BATCH,
    CATEGORY,
    EVERY,
    STEPS,
    Launched,
    Unlaunched,
    command,
    events,
    launched,
    processes,
    same_weights,
    summary,
    unlaunched,
)
from wads_dist.common.errors import ExitCode

pytestmark = [pytest.mark.fault, pytest.mark.slow]
# The launcher's own times: it looks once a second, and gives a process it ends 30 s.
SOON = 60.0


@pytest.fixture(scope="module")
def run(module_path: Path) -> Path:
    """The folder of the run that all these faults happen to."""
    return module_path / "run"


@contextmanager
def under_way(arguments: list[str] | Unlaunched, run: Path) -> Iterator[Launched]:
    """The run's command, started again, a few steps after it has gone on from where the last fault left it."""
    known, saved = len(events(run, "start", "resume")), events(run, "checkpoint")
    with launched(run, arguments, run.parent / "log") as start:
        start.wait_for_steps(2)
        begun = events(run, "start", "resume")[known:]
        assert len(begun) == 1 and begun[0]["step"] == (saved[-1]["step"] if saved else 0)
        assert len({p.pid for p in processes(run) if p.kind == "worker"}) == 2
        yield start
    assert processes(run) == []
    assert not (run / CATEGORY / "metrics.json").exists(), "the fault came too late to be one"


def check_saved_and_stopped(run: Path, start: Launched, code: int) -> None:
    last = events(run)[-2:]
    assert [event["event"] for event in last] == ["checkpoint", "preempted"] and last[0]["step"] == last[1]["step"]
    assert "stopped as asked, and saved" in start.text()
    record = summary(run)
    assert not record["complete"] and record["missing"] == [CATEGORY]
    assert record["exit_code"] == code == ExitCode.PREEMPTED and record["failed"] == {}


@pytest.mark.parametrize(
    ("how", "kind", "rank"),
    [(signal.SIGTERM, "worker", 1), (signal.SIGUSR1, "worker", 0), (signal.SIGUSR1, "supervisor", 1)],
)
def test_one_rank_is_asked_to_stop_and_all_save(
    demo_shards: Path, run: Path, how: signal.Signals, kind: str, rank: int
) -> None:
    with under_way(unlaunched(demo_shards, run), run) as start:
        start.kill(how, kind, rank)
        code, seconds = start.ended(SOON)
        print(
            f"{how.name} to the {kind} of rank {rank}: all saved at {events(run)[-1]}, exit code {code} in {seconds:.1f} s"
        )
        check_saved_and_stopped(run, start, code)


def test_a_second_signal_ends_at_once(demo_shards: Path, run: Path) -> None:
    with under_way(unlaunched(demo_shards, run), run) as start:
        start.kill(signal.SIGSTOP, "worker", 1)  # so that no step can be finished
        time.sleep(1)
        saved = len(events(run, "checkpoint"))
        start.kill(signal.SIGTERM, "supervisor", 0)
        time.sleep(4)
        assert len([p for p in processes(run) if p.kind == "worker"]) == 2  # still trying to finish the step
        start.kill(signal.SIGTERM, "supervisor", 0)
        code, seconds = start.ended(SOON)
        print(f"second SIGTERM to rank 0: exit code {code} in {seconds:.1f} s, nothing saved")
        assert code == ExitCode.PREEMPTED and len(events(run, "checkpoint")) == saved


@pytest.mark.parametrize(("kind", "expected"), [("worker", 128 + signal.SIGKILL), ("supervisor", 247)])
def test_a_killed_rank_ends_all(demo_shards: Path, run: Path, kind: str, expected: int) -> None:
    with under_way(command(demo_shards, run), run) as start:
        start.kill(signal.SIGKILL, kind, 1)
        code, seconds = start.ended(SOON)
        print(f"kill -9 of the {kind} of rank 1: exit code {code}, nothing left after {seconds:.1f} s")
        assert code == expected and not summary(run)["complete"]
        if kind == "worker":
            assert f"{CATEGORY}: the worker of rank 1 on " in start.text() and "was ended by SIGKILL" in start.text()


@pytest.mark.parametrize(
    ("how", "kind", "expected"), [(signal.SIGKILL, "launch", 0), (signal.SIGTERM, "deepspeed", -signal.SIGTERM)]
)
def test_a_launcher_that_dies_leaves_no_orphan(
    demo_shards: Path, run: Path, how: signal.Signals, kind: str, expected: int
) -> None:
    """DeepSpeed exits 0 when its inner process is killed: only the summary tells the truth."""
    with under_way(command(demo_shards, run), run) as start:
        start.kill(how, kind)
        code, seconds = start.ended(SOON)
        print(f"{how.name} to {kind}: it exits with {code}; all saved, nothing left after {seconds:.1f} s")
        assert code == expected and "the launcher is gone" in start.text()
        check_saved_and_stopped(run, start, ExitCode.PREEMPTED)


def test_an_interrupt_from_the_terminal_ends_everything(demo_shards: Path, run: Path) -> None:
    with under_way(command(demo_shards, run), run) as start:
        saved = len(events(run, "checkpoint"))
        os.killpg(start.process.pid, signal.SIGINT)
        code, seconds = start.ended(SOON)
        print(f"SIGINT to the group: deepspeed ended with {code}, nothing left after {seconds:.1f} s")
        assert code == -signal.SIGINT  # which a shell shows as 130
        assert len(events(run, "checkpoint")) - saved <= 1 and events(run)[-1]["event"] in ("step", "checkpoint")
        assert not summary(run)["complete"]


def test_after_all_that_the_run_ends_as_the_unbroken_one(demo_shards: Path, run: Path, unbroken: Path) -> None:
    with launched(run, unlaunched(demo_shards, run), run.parent / "log") as start:
        code, _ = start.ended(600)
    assert code == 0 and summary(run)["complete"] and summary(run)["exit_code"] == 0
    lives = events(run, "start", "resume")
    print(f"{len(lives)} lives, resumed at steps {[life['step'] for life in lives]} of {STEPS}")
    assert same_weights(run, unbroken)
    # Every life's steps follow its start without a gap, and no life starts after what was last saved.
    position = 0
    for event in events(run):
        if event["event"] in ("start", "resume"):
            assert event["samples"] <= position
            position = event["samples"]
        elif event["event"] == "step":
            assert event["samples"] == position + BATCH
            position += BATCH
    assert position == BATCH * STEPS and STEPS % EVERY == 0
