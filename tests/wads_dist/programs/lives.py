"""Ranks that can be ended and started again in a second: a parent imports everything once and forks them.

A forked rank is a process of its own with its own process group, engines and exit code; only the imports are shared.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import common

import tests.support.imported  # noqa: F401
from wads_dist.common.ranks import Ranks
from wads_dist.training.checkpoint import DataHashes

DATA = DataHashes("f" * 64, {"train-000000.tar": "a" * 64})
Body = Callable[[Ranks], None]


def start(world: int, body: Body) -> list[int]:
    """Forks ``world`` ranks that run ``body``; returns their process ids. A rank exits with 0, or with 1 and a traceback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    sys.stdout.flush()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
            try:
                body(common.join())
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    return pids


def wait(pids: list[int], timeout: float = 300) -> list[int]:
    """Exit codes, a signal as its negative; the peers of a rank that died are ended, as a supervisor would."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if any(codes.values()) or time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline + 10, f"ranks {pids} do not end"
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def wait_until(condition: Callable[[], bool], pids: list[int], timeout: float = 300) -> None:
    """Until it holds, while all ranks live."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        ended = [pid for pid in pids if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
        assert not ended, f"ranks {ended} have ended early"
        time.sleep(0.002)


def run(world: int, body: Body, timeout: float = 300) -> None:
    """Ranks that must all end well."""
    codes = wait(start(world, body), timeout)
    assert codes == [0] * world, codes
