"""Categories side by side: 15 of them under one launch of two and of four ranks, and what a fault in one group does to the
others. Faults fall while workers are held within a step.

Every rank has one thread, whatever their number: sums over several threads round differently.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.launching import (
    Launched,
    Unlaunched,
    events,
    free_port,
    launched,
    processes,
    summary,
    wait_for,
)
from tests.support.narrow import NARROW
from wads_dist.common.errors import ExitCode
from wads_dist.runs.leases import attempts_of
from wads_dist.runs.reader import rank_times

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(1500)]
STEPS = 2
OPTIONS = (
    f"{NARROW} --trainer.global_batch_size 8 --trainer.samples {8 * STEPS} --trainer.log_every 1 "
    "--trainer.threads 1 --checkpoint.every_steps 1 --checkpoint.keep 1 --checkpoint.keep_best false"
).split()
FOUR = ["demo_biscuit", "demo_gear", "demo_leafplate", "demo_weave"]
EIGHT = [*FOUR, "demo_bolt", "demo_button", "demo_chip", "demo_dial"]


@pytest.fixture(scope="module")
def shards(module_path: Path) -> Path:
    """All 15 demo categories, 8 training images each."""
    from wads_dist.shards.demo import demo

    out = module_path / "shards"
    demo(out, categories=15, size=64, train=8, good=3, per_defect=1, workers=1, progress=False)
    return out


def command(shards: Path, run: Path, ranks: int, categories: list[str] | None = None, *more: str) -> Unlaunched:
    names = ",".join(categories or ["all"])
    what = ["--data.shards", str(shards), "--run.dir", str(run), "--data.categories", names]
    return Unlaunched(ranks, ["tests/support/train.py", *what, *OPTIONS, *more])


def under_launcher(command: Unlaunched) -> list[str]:
    """For what the launcher has a part in."""
    return ["deepspeed", "--num_accelerators", str(command.world), "--master_port", str(free_port()), *command.words]


def trained(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("*/weights.safetensors"))


def same(a: Path, b: Path, category: str) -> bool:
    """Bitwise: weights, buffers, and so all that led to them."""
    x, y = (load_file(run / category / "weights.safetensors") for run in (a, b))
    return x.keys() == y.keys() and all(x[name].equal(y[name]) for name in x)


def ends_well(start: Launched, patience: float = 900) -> float:
    code, seconds = start.ended(patience)
    assert code == 0 and summary(start.run)["complete"], start.text()[-4000:]
    return seconds


@pytest.fixture(scope="module")
def by_two(shards: Path, module_path: Path) -> Path:
    """All 15 by two ranks, a group each, undisturbed."""
    run = module_path / "by_two"
    with launched(run, command(shards, run, 2), run.parent / "log") as start:
        seconds = ends_well(start)
    print(f"15 categories on 2 ranks: {seconds:.0f} s")
    return run


def check_nobody_idles(run: Path) -> None:
    times = rank_times(run)
    for rank, t in times.items():
        print(
            f"rank {rank}: start-up {t.startup:.1f} s, training and evaluation {t.worked:.1f} s, waited {t.waited:.2f} s "
            f"({100 * t.idle:.2f} %), nothing left {t.nothing_left:.1f} s"
        )
    assert max(t.idle for t in times.values()) < 0.02 and all(t.worked > 0 for t in times.values())


def test_fifteen_categories_come_out_the_same_on_two_and_on_four_ranks(
    shards: Path, by_two: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with launched(run, command(shards, run, 4), tmp_path / "log") as start:
        print(f"15 categories on 4 ranks: {ends_well(start):.0f} s")
    assert len(trained(by_two)) == 15 and trained(run) == trained(by_two)
    for name in trained(run):
        assert same(run, by_two, name), name
        assert len(attempts_of(run, name)) == 1
    for each in (by_two, run):
        check_nobody_idles(each)
    assert len(rank_times(by_two)) == 2 and len(rank_times(run)) == 4
    assert {claim.group for n in trained(run) if (claim := attempts_of(run, n)[0].claim)} == {"g0", "g1", "g2", "g3"}


def test_groups_of_two_ranks_come_out_the_same_however_many_there_are(shards: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, ranks in zip(runs, (2, 4), strict=True):
        arguments = command(shards, run, ranks, FOUR[:3], "--parallel.ranks_per_category", "2")
        with launched(run, arguments, tmp_path / "log") as start:
            ends_well(start)
    assert all(same(*runs, name) for name in FOUR[:3])
    assert {event["world_size"] for name in FOUR[:3] for event in events(runs[1], "start", category=name)} == {2}


def test_two_categories_of_one_rank_come_out_the_same_on_cores_of_their_own(
    shards: Path, by_two: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--parallel.categories_per_gpu", "2", "--parallel.pin_cores", "true")
    with held(run, command(shards, run, 1, FOUR[:3], *options)) as start:
        wait_for(lambda: disjoint_cores(run), "each of two workers keeps to cores of its own")
        release(run)
        ends_well(start)
    assert all(same(run, by_two, name) for name in FOUR[:3])


def disjoint_cores(run: Path) -> bool:
    """Workers start on all cores and then keep to theirs."""
    return not set.intersection(*(os.sched_getaffinity(pid) for pid in workers(run)))


def workers(run: Path) -> list[int]:
    return [process.pid for process in processes(run) if process.kind == "worker"]


def test_two_launches_on_one_folder_share_the_work(shards: Path, by_two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    one = command(shards, run, 1, FOUR)
    with launched(run, one, tmp_path / "1.log") as first, launched(run, one, tmp_path / "2.log") as second:
        for start in (first, second):
            assert start.process.wait(900) == 0, start.text()[-3000:]
    attempts = [attempts_of(run, name) for name in FOUR]
    assert [len(of) for of in attempts] == [1] * 4
    assert len({attempt.claim.launch for (attempt,) in attempts if attempt.claim}) == 2
    assert all(same(run, by_two, name) for name in FOUR)


def hold_of(run: Path) -> Path:
    return run.with_name("hold")


@contextmanager
def held(run: Path, arguments: Unlaunched | list[str]) -> Iterator[Launched]:
    """A launch once its two groups are within a step, which they end after ``release`` or when they are asked to stop."""
    hold = hold_of(run)
    hold.mkdir()
    try:
        with launched(run, arguments, run.with_name("log"), HOLD=str(hold)) as start:

            def both_wait() -> bool:
                assert start.process.poll() is None, start.text()[-3000:]
                return len(workers(run)) == 2 and {str(pid) for pid in workers(run)} <= {p.name for p in hold.iterdir()}

            wait_for(both_wait, "both groups train")
            yield start
    finally:
        release(run)


def release(run: Path) -> None:
    with suppress(FileNotFoundError):
        hold = hold_of(run)
        shutil.rmtree(hold.rename(hold.with_name("released")))  # at once, whatever is written there


def at_work(run: Path, group: str) -> str:
    """The category that a group is training."""
    for name in EIGHT:
        attempts = attempts_of(run, name)
        if attempts and (claim := attempts[-1].claim) and not attempts[-1].end and claim.group == group:
            return name
    raise AssertionError(f"{group} trains nothing")


def last_event(run: Path, category: str) -> str:
    return str(events(run, category=category)[-1]["event"])


def test_a_killed_worker_is_tried_again_and_the_other_group_does_not_notice(
    shards: Path, by_two: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with held(run, command(shards, run, 2, EIGHT[:2])) as start:
        killed, other = at_work(run, "g0"), at_work(run, "g1")
        start.kill(signal.SIGKILL, "worker", 0)
        release(run)
        ends_well(start)
    ends = {name: [a.end.code if a.end else None for a in attempts_of(run, name)] for name in (killed, other)}
    print(f"the worker of {killed} was killed; attempts ended with {ends}")
    assert ends == {killed: [128 + signal.SIGKILL, 0], other: [0]}
    assert all(same(run, by_two, name) for name in EIGHT[:2])


class TestOneRunThatThingsHappenTo:
    """Eight categories on two ranks, a group each. Every fault ends the launch, and the same command goes on."""

    def test_one_rank_is_asked_to_stop_and_both_groups_save(self, shards: Path, run: Path) -> None:
        with held(run, command(shards, run, 2, EIGHT)) as start:
            both = [at_work(run, "g0"), at_work(run, "g1")]
            start.kill(signal.SIGTERM, "supervisor", 1)
            code, seconds = start.ended(60)
        record, last = summary(run), [last_event(run, name) for name in both]
        print(f"SIGTERM to rank 1: exit code {code} in {seconds:.1f} s; last events of {both}: {last}")
        assert set(last) <= {"preempted", "done"} and "preempted" in last
        assert code == record["exit_code"] == ExitCode.PREEMPTED and record["failed"] == {} and not record["complete"]

    def test_a_killed_supervisor_ends_the_launch_and_the_other_group_saves(self, shards: Path, run: Path) -> None:
        with held(run, under_launcher(command(shards, run, 2, EIGHT))) as start:
            mine = at_work(run, "g0")
            start.kill(signal.SIGKILL, "supervisor", 1)
            code, seconds = start.ended(60)
        print(f"kill -9 of the supervisor of rank 1: exit code {code}, nothing left after {seconds:.1f} s")
        assert code == 247 and last_event(run, mine) in ("preempted", "done")

    def test_a_killed_launcher_leaves_no_orphan_and_all_save(self, shards: Path, run: Path) -> None:
        with held(run, under_launcher(command(shards, run, 2, EIGHT))) as start:
            both = [at_work(run, "g0"), at_work(run, "g1")]
            start.kill(signal.SIGKILL, "launch")
            code, seconds = start.ended(60)
        last = [last_event(run, name) for name in both]
        print(f"kill -9 of launch.py: deepspeed exits with {code}, nothing left after {seconds:.1f} s; {last}")
        assert set(last) <= {"preempted", "done"}
        assert not summary(run)["complete"] and summary(run)["exit_code"] == ExitCode.PREEMPTED

    def test_after_all_that_everything_is_as_if_nothing_had_happened(
        self, shards: Path, run: Path, by_two: Path
    ) -> None:
        with launched(run, command(shards, run, 2, EIGHT), run.parent / "log") as start:
            ends_well(start)
        for name in EIGHT:
            ends = [attempt.end.code if attempt.end else None for attempt in attempts_of(run, name)]
            print(f"{name}: attempts ended with {ends}")
            assert same(run, by_two, name)


@pytest.fixture(scope="module")
def run(module_path: Path) -> Path:
    """The folder of the run that all these faults happen to."""
    return module_path / "run"
