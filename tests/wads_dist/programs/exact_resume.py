"""A run that is stopped and resumed, beside one that was never stopped, at ZeRO 0 to 3.

By as many ranks, every bit is that of the unbroken run: weights, moments, moving average, random state, buffers that differ
between the ranks. By one rank and then by two again, the whole weights, Adam's moments and the average are bitwise what was
saved, the buffers are the mean of the saved ranks', and the samples go on where they were; the losses then stay close, not
equal, because sums are taken in another order.

    exact_resume.py FOLDER STAGES [SETTINGS]     with settings of the training: without the other number of ranks
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import lives
from common import small_trainer
from lives import DATA

from wads_dist.common.ranks import SHARED_MEMORY, Ranks
from wads_dist.training import checkpoint, engines
from wads_dist.training.progress import random_state
from wads_dist.training.trainer import Trainer

FIRST, SECOND, WHOLE = 3, 6, 9
"""Steps: where the unbroken run saves, where it is compared with the resumed one, and where all end."""
GROUPED = "3g"
"""ZeRO-3 with several groups of parameters, as large models have: each has its own count of steps."""
TOLERANCE = {"0": 2e-3}
"""Largest relative difference of a step's mean loss between one rank and two: in micro-batches of 2 on both (1e-6; 1.3e-7 was
seen), at ZeRO-0 in one, where BatchNorm sees 8 samples at once on one rank and twice 4 on two."""


def trainer_at(stage: str, ranks: Ranks, base: Path) -> Trainer:
    settings = json.loads(Path(f"configs/deepspeed/zero{stage[0]}.json").read_text())
    if stage == GROUPED:
        settings["zero_optimization"]["sub_group_size"] = 200_000
    path = base / f"zero{stage}-{ranks.rank}.json"
    path.write_text(json.dumps(settings))
    options = ["--trainer.deepspeed", str(path), *([] if stage == "0" else ["--trainer.micro_batch_size", "2"])]
    trainer = small_trainer(ranks, *options, "--trainer.ema", "0.9", "--trainer.learning_rate", "3e-4", *sys.argv[3:])
    trainer.loss_scale = engines.LossScale(scale=1.0, dynamic=True, interval=2)  # moves within this test
    assert stage != GROUPED or len(trainer.generator_engine.optimizer.fp16_groups) > 1
    return trainer


def steps(trainer: Trainer, until: int) -> tuple[list[list[int]], list[float]]:
    """Trains up to step ``until``; all ranks' sample ids, and the mean loss, of each step."""
    ids, losses = [], []
    while trainer.progress.step < until:
        mine = torch.cat(trainer.sample_ids(trainer.progress.next_sample)).tolist()
        ids.append([i for part in trainer.ranks.gather(mine) for i in part])
        own = trainer.step(trainer.progress.next_sample).means()["total"]
        losses.append(sum(trainer.ranks.gather(own)) / trainer.ranks.world_size)
        torch.rand(1)  # a library that draws
    return ids, losses


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


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, moments, moving average of the whole model, however they are split; and this rank's buffers."""
    state = {f"buffer {name}": b.clone() for name, b in trainer.generator_engine.module.named_buffers()}
    for engine, label in zip(trainer.both, checkpoint.ENGINES, strict=True):
        for name, value in engines.full_state(engine, {}).items():
            state[f"{label} {name}"] = value
        for name, parameter in engine.module.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                if engine.zero_optimization_stage() == 0:
                    state[f"{label} {key} {name}"] = engine.optimizer.state[parameter][key].clone()
                else:
                    state[f"{label} {key} {name}"] = safe_get_full_optimizer_state(parameter, key).clone()
        base = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
        counts = {float(entry["step"]) for entry in base.state.values()}
        assert counts == {float(trainer.progress.step)}, counts
        # Each count is its own: one tensor in several places would be counted several times a step.
        assert len({entry["step"].data_ptr() for entry in base.state.values()}) == len(base.state)
    with trainer.ema.applied(trainer.generator_engine.module):
        state |= {f"average {name}": value for name, value in engines.full_state(trainer.generator_engine, {}).items()}
    return state


def unbroken(ranks: Ranks, stage: str, base: Path) -> None:
    trainer, folder = trainer_at(stage, ranks, base), base / f"zero{stage}"
    done = [steps(trainer, FIRST)]
    saved = checkpoint.save(trainer, folder, DATA)
    # DeepSpeed's, 66 MiB a rank, which would outlive every rank that is killed.
    assert not list(SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer*_{os.environ['MASTER_PORT']}_*"))
    assert saved.path == folder / f"step-{FIRST:08d}" and saved.bytes > 0
    torch.save(whole_state(trainer), base / f"state-{stage}-{FIRST}-{ranks.rank}.pt")
    done.append(steps(trainer, SECOND))
    torch.save(everything(trainer), base / f"whole-{stage}-{ranks.rank}.pt")
    done.append(steps(trainer, WHOLE))
    torch.save(done, base / f"done-{stage}-{ranks.rank}.pt")


def resumed(ranks: Ranks, stage: str, base: Path) -> None:
    """By as many ranks, from the first checkpoint, which stays the newest."""
    trainer = trainer_at(stage, ranks, base)
    torch.manual_seed(999 + ranks.rank)
    assert checkpoint.resume(trainer, base / f"zero{stage}", DATA) and trainer.progress.step == FIRST
    assert steps(trainer, SECOND) == torch.load(base / f"done-{stage}-{ranks.rank}.pt")[1]
    whole = torch.load(base / f"whole-{stage}-{ranks.rank}.pt", weights_only=False)
    count = assert_same(everything(trainer), whole, f"zero{stage} rank {ranks.rank}")
    buffers = torch.cat([b.flatten().float() for b in trainer.generator_engine.module.buffers()])
    assert not any(torch.equal(buffers, other) for i, other in enumerate(ranks.gather(buffers)) if i != ranks.rank)
    if ranks.is_first:
        print(f"zero{stage}: {count:,} numbers of rank 0 bitwise equal after the resume", flush=True)


def leg(ranks: Ranks, until: int, stage: str, base: Path) -> None:
    """By another number of ranks than before, from the newest checkpoint."""
    trainer, folder = trainer_at(stage, ranks, base), base / f"zero{stage}"
    initial = {name: b.clone() for name, b in trainer.generator_engine.module.named_buffers()}
    assert checkpoint.resume(trainer, folder, DATA)
    old = [torch.load(path) for path in sorted(base.glob(f"state-{stage}-{trainer.progress.step}-*.pt"))]
    assert len(old) == 3 - ranks.world_size
    for name, value in whole_state(trainer).items():
        if name.startswith("buffer") and value.is_floating_point():
            torch.testing.assert_close(value, sum(s[name] for s in old) / len(old), rtol=1e-6, atol=1e-7)
            assert not torch.equal(value, initial[name.removeprefix("buffer ")]), f"{name} was not restored"
        else:
            assert torch.equal(value, old[0][name]), (stage, name)
    left = [path.name for path in folder.glob(".universal*")]
    ranks.barrier()
    assert not left, left
    torch.save(steps(trainer, until), base / f"part-{stage}-{until}-{ranks.rank}.pt")
    torch.save(whole_state(trainer), base / f"state-{stage}-{until}-{ranks.rank}.pt")
    assert checkpoint.save(trainer, folder, DATA).path


def main(base: Path) -> None:
    for stage in sys.argv[2].split(","):
        lives.run(2, lambda ranks, stage=stage: unbroken(ranks, stage, base))
        lives.run(2, lambda ranks, stage=stage: resumed(ranks, stage, base))
        if len(sys.argv) > 3 or stage == "3":
            continue
        for world, until in ((1, SECOND), (2, WHOLE)):
            lives.run(world, lambda ranks, stage=stage, until=until: leg(ranks, until, stage, base))
        done = torch.load(base / f"done-{stage}-0.pt")
        parts = [done[0], *(torch.load(base / f"part-{stage}-{until}-0.pt") for until in (SECOND, WHOLE))]
        ids, part_ids = ([step for ids, _ in d for step in ids] for d in (done, parts))
        losses, part_losses = ([loss for _, losses in d for loss in losses] for d in (done, parts))
        assert part_ids == ids == [list(range(8 * i, 8 * i + 8)) for i in range(WHOLE)]
        worst = max(abs(a / b - 1) for a, b in zip(part_losses, losses, strict=True))
        assert worst < TOLERANCE.get(stage, 1e-6), (part_losses, losses)
        print(f"zero{stage}: 2 -> 1 -> 2 ranks, same samples, same state, losses within {worst:.1e}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as base:  # gigabytes
        main(Path(base))
