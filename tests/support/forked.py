"""Ranks and workers that start in no time: processes that have imported everything once are forked.

Starting Python, torch and DeepSpeed takes seconds of processor time for each of the four processes of two ranks. A forked
process is one of its own all the same: with its environment, output, signals, exit code, process group and command line. What
reads the environment while it is imported has read that of the server: no interpreted kernels, and the CPU as accelerator.
"""

import ctypes
import functools
import itertools
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
IMPORTED = ["tests.support.train"]  # and what it imports: all of a supervisor and of a worker
# The server's command line holds this name of no module: a fork can show no longer command line than its server's.
ROOM = "_" * 4000


def show_as(arguments: Sequence[str]) -> None:
    """Makes this the command line that others see of this process, cut off where the old one ends."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = "\0".join(arguments).encode()[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


class Fork:
    """``subprocess.Popen`` as far as a supervisor needs it: ``act`` in a fork of this process."""

    def __init__(self, act: Callable[[], int], command: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int]):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.returncode: int | None = None
        # A signal to the fork must not be handled as this process would.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.pid = os.fork()
        if self.pid == 0:
            signal.set_wakeup_fd(-1)
            for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(signum, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            kept = [2, *sorted(pass_fds), os.sysconf("SC_OPEN_MAX")]
            for low, high in itertools.pairwise(kept):
                os.closerange(low + 1, high)
            _become(act, command, env)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(act: Callable[[], int], command: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Does ``act`` as a process started by ``command`` (whose first word is the interpreter's), and ends."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        rank = [f"--local_rank={env['RANK']}"] if "RANK" in env else []
        show_as([*command[:2], *rank, *command[2:]])
        sys.argv = [*command[1:]]
        code = act()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _rank(command: list[str], env: dict[str, str], log: Path) -> NoReturn:
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(REPOSITORY)
    sys.path.insert(0, str(Path(command[1]).parent))
    _become(lambda: runpy.run_path(command[1], run_name="__main__") and 0, command, env)


@functools.cache
def _server() -> "multiprocessing.context.ForkServerContext":
    from tests.conftest import environment  # and with it pytest, which no rank needs

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *IMPORTED, ROOM])
    with _environment(environment()):
        forkserver.ensure_running()
    return context


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    own = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(env)
        yield
    finally:
        os.environ.clear()
        os.environ.update(own)


class Ranks:
    """``world`` ranks of a program, without a launcher; ``subprocess.Popen`` as far as tests need it."""

    def __init__(
        self, world: int, command: Sequence[str], env: Mapping[str, str], logs: Sequence[Path], *, fork: bool = True
    ) -> None:
        from wads_dist.common.processes import free_port

        place = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        context = _server() if fork else multiprocessing.get_context("spawn")
        self.processes = []
        for rank in range(world):
            own = {**env, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank, args=([sys.executable, *command], own, logs[rank]))
            process.start()
            self.processes.append(process)

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    @property
    def returncode(self) -> int | None:
        """The highest of the ranks', once all have ended."""
        codes = [code for code in self.codes if code is not None]
        return max(codes, key=abs) if len(codes) == len(self.processes) else None

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float) -> int | None:
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return self.returncode

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
