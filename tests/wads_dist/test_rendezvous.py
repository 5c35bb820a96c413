"""Two launched ranks, here as two threads with a connection each."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from wads_dist import rendezvous
from wads_dist.errors import ExitCode, LaunchError, PreemptedError, RankLostError
from wads_dist.pulse import Standing
from wads_dist.rendezvous import Launch, Line, free_port


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
        launch._pulse.join(5)


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
        shared = launch.share("plan", f"of {launch.rank}")
        everyone = launch.everyone("code", str(launch.rank))
        launch.leave()
        return shared, everyone

    assert together(pair, talk) == [("of 0", ["0", "1"])] * 2


def test_the_first_reason_keeps_a_flag(pair: list[Launch]) -> None:
    assert pair[0].flag("ended") is None
    pair[1].raise_flag("ended", "hung")
    pair[0].raise_flag("ended", "stopped")
    assert pair[0].flag("ended") == pair[1].flag("ended") == "hung"


def test_the_first_rank_sees_where_all_workers_stand(pair: list[Launch]) -> None:
    pair[0].standing, pair[1].standing = Standing(tick=5), Standing(tick=7, host="b")
    deadline = time.monotonic() + 20
    while 1 not in pair[0].standings():
        assert time.monotonic() < deadline
    assert pair[0].standings() == {0: Standing(tick=5), 1: Standing(tick=7, host="b")}


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_that_leaves_early_says_why_and_ends_the_others_wait(pair: list[Launch], leaver: int) -> None:
    def act(launch: Launch) -> Any:
        if launch.rank == leaver:
            launch.leave_early(PreemptedError("stopped as asked"))
            return None
        return launch.everyone("never")

    error = together(pair, act)[1 - leaver]
    assert isinstance(error, RankLostError) and error.exit_code == ExitCode.PREEMPTED
    assert f"rank {leaver} on " in str(error) and "stopped as asked" in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_falls_silent_is_named(pair: list[Launch], silent: int) -> None:
    def act(launch: Launch) -> Any:
        if launch.rank == silent:
            while not launch._peers[1 - silent].text or not pair[1 - silent]._peers[silent].text:
                time.sleep(0.01)  # both have been heard of
            launch._closed.set()
            return None
        return launch.everyone("never")

    error = together(pair, act)[1 - silent]
    assert isinstance(error, RankLostError) and error.exit_code == ExitCode.RANK_LOST
    assert f"rank {silent} on {pair[silent].host} has not been heard of" in str(error)


def test_a_call_that_never_returns_is_given_up() -> None:
    line = Line()
    with pytest.raises(TimeoutError, match="no answer"):
        line.call(threading.Event().wait, timeout=0.1)


def test_a_call_hands_back_what_it_returned_or_raised() -> None:
    line = Line()
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
    # It has posted nothing: the first launch would take a pulse that ends for a rank of its own.
    assert not store.check(["pulse/1"])
