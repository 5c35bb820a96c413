"""Runs under DeepSpeed's launcher, whose every process a test can see, signal and wait for."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.conftest import REPOSITORY, environment
from tests.support.forked import Ranks
from tests.support.narrow import NARROW

CATEGORY = "demo_biscuit"
BATCH, STEPS, EVERY = 8, 60, 4
OPTIONS = (
    f"{NARROW} --trainer.global_batch_size {BATCH} --trainer.samples {BATCH * STEPS} --trainer.log_every 1 "
    # One thread, so that the same bits come out however the ranks are spread over hosts.
    f"--trainer.threads 1 --checkpoint.every_steps {EVERY} --data.categories {CATEGORY} "
    # What ends a worker ends the launch, and is not mended by another try.
    "--parallel.attempts 1"
).split()
# Far above what anything here takes on a quiet machine; a busy one may need it.
PATIENCE = 300.0


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> float:
    """Waits until ``condition`` holds; returns how many seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < patience, f"waited {patience:.0f} s in vain until {what}"
        time.sleep(0.05)
    return time.monotonic() - started


@dataclass(frozen=True)
class Process:
    """A living process of a run."""

    pid: int
    kind: str
    """``deepspeed`` (what a person starts), ``launch`` (its inner process, one a node), ``supervisor`` or ``worker``."""
    rank: int


def processes(run: Path) -> list[Process]:
    """The run's living processes, found by the folder in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if str(run) not in arguments or (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                continue
            variables = (path / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended meanwhile
        # A rank that was forked, not started, has the environment of what it was forked from.
        ranks = [
            word.rpartition("=")[2] for word in variables + arguments if word.startswith(("RANK=", "--local_rank="))
        ]
        rank = int(ranks[0]) if ranks else -1
        if "--run" in arguments:
            kind = "worker"
        elif "deepspeed.launcher.launch" in arguments:
            kind = "launch"
        elif any(Path(argument).name == "deepspeed" for argument in arguments[:2]):
            kind = "deepspeed"
        elif rank >= 0:
            kind = "supervisor"
        else:
            continue  # nice, ssh, a shell
        found.append(Process(int(path.name), kind, rank))
    return found


def events(run: Path, *kinds: str, category: str = CATEGORY) -> list[dict[str, Any]]:
    path = run / category / "events.jsonl"
    # Lines only: the last may be half written when a process was killed.
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    parsed = [json.loads(line) for line in lines]
    return [event for event in parsed if not kinds or event["event"] in kinds]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def same_weights(a: Path, b: Path) -> bool:
    """Bitwise: weights, buffers, and so all that led to them."""
    x, y = (load_file(run / CATEGORY / "weights.safetensors") for run in (a, b))
    return x.keys() == y.keys() and all(x[name].equal(y[name]) for name in x)


class Launched:
    """One start of a command on a run's folder."""

    def __init__(self, run: Path, command: "list[str] | Unlaunched", log: Path, **extra: str) -> None:
        self.run, self.log = run, log
        self.steps_before = len(events(run, "step"))
        self.process: subprocess.Popen[bytes] | Ranks
        with log.open("wb") as out:
            if isinstance(command, Unlaunched):
                self.process = Ranks(command.world, command.words, environment(**extra), [log] * command.world)
            else:  # a group of its own, as a terminal would give it
                self.process = subprocess.Popen(
                    command, cwd=REPOSITORY, env=environment(**extra), stdout=out, stderr=out, start_new_session=True
                )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def pid(self, kind: str, rank: int = -1) -> int:
        return next(p.pid for p in processes(self.run) if p.kind == kind and (rank < 0 or p.rank == rank))

    def wait_for_steps(self, count: int = 1) -> None:
        """Until so many steps were taken since this start."""

        def taken() -> bool:
            assert self.process.poll() is None, f"ended early with {self.process.returncode}:\n{self.text()[-3000:]}"
            return len(events(self.run, "step")) >= self.steps_before + count

        wait_for(taken, "steps are taken")

    def kill(self, how: signal.Signals, kind: str, rank: int = -1) -> None:
        os.kill(self.pid(kind, rank), how)

    def ended(self, patience: float) -> tuple[int, float]:
        """The exit code once no process of the run is left, and the seconds until then."""
        seconds = wait_for(
            lambda: self.process.poll() is not None and not processes(self.run),
            f"all of {processes(self.run)} have ended:\n{self.text()[-3000:]}",
            patience,
        )
        return self.process.returncode, seconds


@dataclass(frozen=True)
class Unlaunched:
    """Ranks that no launcher starts, as on Slurm; forked, and so are their workers."""

    world: int
    words: list[str]


def unlaunched(
    shards: Path, run: Path, *more: str, ranks: int = 2, program: str = "tests/support/train.py"
) -> Unlaunched:
    """CPU ranks of the category, for what is not about the launcher: they start in a moment."""
    return Unlaunched(ranks, [program, "--data.shards", str(shards), "--run.dir", str(run), *OPTIONS, *more])


def command(shards: Path, run: Path, *more: str) -> list[str]:
    """Two CPU ranks of the category under DeepSpeed's launcher."""
    head = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "launch/train.py"]
    return [*head, "--data.shards", str(shards), "--run.dir", str(run), *OPTIONS, *more]


@contextmanager
def launched(run: Path, arguments: list[str] | Unlaunched, log: Path, **extra: str) -> Iterator[Launched]:
    """Starts ``arguments``; whatever happens inside, nothing of the run is left afterwards."""
    start = Launched(run, arguments, log, **extra)
    try:
        yield start
    finally:
        for _ in range(100):
            left = processes(run)
            for process in left:
                try:
                    os.kill(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if not left and start.process.poll() is not None:
                break
            time.sleep(0.1)


def free_port() -> int:
    from wads_dist.common.processes import free_port

    return free_port()
