"""Saving and resuming a trainer: DeepSpeed's sharded state of both engines, and all that DeepSpeed leaves out.

    step-00001200/
        generator-segmenter/, discriminator/   DeepSpeed's sharded state of each engine
        rank-00000.pt …               this rank's random state, its own BatchNorm buffers and moving average
        stopping.pt                   weights of the best score so far, where early stopping has taken one
        progress.json                 data position, counts, loss scale, world size, configuration, the data's hashes
        manifest.json                 size and SHA-256 of all of them

``checkpoint_files`` says what makes such a directory complete, ``reshard`` how another number of ranks loads it, and
docs/checkpoints.md why. Loading unpickles DeepSpeed's files, after their hashes were found right: that detects damage, not
malice. Resume only from folders you trust; weights for use elsewhere are safetensors.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, cast

import torch

from wads_dist.common.errors import ResumeError
from wads_dist.common.files import FileEntry, hashed_file, write_text
from wads_dist.common.ranks import Ranks
from wads_dist.config.load import config_difference, recorded_config
from wads_dist.config.schema import CheckpointConfig, Config
from wads_dist.training import checkpoint_files as files
from wads_dist.training import reshard
from wads_dist.training.checkpoint_files import PROGRESS
from wads_dist.training.engines import ENGINES, TAG, load_engines, load_rank
from wads_dist.training.trainer import Trainer

STOPPING = "stopping.pt"
# Weights as the module has them and as the optimiser has them, and Adam's two moments, all fp32.
BYTES_PER_PARAMETER = 16
SAFETY = 1.1

Report = Callable[..., None]
"""Called on every rank with an event's name and its values."""


@dataclass(frozen=True)
class DataHashes:
    """What a category's data is: its fingerprint, and the SHA-256 of each shard, so that a difference can be named."""

    fingerprint: str
    shards: dict[str, str]

    def difference(self, other: "DataHashes") -> list[str]:
        """One line for each shard in which ``other`` differs."""
        lines = [f"{name}: no longer there" for name in self.shards.keys() - other.shards.keys()]
        lines += [f"{name}: new" for name in other.shards.keys() - self.shards.keys()]
        common = self.shards.keys() & other.shards.keys()
        lines += [f"{name}: other content" for name in common if self.shards[name] != other.shards[name]]
        return sorted(lines) or ["labels or offsets of the samples"]


@dataclass(frozen=True)
class Saved:
    """What became of a save: a path, or a problem. The previous checkpoint is intact either way."""

    path: Path | None = None
    problem: str | None = None
    bytes: int = 0
    seconds: float = 0.0


class Writer:
    """Stands in for DeepSpeed's checkpoint engine: hashes and syncs what is written, and keeps count of it.

    A disk that is full must not stop one rank inside a collective that the others have yet to enter. So a write that fails
    is remembered, the rest of the save is gone through without writing, and the ranks agree afterwards.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries: dict[str, FileEntry] = {}
        self.error: OSError | None = None

    def save(self, state_dict: Any, path: str | Path) -> None:
        if self.error:
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with hashed_file(path) as out:
                torch.save(state_dict, cast(IO[bytes], out))
            self.entries[str(path.relative_to(self.root))] = out.entry()
        except OSError as error:
            self.error = error

    # What DeepSpeed's ``save_checkpoint`` asks of a checkpoint engine besides.
    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Made when there is something to write."""

    def create(self, info: Any) -> None: ...
    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    @contextmanager
    def installed(self, engine: Any) -> Iterator[None]:
        """``engine`` writes through this inside. Its recovery script (a copied program) is left out."""
        own = engine.checkpoint_engine
        engine.checkpoint_engine, engine._copy_recovery_script = self, lambda save_path: None
        try:
            yield
        finally:
            engine.checkpoint_engine = own
            del engine._copy_recovery_script


# --- saving ------------------------------------------------------------------------------------------------------


def save(
    trainer: Trainer,
    folder: Path,
    data: DataHashes,
    loss: float | None = None,
    may_publish: Callable[[], bool] = lambda: True,
) -> Saved:
    """Writes and publishes a checkpoint of the trainer's present step; collective. Never raises for want of space.

    A crash at any moment leaves the previous checkpoint and the pointer to it as they were; so does a disk that is full,
    which is said on stderr and in the result.

    Args:
        trainer: between two steps.
        folder: the category's ``checkpoints``, on a file system that all ranks share.
        data: what is trained on.
        loss: mean loss since the previous save, the same on every rank; decides which checkpoint is the best.
        may_publish: asked on the first rank right before the rename; a process that was frozen for minutes may have been
            succeeded by another, whose files it must leave alone.
    """
    started = time.monotonic()
    ranks, name = trainer.ranks, files.name_of(trainer.progress.step)
    plan = ranks.gather(_prepare(folder, name, size_estimate(trainer)) if ranks.is_first else None)[0]
    assert plan is not None
    if plan.path or plan.problem:
        return _said(plan, ranks)
    partial = files.partial_of(folder, name)
    writer = Writer(partial)
    for engine_name, engine in zip(ENGINES, trainer.both, strict=True):
        with writer.installed(engine):
            engine.save_checkpoint(str(partial / engine_name), tag=TAG, save_latest=False)
    writer.save(trainer.rank_state(), partial / f"rank-{ranks.rank:05d}.pt")
    if trainer.best is not None:
        writer.save(trainer.best, partial / STOPPING)
    written = ranks.gather((writer.entries, describe(writer.error) if writer.error else None))
    saved = None
    if ranks.is_first:
        problem = next((f"rank {rank}: {error}" for rank, (_, error) in enumerate(written) if error), None)
        entries = {path: entry for part, _ in written for path, entry in part.items()}
        try:
            if problem is None:
                text = json.dumps(meta(trainer, data, loss), indent=1)
                with hashed_file(partial / PROGRESS) as out:
                    out.write(text.encode())
                entries[PROGRESS] = out.entry()
                files.write_manifest(partial, entries)
                if not may_publish():
                    return _said(ranks.gather(Saved(problem="another group has taken over"))[0], ranks)
                files.publish(folder, name)
        except OSError as error:
            problem = describe(error)
        if problem:
            shutil.rmtree(partial, ignore_errors=True)
            saved = Saved(problem=problem)
        else:
            _remove_old(folder, name, trainer.config.checkpoint)
            size = sum(entry.bytes for entry in entries.values())
            saved = Saved(folder / name, None, size, time.monotonic() - started)
    return _said(ranks.gather(saved)[0], ranks)


def _remove_old(folder: Path, name: str, config: CheckpointConfig) -> None:
    try:
        files.retain(folder, name, config.keep, config.keep_best)
    except OSError as error:
        _say(f"{folder}: an old checkpoint could not be removed: {describe(error)}")


def _say(text: str) -> None:
    """On stderr, if anyone is left to read it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _prepare(folder: Path, name: str, needed: int) -> Saved:
    """The first rank's part before anything is written: a path if there is nothing to do, a problem if it cannot be done."""
    if files.pointed_to(folder) == name and (folder / name).is_dir():
        return Saved(folder / name)  # resumed here, and asked to save before the first step
    try:
        files.start(folder, name)
        free = shutil.disk_usage(folder).free
        if free < needed:
            files.partial_of(folder, name).rmdir()
            return Saved(problem=f"{folder}: {free / 2**20:,.0f} MiB free, a checkpoint needs {needed / 2**20:,.0f}")
    except OSError as error:
        return Saved(problem=describe(error))
    return Saved()


def _said(saved: Saved | None, ranks: Ranks) -> Saved:
    assert saved is not None
    if saved.problem and ranks.is_first:
        _say(f"NO CHECKPOINT WRITTEN: {saved.problem}. Training goes on; the previous checkpoint is intact. Make room.")
    return saved


def describe(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def size_estimate(trainer: Trainer) -> int:
    """Bytes a checkpoint will take, generously."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for engine in trainer.both for p in engine.module.parameters())
    copies = bool(trainer.ema) + bool(trainer.config.stopping.every)
    average = copies * sum(getattr(p, "ds_numel", p.numel()) for p in trainer.generator_engine.module.parameters())
    buffers = sum(b.numel() * b.element_size() for b in trainer.generator_engine.module.buffers()) * (
        trainer.ranks.world_size + 1
    )
    return int(SAFETY * (parameters * BYTES_PER_PARAMETER + average * 4 + buffers)) + 2**20


def meta(trainer: Trainer, data: DataHashes, loss: float | None) -> dict[str, Any]:
    """The content of ``progress.json``."""
    return {
        **trainer.state_dict(),
        "loss": loss,
        "world_size": trainer.ranks.world_size,
        "zero_stage": trainer.zero_stage,
        "data": {"fingerprint": data.fingerprint, "shards": data.shards},
        "config": trainer.config.to_toml(),
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# --- resuming ----------------------------------------------------------------------------------------------------


def check_objective(saved: str, config: Config, checkpoint: Path) -> None:
    """Raises ResumeError where a checkpoint of the configuration ``saved`` (TOML) was trained for something else than
    ``config`` asks for. ``record.check_run`` asks the run's folder first, but its record may be gone."""
    try:
        changed = config_difference(recorded_config(saved), config)
    except ValueError as error:
        raise ResumeError(f"{checkpoint}: its settings are not those of this version of WADS-dist ({error})") from error
    if lines := [line for line in changed if line.startswith(("objective.", "synthesis.", "stopping."))]:
        raise ResumeError(
            f"{checkpoint} was trained with another objective (its value → yours):\n  "
            + "\n  ".join(lines)
            + "\nGive the same settings to go on with it, or another --run.dir to start anew."
        )


def resume(trainer: Trainer, folder: Path, data: DataHashes, report: Report = lambda event, **values: None) -> bool:
    """Restores the newest good checkpoint in ``folder`` into ``trainer``; False when there never was one. Collective.

    Nothing is unpickled before every hash was found right. A damaged checkpoint is moved to ``quarantine`` and the one
    before it is taken. The number of ranks may be another than at the save.

    Raises:
        ResumeError: there were checkpoints but none is good, or the newest good one was trained on other data or for another
            objective.
    """
    checkpoint = choose(trainer.ranks, folder, report)
    if checkpoint is not None:
        restore(trainer, checkpoint, data, report)
    return checkpoint is not None


def zero_stage(checkpoint: Path | None, world_size: int) -> int | None:
    """The ZeRO stage to train at: that of the ``checkpoint`` to go on from, which no other can load; else, for a rank that
    trains alone and has nothing to share, 0; else None, that of DeepSpeed's file."""
    if checkpoint is not None:
        return int(json.loads((checkpoint / PROGRESS).read_text())["zero_stage"])
    return 0 if world_size == 1 else None


def restore(
    trainer: Trainer, checkpoint: Path, data: DataHashes, report: Report = lambda event, **values: None
) -> None:
    """``trainer`` as it was at ``checkpoint``, which has been found right (``choose``). Collective.

    Raises:
        ResumeError: it was trained on other data or for another objective.
    """
    saved = json.loads((checkpoint / PROGRESS).read_text())
    before = DataHashes(**saved["data"])
    if before.fingerprint != data.fingerprint:
        raise ResumeError(
            f"{checkpoint} was trained on other data (fingerprint {before.fingerprint[:12]}, now {data.fingerprint[:12]}):\n  "
            + "\n  ".join(before.difference(data))
            + "\nGive the same shards, or another --run.dir to start anew."
        )
    check_objective(saved["config"], trainer.config, checkpoint)
    if saved["world_size"] == trainer.ranks.world_size:
        load_engines(trainer.both, checkpoint)
        state = load_rank(checkpoint, trainer.ranks.rank)
        if trainer.ema and state["ema"] is None:
            state["ema"] = load_rank(checkpoint, 0)["ema"]
    else:
        if trainer.ranks.is_first:
            _say(f"{checkpoint}: from {saved['world_size']} to {trainer.ranks.world_size} ranks")
        report("reshard", step=saved["progress"]["step"], ranks=[saved["world_size"], trainer.ranks.world_size])
        state = reshard.load(trainer, checkpoint, saved["world_size"])
    trainer.load_rank_state(state)
    trainer.load_state_dict(saved)
    if trainer.progress.scores and trainer.ranks.is_first:
        trainer.best = torch.load(checkpoint / STOPPING, map_location="cpu", weights_only=True)


def choose(ranks: Ranks, folder: Path, report: Report) -> Path | None:
    """The newest good checkpoint, on which all ranks agree: each hashes its share of the files.

    Raises:
        ResumeError: there were checkpoints, but none is good.
    """
    while True:
        view = (files.candidate(folder), files.had_checkpoints(folder)) if ranks.is_first else (None, False)
        name, had_any = ranks.gather(view)[0]
        if name is None:
            if had_any:
                raise ResumeError(
                    f"{folder}: no good checkpoint is left (damaged ones are in {folder / files.QUARANTINE}). Restore one "
                    f"from a backup, or remove {folder} to start this category anew."
                )
            return None
        found = ranks.gather(files.problems(folder / name, ranks.rank, ranks.world_size))
        problems = list(dict.fromkeys(problem for part in found for problem in part))
        if ranks.is_first and not problems and files.pointed_to(folder) != name:
            write_text(folder / files.LATEST, name)
        if not problems:
            return folder / name
        if ranks.is_first:
            moved = files.quarantine(folder, name)
            _say("\n  ".join([f"DAMAGED CHECKPOINT {folder / name}, moved to {moved}:", *problems]))
        report("quarantine", checkpoint=name, problems=problems)
        ranks.barrier()
