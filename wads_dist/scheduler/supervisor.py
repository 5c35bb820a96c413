"""One rank's worker of one category, from its start to its end: watched, asked to stop, and ended.

The supervisor holds no model. It passes signals on, posts where its worker stands, and ends it when a worker of another rank
has failed, hangs, or when a rank is gone; the group's first rank finds out who hangs and keeps the category's lease alive.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from wads_dist.common.errors import ExitCode, RankLostError, WadsError
from wads_dist.common.files import python_path
from wads_dist.common.heartbeat import UNTIMED, Listener, stalled
from wads_dist.common.signals import ASKING
from wads_dist.config.schema import Config, ParallelConfig
from wads_dist.runs.folder import EVENTS
from wads_dist.runs.leases import Lease
from wads_dist.scheduler.rendezvous import Group

WORKER = (sys.executable, "-P", "-m", "wads_dist.training.worker")  # -P: nothing is imported from the working folder
POLL_SECONDS, LOOK_SECONDS = 0.2, 1.0
# For workers whose peer has saved and ended as they are about to.
GRACE_SECONDS = 10.0
# For a group to save when the launch's first rank, which it does not need for that, is gone.
SAVE_SECONDS = 60.0
# For the kernel to end a killed process.
KILL_SECONDS = 30.0
PREEMPTED = str(int(ExitCode.PREEMPTED))
STOPPED, HUNG, TAKEN = "stopped", "hung", "taken over by another group"


class Stop(Protocol):
    """Says whether the worker is to be asked to stop."""

    @property
    def requested(self) -> bool: ...


@dataclass(frozen=True)
class Task:
    """What the first rank of a group tells the others to train next."""

    category: str
    attempt: int
    lease: str
    config: str
    """The launch's configuration: another launch of the run may differ in what does not change the result."""
    address: str
    port: int
    nothing_left: float = 0.0
    """Seconds that this took because all that was left was being trained by others."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task | None":
        """None: there is nothing left to do."""
        return cls(**json.loads(text)) if text != "{}" else None


@dataclass(frozen=True)
class Worked:
    """What became of a task."""

    code: int
    seconds: float
    startup: float
    """Of these, from the worker's start to its first step."""
    ended: float = 0.0
    """When this rank's worker ended, by the monotonic clock."""


@dataclass(frozen=True)
class Cores:
    """The share of a node's processor that one worker gets."""

    threads: int
    pinned: tuple[int, ...] = ()
    """The cores it may use; empty: it may use any."""

    @classmethod
    def share(
        cls, parallel: ParallelConfig, threads: int | None, local_rank: int, local_ranks: int, slot: int
    ) -> "Cores":
        """Every worker of a node as many as any other; a launcher that has bound its ranks to cores is followed."""
        mine, slots = sorted(os.sched_getaffinity(0)), parallel.categories_per_gpu
        try:
            bound = len(mine) < len(os.sched_getaffinity(os.getppid()))
        except OSError:
            bound = False
        workers, index = (slots, slot) if bound else (local_ranks * slots, local_rank * slots + slot)
        each = max(1, len(mine) // workers)
        first = index * each % len(mine)
        pinned = tuple(mine[first : first + each]) if parallel.pin_cores else ()
        return cls(threads or each, pinned)


class Worker:
    """A worker process and what is known of it."""

    def __init__(self, config: Config, group: Group, location: str, task: Task, cores: Cores) -> None:
        self.group = group
        reader, writer = os.pipe()
        env = os.environ | {
            "RANK": str(group.rank),
            "WORLD_SIZE": str(group.world_size),
            "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
            # DeepSpeed reduces through shared memory when all ranks of a world are on one node.
            "LOCAL_SIZE": str(group.local_size),
            "LOCAL_WORLD_SIZE": str(group.local_size),
            "MASTER_ADDR": task.address,
            "MASTER_PORT": str(task.port),
            # torchrun's agent holds the store of the launch; that of a category's world is its first worker's.
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            # torch and DeepSpeed deprecate each other's calls; a user can do nothing about it.
            "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning"),
            "PYTHONPATH": python_path(),
        }
        what = [
            "--run",
            str(config.run.dir),
            "--category",
            task.category,
            "--shards",
            location,
            "--heartbeat",
            str(writer),
        ]
        what += ["--threads", str(cores.threads), "--lease", task.lease, "--config", task.config]
        if cores.pinned:
            what += ["--cores", ",".join(map(str, cores.pinned))]
        self.started = time.monotonic()
        self.startup: float | None = None
        self.process = subprocess.Popen([*WORKER, *what], env=env, pass_fds=[writer])
        os.close(writer)
        self.listener = Listener(reader, socket.gethostname())
        self.asked = False
        self.stopped = False
        """Ended by this supervisor, so that its exit status tells nothing."""

    def ask_to_stop(self) -> None:
        """Once: the worker finishes the step, and all ranks save."""
        if not self.asked:
            self.asked = True
            self.process.send_signal(signal.SIGTERM)

    def end(self, reason: str = STOPPED) -> None:
        """At once, unless there is something to wait for: checkpoints are complete or absent.

        Raises:
            RankLostError: it cannot be ended.
        """
        if reason == HUNG and self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR2)  # writes where each of its threads stands; if frozen, it cannot
            time.sleep(1)
        if reason == PREEMPTED:  # a peer was asked, and this one may not know yet
            self.ask_to_stop()
            self.wait(GRACE_SECONDS)
        if self.process.poll() is None:
            self.stopped = True
            self.process.kill()
            if not self.wait(KILL_SECONDS):
                raise RankLostError(
                    f"the worker {self.process.pid} of rank {self.group.launch.rank} on {self.group.launch.host} cannot be "
                    f"killed: it is stuck in a driver or a file system"
                )

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within ``seconds``; the category's lease is renewed meanwhile."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            self.group.while_waiting()
            time.sleep(POLL_SECONDS / 4)
        return self.process.poll() is not None

    @property
    def result(self) -> str:
        """Its exit status for the other ranks."""
        if self.stopped:
            return STOPPED
        status = self.process.returncode
        # Asked before it could listen, during its imports: nothing was lost.
        return PREEMPTED if -status in ASKING else str(status)


def supervise(
    config: Config, group: Group, stop: Stop, location: str, task: Task, cores: Cores, lease: Lease | None
) -> Worked:
    """Runs this rank's worker of one task to its end; the same exit code on every rank of the group.

    ``lease`` is the group's first rank's. Call it while ``stop`` is deferred.

    Raises:
        RankLostError: a rank that this one depends on is gone.
        WadsError: asked to stop, and the worker could not.
    """
    category, key = task.category, f"{task.category}.{task.attempt}"
    flag, reason, next_look = f"{key}/ended", None, 0.0
    worker = Worker(config, group, location, task, cores)
    try:
        while worker.process.poll() is None:
            worker_state = worker.listener.worker_state()
            if worker.startup is None and worker_state.phase != UNTIMED[0]:
                worker.startup = time.monotonic() - worker.started
            group.stand(worker_state)
            if stop.requested:
                worker.ask_to_stop()
            group.check_peers()
            if reason := group.flag(flag):
                worker.end(reason)
            elif lease and time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_SECONDS  # a listing of a folder that all nodes share
                reason = None if lease.held else TAKEN
            if lease and reason is None and (problem := stalled(group.worker_states(), config.trainer.hang_timeout)):
                _report_hang(config, category, problem)
                reason = HUNG
            if lease and reason in (HUNG, TAKEN):
                group.raise_flag(flag, reason)
                worker.end(reason)
            time.sleep(max(POLL_SECONDS, group.launch.poll_seconds))
        ended = time.monotonic()
        if worker.process.returncode != 0:
            group.raise_flag(flag, worker.result)
            _report_signal(group, worker, category)
    except RankLostError:
        if group.whole:  # only the launch is lost: the group can still save
            worker.ask_to_stop()
            worker.wait(SAVE_SECONDS)
        raise
    finally:
        worker.end()
        worker.listener.close()
        group.stand(None)
    result = str(int(ExitCode.RANK_LOST)) if reason in (HUNG, TAKEN) else worker.result
    if reason == PREEMPTED and worker.stopped:
        result = PREEMPTED
    if stop.requested and result not in ("0", PREEMPTED):
        # A launcher that ends all because one rank is gone must not wait for this one to miss that rank.
        raise WadsError(
            f"{category}: asked to stop, but the worker of rank {group.launch.rank} ended ({result}) before all had saved; the "
            f"same command goes on from the last checkpoint"
        )
    code = first_cause(group.all_gather(f"{key}/result", result))
    seconds = ended - worker.started
    return Worked(code, seconds, seconds if worker.startup is None else worker.startup, ended)


def _report_hang(config: Config, category: str, problem: str) -> None:
    folder = config.run.dir / category
    print(f"{category}: {problem}. Stacks of all ranks: {folder}/stacks-rank-*.txt", file=sys.stderr, flush=True)
    event = {"event": "hung", "time": round(time.time(), 3), "problem": problem}
    with (folder / EVENTS).open("a") as stream:
        stream.write(json.dumps(event) + "\n")


def _report_signal(group: Group, worker: Worker, category: str) -> None:
    status = worker.process.returncode
    if status < 0 and not worker.stopped:
        name = signal.Signals(-status).name
        print(
            f"{category}: the worker of rank {group.launch.rank} on {group.launch.host} was ended by {name}",
            file=sys.stderr,
        )


def first_cause(results: Sequence[str]) -> int:
    """The code that explains a failure: a documented one first, then a signal from outside, then a crash, which may be that
    of a worker whose peer had died (as may an abort), and last of all those that supervisors ended."""
    failures = [result for result in results if result != "0"]
    if not failures:
        return ExitCode.OK

    def order(result: str) -> int:
        if result == STOPPED:
            return 4
        code = int(result)
        if code == -signal.SIGABRT:
            return 3
        return 2 if code == ExitCode.CRASHED else 1 if code < 0 else 0

    first = min(failures, key=order)
    if first == STOPPED:
        return ExitCode.CRASHED
    return int(first) if int(first) > 0 else 128 - int(first)
