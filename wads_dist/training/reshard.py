"""Loading a checkpoint with another number of ranks than wrote it.

At ZeRO 1 to 3, weights and Adam's moments go through DeepSpeed's universal checkpoint: one process converts it beside the
original, every rank takes its part, and it is removed. At ZeRO-0 every rank has all of it anyway. What DeepSpeed leaves out
is put right here: buffers (left at their initial values), moving average, random state, and one counter of steps a tensor.
"""

import contextlib
import io
import math
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger
from torch import Tensor

from wads_dist.common.errors import ResumeError
from wads_dist.training.engines import ENGINES, TAG, load_engines, load_rank
from wads_dist.training.trainer import Trainer


def load(trainer: Trainer, checkpoint: Path, saved_ranks: int) -> dict[str, Any]:
    """Both engines' state from a checkpoint of ``saved_ranks`` ranks; returns this rank's part of the rest. Collective."""
    if trainer.zero_stage == 0:
        load_engines(trainer.both, checkpoint)
    else:
        universal = checkpoint.with_name(f".universal-{checkpoint.name}")
        try:
            failed = convert(checkpoint, universal) if trainer.ranks.is_first else None
            failed = trainer.ranks.gather(failed)[0]
            if failed:
                raise ResumeError(f"{checkpoint} could not be converted for another number of ranks: {failed}")
            with loading_universal(trainer.both):
                load_engines(trainer.both, universal)
            trainer.ranks.barrier()
        finally:
            if trainer.ranks.is_first:
                shutil.rmtree(universal, ignore_errors=True)
        for engine in trainer.both:
            own_steps(engine.optimizer.optimizer)
    return rest(trainer, [load_rank(checkpoint, rank) for rank in range(saved_ranks)])


def convert(checkpoint: Path, universal: Path) -> str | None:
    """Writes DeepSpeed's universal form of both engines; returns what went wrong with the disk, if anything."""
    shutil.rmtree(universal, ignore_errors=True)
    said = io.StringIO()
    try:
        for name in ENGINES:
            arguments = Namespace(
                input_folder=str(checkpoint / name / TAG),
                output_folder=str(universal / name / TAG),
                num_extract_workers=1,  # in this process: several would fork it
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # of models that DeepSpeed splits over tensors; there is none
            )
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                ds_to_universal.main(arguments)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        return str(error).splitlines()[0]
    return None


@contextmanager
def loading_universal(engines: Sequence[DeepSpeedEngine]) -> Iterator[None]:
    """The engines read the universal form inside (otherwise a setting of DeepSpeed's file, for the whole of a run)."""
    level = logger.level
    logger.setLevel("ERROR")  # it warns that models are not split over tensors
    for engine in engines:
        engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        logger.setLevel(level)
        for engine in engines:
            engine._config.load_universal_checkpoint = False


def own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Gives every state its own step counter, on its device: ZeRO-3's loader puts one tensor into all of them, which would
    then count several times a step, and the converter leaves it on the CPU."""
    for parameter, state in optimizer.state.items():
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).clone().to(parameter.device)


def rest(trainer: Trainer, saved: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Buffers averaged over the ranks that saved them (each one's BatchNorm saw its own part of the data), this rank's part
    of the moving average, and a random state."""
    ranks = trainer.ranks
    buffers = {}
    for name, first in saved[0]["buffers"].items():
        values = torch.stack([state["buffers"][name] for state in saved])
        buffers[name] = values.mean(0) if first.is_floating_point() else first
    average = None
    if trainer.ema:
        averages = [state["ema"] for state in saved if state["ema"] is not None]
        average = [
            repartition(parts, parameter, ranks.rank, ranks.world_size)
            for *parts, parameter in zip(*averages, trainer.generator_engine.module.parameters(), strict=True)
        ]
    return {"buffers": buffers, "ema": average, "random": saved[ranks.rank % len(saved)]["random"]}


def repartition(parts: Sequence[Tensor], parameter: Tensor, rank: int, world_size: int) -> Tensor:
    """This rank's part of a tensor that was saved in ``parts`` (ZeRO-3: equal parts of the flat tensor, the last one padded);
    the whole tensor where parameters are not partitioned."""
    if not hasattr(parameter, "ds_tensor"):
        return parts[0]
    numel = parameter.ds_numel  # type: ignore[attr-defined]
    share = math.ceil(numel / world_size)
    whole = torch.zeros(share * world_size)
    whole[:numel] = torch.cat([part.flatten() for part in parts])[:numel]
    return whole[rank * share : (rank + 1) * share]
