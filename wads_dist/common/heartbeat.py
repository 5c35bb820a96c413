"""Where each rank stands: told by a worker to its supervisor once a second, and judged when one stands still.

A hung rank and the ranks that wait for it look alike from outside: none makes progress. So a worker counts the
phases that it enters; all ranks enter the same ones in the same order, and the one that hangs has entered the fewest.
"""

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from wads_dist.common.errors import ExitCode

BEAT_SECONDS = 1.0
# How long these take depends on the data's size and place, not on a step; only a frozen process counts there.
UNTIMED = ("load", "evaluate")


@dataclass(frozen=True)
class WorkerState:
    """Where a rank's worker stands."""

    tick: int = 0
    """Phases entered since the worker started."""
    step: int = 0
    phase: str = UNTIMED[0]
    still: float = 0.0
    """Seconds since the last phase was entered."""
    silent: float = 0.0
    """Seconds since the worker was last heard of: its process is frozen, or too busy for a thread of its own to run."""
    host: str = ""


class Heartbeat:
    """The phases that a worker enters. ``beat`` tells them to the supervisor; without it they are kept and nothing is told."""

    def __init__(self) -> None:
        self._state = (0, 0, UNTIMED[0], time.monotonic())

    def enter(self, phase: str, step: int) -> None:
        """This rank begins ``phase`` of ``step``. Costs one assignment: it stands in the path of every step."""
        self._state = (self._state[0] + 1, step, phase, time.monotonic())

    def beat(self, pipe: int) -> None:
        """Writes the worker's state to ``pipe`` every second from a thread, and ends the process soon after its reader is gone:
        nobody would collect its result, and the next run of the same command must find the folder to itself."""
        os.set_blocking(pipe, False)

        def write() -> None:
            while True:
                tick, step, phase, since = self._state
                line = asdict(WorkerState(tick, step, phase, time.monotonic() - since))
                try:
                    os.write(pipe, json.dumps(line).encode() + b"\n")
                except BlockingIOError:
                    pass  # a supervisor that does not read must not stop the training
                except OSError:
                    os._exit(ExitCode.CRASHED)
                time.sleep(BEAT_SECONDS)

        threading.Thread(target=write, daemon=True).start()


class Listener:
    """The supervisor's end of a worker's pipe."""

    def __init__(self, pipe: int, host: str) -> None:
        os.set_blocking(pipe, False)
        self.pipe, self.host = pipe, host
        self.heard, self.last, self.rest = time.monotonic(), WorkerState(), b""

    def worker_state(self) -> WorkerState:
        """The newest state, aged by how long ago it was heard."""
        now = time.monotonic()
        try:
            text = self.rest + os.read(self.pipe, 1 << 16)
        except BlockingIOError:
            text = self.rest
        *lines, self.rest = text.split(b"\n")
        if lines:
            self.heard, self.last = now, WorkerState(**json.loads(lines[-1]))
        silent = now - self.heard
        # A beat is allowed to be late: only what is beyond it ages the state.
        late = max(0.0, silent - 2 * BEAT_SECONDS)
        return WorkerState(**asdict(self.last) | {"still": self.last.still + late, "silent": silent, "host": self.host})

    def close(self) -> None:
        os.close(self.pipe)


def stalled(worker_states: Mapping[int, WorkerState], timeout: float) -> str | None:
    """Says which rank makes no progress, if any has made none for ``timeout`` seconds (0: never)."""
    frozen = [rank for rank, s in worker_states.items() if s.silent > timeout]
    still = [rank for rank, s in worker_states.items() if s.still > timeout and s.phase not in UNTIMED]
    if not timeout or not (frozen or still):
        return None
    # The others wait for a frozen process, whatever it had entered; or for the rank that has entered the fewest phases.
    least = min(s.tick for s in worker_states.values())
    behind = frozen or [rank for rank, s in worker_states.items() if s.tick == least]
    described = "; ".join(_describe(rank, worker_states[rank], rank in frozen) for rank in behind[:8])
    if len(behind) == len(worker_states) > 1:
        return f"no rank makes progress, and none is behind the others: {described}"
    waiting = [f"rank {rank} (step {s.step}, {s.phase})" for rank, s in worker_states.items() if rank not in behind]
    return described + (f"; waiting for it: {', '.join(waiting[:8])}" if waiting else "")


def _describe(rank: int, worker_state: WorkerState, frozen: bool) -> str:
    seconds = max(worker_state.still, worker_state.silent if frozen else 0.0)
    what = "its process is frozen" if frozen else worker_state.phase
    return f"rank {rank} on host {worker_state.host}: no progress since step {worker_state.step} for {seconds:.0f} s ({what})"
