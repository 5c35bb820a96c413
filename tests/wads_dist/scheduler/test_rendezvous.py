"""Two launched ranks, here as two threads with a connection each."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from wads_dist.common.errors import ExitCode, LaunchError, PreemptedError, RankLostError
from wads_dist.common.heartbeat import WorkerState
from wads_dist.common.processes import free_port
from wads_dist.scheduler import rendezvous
from wads_dist.scheduler.rendezvous import CallWithTimeout, Launch, unless_launched

pytestmark = pytest.mark.alone  # ranks that must be heard of within seconds


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    monkeypatch.setattr(rendezvous, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(rendezvous, "LOST_SECONDS", 3.0)
    port, patience = free_port(), timedelta(seconds=60)
    launches = []
    for rank in range(2):
        store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, wait_for_workers=False, timeout=patience)
        launches.append(Launch(rank, 2, "127.0.0.1", store))
    yield launches
    for launch in launches:
        launch._closed.set()
        launch._exchanging.join(5)


def together(launches: list[Launch], act: Callable[[Launch], Any]) -> list[Any]:
    """``act`` of every rank at once; what each returned or raised."""
    results: list[Any] = [None] * len(launches)

    def run(rank: int) -> None:
        try:
            results[rank] = act(launches[rank])
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(launches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_ranks_agree_and_leave(pair: list[Launch]) -> None:
    def talk(launch: Launch) -> Any:
        group = launch.everybody()
        shared = group.broadcast("plan", f"of {launch.rank}")
        everyone = group.all_gather("code", str(launch.rank))
        return shared, everyone, launch.leave(4 if launch.is_first else 0)

    assert together(pair, talk) == [("of 0", ["0", "1"], 4)] * 2


def test_groups_talk_among_themselves(pair: list[Launch]) -> None:
    """The same keys in two groups of one rank each."""

    def talk(launch: Launch) -> Any:
        group = launch.group(f"g{launch.rank}", [launch.rank])
        return group.broadcast("task", f"of {launch.rank}"), group.all_gather("code", "5"), group.flag("ended")

    pair[0].group("g0", [0]).raise_flag("ended", "hung")
    assert together(pair, talk) == [("of 0", ["5"], "hung"), ("of 1", ["5"], None)]


def test_the_first_rank_learns_who_has_finished_and_the_others_when_it_has_concluded(pair: list[Launch]) -> None:
    first, other = pair
    first.finish()
    assert not first.all_finished()
    other.finish()
    assert first.all_finished() and not other.all_finished()
    first.everybody().broadcast("concluded", "0")
    assert other.all_finished()


def test_the_first_reason_keeps_a_flag(pair: list[Launch]) -> None:
    assert pair[0].flag("ended") is None
    pair[1].raise_flag("ended", "hung")
    pair[0].raise_flag("ended", "stopped")
    assert pair[0].flag("ended") == pair[1].flag("ended") == "hung"


def test_the_first_rank_sees_where_all_workers_stand(pair: list[Launch]) -> None:
    groups = [launch.group("g0", [0, 1]) for launch in pair]
    groups[0].stand(WorkerState(tick=5))
    groups[1].stand(WorkerState(tick=7, host="b"))
    deadline = time.monotonic() + 20
    while 1 not in groups[0].worker_states():
        assert time.monotonic() < deadline
    assert groups[0].worker_states() == {0: WorkerState(tick=5), 1: WorkerState(tick=7, host="b")}
    assert pair[0].group("g1", [0, 1]).worker_states() == {}


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_that_leaves_early_says_why_and_ends_the_others_wait(pair: list[Launch], leaver: int) -> None:
    def act(launch: Launch) -> Any:
        if launch.rank == leaver:
            launch.leave_early(PreemptedError("stopped as asked"))
            return None
        return launch.everybody().all_gather("never")

    error = together(pair, act)[1 - leaver]
    assert isinstance(error, RankLostError) and error.exit_code == ExitCode.PREEMPTED
    assert f"rank {leaver} on " in str(error) and "stopped as asked" in str(error)


def test_the_loss_of_another_groups_rank_is_known_and_harms_nobody(pair: list[Launch]) -> None:
    first, other = pair
    alone = first.group("g0", [0])
    other.leave_early(PreemptedError("its node was taken away"))
    deadline = time.monotonic() + 20
    while not first.lost():
        assert time.monotonic() < deadline
    alone.check_peers()
    assert "taken away" in first.lost()[1] and first.all_finished() and first.leave(0) == 0


def test_a_rank_whose_process_has_ended_is_lost_at_once(pair: list[Launch]) -> None:
    first, _ = pair
    assert first.lost() == {} and not first.all_finished()
    first.gone = frozenset({1})
    assert "rank 1 on" in first.lost()[1] and first.all_finished() and first.leave(3) == 3


def test_a_group_without_the_first_rank_is_whole_when_that_leaves(pair: list[Launch]) -> None:
    """So it can save what it has."""
    group = pair[1].group("g1", [1])
    pair[0].leave_early(PreemptedError("stopped"))
    deadline = time.monotonic() + 20
    with pytest.raises(RankLostError, match="rank 0 on"):
        while time.monotonic() < deadline:
            group.check_peers()
    assert group.whole and not pair[1].everybody().whole


def test_what_is_abandoned_stops_waiting(pair: list[Launch]) -> None:
    pair[0].abandoned.set()
    with pytest.raises(PreemptedError):
        pair[0].everybody().all_gather("never")


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_falls_silent_is_named(pair: list[Launch], silent: int) -> None:
    def act(launch: Launch) -> Any:
        if launch.rank == silent:
            while not launch._peers[1 - silent].text or not pair[1 - silent]._peers[silent].text:
                time.sleep(0.01)  # both have been heard of
            launch._closed.set()
            return None
        return launch.everybody().all_gather("never")

    error = together(pair, act)[1 - silent]
    assert isinstance(error, RankLostError) and error.exit_code == ExitCode.RANK_LOST
    assert f"rank {silent} on {pair[silent].host} has not been heard of" in str(error)


def test_a_call_that_never_returns_is_given_up() -> None:
    line = CallWithTimeout()
    with pytest.raises(TimeoutError, match="no answer"):
        line.call(threading.Event().wait, timeout=0.1)


def test_a_call_hands_back_what_it_returned_or_raised() -> None:
    line = CallWithTimeout()
    assert line.call(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        line.call(lambda: 1 // 0)


def test_a_second_launch_on_the_same_port_leaves_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first rank cannot open the port; its second, which can connect, once worked on the first launch's plan."""
    port, patience = free_port(), timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False, timeout=patience)
    store.set("identity", "launch/train.py --run.dir other")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    for rank, said in (("0", "cannot be opened"), ("1", "--run.dir other")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(LaunchError, match=said) as caught:
            Launch.from_environment()
        assert "--master_port" in str(caught.value)
    # It has posted nothing: the first launch would take a heartbeat that ends for a rank of its own.
    assert not store.check(["heartbeat/1"])


def test_what_the_ranks_of_an_earlier_life_agreed_on_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agent keeps its store when it starts the ranks again."""
    port, patience = free_port(), timedelta(seconds=60)
    agent = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False, timeout=patience)
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (place | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    for life in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", life)
        launch = Launch.from_environment()
        assert launch.flag("stop") is None
        launch.raise_flag("stop", "asked")
        assert launch.flag("stop") == "asked"
        launch.everybody().broadcast("concluded", "7")
        launch._closed.set()
        launch._exchanging.join(5)
    assert agent.check(["/concluded", "1//concluded"])


def test_a_process_without_a_launcher_takes_a_port_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement beside a training, whose launcher has 29500."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    unless_launched()
    assert os.environ["WORLD_SIZE"] == "1"
    first = os.environ["MASTER_PORT"]
    with socket.socket() as listener:
        listener.bind(("", int(first)))
        unless_launched()
        assert os.environ["MASTER_PORT"] == first  # launched by now
        monkeypatch.delenv("RANK")
        unless_launched()
        assert os.environ["MASTER_PORT"] != first
