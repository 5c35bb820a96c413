"""Stop at step 2, resume in new processes, run to step 4: every bit is that of the run that was never stopped.

At ZeRO 0 to 3 with two ranks, moving average and gradient accumulation, and with buffers that differ between the ranks.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import lives
from common import small_trainer
from lives import DATA

from wads_dist.common.ranks import SHARED_MEMORY, Ranks
from wads_dist.training import checkpoint, engines
from wads_dist.training.progress import random_state
from wads_dist.training.trainer import Trainer

HALF, WHOLE = 2, 4


def trainer_at(stage: str, ranks: Ranks) -> Trainer:
    options = ["--trainer.deepspeed", f"configs/deepspeed/zero{stage}.json", "--trainer.micro_batch_size", "2"]
    trainer = small_trainer(ranks, *options, "--trainer.ema", "0.9", "--trainer.learning_rate", "1e-3", *sys.argv[3:])
    trainer.loss_scale = engines.LossScale(scale=1.0, dynamic=True, interval=2)  # moves within this test
    return trainer


def steps(trainer: Trainer, until: int) -> list[list[int]]:
    """Trains up to step ``until``; returns the sample ids of each step on this rank."""
    seen = []
    while trainer.progress.step < until:
        seen.append(torch.cat(trainer.sample_ids(trainer.progress.next_sample)).tolist())
        trainer.step(trainer.progress.next_sample)
        torch.rand(1)  # a library that draws
    return seen


def everything(trainer: Trainer) -> dict[str, object]:
    """All state of this rank, by name."""
    state: dict[str, object] = {"random": random_state(), "progress": trainer.progress.state_dict()}
    state["progress"].pop("seconds")  # type: ignore[attr-defined]
    state["loss scale"] = trainer.loss_scale.state_dict()
    for engine, name in zip(trainer.both, checkpoint.ENGINES, strict=True):
        state[f"{name} weights"] = engines.full_state(engine, dict(engine.module.named_buffers()))
        base = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
        state[f"{name} optimiser"] = [dict(entry) for entry in base.state.values()]
        flat = (
            "fp32_partitioned_groups_flat"
            if engine.zero_optimization_stage() == 3
            else "single_partition_of_fp32_groups"
        )
        state[f"{name} master weights"] = [p.detach().clone() for p in getattr(engine.optimizer, flat, [])]
    state["average"] = trainer.ema.shadow
    return state


def assert_same(a: object, b: object, where: str) -> int:
    """Bitwise equality of nested state; returns how many numbers were compared."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b), where
        return a.numel()
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return sum(assert_same(a[key], b[key], f"{where} / {key}") for key in a)
    if isinstance(a, list | tuple):
        assert len(a) == len(b), where
        return sum(assert_same(x, y, f"{where} / {i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    assert (a == b).all() if hasattr(a, "all") else a == b, (where, a, b)
    return 1


def main(base: Path) -> None:
    for stage in sys.argv[2].split(","):
        folder = base / f"zero{stage}"

        def unbroken(ranks: Ranks, stage: str = stage, folder: Path = folder) -> None:
            trainer = trainer_at(stage, ranks)
            seen = steps(trainer, HALF)
            saved = checkpoint.save(trainer, folder, DATA)
            # DeepSpeed's, 66 MiB a rank, which would outlive every rank that is killed.
            assert not list(SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer*_{os.environ['MASTER_PORT']}_*"))
            assert saved.path == folder / f"step-{HALF:08d}" and saved.bytes > 0
            seen += steps(trainer, WHOLE)
            torch.save((everything(trainer), seen), base / f"whole-{stage}-{ranks.rank}.pt")

        def resumed(ranks: Ranks, stage: str = stage, folder: Path = folder) -> None:
            trainer = trainer_at(stage, ranks)
            torch.manual_seed(999 + ranks.rank)
            assert checkpoint.resume(trainer, folder, DATA) and trainer.progress.step == HALF
            seen = steps(trainer, WHOLE)
            whole, all_seen = torch.load(base / f"whole-{stage}-{ranks.rank}.pt", weights_only=False)
            assert seen == all_seen[HALF:] and all_seen[0] != all_seen[1]
            count = assert_same(everything(trainer), whole, f"zero{stage} rank {ranks.rank}")
            buffers = torch.cat([b.flatten().float() for b in trainer.generator_engine.module.buffers()])
            assert not any(
                torch.equal(buffers, other) for i, other in enumerate(ranks.gather(buffers)) if i != ranks.rank
            )
            if ranks.is_first:
                print(f"zero{stage}: {count:,} numbers of rank 0 bitwise equal after the resume", flush=True)

        lives.run(2, unbroken)
        lives.run(2, resumed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as base:  # gigabytes
        main(Path(base))
