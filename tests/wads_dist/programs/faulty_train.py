"""``tests/support/train.py`` with faults in its data, for one rank at chosen steps.

FAULTS is a JSON list of [kind, rank, first step, end step]; kinds: ``nan``, ``spike``, ``slow``, ``hang``.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from torch import Tensor

from tests.support.train import train
from wads_dist.data.training import TrainingData
from wads_dist.kernels.synthesis import Batch

SLOW_SECONDS = 1.5
FAULTS = [fault for fault in json.loads(os.environ["FAULTS"]) if fault[1] == int(os.environ["RANK"])]
batch_of = TrainingData.batch


def faulty_batch(self: Any, sample: Tensor, upcoming: Tensor | None = None) -> Batch:
    batch = batch_of(self, sample, upcoming)
    step = int(sample[0]) // int(os.environ["BATCH"])
    # The trainer also asks for 128 samples once, before the first step.
    for kind, _, first, end in FAULTS if upcoming is not None else ():
        if first <= step < end:
            if kind == "nan":
                batch.anomalous[0] = float("nan")
            elif kind == "spike":
                batch.clean.mul_(300)
            elif kind == "slow":
                time.sleep(SLOW_SECONDS)
            elif kind == "hang":
                time.sleep(10_000)
    return batch


if __name__ == "__main__":
    TrainingData.batch = faulty_batch  # type: ignore[method-assign]
    train()
