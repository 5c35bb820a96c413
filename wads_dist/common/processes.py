"""What a process can know of others, and how it ends."""

import contextlib
import os
import signal
import socket
import sys
from functools import cache
from pathlib import Path


def stat_fields(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the state on; the name before them may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def start_time(pid: int) -> str | None:
    """Tells a process from another that was given its number later; None when it is gone, or dead and not yet collected."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@cache
def this_machine() -> str:
    """Equal for two processes exactly if each can look up the other by its pid: one boot of one machine, one pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def leave(status: int) -> None:
    """Ends the process without the interpreter's teardown, in which threads of torch may wait for ranks that are gone, or
    abort because of them."""
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
