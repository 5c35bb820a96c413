"""Categories side by side on two hosts, of which one dies: without a word, as when its power goes."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.conftest import Host, Hosts, sh
from tests.support.launching import OPTIONS, events, launched, processes, summary, wait_for
from wads_dist.runs.leases import attempts_of

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(1200)]
CATEGORIES = ["demo_biscuit", "demo_gear", "demo_leafplate", "demo_weave"]
MORE = ["--data.categories", ",".join(CATEGORIES), "--parallel.lease_seconds", "6", "--trainer.samples", "240"]
MORE += ["--checkpoint.keep", "1", "--parallel.attempts", "2"]  # a dead host costs its category one


@pytest.fixture(scope="module")
def shards(module_path: Path) -> Path:
    from wads_dist.shards.demo import demo

    out = module_path / "shards"
    demo(out, categories=15, size=64, train=8, good=3, per_defect=1, workers=1, progress=False)
    return out


def pull_the_plug(host: Host) -> None:
    """Nothing it had running is left, and no connection was closed: what it sends while dying does not arrive."""
    host.cable("down")
    for pid in map(int, sh("ip", "netns", "pids", host.namespace).split()):
        if host.sshd is None or pid != host.sshd.pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def command(hosts: Hosts, shards: Path, run: Path) -> list[str]:
    return hosts.command("launch/train.py", "--data.shards", str(shards), "--run.dir", str(run), *OPTIONS, *MORE)


def groups_at_work(run: Path) -> dict[str, str]:
    """Host → the category that it trains, of those that have taken a step."""
    found = {}
    for name in CATEGORIES:
        attempts = attempts_of(run, name)
        if attempts and attempts[-1].claim and not attempts[-1].end and events(run, "step", category=name):
            found[attempts[-1].claim.host] = name
    return found


def test_a_dead_host_takes_only_its_own_category_and_the_other_finishes_all(
    hosts: Hosts, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with launched(run, command(hosts, shards, run), tmp_path / "log", **hosts.environment()) as start:
        wait_for(lambda: len(groups_at_work(run)) == 2 or start.process.poll() is not None, "both hosts train")
        at_work = groups_at_work(run)
        pull_the_plug(hosts.second)
        try:
            code, seconds = start.ended(600)
        finally:
            hosts.second.cable("up")
        text = start.text().replace("\n", " ")
    print(
        f"{hosts.second.name} died; {hosts.first.name} finished all after {seconds:.0f} s; deepspeed exits with {code}"
    )
    assert summary(run)["complete"] and summary(run)["exit_code"] == 0, text[-3000:]
    assert (
        f"rank 1 on {hosts.second.name} has not been heard of" in text
        and "Other ranks take over its categories" in text
    )
    attempts = {name: attempts_of(run, name) for name in CATEGORIES}
    lost = at_work[hosts.second.name]
    assert [a.claim.host for a in attempts.pop(lost) if a.claim] == [hosts.second.name, hosts.first.name]
    assert [len(of) for of in attempts.values()] == [1, 1, 1]


def test_when_the_first_host_dies_the_other_saves_and_the_same_command_goes_on(
    hosts: Hosts, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # So many that none is done before the other host finds out; saved at the end only.
    arguments = [*command(hosts, shards, run), "--trainer.samples", "800000", "--checkpoint.every_steps", "100000"]
    with launched(run, arguments, tmp_path / "log", **hosts.environment()) as start:
        wait_for(lambda: len(groups_at_work(run)) == 2 or start.process.poll() is not None, "both hosts train")
        mine = groups_at_work(run)[hosts.second.name]
        pull_the_plug(hosts.first)
        try:
            seconds = wait_for(lambda: not processes(run), "the other host has ended", 120)
        finally:
            hosts.first.cable("up")
    saved, last = events(run, category=mine)[-2:]
    print(f"{hosts.first.name} died; {hosts.second.name} ended after {seconds:.0f} s, having written {last}")
    assert (saved["event"], last["event"]) == ("checkpoint", "preempted") and saved["step"] == last["step"] > 0
    assert not summary(run)["complete"]
    with launched(run, arguments, tmp_path / "log", **hosts.environment()) as start:
        wait_for(lambda: events(run, "resume", category=mine) or start.process.poll() is not None, "it is resumed")
        (resumed,) = events(run, "resume", category=mine)
        assert resumed["step"] == last["step"]
