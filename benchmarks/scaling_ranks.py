"""Measures ranks for benchmarks/scaling.py: steps, messages, collectives and bytes, checkpoints.

    deepspeed benchmarks/scaling_ranks.py --config configs/mvtec.toml [--SECTION.FIELD VALUE ...]

measures the ranks that were launched, on random images, and prints what ``benchmarks/scaling.py`` wants to know of them.
"""

import gc
import json
import multiprocessing
import os
import socket
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config, resolve_batches
from wads_dist.launch.command import run_command
from wads_dist.model.networks import Discriminator, Wads
from wads_dist.profiling.scaling import Compute, Networks, checkpoint_bytes, sent_bytes, step_collectives
from wads_dist.profiling.step import RandomImages
from wads_dist.training import checkpoint
from wads_dist.training.loop import initialise
from wads_dist.training.trainer import Trainer

MESSAGES = (80, 16 << 20)
"""Bytes of a message that is all latency, and of one that is mostly bandwidth."""
SPAWN = multiprocessing.get_context("spawn")


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


def networks_of(config: Config) -> Networks:
    with torch.device("meta"):
        modules = Wads(config.model, config.data.image_size), Discriminator(config.data.image_size, config.model.width)
    generator_segmenter, discriminator = (tuple(p.numel() for p in module.parameters()) for module in modules)
    return Networks(generator_segmenter, discriminator, sum(b.nbytes for module in modules for b in module.buffers()))


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

    def forget(self) -> None:
        self.trainers.clear()
        gc.collect()

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
        """Of a step: collectives called, bytes of their tensors, bytes TCP sent for them, averaged over ranks; and formulas."""
        trainer, world = self.trainer(stage, 2), self.ranks.world_size
        formula = step_collectives(networks_of(self.config), stage, world)
        self.ranks.barrier()
        before = tcp_bytes_sent()
        with Sent() as sent:
            trainer.step(0)
        return {
            "calls": sent.calls,
            "calls, formula": sum(call.count for call in formula),
            "bytes": sent.bytes,
            "bytes, formula": sum(call.count * call.size for call in formula),
            "TCP": fmean(self.ranks.gather(tcp_bytes_sent() - before)),
            "TCP, formula": sum(sent_bytes(call, world, gloo=True) for call in formula),
        }

    def saves(self, stage: int) -> dict[str, float]:
        """Bytes of a checkpoint, and the formula's; the seconds it takes."""
        with tempfile.TemporaryDirectory() as folder:
            saved = checkpoint.save(self.trainer(stage, 2), Path(self.ranks.gather(folder)[0]), DATA)
            self.ranks.barrier()
        assert saved.path, saved
        formula = checkpoint_bytes(networks_of(self.config), stage, self.ranks.world_size)
        return {"bytes": saved.bytes, "bytes, formula": formula, "seconds": saved.seconds}


def serve(pipe: Connection, environment: dict[str, str], options: list[str]) -> None:
    """Does what comes through the pipe, until it closes; replies with the result, or with what went wrong."""
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    for stream in (1, 2):  # DeepSpeed's chatter
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    try:
        rank = Rank(load_config(options))
        while True:
            name, arguments = pipe.recv()
            pipe.send(getattr(rank, name)(**arguments))
    except EOFError:
        os._exit(0)
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))
        os._exit(1)


def lone_world(size: int) -> dict[str, str]:
    """The environment of a world on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    return address | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), str(size))


class World:
    """CPU ranks in processes of their own, idle unless asked."""

    def __init__(self, size: int, options: list[str]) -> None:
        place = lone_world(size) | {"DS_ACCELERATOR": "cpu"}
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = SPAWN.Pipe()
            environment = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(SPAWN.Process(target=serve, args=(theirs, environment, options), daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def send(self, name: str, **arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((name, arguments))

    def result(self) -> Any:
        """The first rank's, when all have replied."""
        replies = [pipe.recv() for pipe in self.pipes]
        for error in (reply for reply in replies if isinstance(reply, Exception)):
            raise error
        return replies[0]

    def ask(self, name: str, **arguments: Any) -> Any:
        self.send(name, **arguments)
        return self.result()

    def close(self) -> None:
        """Ends the ranks."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join()


def cpu_seconds_of_others(worlds: list[World]) -> float:
    """CPU time that the machine has spent so far on anything but these ranks, other virtual machines included (Linux)."""
    ticks = [int(part) for part in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    for process in (process for world in worlds for process in world.processes):
        own = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += [-int(own[11]), -int(own[12])]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # less idle, less waiting for disks


def fit_compute(times: dict[int, float]) -> Compute:
    """A line through the seconds of a step at two numbers of samples."""
    (few, short), (many, long) = sorted(times.items())
    sample = (long - short) / (many - few)
    return Compute(sample, short - few * sample)


def fit_links(times: dict[str, list[float]], ranks: int) -> dict[str, dict[str, float]]:
    """Latency of a hop and bandwidth of a ring, by way, from the seconds of MESSAGES."""
    links = {}
    for way, (short, long) in times.items():
        turns = (1 if way == "all-gather" else 2) * (ranks - 1)
        bandwidth = turns / ranks * (MESSAGES[1] - MESSAGES[0]) / (long - short)
        links[way] = {"latency": short / turns, "bandwidth": bandwidth}
    return links


def measure(config: Config) -> int:
    """Measures the launched ranks and prints what it found, as JSON."""
    warnings.simplefilter("ignore")
    if "RANK" not in os.environ:
        os.environ.update(lone_world(1), RANK="0", LOCAL_RANK="0")
    rank = Rank(config)
    world, share = rank.ranks.world_size, resolve_batches(config, rank.ranks.world_size)[0]
    stage = int(json.loads(read_settings(config)[0].read_text())["zero_optimization"]["stage"])
    times = {batch: rank.step(stage, batch, 5) for batch in (share, 2 * share)}
    compute = fit_compute(times)
    found: dict[str, Any] = {
        "ranks": world,
        "device": torch.cuda.get_device_name() if rank.ranks.device.type == "cuda" else "cpu",
        "zero_stage": stage,
        "ms_per_step": {f"{batch} samples a rank": 1000 * seconds for batch, seconds in times.items()},
        "ms_per_sample": 1000 * compute.sample,
        "ms_per_step_besides": 1000 * compute.step,  # with more than one rank, communication among it
        "links": fit_links(rank.messages(5), world) if world > 1 else {},
        "a_step_sends": rank.sends(stage),
        "checkpoint": rank.saves(stage),
    }
    if rank.ranks.is_first:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    leave(run_command(measure, sys.argv[1:] or ["--config", "configs/demo.toml"]))
