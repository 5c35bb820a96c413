"""What a checkpoint of the mvtec.toml model costs: seconds of training lost, bytes, and their share at the default interval.

Training stands still while ``checkpoint.save`` runs: serialising, writing, hashing, syncing, publishing. Beside it stand a
plain ``torch.save`` of the same tensors (no hash, no sync), and copying the state to memory, which is all that a save in the
background would wait for.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from wads_dist.config.load import load_config
from wads_dist.profiling.step import RandomImages
from wads_dist.scheduler.rendezvous import unless_launched
from wads_dist.shards.arguments import Parser, local_path
from wads_dist.training import checkpoint, checkpoint_files
from wads_dist.training.trainer import Trainer

DATA = checkpoint.DataHashes("0" * 64, {})


def build(batch: int) -> Trainer:
    """A trainer of ``configs/mvtec.toml`` after one step, so that Adam has its moments; one rank."""
    from wads_dist.training.loop import initialise

    unless_launched()
    options = f"--config configs/mvtec.toml --data.shards none --trainer.global_batch_size {batch}".split()
    config = load_config(options)
    ranks = initialise(config, os.cpu_count() or 1)
    trainer = Trainer(config, ranks, RandomImages(config, ranks.device))  # type: ignore[arg-type]
    trainer.step(0)
    return trainer


def state_tensors(trainer: Trainer) -> list[torch.Tensor]:
    """Weights, the optimisers' copies of them, and Adam's moments: what a checkpoint mostly is."""
    tensors = []
    for engine in trainer.both:
        tensors += [p.data for p in engine.module.parameters()]
        tensors += [p.data for p in engine.optimizer.single_partition_of_fp32_groups]
        tensors += [v for state in engine.optimizer.optimizer.state.values() for v in state.values()]
    return tensors


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--folder", type=local_path, help="on the disk to be measured (default: the system's temporary folder)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    trainer = build(batch=4)
    interval = trainer.config.checkpoint.every_minutes * 60
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoints = Path(folder) / "checkpoints"
        saved: list[checkpoint.Saved] = []

        def save() -> None:
            trainer.progress.step += 1
            saved.append(checkpoint.save(trainer, checkpoints, DATA))
            assert saved[-1].path, saved[-1]

        stall = median_seconds(save, arguments.repeats)
        tensors = state_tensors(trainer)
        plain = median_seconds(lambda: torch.save(tensors, Path(folder) / "plain.pt"), arguments.repeats)
        copies = [torch.empty_like(t, device="cpu") for t in tensors]
        copy = median_seconds(lambda: torch._foreach_copy_(copies, tensors), arguments.repeats)
        newest = saved[-1].path
        assert newest is not None
        verify = median_seconds(lambda: checkpoint_files.problems(newest), arguments.repeats)
    parameters = sum(p.numel() for engine in trainer.both for p in engine.module.parameters())
    size = saved[-1].bytes
    share = 100 * stall / (interval + stall)
    print(f"mvtec.toml, ZeRO-1, one rank on {trainer.ranks.device}; {parameters / 1e6:.1f} M parameters")
    print(f"bytes of a checkpoint     {size / 1e6:7.0f} MB, {size / parameters:.1f} a parameter")
    print(f"stall of a save           {stall:7.2f} s, {share:.2f} % of training at one in {interval / 60:.0f} minutes")
    print(f"  plain torch.save        {plain:7.2f} s")
    print(f"  copy of the state       {copy:7.2f} s")
    print(f"verifying it              {verify:7.2f} s")


if __name__ == "__main__":
    main()
