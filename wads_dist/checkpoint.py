"""Checkpoints: one directory per step, complete or absent.

    checkpoints/step-00001200/        published by one rename, after every rank has finished writing beside that name
        generator-segmenter/, discriminator/   DeepSpeed's sharded state of each engine
        rank-00000.pt …               this rank's random state, its own BatchNorm buffers and moving average
        progress.json                 data position, counts, loss scale, world size, configuration, data fingerprint
    checkpoints/latest                names the newest one; moves last

Loading DeepSpeed's files unpickles them: resume only from folders you trust. Weights for use elsewhere are safetensors.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wads_dist.errors import ResumeError
from wads_dist.trainer import Trainer

ENGINES = ("generator-segmenter", "discriminator")
LATEST = "latest"
TAG = "state"


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` in one step: a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def random_state() -> dict[str, Any]:
    """State of every generator a library might draw from; the data path draws from none of them."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save(trainer: Trainer, folder: Path, fingerprint: str) -> Path:
    """Writes and publishes a checkpoint of the trainer's present step; collective. Returns its directory.

    A crash at any moment leaves the previous checkpoint and the pointer to it as they were.
    """
    ranks, step = trainer.ranks, trainer.progress.step
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}"
    if ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    for name, engine in zip(ENGINES, trainer.both, strict=True):
        engine.save_checkpoint(str(partial / name), tag=TAG, save_latest=False)
    own = {
        "random": random_state(),
        "buffers": dict(trainer.gs.module.named_buffers()),
        "ema": trainer.ema.shadow if trainer.ema else None,
    }
    torch.save(own, partial / f"rank-{ranks.rank:05d}.pt")
    ranks.barrier()
    if ranks.is_first:
        meta = {
            "progress": trainer.progress.state_dict(),
            "loss_scale": trainer.loss_scale.state_dict(),
            "world_size": ranks.world_size,
            "fingerprint": fingerprint,
            "config": trainer.config.to_toml(),
        }
        (partial / "progress.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        write_text(folder / LATEST, final.name)
        # A crash before the pointer moved can have left a later step than this one: it must not push this one out.
        others = [old for old in sorted(folder.glob("step-*")) if old != final]
        for old in others[: max(0, len(others) + 1 - trainer.config.checkpoint.keep)]:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def resume(trainer: Trainer, folder: Path, fingerprint: str) -> bool:
    """Restores the newest checkpoint in ``folder`` into ``trainer``; False when there is none. Collective.

    Raises:
        ResumeError: it was written by another number of ranks, or from other data.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        return False
    final = folder / pointer.read_text().strip()
    meta = json.loads((final / "progress.json").read_text())
    ranks = trainer.ranks
    if meta["fingerprint"] != fingerprint:
        raise ResumeError(
            f"{final} was trained on data with fingerprint {meta['fingerprint'][:12]}, the data now has "
            f"{fingerprint[:12]}. Give the same shards, or another --run.dir to start anew."
        )
    if meta["world_size"] != ranks.world_size:
        raise ResumeError(
            f"{final} was written by {meta['world_size']} ranks, this launch has {ranks.world_size}. Launch with "
            f"{meta['world_size']}, or another --run.dir to start anew."
        )
    for name, engine in zip(ENGINES, trainer.both, strict=True):
        loaded, _ = engine.load_checkpoint(str(final / name), tag=TAG)
        if loaded is None:
            raise ResumeError(f"{final / name} could not be loaded; remove {final} and point {pointer} to another step")
    # Ours, in a folder whose DeepSpeed files are unpickled anyway.
    own = torch.load(final / f"rank-{ranks.rank:05d}.pt", map_location="cpu", weights_only=False)
    with torch.no_grad():
        for name, buffer in trainer.gs.module.named_buffers():
            buffer.copy_(own["buffers"][name])
        if trainer.ema:
            torch._foreach_copy_(trainer.ema.shadow, own["ema"])
    restore_random_state(own["random"])
    trainer.progress.load_state_dict(meta["progress"])
    trainer.loss_scale.load_state_dict(meta["loss_scale"])
    return True
