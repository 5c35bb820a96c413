"""A run over two hosts through ``deepspeed --hostfile``: one host's worker is killed, then one host's cable is pulled, and the
same command goes on. In the end the weights are bitwise those of a run on one host that nothing happened to."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.conftest import Hosts
from tests.support.launching import CATEGORY, OPTIONS, Launched, events, launched, same_weights, summary
from wads_dist.common.errors import ExitCode

# One category on both hosts.
TOGETHER = ("--parallel.straddle_nodes", "true")
pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(module_path: Path) -> Path:
    return module_path / "run"


@contextmanager
def start(hosts: Hosts, shards: Path, run: Path) -> Iterator[Launched]:
    arguments = hosts.command(
        "launch/train.py", "--data.shards", str(shards), "--run.dir", str(run), *OPTIONS, *TOGETHER
    )
    with launched(run, arguments, run.parent / "log", **hosts.environment()) as launch:
        yield launch


def test_a_killed_worker_of_one_host_ends_all(hosts: Hosts, demo_shards: Path, run: Path) -> None:
    with start(hosts, demo_shards, run) as launch:
        launch.wait_for_steps(6)
        launch.kill(signal.SIGKILL, "worker", 1)
        code, seconds = launch.ended(60)
        print(f"kill -9 of the worker on {hosts.second.name}: exit code {code}, nothing left after {seconds:.1f} s")
        assert code == 128 + signal.SIGKILL and not summary(run)["complete"]
        assert f"{CATEGORY}: the worker of rank 1 on {hosts.second.name} was ended by SIGKILL" in launch.text()


def test_a_host_that_falls_silent_is_named_and_ends_all(hosts: Hosts, demo_shards: Path, run: Path) -> None:
    """No connection is closed: only the missing heartbeats tell."""
    with start(hosts, demo_shards, run) as launch:
        launch.wait_for_steps(4)
        assert events(run, "resume")[-1]["step"] > 0
        hosts.second.cable("down")
        try:
            code, seconds = launch.ended(120)
        finally:
            hosts.second.cable("up")
        print(f"{hosts.second.name} without network: exit code {code}, nothing left on either after {seconds:.1f} s")
        assert code != 0 and not summary(run)["complete"]
        assert f"rank 1 on {hosts.second.name} has not been heard of for 30 s" in launch.text().replace("\n", " ")


def test_after_that_the_run_ends_as_the_unbroken_one(
    hosts: Hosts, demo_shards: Path, run: Path, unbroken: Path
) -> None:
    with start(hosts, demo_shards, run) as launch:
        code, seconds = launch.ended(600)
        assert code == 0, launch.text()[-3000:]
    print(f"lives: {[event['step'] for event in events(run, 'start', 'resume')]}, the last {seconds:.0f} s")
    assert summary(run)["complete"] and summary(run)["categories"][CATEGORY]["world_size"] == 2
    assert same_weights(run, unbroken)
    assert int(summary(run)["exit_code"]) == ExitCode.OK
