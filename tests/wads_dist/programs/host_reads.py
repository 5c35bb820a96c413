"""One rank: what of a training step reads the device's numbers on the host, at each ZeRO stage; and whether a lone rank copies
its gradients.

On a GPU every such read waits for all that was launched before, and torch itself reports them (``set_sync_debug_mode``). On a
CPU reads are counted as they pass the dispatcher; ``Tensor.tolist`` does not pass it, and is counted where it is called.
"""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from common import join, leave, small_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from wads_dist.trainer import Trainer

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}


class Reads(TorchDispatchMode):
    """The operators that answer on the host, and the line of ours or of DeepSpeed's from which each was called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.joined = 0
        """Elements of the largest tensor that was put together from others."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.name().split(".")[0] in READS:
            callers = [f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
            self.found.append(f"{func.name()} at {callers[-1].filename}:{callers[-1].lineno}")
        result = func(*args, **(kwargs or {}))
        if func.name() == "aten::cat":
            self.joined = max(self.joined, result.numel())
        return result


class Agreements:
    """``Ranks.gather_rows``, which may wait, and is counted."""

    def __init__(self, trainer: Trainer) -> None:
        self.gather_rows, self.count, self.on_gpu = trainer.ranks.gather_rows, 0, trainer.ranks.device.type == "cuda"
        object.__setattr__(trainer.ranks, "gather_rows", self)

    def __call__(self, row: torch.Tensor) -> list[list[float]]:
        self.count += 1
        self.forbid_waiting(False)
        rows = self.gather_rows(row)
        self.forbid_waiting(True)
        return rows

    def forbid_waiting(self, forbidden: bool) -> None:
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("error" if forbidden else "default")


ranks = join()
for stage in sys.argv[1].split(","):
    trainer = small_trainer(
        replace(ranks), "--trainer.deepspeed", f"configs/deepspeed/zero{stage}.json", "--trainer.samples", "80"
    )
    for step in range(3):  # what is set up once may wait
        trainer.step(8 * step)
    agreements, reads = Agreements(trainer), Reads()
    agreements.forbid_waiting(True)
    with contextlib.nullcontext() if agreements.on_gpu else reads:
        trainer.step(24)
    agreements.forbid_waiting(False)
    print(f"ZeRO-{stage}: {agreements.count} agreement, {len(reads.found)} other reads")
    if stage == "0" and not agreements.on_gpu:
        parameters = sum(p.numel() for p in trainer.gs.module.parameters())
        print(f"  gradients are {'copied' if reads.joined > parameters / 2 else 'left where they are'}")
    for place, count in Counter(reads.found).items():
        print(f"  {count} x {place}")
leave()
