"""Rows 5, 6, 7 and 14 of the fault table, with two real ranks: kills during a save, damage, a full disk, other data.

Each row prints what it did and found, and ``row N: passed``; one that fails prints its traceback, and the next one starts.
"""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import lives
import torch
from common import small_trainer
from lives import DATA

from wads_dist.common.errors import ResumeError
from wads_dist.common.files import HashedFile
from wads_dist.common.ranks import Ranks
from wads_dist.training import checkpoint
from wads_dist.training import checkpoint_files as files
from wads_dist.training.checkpoint import DataHashes
from wads_dist.training.trainer import Trainer

OPTIONS = ["--checkpoint.keep_best", "false"]


def step(trainer: Trainer) -> None:
    trainer.step(trainer.progress.next_sample)


def make(folder: Path, count: int) -> None:
    """A folder with a checkpoint of each of the steps 1 to ``count``."""

    def body(ranks: Ranks) -> None:
        trainer = small_trainer(ranks, *OPTIONS, "--checkpoint.keep", str(count))
        for _ in range(count):
            step(trainer)
            assert checkpoint.save(trainer, folder, DATA).path

    lives.run(2, body)
    assert files.steps(folder) == [files.name_of(step) for step in range(count, 0, -1)]


# --- row 5 -------------------------------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_file(part: str, at: int = 0) -> None:
    """Dies while a file whose path holds ``part`` is written, after ``at`` bytes or more."""
    write = HashedFile.write

    def half(self: HashedFile, data: Any) -> int:
        if part in str(self.file.name) and self.bytes >= at:
            self.file.write(memoryview(data).cast("B")[: len(data) // 2])
            die()
        return write(self, data)

    HashedFile.write = half  # type: ignore[method-assign]


def die_in_rename(target: str) -> None:
    rename = os.rename
    os.rename = lambda a, b: die() if target in str(b) else rename(a, b)  # type: ignore[assignment]


def die_in_rmtree(target: str) -> None:
    rmtree = shutil.rmtree

    def half(path: Path, *more: Any, **options: Any) -> None:
        if target in str(path):
            next(p for p in sorted(Path(path).rglob("*")) if p.is_file()).unlink()
            die()
        rmtree(path, *more, **options)

    shutil.rmtree = half  # type: ignore[assignment]


# (stage of a save, the rank that dies, how, whether the new checkpoint is the one to be used)
STAGES: tuple[tuple[str, int, Callable[[], None], bool], ...] = (
    ("in the first byte of an engine's file", 0, lambda: die_in_file("discriminator"), False),
    ("within the other rank's shard", 1, lambda: die_in_file("zero_pp_rank_1", 100_000), False),
    ("within the other rank's own file", 1, lambda: die_in_file("rank-00001"), False),
    ("within progress.json", 0, lambda: die_in_file("progress.json"), False),
    ("within the manifest", 0, lambda: die_in_file("manifest.json"), False),
    ("before the rename", 0, lambda: die_in_rename("/step-"), False),
    ("between the rename and the pointer", 0, lambda: setattr(files, "write_text", die), False),
    ("while the oldest is removed", 0, lambda: die_in_rmtree(".removed-step-00000001"), True),
)


def row_5(base: Path) -> None:
    folder = base / "kills"
    make(folder, 2)
    expected = 2
    for stage, who, arm, published in STAGES:

        def body(ranks: Ranks, who: int = who, arm: Callable[[], None] = arm, expected: int = expected) -> None:
            trainer = small_trainer(ranks, *OPTIONS)
            assert checkpoint.resume(trainer, folder, DATA) and trainer.progress.step == expected
            step(trainer)
            if ranks.rank == who:
                arm()
            checkpoint.save(trainer, folder, DATA)

        codes = lives.wait(lives.start(2, body))
        assert codes[who] == -signal.SIGKILL, codes
        expected += published
        pointed = files.pointed_to(folder)
        assert pointed == files.name_of(expected) and not files.problems(folder / pointed), (stage, pointed)
        print(f"row 5: rank {who} killed {stage}: {pointed} is chosen and whole", flush=True)

    def last(ranks: Ranks) -> None:
        trainer = small_trainer(ranks, *OPTIONS)
        assert checkpoint.resume(trainer, folder, DATA) and trainer.progress.step == expected
        step(trainer)
        assert checkpoint.save(trainer, folder, DATA).path
        if ranks.is_first:  # what the dead left behind is gone
            assert {path.name for path in folder.iterdir()} == {"latest", *map(files.name_of, (expected, expected + 1))}

    lives.run(2, last)


# --- row 6 -------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def flip_in_hash(path: Path) -> None:
    flip(path, path.read_text().rindex('"sha256": "') + 20)


def link_copy(whole: Path, folder: Path, damaged: str) -> None:
    """A copy that shares the files' content, but for the file ``damaged`` of each checkpoint, which has its own."""
    shutil.copytree(whole, folder, copy_function=os.link)
    for name in files.steps(folder):
        (folder / name / damaged).unlink()
        shutil.copy(whole / name / damaged, folder / name / damaged)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def set_trap(path: Path, sprung: Path) -> None:
    """Of the same size, so that only the hash can tell."""
    path.write_bytes(pickle.dumps(Trap(sprung)).ljust(path.stat().st_size, b"\0"))


def row_6(base: Path) -> None:
    whole = base / "whole"
    make(whole, 3)
    newest, before = files.name_of(3), files.name_of(2)
    shard = "generator-segmenter/state/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    model = "discriminator/state/mp_rank_00_model_states.pt"
    sprung = base / "sprung"
    damages: tuple[tuple[str, str, Callable[[Path], object], str], ...] = (
        ("truncated by a byte", shard, truncate, "bytes, the manifest says"),
        ("with a flipped bit", model, flip, "SHA-256"),
        ("deleted", shard, Path.unlink, "is missing"),
        ("emptied", "rank-00001.pt", lambda path: os.truncate(path, 0), "0 bytes, the manifest says"),
        ("with a flipped bit", "progress.json", flip, "SHA-256"),
        ("with a flipped bit in a hash", "manifest.json", flip_in_hash, "SHA-256"),
        ("cut in half", "manifest.json", lambda path: os.truncate(path, path.stat().st_size // 2), "cannot be read"),
        ("deleted", "manifest.json", Path.unlink, "manifest.json is missing"),
        ("replaced by a pickle that runs a program", model, lambda path: set_trap(path, sprung), "SHA-256"),
    )

    def body(ranks: Ranks) -> None:
        trainer = small_trainer(ranks, *OPTIONS)
        for i, (how, what, damage, words) in enumerate(damages):
            folder = base / f"damaged-{i}"
            if ranks.is_first:
                link_copy(whole, folder, what)
                damage(folder / newest / what)
            ranks.barrier()
            said: list[dict[str, Any]] = []
            assert checkpoint.resume(
                trainer, folder, DATA, lambda event, said=said, **v: said.append({"event": event, **v})
            )
            assert trainer.progress.step == 2, what
            assert [s["event"] for s in said] == ["quarantine"] and said[0]["checkpoint"] == newest
            assert len(said[0]["problems"]) == 1 and words in said[0]["problems"][0], said
            if ranks.is_first:
                assert (folder / "quarantine" / newest).is_dir() and files.pointed_to(folder) == before
                print(f"row 6: {what} {how}: {said[0]['problems'][0]}; went on from {before}", flush=True)
            ranks.barrier()
        assert not sprung.exists()

        folder = base / "none-good"
        if ranks.is_first:
            link_copy(whole, folder, shard)
            for name in files.steps(folder):
                flip(folder / name / shard)
        ranks.barrier()
        for _ in range(2):  # the second time there is nothing but the quarantine
            try:
                checkpoint.resume(trainer, folder, DATA)
            except ResumeError as error:
                assert "no good checkpoint is left" in str(error)
            else:
                raise AssertionError("started anew in silence")
            ranks.barrier()
        if ranks.is_first:
            assert len(list((folder / "quarantine").iterdir())) == 3
            print("row 6: all three damaged: refused, all in quarantine", flush=True)

    lives.run(2, body)


# --- row 7 -------------------------------------------------------------------------------------------------------


def row_7(base: Path) -> None:
    small = base / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True, text=True)
    if mount.returncode == 0:
        try:
            full_disk(small)
        finally:
            subprocess.run(["umount", "-l", small], check=True)
    else:
        print(f"row 7: no small file system may be mounted here ({mount.stderr.strip()}); a limit on file sizes only")
    folder = base / "limit"

    def body(ranks: Ranks) -> None:
        trainer = small_trainer(ranks, *OPTIONS)
        step(trainer)
        assert checkpoint.save(trainer, folder, DATA).path
        step(trainer)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if ranks.rank == 1:  # this rank's disk only
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        saved = checkpoint.save(trainer, folder, DATA)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert saved.path is None and "rank 1" in str(saved.problem) and "File too large" in str(saved.problem), saved
        check_previous(ranks, folder, saved.problem, "one rank could not write")
        step(trainer)
        assert checkpoint.save(trainer, folder, DATA).path == folder / files.name_of(3)

    lives.run(2, body)


def full_disk(small: Path) -> None:
    """A file system that has room for one checkpoint and a half, then for three."""
    folder = small / "checkpoints"

    def resize(ranks: Ranks, size: int) -> None:
        if ranks.is_first:
            subprocess.run(["mount", "-o", f"remount,size={size}", small], check=True)
        ranks.barrier()

    def body(ranks: Ranks) -> None:
        trainer = small_trainer(ranks, *OPTIONS)
        step(trainer)
        estimate = checkpoint.size_estimate(trainer)
        resize(ranks, 3 * estimate)
        saved = checkpoint.save(trainer, folder, DATA)
        assert saved.path and estimate / 1.5 < saved.bytes < estimate, (saved.bytes, estimate)
        resize(ranks, int(1.6 * saved.bytes))
        step(trainer)
        refused = checkpoint.save(trainer, folder, DATA)
        assert refused.path is None and "MiB free, a checkpoint needs" in str(refused.problem), refused
        check_previous(ranks, folder, refused.problem, "too little room")
        step(trainer)
        estimate_of, checkpoint.size_estimate = (
            checkpoint.size_estimate,
            lambda trainer: 0,
        )  # someone else fills it meanwhile
        failed = checkpoint.save(trainer, folder, DATA)
        checkpoint.size_estimate = estimate_of
        assert failed.path is None and "No space left on device" in str(failed.problem), failed
        check_previous(ranks, folder, failed.problem, "full during the save")
        step(trainer)
        resize(ranks, 4 * estimate)
        assert checkpoint.save(trainer, folder, DATA).path == folder / files.name_of(4)

    lives.run(2, body)


def check_previous(ranks: Ranks, folder: Path, problem: str | None, what: str) -> None:
    """Only the first checkpoint is there, and it is whole; all ranks were told the same."""
    assert len(set(ranks.gather(problem))) == 1
    if ranks.is_first:
        assert {path.name for path in folder.iterdir()} == {"latest", files.name_of(1)}
        assert files.pointed_to(folder) == files.name_of(1) and not files.problems(folder / files.name_of(1))
        print(f"row 7: {what}: {problem}; training went on, the checkpoint before is whole", flush=True)
    ranks.barrier()


# --- row 14 ------------------------------------------------------------------------------------------------------


def row_14(base: Path) -> None:
    folder = base / "other-data"
    make(folder, 1)
    other = DataHashes("e" * 64, {"train-000000.tar": "b" * 64, "train-000001.tar": "c" * 64})

    def body(ranks: Ranks) -> None:
        trainer = small_trainer(ranks, *OPTIONS)
        before = torch.cat([p.flatten() for p in trainer.generator_engine.module.parameters()]).clone()
        try:
            checkpoint.resume(trainer, folder, other)
        except ResumeError as error:
            assert "train-000000.tar: other content" in str(error) and "train-000001.tar: new" in str(error)
            if ranks.is_first:
                print("row 14:", json.dumps(str(error)), flush=True)
        else:
            raise AssertionError("resumed on other data")
        assert torch.equal(before, torch.cat([p.flatten() for p in trainer.generator_engine.module.parameters()]))

    lives.run(2, body)
    assert not files.problems(folder / files.name_of(1))


def main(base: Path) -> None:
    for row in sys.argv[2].split(","):
        try:
            globals()[f"row_{row}"](base)
            print(f"row {row}: passed", flush=True)
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as base:  # gigabytes
        main(Path(base))
