"""``launch/train.py`` whose workers are forked instead of started, once they have been imported.

While the folder HOLD exists, each worker waits within its next step, and says so by a file there whose name is its process id:
until the folder is gone, or it is asked to stop.
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor

import tests.support.imported  # noqa: F401
from tests.support.forked import Fork
from wads_dist.common.processes import leave
from wads_dist.common.signals import StopRequest
from wads_dist.data.training import TrainingData
from wads_dist.kernels.synthesis import Batch
from wads_dist.launch.command import run_command
from wads_dist.scheduler import supervisor
from wads_dist.scheduler.run import train_run
from wads_dist.training import worker


def hold_workers(hold: Path) -> None:
    asked: list[StopRequest] = []
    signals, batch_of = worker.worker_signals, TrainingData.batch

    def remembered() -> StopRequest:
        asked.append(signals())
        return asked[-1]

    def held_batch(self: Any, sample: Tensor, upcoming: Tensor | None = None) -> Batch:
        if upcoming is not None and hold.exists():  # None: the trainer asks for samples before the first step
            with suppress(FileNotFoundError):  # gone meanwhile
                (hold / str(os.getpid())).touch()
            while hold.exists() and not asked[-1].requested:
                time.sleep(0.02)
        return batch_of(self, sample, upcoming)

    worker.worker_signals = remembered
    TrainingData.batch = held_batch  # type: ignore[method-assign]


def train() -> None:
    if "HOLD" in os.environ:
        hold_workers(Path(os.environ["HOLD"]))
    supervisor.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=lambda command, env, pass_fds: Fork(
            lambda: leave(worker.main()) or 0, command[:1] + command[3:], env, pass_fds
        )
    )
    leave(run_command(train_run))


if __name__ == "__main__":
    train()
