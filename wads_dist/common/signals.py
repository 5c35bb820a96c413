"""Signals, and launchers that die.

SIGTERM and SIGUSR1 (how Slurm pre-empts) ask for the step to be finished and saved; a second one, or Ctrl-C, ends at once: a
checkpoint is complete or absent, so that is always safe. A launcher that is gone counts as SIGTERM, because DeepSpeed's dies
without telling its children: ``kill -9`` of its inner process makes ``deepspeed`` exit 0, SIGTERM to ``deepspeed`` reaches
nobody else.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wads_dist.common.errors import ExitCode, PreemptedError
from wads_dist.common.processes import start_time, stat_fields

ASKING = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler, a launcher and a supervisor may each pass on the same request; these are one.
SAME_SECONDS = 3.0
ORPHAN_SECONDS = 20.0


class StopRequest:
    """Whether this process was asked to stop. ``end`` is called, with an exit code, when there is nothing to wait for."""

    def __init__(self, end: Callable[[ExitCode], None]) -> None:
        self.end = end
        self.requested = False
        self.leaving = False
        """On the way out: a signal more must not break off what is said to the other ranks."""
        self._since: float | None = None
        """When this process itself was first signalled; what it was asked otherwise counts for no signal."""
        self._deferring = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first request only sets ``requested``; whoever enters looks at it. Outside, it ends the process."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def request(self) -> None:
        """What a first signal asks for, asked by another rank."""
        self.requested = True

    def receive(self, signum: int) -> None:
        now = time.monotonic()
        if self.leaving:
            return
        if signum == signal.SIGINT:
            self.end(ExitCode.INTERRUPTED)
        elif not self._deferring:
            self.end(ExitCode.PREEMPTED)
        elif self._since is None:
            self.requested, self._since = True, now
        elif now - self._since > SAME_SECONDS:
            self.end(ExitCode.PREEMPTED)


def supervisor_signals() -> StopRequest:
    """For a process whose main thread is never long in a call of another language: signals end it by an exception, so that
    everything it has started is cleaned up on the way."""

    def end(code: ExitCode) -> None:
        if code == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        raise PreemptedError("stopped as asked; the same command goes on from the last checkpoint")

    request = StopRequest(end)
    if threading.current_thread() is threading.main_thread():
        for signum in (*ASKING, signal.SIGINT):
            signal.signal(signum, lambda signum, _: request.receive(signum))
    return request


def worker_signals() -> StopRequest:
    """For a worker. Python calls a handler between two bytecodes of the main thread, which never come while that waits in a
    collective: so a thread reads the signals from the wake-up descriptor, and ends the process without asking anyone."""

    def end(code: ExitCode) -> None:
        os._exit(code)

    request = StopRequest(end)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for signum in (*ASKING, signal.SIGINT):
        signal.signal(signum, lambda *_: None)  # without one, nothing is written to the descriptor
    signal.set_wakeup_fd(writer.fileno())

    def read() -> None:
        keep = writer  # its descriptor is open for as long as this thread runs
        while data := reader.recv(64):
            for signum in data:
                # A second one is the supervisor's to judge, who has passed on the first: others signal both.
                if signum == signal.SIGINT or not request.requested:
                    request.receive(signum)
        keep.close()

    threading.Thread(target=read, daemon=True).start()
    return request


def stop_with_launcher(stop: StopRequest) -> None:
    """Asks this process to stop soon after a launcher above it has died, and sees to it that it is gone in half a minute."""
    launchers = _launchers_above()

    def watch() -> None:
        while all(start_time(pid) == start for pid, start in launchers):
            time.sleep(1)
        if stop.leaving:
            return  # Ctrl-C, for one, ends all of them at once
        _say("the launcher is gone: saving and ending; the same command goes on from there")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(ExitCode.PREEMPTED)  # the main thread is stuck; the worker ends when its pipe breaks

    if launchers:
        threading.Thread(target=watch, daemon=True).start()


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may have gone with the launcher
        print(f"rank {os.environ.get('RANK', 0)}: {text}", file=sys.stderr, flush=True)


def _launchers_above() -> list[tuple[int, str]]:
    """(pid, start time) of this process's ancestors, as far up as they are launchers. A shell is none: it may leave its
    children to run on, as under nohup."""
    found: list[tuple[int, str]] = []
    pid = os.getppid()
    try:
        while pid > 1 and (start := start_time(pid)) is not None:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if not is_launcher(arguments, bool(found)):
                break
            found.append((pid, start))
            pid = int(stat_fields(pid)[1])
    except OSError:
        pass  # it ended just now: the one below it, already noted, tells
    return found


def is_launcher(arguments: list[str], below: bool) -> bool:
    """Whether a process with this command line is a launcher. ``below``: it has started one, and so is one too if it is the
    SSH session of a remote node."""
    text = " ".join(arguments)
    programs = {Path(argument).name for argument in arguments[:2]}  # the interpreter may come first
    modules = ("deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run")
    return (
        bool(programs & {"deepspeed", "torchrun"})
        or any(module in text for module in modules)
        # The session (``sshd: user@notty``), not the daemon, which may be restarted without harm to sessions.
        or (below and text.startswith("sshd") and "@" in text)
    )
