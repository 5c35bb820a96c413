"""Ranks: what their steps, messages and checkpoints take, and how many bytes they send. JSON on standard output.

    deepspeed benchmarks/scaling_ranks.py --config configs/mvtec.toml [--SECTION.FIELD VALUE ...]

measures the ranks that were launched, on random images: steps at the configured share of the batch and at twice that (if twice
the samples take no longer, the host is the limit), collectives, and a checkpoint into the temporary folder (TMPDIR), which
several hosts must share.
"""

import json
import os
import socket
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_cost import DATA
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wads_dist.common.processes import leave
from wads_dist.common.ranks import Ranks
from wads_dist.config.deepspeed import read_settings
from wads_dist.config.schema import Config, resolve_batches
from wads_dist.launch.command import run_command
from wads_dist.profiling.step import RandomImages
from wads_dist.scheduler.rendezvous import unless_launched
from wads_dist.training import checkpoint
from wads_dist.training.loop import initialise
from wads_dist.training.trainer import Trainer

MESSAGES = (80, 16 << 20)
"""Bytes of a message that is all latency, and of one that is mostly bandwidth."""


class Sent(TorchDispatchMode):
    """Counts the collectives called inside, and the bytes of their whole tensors."""

    calls = bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls += 1
            self.bytes += max(sum(t.nbytes for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args)
        return func(*args, **(kwargs or {}))


def tcp_bytes_sent() -> int:
    """What the kernel has sent for this process's TCP connections (Linux: tcpi_bytes_sent less tcpi_bytes_retrans)."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            sent, again = struct.unpack_from("QQ", info, 200)
            total += sent - again
        except (OSError, struct.error):  # no TCP connection
            continue
    return total


class Rank:
    """One rank of a world, and what it can measure. Every method is collective."""

    def __init__(self, config: Config) -> None:
        threads = config.trainer.threads or max(1, (os.cpu_count() or 1) // Ranks.from_environment().local_world_size)
        self.config, self.ranks = config, initialise(config, threads)
        self.trainers: dict[int, Trainer] = {}

    def trainer(self, stage: int, batch: int) -> Trainer:
        """The trainer of a ZeRO stage, which has taken its first steps, set to ``batch`` samples a rank."""
        settings: dict[str, Any] = {"deepspeed": Path(f"configs/deepspeed/zero{stage}.json")}
        settings |= {"global_batch_size": batch * self.ranks.world_size, "micro_batch_size": batch}
        config = self.config.model_copy(update={"trainer": self.config.trainer.model_copy(update=settings)})
        if stage not in self.trainers:
            images = RandomImages(config, self.ranks.device)
            self.trainers[stage] = Trainer(config, self.ranks, images)  # type: ignore[arg-type]
            for engine in self.trainers[stage].both:
                engine.train()
            for _ in range(3):  # then Adam has its moments, and ZeRO-3 its order of modules
                self.trainers[stage].step(0)
        trainer = self.trainers[stage]
        trainer.config, trainer.micro_batch_size = config, batch
        return trainer

    def timed(self, action: Callable[[], object], count: int) -> float:
        """Median seconds; one more before is not counted."""
        seconds = []
        for _ in range(count + 1):
            self.ranks.barrier()
            started = time.perf_counter()
            action()
            get_accelerator().synchronize()
            seconds.append(time.perf_counter() - started)
        return median(seconds[1:])

    def step(self, stage: int, batch: int, count: int) -> float:
        trainer = self.trainer(stage, batch)
        return self.timed(lambda: trainer.step(0), count)

    def messages(self, count: int) -> dict[str, list[float]]:
        """Seconds of collectives over each of MESSAGES: the process group's, and DeepSpeed's for CPU ranks of one machine."""
        tensors = [torch.zeros(size // 4, device=self.ranks.device) for size in MESSAGES]
        ways: dict[str, Callable[[Tensor], object]] = {
            "all-reduce": dist.all_reduce,
            "all-gather": lambda t: dist.all_gather_into_tensor(t, t.chunk(self.ranks.world_size)[self.ranks.rank]),
        }
        if self.ranks.device.type == "cpu" and os.environ.get("LOCAL_SIZE") == str(self.ranks.world_size):
            ways["all-reduce in shared memory"] = comm.inference_all_reduce
        return {way: [self.timed(partial(call, t), count) for t in tensors] for way, call in ways.items()}

    def sends(self, stage: int) -> dict[str, float]:
        """Of a step: collectives called, bytes of their tensors, bytes that TCP sent for them, averaged over ranks."""
        trainer = self.trainer(stage, 2)
        self.ranks.barrier()
        before = tcp_bytes_sent()
        with Sent() as sent:
            trainer.step(0)
        return {"calls": sent.calls, "bytes": sent.bytes, "TCP": fmean(self.ranks.gather(tcp_bytes_sent() - before))}

    def saves(self, stage: int) -> dict[str, float]:
        """Bytes of a checkpoint, and the seconds it takes."""
        with tempfile.TemporaryDirectory() as folder:
            saved = checkpoint.save(self.trainer(stage, 2), Path(self.ranks.gather(folder)[0]), DATA)
            self.ranks.barrier()
        assert saved.path, saved
        return {"bytes": saved.bytes, "seconds": saved.seconds}


def measure(config: Config) -> int:
    """Measures the launched ranks and prints what it found, as JSON."""
    warnings.simplefilter("ignore")
    unless_launched()
    rank = Rank(config)
    world, share = rank.ranks.world_size, resolve_batches(config.trainer, rank.ranks.world_size)[0]
    stage = int(read_settings(config.trainer)[1]["zero_optimization"]["stage"])
    found: dict[str, Any] = {
        "ranks": world,
        "device": torch.cuda.get_device_name() if rank.ranks.device.type == "cuda" else "cpu",
        "zero_stage": stage,
        "ms_per_step": {f"{batch} samples a rank": 1000 * rank.step(stage, batch, 5) for batch in (share, 2 * share)},
        "seconds_of_80_bytes_and_16_MiB": rank.messages(5) if world > 1 else {},
        "a_step_sends": rank.sends(stage),
        "checkpoint": rank.saves(stage),
    }
    if rank.ranks.is_first:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    leave(run_command(measure, sys.argv[1:] or ["--config", "configs/demo.toml"]))
