"""One rank: what of a training step reads the device's numbers on the host, at each ZeRO stage; and whether a lone rank copies
its gradients.

On a GPU every such read waits for all that was launched before, and torch itself reports them (``set_sync_debug_mode``). On a
CPU they are counted: operators of whose result the host needs the size or the value as they pass the dispatcher, and methods
that do not pass it where they are called. What only waits torch does not report: ``synchronize`` of the accelerator, device,
stream and event is counted on either.
"""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from common import join, leave, small_trainer
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from wads_dist.training.trainer import Trainer

READS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"),
}
METHODS = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)


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
        by_mask = func.name().startswith("aten::index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in _indices(args)
        )
        if by_mask or func.name().split(".")[0] in READS:
            self.note(func.name())
        result = func(*args, **(kwargs or {}))
        if func.name() == "aten::cat":
            self.joined = max(self.joined, result.numel())
        return result

    def note(self, what: str) -> None:
        callers = [f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
        self.found.append(f"{what} at {callers[-1].filename}:{callers[-1].lineno}")


class Methods(TorchFunctionMode):
    """Those that read without an operator, while ``counting``."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads, self.counting = reads, True

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.counting and func in METHODS:
            self.reads.note(func.__name__)
        return func(*args, **(kwargs or {}))


def _indices(args: Sequence[Any]) -> Sequence[torch.Tensor | None]:
    return args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else []


class Agreements:
    """``Ranks.gather_rows``, which may wait, and is counted."""

    def __init__(self, trainer: Trainer, methods: Methods) -> None:
        self.methods = methods
        self.gather_rows, self.count, self.on_gpu = trainer.ranks.gather_rows, 0, trainer.ranks.device.type == "cuda"
        object.__setattr__(trainer.ranks, "gather_rows", self)

    def __call__(self, row: torch.Tensor) -> list[list[float]]:
        self.count += 1
        self.forbid_waiting(False)
        rows = self.gather_rows(row)
        self.forbid_waiting(True)
        return rows

    def forbid_waiting(self, forbidden: bool) -> None:
        self.methods.counting = forbidden
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("error" if forbidden else "default")


class Waits:
    """Counts what waits for the device and asks nothing of it."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.count = 0
        owners = (get_accelerator(), torch.cuda, torch.cuda.Event, torch.cuda.Stream, torch.accelerator)
        for owner in owners:
            stack.enter_context(mock.patch.object(owner, "synchronize", self._counted(owner.synchronize)))

    def _counted(self, wait: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return wait(*args, **kwargs)

        return counted


ranks = join()
for stage in sys.argv[1].split(","):
    trainer = small_trainer(
        replace(ranks), "--trainer.deepspeed", f"configs/deepspeed/zero{stage}.json", "--trainer.samples", "80"
    )
    for step in range(3):  # what is set up once may wait
        trainer.step(8 * step)
    reads = Reads()
    methods = Methods(reads)
    agreements = Agreements(trainer, methods)
    agreements.forbid_waiting(True)
    with contextlib.ExitStack() as stack:
        waits = Waits(stack)
        if not agreements.on_gpu:
            stack.enter_context(reads)
            stack.enter_context(methods)
        trainer.step(24)
    agreements.forbid_waiting(False)
    print(f"ZeRO-{stage}: {agreements.count} agreement, {len(reads.found)} other reads, {waits.count} waits")
    if stage == "0" and not agreements.on_gpu:
        parameters = sum(p.numel() for p in trainer.generator_engine.module.parameters())
        print(f"  gradients are {'copied' if reads.joined > parameters / 2 else 'left where they are'}")
    for place, count in Counter(reads.found).items():
        print(f"  {count} x {place}")
leave()
