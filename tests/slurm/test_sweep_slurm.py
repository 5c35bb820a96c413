"""Sweeps through a real Slurm whose tasks are put back, cancelled and told that their time is over, and whose nodes go down. In
the end all is done, and the weights are bitwise those of a sweep to which nothing happened.

What is to be disturbed is held until it is, so that no machine is too fast: its workers are stopped once they have taken a few
steps, and go on when they are released.
"""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, environment
from tests.slurm.conftest import Slurm
from tests.support.launching import BATCH, events, wait_for
from tests.support.narrow import NARROW
from wads_dist.common.errors import ExitCode

pytestmark = [pytest.mark.slurm, pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(1800)]
CATEGORIES = ["demo_biscuit", "demo_leafplate", "demo_washer"]
STEPS, EVERY = 24, 4
OPTIONS = (
    f"{NARROW} --trainer.global_batch_size {BATCH} --trainer.samples {BATCH * STEPS} --trainer.log_every 1 "
    # A lease that a dead node has left behind is not waited for long.
    f"--trainer.threads 1 --checkpoint.every_steps {EVERY} --checkpoint.keep 1 --parallel.lease_seconds 10"
).split()


@pytest.fixture(scope="module")
def shards(module_path: Path) -> Path:
    from wads_dist.shards.demo import demo

    out = module_path / "shards"
    demo(out, categories=len(CATEGORIES), size=64, train=8, good=3, per_defect=1, workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def undisturbed(shards: Path, module_path: Path) -> Path:
    """The run of a sweep on this machine, without Slurm."""
    out = module_path / "sweep"
    # Two groups of one rank, as the tasks are.
    command = ["python", "launch/sweep.py", "--out", str(out), "--ranks", "2", "--data.shards", str(shards), *OPTIONS]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    return out / "run"


class Started:
    """``launch/sweep.py --slurm``, watching its tasks."""

    def __init__(self, slurm: Slurm, out: Path, shards: Path, *options: str) -> None:
        self.out, self.run, self.log = out, out / "run", out.parent / f"{out.name}.log"
        self.command = ["python", "launch/sweep.py", "--out", str(out), "--slurm", "--cpus", "2", *options,
                        "--data.shards", str(shards), *OPTIONS]  # fmt: skip
        self.environment = slurm.environment
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=REPOSITORY, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def said(self) -> str:
        """By the sweep, and then by its tasks."""
        logs = sorted((self.out / "slurm").glob("*.log"))
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in [self.log, *logs])

    @property
    def jobs(self) -> list[str]:
        path = self.out / "sweep.json"
        return [job["job"] for job in json.loads(path.read_text())["jobs"]] if path.is_file() else []

    def workers(self, category: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if {"wads_dist.training.worker", str(self.run), category} <= set(process.cmdline()):
                    found.append(process)
        return found

    def hold(self, *categories: str) -> None:
        """Stops each category's workers once they have taken so many steps that there is a checkpoint among them."""
        left = set(categories)

        def held() -> bool:
            assert self.process.poll() is None, self.said()
            for category in sorted(left):
                kinds = [e["event"] for e in events(self.run, "start", "resume", "step", category=category)]
                if kinds[-EVERY - 2 :] == ["step"] * (EVERY + 2):
                    for worker in self.workers(category):
                        worker.suspend()
                    left.remove(category)
            return not left

        wait_for(held, f"{', '.join(categories)} take steps", 600)

    def release(self, category: str, *, when_asked: bool = False) -> None:
        """Lets the category's workers go on; ``when_asked``: to stop, which a held one finds out afterwards."""

        def asked() -> bool:
            return all(w.status() != psutil.STATUS_STOPPED or sigterm_waits(w.pid) for w in self.workers(category))

        if when_asked:
            wait_for(asked, f"the workers of {category} are asked to stop")
        for worker in self.workers(category):
            with suppress(psutil.NoSuchProcess):
                worker.resume()

    def ended(self) -> int:
        return self.process.wait(900)


def sigterm_waits(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("ShdPnd:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


@contextmanager
def started(slurm: Slurm, out: Path, shards: Path, *options: str) -> Iterator[Started]:
    """Whatever happens inside, neither the sweep nor its jobs are left."""
    start = Started(slurm, out, shards, *options)
    try:
        yield start
    finally:
        start.process.kill()
        start.process.wait()
        for job in start.jobs:
            subprocess.run(["scancel", job], env=start.environment, check=False)
        wait_for(lambda: not slurm.tasks(), "the queue is empty", 120)


def lives(start: Started, category: str) -> list[int]:
    """The step at which each start of the category began."""
    return [event["step"] for event in events(start.run, "start", "resume", category=category)]


def summary(start: Started) -> dict[str, Any]:
    return json.loads((start.out / "summary.json").read_text())


def test_a_disturbed_array_ends_as_the_undisturbed_run(
    slurm: Slurm, shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with started(slurm, tmp_path / "sweep", shards, "--ranks", "1") as start:
        requeued, lost, left = CATEGORIES
        start.hold(requeued, lost)
        (job,) = start.jobs
        # The same command again, while all of its tasks are in the queue.
        again = subprocess.run([*start.command, "--no-watch"], cwd=REPOSITORY, env=slurm.environment, text=True,
                               capture_output=True)  # fmt: skip
        assert again.returncode == 0 and start.jobs == [job] and "In the queue already: 3 tasks" in again.stdout

        slurm.run("scontrol", "requeue", f"{job}_0")
        start.release(requeued, when_asked=True)
        # It makes room for the third task. A daemon that dies and comes back alone: its task does not notice.
        start.hold(left)
        node = slurm.node(f"{job}_2")
        slurm.kill_node(node, tasks=False)
        slurm.start_node(node)
        start.release(left)

        node = slurm.node(f"{job}_1")
        slurm.kill_node(node, tasks=True)
        wait_for(lambda: "down" in slurm.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T"), "it is missed")
        slurm.start_node(node)

        assert start.ended() == 0, start.said()
        for category in CATEGORIES:
            print(f"{category}: started at steps {lives(start, category)}")
            mine, theirs = (load_file(run / category / "weights.safetensors") for run in (start.run, undisturbed))
            assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine), category
        for category in (requeued, lost):
            assert len(lives(start, category)) == 2 and lives(start, category)[1] > 0
        assert lives(start, left) == [0]
        assert summary(start)["complete"] and start.jobs == [job]


def test_a_task_that_is_told_of_its_time_limit_saves_and_goes_back(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    """As ``--signal=B:USR1@120`` does: the signal reaches the batch shell alone. Two ranks, which both must be told."""
    category = CATEGORIES[0]
    with started(slurm, tmp_path / "sweep", shards, "--ranks", "2", "--data.categories", category) as start:
        start.hold(category)
        (job,) = start.jobs
        slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_0")
        start.release(category, when_asked=True)
        wait_for(lambda: "saved, and back in the queue" in start.said(), "it says so", 120)
        assert events(start.run, "preempted", category=category)
        saved = events(start.run, "checkpoint", category=category)[-1]["step"]
        assert start.ended() == 0, start.said()
        assert lives(start, category) == [0, saved] and saved > 0
        assert summary(start)["complete"] and start.jobs == [job]


def test_a_cancelled_task_saves_and_the_same_command_submits_it_again(
    slurm: Slurm, shards: Path, tmp_path: Path
) -> None:
    category, other = CATEGORIES[:2]
    options = ("--ranks", "1", "--data.categories", f"{category},{other}")
    with started(slurm, tmp_path / "sweep", shards, *options) as start:
        start.hold(category)
        (job,) = start.jobs
        slurm.run("scancel", f"{job}_0")
        start.release(category, when_asked=True)
        assert start.ended() == ExitCode.PREEMPTED, start.said()
        assert summary(start)["missing"] == {"run": [category]} and summary(start)["failed"] == {}
        assert events(start.run, "preempted", category=category)
    with started(slurm, tmp_path / "sweep", shards, *options) as start:
        assert start.ended() == 0, start.said()
        assert lives(start, category)[1] > 0 and len(lives(start, other)) == 1
        assert [job["tasks"] for job in json.loads((start.out / "sweep.json").read_text())["jobs"]] == [[0, 1], [0]]


def test_ctrl_c_leaves_the_jobs_alone(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    options = ("--ranks", "1", "--data.categories", CATEGORIES[0])
    with started(slurm, tmp_path / "sweep", shards, *options) as start:
        wait_for(lambda: start.jobs, "it is submitted")
        wait_for(lambda: "running" in start.log.read_text(), "it watches")
        start.process.send_signal(signal.SIGINT)
        assert start.ended() == ExitCode.INTERRUPTED
        assert "Detached; the jobs go on" in start.log.read_text()
        assert list(slurm.tasks()) == [0]
