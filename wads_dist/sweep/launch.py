"""One ``deepspeed … launch/train.py`` as a child: signals are passed on to its ranks, every one of them is waited for, and what
came of it is read from the run's folder.

DeepSpeed's launcher can do none of it: SIGUSR1 kills it, SIGTERM kills it without its ranks being told, and it exits with 0
when its inner process was killed. So signals go to the ranks themselves, and this process adopts those whose launcher has died.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from wads_dist.common.errors import ExitCode
from wads_dist.common.files import PACKAGE, write_text
from wads_dist.common.processes import free_port
from wads_dist.common.signals import SAME_SECONDS
from wads_dist.sweep.plan import Run, Sweep

PROGRAM = str(PACKAGE / "launch" / "train.py")
PR_SET_CHILD_SUBREAPER = 36
# The first ends at once, the others save. SIGHUP: a terminal that was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 0.5


class Signals:
    """What this process was asked by signals since this was made; they do nothing else any more."""

    def __init__(self) -> None:
        self.first: int | None = None
        """The time limit's SIGUSR1 may be followed by SIGTERM: what was asked first is what happens."""
        self.wishes = 0
        """Signals, but those within seconds of each other are one."""
        self._since = -SAME_SECONDS
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, _: object) -> None:
        self.first = self.first or signum
        if (now := time.monotonic()) - self._since > SAME_SECONDS:
            self.wishes, self._since = self.wishes + 1, now


class TrainingLaunch:
    """A running launch of ``launch/train.py``, whose output goes to ``log`` (None: where this process's goes)."""

    def __init__(self, arguments: Sequence[str], ranks: int | None, signals: Signals, log: Path | None = None) -> None:
        self.signals = signals
        self._told: dict[psutil.Process, int] = {}
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        environment = {name: value for name, value in os.environ.items() if name != "RANK"}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        options = [] if ranks is None else ["--num_accelerators", str(ranks)]
        if ranks and (visible := environment.get("CUDA_VISIBLE_DEVICES")):
            # Given a number, DeepSpeed would take the machine's first GPUs, whoever they belong to.
            environment["CUDA_VISIBLE_DEVICES"], options = ",".join(visible.split(",")[:ranks]), []
        deepspeed = shutil.which("deepspeed", path=environment["PATH"]) or "deepspeed"
        command = [deepspeed, *options, "--master_port", str(free_port()), PROGRAM, *arguments]
        if log is None:
            self.process = subprocess.Popen(command, env=environment)
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            # A session of its own: Ctrl-C reaches the ranks once, through this process.
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)

    def poll(self) -> bool:
        """Passes signals on; whether the launcher or one of its ranks still runs."""
        ranks, signum = self.ranks(), self.signals.first
        for rank in ranks:
            if signum is not None and self._told.get(rank, 0) < self.signals.wishes:
                self._told[rank] = self.signals.wishes
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)
        return self.process.poll() is None or bool(ranks)

    def ranks(self) -> list[psutil.Process]:
        """The living processes that run ``launch/train.py`` as a rank, neither their launchers nor their workers."""
        below = [p for p in psutil.Process().children(recursive=True) if p.pid != self.process.pid]
        _, living = psutil.wait_procs(below, timeout=0)  # which also collects those that this process has adopted
        return [process for process in living if _is_rank(process)]

    @property
    def code(self) -> ExitCode:
        """Why it ended before all was done, as far as the launcher's exit code can tell."""
        if self.signals.first is not None:
            return ExitCode.INTERRUPTED if self.signals.first == signal.SIGINT else ExitCode.PREEMPTED
        code = self.process.returncode
        if code in (0, 128 + signal.SIGTERM) or -code in SIGNALS:
            return ExitCode.PREEMPTED  # only the launcher was ended; its ranks have noticed, and saved
        return ExitCode(code) if code in list(ExitCode) else ExitCode.RANK_LOST


def _is_rank(process: psutil.Process) -> bool:
    try:
        return PROGRAM in process.cmdline() and "RANK" in process.environ()
    except psutil.Error:
        return False  # it ended meanwhile


def train(
    sweep: Sweep, run: Run, categories: Sequence[str], signals: Signals, log: Path | None, look: Callable[[], object]
) -> ExitCode:
    """Launches ``categories`` of ``run`` and waits until no rank is left, calling ``look`` meanwhile."""
    ended = [sweep.ended_file(run, category) for category in categories]
    for path in ended:
        path.unlink(missing_ok=True)
    settings = ["--config", str(sweep.config_file(run)), "--data.categories", ",".join(categories)]
    launch = TrainingLaunch(settings, sweep.ranks, signals, log)
    while launch.poll():
        look()
        time.sleep(POLL_SECONDS)
    code = launch.code if set(categories) & set(run.missing) else ExitCode.OK
    for path in ended:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, str(int(code)))
    return code
