"""The queue of categories: who gets one, who loses it, and when it is given up. Processes are real; other machines are not."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from wads_dist.common.errors import ExitCode, WadsError
from wads_dist.runs import leases
from wads_dist.runs.folder import METRICS
from wads_dist.runs.leases import Lease, Owner, Queue, attempts_of, still_held

pytestmark = pytest.mark.alone  # leases of fractions of a second
OWNER = Owner(launch="first", group="g0", ranks=(0, 1), host="node-a")
ELSEWHERE = "another boot:another namespace"
LEASE_SECONDS = 60.0
fork = multiprocessing.get_context("fork")


def queue(
    run: Path, *categories: str, launch: str = "first", attempts: int = 3, seconds: float = LEASE_SECONDS
) -> Queue:
    owner = replace(OWNER, launch=launch)
    return Queue(run, categories or ("bottle",), owner, attempts=attempts, lease_seconds=seconds)


def taken(of: Queue) -> Lease:
    lease = of.take()
    assert lease is not None
    return lease


def finish(run: Path, category: str = "bottle") -> None:
    (run / category).mkdir(parents=True, exist_ok=True)
    (run / category / METRICS).write_text("{}")


class Clock:
    """Stands in for this process's monotonic clock, and gives heartbeats times that differ however fast a test is."""

    def __init__(self) -> None:
        self.now, self.beats = 1000.0, 0

    def tick(self, seconds: float = 1.0) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, utime = Clock(), os.utime

    def counted(path: Path) -> None:
        clock.beats += 1
        utime(path, ns=(clock.beats, clock.beats))

    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(os, "utime", counted)
    return clock


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[Queue], Lease]:
    """Takes from a queue as a process of another machine would, whose number means nothing on this one."""

    def take(of: Queue) -> Lease:
        with monkeypatch.context() as patched:
            patched.setattr(leases, "this_machine", lambda: ELSEWHERE)
            patched.setattr(leases, "start_time", lambda pid: "1")
            return taken(of)

    return take


class Process:
    """A forked process that runs ``target`` with one end of a pipe; ``pipe`` is the other."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self.pipe, other = fork.Pipe()
        self.process = fork.Process(target=target, args=(other, *arguments), daemon=True)
        self.process.start()
        other.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def race(run: Path, categories: list[str], processes: int) -> list[tuple[str, int]]:
    """What that many processes get, each of which takes what it can; all start together and none ends before all have."""
    barrier = fork.Barrier(processes)

    def take_all(pipe: Connection) -> None:
        mine = queue(run, *categories)
        barrier.wait()
        got = []
        while lease := mine.take():
            got.append((lease.category, lease.attempt))
        pipe.send(got)
        pipe.recv()

    racers = [Process(take_all) for _ in range(processes)]
    got = [claim for racer in racers for claim in racer.pipe.recv()]
    for racer in racers:
        racer.kill()
    return got


def holder(pipe: Connection, run: Path, seconds: float = LEASE_SECONDS) -> None:
    """Takes everything, and answers each message with whether it still holds the first after a beat."""
    mine = queue(run, *sorted(path.name for path in (run / "queue").iterdir()), seconds=seconds)
    held = list(iter(mine.take, None))
    pipe.send(len(held))
    while pipe.recv():
        held[0].beat()
        pipe.send(held[0].held)


def start_holder(run: Path, *categories: str, seconds: float = LEASE_SECONDS) -> Process:
    for category in categories:
        (run / "queue" / category).mkdir(parents=True)
    process = Process(holder, run, seconds)
    assert process.pipe.recv() == len(categories)
    return process


# --- who gets a category -----------------------------------------------------------------------------------------


def test_of_many_processes_each_category_goes_to_one(tmp_path: Path) -> None:
    categories = [f"category-{i:02d}" for i in range(40)]
    assert sorted(race(tmp_path, categories, 8)) == [(category, 1) for category in categories]


def test_of_several_observers_one_takes_over(tmp_path: Path) -> None:
    categories = [f"category-{i:02d}" for i in range(20)]
    start_holder(tmp_path, *categories).kill()
    assert sorted(race(tmp_path, categories, 4)) == [(category, 2) for category in categories]


def test_categories_go_in_the_order_given(tmp_path: Path) -> None:
    mine = queue(tmp_path, "b", "a", "c")
    assert [taken(mine).category for _ in range(3)] == ["b", "a", "c"]
    assert mine.take() is None and mine.remaining() == ["b", "a", "c"]


def test_a_lease_says_who_holds_it_and_is_all_there_is(tmp_path: Path) -> None:
    lease = taken(queue(tmp_path))
    content = json.loads(lease.path.read_text())
    assert content.pop("time") == pytest.approx(time.time(), abs=60)
    assert content == {
        "attempt": 1,
        "launch": "first",
        "group": "g0",
        "ranks": [0, 1],
        "host": "node-a",
        "machine": leases.this_machine(),
        "pid": os.getpid(),
        "started": Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19],
    }
    assert lease.path == tmp_path / "queue/bottle/001.json" and os.listdir(lease.path.parent) == ["001.json"]


def test_a_link_that_was_made_though_denied_is_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(source: Path, target: Path) -> None:  # the first answer got lost
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert taken(queue(tmp_path)).attempt == 1


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(WadsError, match=r"001\.json could not be written \(Operation not supported\).*hard links"):
        queue(tmp_path).take()


# --- who loses it ------------------------------------------------------------------------------------------------


def test_a_process_killed_on_this_machine_has_lost_at_once(tmp_path: Path) -> None:
    process = start_holder(tmp_path, "bottle")
    mine = queue(tmp_path, seconds=3600)
    assert mine.take() is None
    process.process.kill()
    os.waitid(os.P_PID, process.process.pid or 0, os.WEXITED | os.WNOWAIT)  # dead, and its number not yet given back
    assert taken(mine).attempt == 2


def test_a_process_that_got_the_number_of_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    lease = taken(queue(tmp_path))
    lease.path.write_text(json.dumps(json.loads(lease.path.read_text()) | {"started": "1"}))
    assert taken(queue(tmp_path)).attempt == 2


def test_a_silent_lease_of_another_machine_expires_after_its_time(
    tmp_path: Path, clock: Clock, elsewhere: Callable[[Queue], Lease]
) -> None:
    elsewhere(queue(tmp_path))
    mine = queue(tmp_path)
    for _ in range(int(LEASE_SECONDS)):
        assert mine.take() is None
        clock.tick()
    assert taken(mine).attempt == 2


def test_a_beating_lease_of_another_machine_never_expires(
    tmp_path: Path, clock: Clock, elsewhere: Callable[[Queue], Lease]
) -> None:
    lease, mine = elsewhere(queue(tmp_path)), queue(tmp_path)
    for _ in range(10 * int(LEASE_SECONDS)):
        assert mine.take() is None
        clock.tick()
        lease.beat()
    assert lease.held


def test_an_observer_that_was_stopped_gives_the_holder_time_to_beat(
    tmp_path: Path, clock: Clock, elsewhere: Callable[[Queue], Lease]
) -> None:
    lease, mine = elsewhere(queue(tmp_path)), queue(tmp_path)
    assert mine.take() is None
    clock.tick(100 * LEASE_SECONDS)  # all are stopped, or wait for the file system; then one of them is first
    assert mine.take() is None
    lease.beat()
    assert mine.take() is None and lease.held


def test_a_holder_that_was_stopped_finds_what_it_has_lost(tmp_path: Path) -> None:
    seconds = 0.2
    process = start_holder(tmp_path, "bottle", seconds=seconds)
    assert process.process.pid is not None
    os.kill(process.process.pid, signal.SIGSTOP)
    try:
        mine = queue(tmp_path, seconds=seconds)
        while (lease := mine.take()) is None:
            time.sleep(0.01)
        lease.beat()
        os.kill(process.process.pid, signal.SIGCONT)
        process.pipe.send("held?")
        assert process.pipe.recv() is False
        assert lease.attempt == 2 and still_held(lease.path) and not still_held(lease.path.with_name("001.json"))
    finally:
        process.kill()


def test_a_holder_that_was_stopped_goes_on_with_what_nobody_took(tmp_path: Path, clock: Clock) -> None:
    lease = taken(queue(tmp_path))
    clock.tick(10 * LEASE_SECONDS)
    assert not lease.held  # it may have been taken any moment, were anyone there
    lease.beat()
    assert lease.held


def test_what_cannot_be_renewed_is_held_until_it_may_have_expired(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    lease = taken(queue(tmp_path))
    monkeypatch.setattr(os, "utime", fail)
    monkeypatch.setattr(os, "listdir", fail)
    clock.tick(LEASE_SECONDS - 1)
    lease.beat()
    assert lease.held
    clock.tick(2)
    lease.beat()
    assert not lease.held


def test_a_lease_is_touched_only_when_that_is_due(tmp_path: Path, clock: Clock) -> None:
    lease = taken(queue(tmp_path))
    for _ in range(600):  # a minute of a supervisor's loop
        clock.tick(0.1)
        lease.beat()
    assert 10 <= clock.beats <= 12


def test_a_lease_whose_folder_vanished_is_not_held_and_ends_quietly(tmp_path: Path) -> None:
    lease = taken(queue(tmp_path))
    shutil.rmtree(tmp_path / "queue")
    lease.beat()
    assert not lease.held and not still_held(lease.path)
    lease.end(0)
    assert not (tmp_path / "queue").exists()


def test_an_attempt_that_was_taken_over_gets_no_end(
    tmp_path: Path, clock: Clock, elsewhere: Callable[[Queue], Lease]
) -> None:
    lease, mine = elsewhere(queue(tmp_path)), queue(tmp_path)
    while (other := mine.take()) is None:
        clock.tick()
    lease.end(ExitCode.OK)
    assert [attempt.end for attempt in attempts_of(tmp_path, "bottle")] == [None, None] and other.held


# --- how it ends -------------------------------------------------------------------------------------------------


def test_tries_are_bounded_within_a_launch(tmp_path: Path) -> None:
    mine = queue(tmp_path, attempts=2)
    for _ in range(2):
        assert mine.failed() == {} and mine.remaining() == ["bottle"]
        taken(mine).end(128 + signal.SIGSEGV)
    assert mine.take() is None and mine.remaining() == []
    assert mine.failed() == queue(tmp_path, attempts=2).failed() == {"bottle": 139}


def test_another_launch_has_its_own_tries(tmp_path: Path) -> None:
    first, second = queue(tmp_path, attempts=1), queue(tmp_path, launch="second", attempts=1)
    taken(first).end(1)
    assert first.failed() == {"bottle": 1} and second.failed() == {}
    assert taken(second).attempt == 2
    assert first.remaining() == []  # though it is being trained: not waited for


@pytest.mark.parametrize("code", [2, 3, 5, 6])
def test_what_would_be_repeated_is_given_up_at_once(tmp_path: Path, code: int) -> None:
    mine = queue(tmp_path)
    taken(mine).end(code, "why")
    assert mine.take() is None and mine.failed() == {"bottle": code}


def test_a_holder_that_died_has_used_up_a_try(tmp_path: Path) -> None:
    mine = queue(tmp_path, attempts=1)
    start_holder(tmp_path, "bottle").kill()
    assert mine.take() is None and mine.failed() == {"bottle": ExitCode.RANK_LOST}


def test_what_was_lost_to_another_launch_was_a_try(
    tmp_path: Path, clock: Clock, elsewhere: Callable[[Queue], Lease]
) -> None:
    elsewhere(queue(tmp_path))
    second = queue(tmp_path, launch="second")
    while second.take() is None:
        clock.tick()
    assert queue(tmp_path, attempts=1).failed() == {"bottle": ExitCode.RANK_LOST}


def test_what_was_stopped_as_asked_can_be_taken_and_is_no_failure(tmp_path: Path) -> None:
    mine = queue(tmp_path, attempts=1)
    for attempt in range(1, 4):
        lease = taken(mine)
        assert lease.attempt == attempt
        lease.end(ExitCode.PREEMPTED)
    assert mine.remaining() == ["bottle"] and mine.failed() == {}


def test_only_the_first_end_counts(tmp_path: Path) -> None:
    lease = taken(queue(tmp_path))
    lease.end(ExitCode.NOT_FINITE, "20 steps")
    lease.end(ExitCode.OK)
    (attempt,) = attempts_of(tmp_path, "bottle")
    assert attempt.end and (attempt.end.code, attempt.end.reason) == (6, "20 steps") and not lease.held


def test_done_is_never_taken(tmp_path: Path) -> None:
    finish(tmp_path)
    mine = queue(tmp_path, "bottle", "cable")
    assert taken(mine).category == "cable" and mine.remaining() == ["cable"] and mine.failed() == {}
    assert attempts_of(tmp_path, "bottle") == []


def test_done_while_it_was_being_taken_over_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_holder(tmp_path, "bottle").kill()
    link = os.link

    def late(source: Path, target: Path) -> None:  # the holder was not dead after all
        finish(tmp_path)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert queue(tmp_path).take() is None
    last = attempts_of(tmp_path, "bottle")[-1]
    assert last.number == 2 and last.end and last.end.code == 0


def test_numbers_that_were_removed_are_trained_again(tmp_path: Path) -> None:
    mine = queue(tmp_path)
    lease = taken(mine)
    finish(tmp_path)
    lease.end(0)
    assert mine.take() is None and mine.remaining() == []
    (tmp_path / "bottle" / METRICS).unlink()
    assert mine.remaining() == ["bottle"] and taken(mine).attempt == 2


# --- files that cannot be read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", '{"attempt": 1, "launch": "fir', "[]", "{}", "\xff"])
def test_an_unreadable_lease_is_someones_until_it_is_silent(tmp_path: Path, clock: Clock, content: str) -> None:
    mine = queue(tmp_path, attempts=1)
    lease = taken(mine)
    lease.path.write_bytes(content.encode("latin-1"))
    other = queue(tmp_path, attempts=1)
    assert other.take() is None and other.remaining() == ["bottle"]
    while (after := other.take()) is None:
        clock.tick()
    assert after.attempt == 2 and other.failed() == {}


def test_an_unreadable_end_is_none(tmp_path: Path, clock: Clock) -> None:
    lease, mine = taken(queue(tmp_path)), queue(tmp_path)
    lease.path.with_name("001.ended.json").write_text('{"code": ')
    assert mine.take() is None
    while (after := mine.take()) is None:
        clock.tick()
    assert after.attempt == 2


def test_attempts_are_told_oldest_first_whatever_lies_about(tmp_path: Path) -> None:
    mine = queue(tmp_path)
    folder = tmp_path / "queue/bottle"
    taken(mine).end(1, "no space left")
    taken(mine).end(7)
    (folder / "003.json").write_text("garbage")
    (folder / "1000.json").write_text((folder / "001.json").read_text())
    for name in ("notes.txt", "005.ended.json", ".004.json.0123", ".nfs001.json"):
        (folder / name).write_text("{}")
    attempts = attempts_of(tmp_path, "bottle")
    assert [attempt.number for attempt in attempts] == [1, 2, 3, 1000]
    assert [attempt.end and (attempt.end.code, attempt.end.reason) for attempt in attempts] == [
        (1, "no space left"),
        (7, ""),
        None,
        None,
    ]
    assert [attempt.claim and attempt.claim.ranks for attempt in attempts] == [(0, 1), (0, 1), None, (0, 1)]
    assert attempts_of(tmp_path, "cable") == []


def test_watching_a_run_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from wads_dist.runs.leases import attempts_of; attempts_of(pathlib.Path('.'), 'bottle'); "
    )
    program += "sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    root = Path(leases.__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(root)}).returncode == 0
