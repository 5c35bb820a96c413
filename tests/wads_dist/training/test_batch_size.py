"""``trainer.find_batch_size``: what is tried, what is chosen, and that a run which goes on keeps it."""

import json
import math
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests.conftest import REPOSITORY, environment
from tests.support.narrow import NARROW
from tests.wads_dist.programs.common import Samples, small_config
from wads_dist.common.errors import ConfigError
from wads_dist.common.processes import free_port
from wads_dist.common.ranks import Ranks
from wads_dist.config.load import load_config
from wads_dist.runs.folder import BATCH_SIZE
from wads_dist.training import batch_size
from wads_dist.training.batch_size import Rehearsal, choose, find_batch_size


def tried(share: int, **seconds: float) -> dict[int, float]:
    return choose(share, lambda micro: seconds[f"of_{micro}"])


def test_larger_batches_are_tried_until_one_is_slower() -> None:
    assert list(tried(64, of_8=3, of_16=2, of_32=2.05, of_64=2.5)) == [8, 16, 32, 64]
    assert list(tried(64, of_8=1, of_16=2)) == [8, 16]


def test_what_does_not_fit_ends_the_search() -> None:
    assert tried(64, of_8=2, of_16=1, of_32=math.inf) == {8: 2, 16: 1, 32: math.inf}


def test_fewer_samples_than_batchnorm_likes_are_tried_only_if_more_do_not_fit() -> None:
    assert tried(48, of_8=math.inf, of_6=math.inf, of_4=1) == {8: math.inf, 6: math.inf, 4: 1}
    assert tried(6, of_6=1) == {6: 1}


def test_it_contradicts_a_given_micro_batch() -> None:
    with pytest.raises(ConfigError, match=r"trainer.micro_batch_size 8 and trainer.find_batch_size: give one of them"):
        load_config(["--trainer.micro_batch_size", "8", "--trainer.find_batch_size"])


def test_it_is_not_for_categories_that_share_a_device() -> None:
    with pytest.raises(ConfigError, match=r"trainer.find_batch_size with parallel.categories_per_gpu 2"):
        load_config(["--parallel.categories_per_gpu", "2", "--trainer.find_batch_size"])


ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
CONFIG = small_config("--trainer.find_batch_size")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_in_any_words_is_an_answer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = Rehearsal(CONFIG, ALONE, Samples(CONFIG))  # type: ignore[arg-type]
    assert 0 < rehearsal.seconds(2) < math.inf
    monkeypatch.setattr(rehearsal, "losses", Mock(side_effect=error))
    assert rehearsal.seconds(2) == math.inf
    monkeypatch.setattr(rehearsal, "losses", Mock(side_effect=RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        rehearsal.seconds(2)


def test_memory_that_evaluation_and_buckets_need_is_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = Rehearsal(CONFIG, ALONE, Samples(CONFIG))  # type: ignore[arg-type]
    monkeypatch.setattr(batch_size, "memory_used", lambda device: 0.95)
    assert rehearsal.seconds(2) == math.inf


KEPT = """
import psutil
import torch
from tests.wads_dist.programs.common import Samples, small_config
from wads_dist.training import batch_size
from wads_dist.common.ranks import Ranks
from wads_dist.common.host_memory import keep_freed_memory

keep_freed_memory()
used = []
batch_size.memory_used = lambda device: used.append(psutil.Process().memory_info().rss) or 0.0
config = small_config()
rehearsal = batch_size.Rehearsal(config, Ranks(0, 1, 0, 1, torch.device("cpu")), Samples(config))
for micro in (1, 64, 1):
    rehearsal.seconds(micro)
    print(max(used), psutil.Process().memory_info().rss)
    used.clear()
"""


def test_memory_of_a_large_try_neither_stays_nor_counts_against_a_smaller_one() -> None:
    command = [sys.executable, "-c", KEPT]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True)
    (small, _), (large, left), (after, _) = (map(int, line.split()) for line in done.stdout.splitlines()[-3:])
    assert large - small > 100 << 20
    assert max(after, left) - small < (large - small) / 3


class Timed:
    """Stands in for the rehearsal: so many seconds whatever the batch."""

    tries: list[int]

    def __init__(self, *_: object) -> None: ...

    def seconds(self, micro: int) -> float:
        self.tries.append(micro)
        return self.answer

    answer = 1.0


def test_what_was_found_elsewhere_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another number of ranks or another device it may not fit, and would not be the fastest."""
    monkeypatch.setattr(batch_size, "Rehearsal", Timed)
    found: list[int | None] = []
    for change in ({}, {}, {"world_size": 2}, {"device": "NVIDIA H100"}, {"precision": "fp16"}):
        record = tmp_path / BATCH_SIZE
        if record.is_file():
            record.write_text(json.dumps(json.loads(record.read_text()) | change))
        Timed.tries = []
        config, _ = find_batch_size(CONFIG, ALONE, Samples(CONFIG), tmp_path)  # type: ignore[arg-type]
        assert not config.trainer.find_batch_size
        found.append(config.trainer.micro_batch_size)
        assert bool(Timed.tries) == (change != {} or len(found) == 1), change
    assert found == [8] * 5


def test_a_step_that_fits_nowhere_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "Rehearsal", Timed)
    monkeypatch.setattr(Timed, "answer", math.inf)
    Timed.tries = []
    with pytest.raises(ConfigError, match="a step of one sample does not fit"):
        find_batch_size(CONFIG, ALONE, Samples(CONFIG), tmp_path)  # type: ignore[arg-type]
    assert Timed.tries == [8, 4, 2, 1] and not (tmp_path / BATCH_SIZE).exists()


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_trains_with_what_was_found_and_goes_on_with_it(demo_shards: Path, tmp_path: Path) -> None:
    """Two ranks; the second start must not measure again, nor the first train with what it has not recorded."""
    run = tmp_path / "run"
    command = (
        f"{sys.executable} -m deepspeed.launcher.runner --num_accelerators 2 --master_port {free_port()} launch/train.py "
        f"--data.shards {demo_shards} --run.dir {run} --data.categories demo_biscuit {NARROW} --trainer.global_batch_size 32 "
        "--trainer.threads 1 --trainer.samples 64 --trainer.find_batch_size --checkpoint.every_steps 1 --evaluation.holdout 0"
    ).split()
    folder = run / "demo_biscuit"
    for _ in range(2):
        done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (folder / "metrics.json").unlink()  # as if it had ended before its evaluation
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    first, second = (e for e in events if e["event"] == "batch size")
    assert first["micro_batch_size"] in (8, 16) and "8" in first["images_per_second"]
    assert second["micro_batch_size"] == first["micro_batch_size"] and second["images_per_second"] == {}
    newest = max(folder.glob("checkpoints/*/progress.json"), key=lambda p: p.stat().st_mtime)
    assert f"micro_batch_size = {first['micro_batch_size']}" in json.loads(newest.read_text())["config"]
    assert json.loads((folder / BATCH_SIZE).read_text())["world_size"] == 2
