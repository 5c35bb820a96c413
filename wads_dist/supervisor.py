"""One rank's worker of one category, from its start to its end: watched, asked to stop, and ended.

The supervisor holds no model. It passes signals on, posts where its worker stands, and ends it when a worker of another rank
has failed, hangs, or when a rank is gone; the first rank's supervisor finds out who hangs.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from wads_dist.config import Config
from wads_dist.errors import ExitCode, WadsError
from wads_dist.pulse import Listener, stalled
from wads_dist.rendezvous import Launch, free_port
from wads_dist.signals import ASKING, StopRequest

REPOSITORY = Path(__file__).resolve().parent.parent
WORKER = (sys.executable, "-m", "wads_dist.worker")
POLL_SECONDS = 0.2
# For workers whose peer has saved and ended as they are about to.
GRACE_SECONDS = 10.0
STOPPED, HUNG = "stopped", "hung"


class Worker:
    """A worker process and what is known of it."""

    def __init__(self, config: Config, launch: Launch, location: str, category: str, port: str) -> None:
        reader, writer = os.pipe()
        env = os.environ | {
            "RANK": str(launch.rank),
            "WORLD_SIZE": str(launch.world_size),
            "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
            "MASTER_ADDR": launch.address,
            "MASTER_PORT": port,
            # torch and DeepSpeed deprecate each other's calls; a user can do nothing about it.
            "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        }
        what = ["--run", str(config.run.dir), "--category", category, "--shards", location, "--pulse", str(writer)]
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
        """At once, unless there is something to wait for: checkpoints are complete or absent."""
        if reason == HUNG and self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR2)  # writes where each of its threads stands; if frozen, it cannot
            time.sleep(1)
        if reason == str(int(ExitCode.PREEMPTED)):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
        if self.process.poll() is None:
            self.stopped = True
            self.process.kill()
            self.process.wait()

    @property
    def result(self) -> str:
        """Its exit status for the other ranks."""
        if self.stopped:
            return STOPPED
        status = self.process.returncode
        # Asked before it could listen, during its imports: nothing was lost.
        return str(int(ExitCode.PREEMPTED) if -status in ASKING else status)


def supervise(config: Config, launch: Launch, stop: StopRequest, location: str, category: str) -> int:
    """Runs this rank's worker of one category to its end; the same exit code on every rank.

    Raises:
        RankLostError: another launched rank is gone.
        WadsError: asked to stop, and the worker could not.
    """
    port = launch.share(f"{category}/port", str(free_port()) if launch.is_first else None)
    flag, reason = f"{category}/ended", None
    with stop.deferred():
        worker = Worker(config, launch, location, category, port)
        try:
            while worker.process.poll() is None:
                launch.standing = worker.listener.standing()
                if stop.requested:
                    worker.ask_to_stop()
                launch.check_peers()
                if reason := launch.flag(flag):
                    worker.end(reason)
                elif launch.is_first and (problem := stalled(launch.standings(), config.trainer.hang_timeout)):
                    _report_hang(config, category, problem)
                    reason = HUNG
                    launch.raise_flag(flag, reason)
                    worker.end(reason)
                time.sleep(POLL_SECONDS)
        finally:
            worker.end()
            worker.listener.close()
            launch.standing = None
        if worker.process.returncode != 0:
            launch.raise_flag(flag, worker.result)
            _report_signal(launch, worker, category)
        result = str(int(ExitCode.RANK_LOST)) if reason == HUNG else worker.result
    if stop.requested and result not in ("0", str(int(ExitCode.PREEMPTED))):
        # A launcher that ends all because one rank is gone must not wait for this one to miss that rank.
        raise WadsError(
            f"{category}: asked to stop, but the worker of rank {launch.rank} ended ({result}) before all had saved; the same "
            f"command goes on from the last checkpoint"
        )
    return first_cause(launch.everyone(f"{category}/result", result))


def _report_hang(config: Config, category: str, problem: str) -> None:
    folder = config.run.dir / category
    print(f"{category}: {problem}. Stacks of all ranks: {folder}/stacks-rank-*.txt", file=sys.stderr, flush=True)
    event = {"event": "hung", "time": round(time.time(), 3), "problem": problem}
    with (folder / "events.jsonl").open("a") as stream:
        stream.write(json.dumps(event) + "\n")


def _report_signal(launch: Launch, worker: Worker, category: str) -> None:
    status = worker.process.returncode
    if status < 0 and not worker.stopped:
        name = signal.Signals(-status).name
        print(f"{category}: the worker of rank {launch.rank} on {launch.host} was ended by {name}", file=sys.stderr)


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
