"""Where the time of a training step goes: by phase, by operator, and beside what the device could compute.

The step is the trainer's own, on images made here, so that no data set is needed. Phases are what lies between the moments that
the trainer sets anyway; on a GPU they are the stream's time, which the host may run ahead of.
"""

import contextlib
import itertools
import json
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from wads_dist.common.files import write_text
from wads_dist.common.heartbeat import Heartbeat
from wads_dist.common.ranks import Ranks
from wads_dist.config.schema import Config
from wads_dist.data.training import synthesis_settings
from wads_dist.kernels.synthesis import Batch, synthesise
from wads_dist.model.networks import AUTOCAST_DTYPE
from wads_dist.profiling.timing import host_clock, measure_device
from wads_dist.runs.record import code_version
from wads_dist.shards.textures import procedural_textures
from wads_dist.training.checkpoint import zero_stage
from wads_dist.training.loop import initialise
from wads_dist.training.timing import now, seconds_between, synchronise
from wads_dist.training.trainer import Trainer

IMAGES = 64
WARM_UP = 5
BUDGET = 210e6
"""Samples: 700 epochs of 20,000 for each of 15 categories (paper)."""
PEAKS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "B200": 2250.0, "MI300X": 1307.4}
"""Dense bf16 TFLOP/s by the makers' data sheets, of the SXM or OAM form."""


class RandomImages:
    """``TrainingData``'s batches, over noise."""

    def __init__(self, config: Config, device: torch.device) -> None:
        size, generator = config.data.store_size, torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (IMAGES, 3, size, size), generator=generator, dtype=torch.uint8).to(device)
        self.textures = torch.from_numpy(procedural_textures(size=size)).to(device)
        self.settings = synthesis_settings(config.synthesis, config.data.image_size)
        self.backend = config.trainer.kernels

    def batch(self, sample: Tensor, upcoming: Tensor | None = None) -> Batch:
        return synthesise(self.images, self.textures, sample, 0, self.settings, None, IMAGES, self.backend)


class PhaseClock(Heartbeat):
    """Adds up the time of the phases that the trainer enters."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.on_device = device.type != "cpu"
        self.marks: list[tuple[str, Any]] = []

    def enter(self, phase: str, step: int) -> None:
        self.marks.append((phase, now(self.on_device)))

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; waits for the device."""
        self.enter("", 0)
        if self.on_device:
            torch.cuda.synchronize()
        marks, self.marks = self.marks, []
        total: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in itertools.pairwise(marks):
            total[phase] += seconds_between(start, end)
        return dict(total)


class Untracked(contextlib.nullcontext[None]):
    """Counts FLOPs of no module in particular: the tracker of modules does not know ``torch.autograd.grad``."""

    parents = frozenset({"Global"})


def threads_of(config: Config) -> int:
    """Of this rank, as a launch would give it."""
    return config.trainer.threads or max(1, (os.cpu_count() or 1) // Ranks.from_environment().local_world_size)


def profiled(take: Callable[[int], None], device: torch.device, trace: Path | None) -> tuple[profile, int]:
    """torch's profile of two steps (``trace``: where it goes as a Chrome trace), and the FLOPs of one."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        take(2)
        synchronise(device)
    if trace:
        profiler.export_chrome_trace(str(trace))
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Untracked()  # type: ignore[assignment]
    with counter:
        take(1)
    return profiler, counter.get_total_flops()


def measure(config: Config, ranks: Ranks, steps: int, trace: Path | None = None) -> dict[str, Any]:
    """The accounting of ``steps`` steps of this rank, as a JSON object; with ``trace``, a Chrome trace of two more."""
    clock, on_gpu = PhaseClock(ranks.device), ranks.device.type == "cuda"
    stage = zero_stage(None, ranks.world_size)
    trainer = Trainer(config, ranks, RandomImages(config, ranks.device), heartbeat=clock, stage=stage)  # type: ignore[arg-type]
    trainer.generator_engine.train()
    trainer.discriminator_engine.train()
    batch = config.trainer.global_batch_size
    position = 0

    def take(count: int) -> None:
        nonlocal position
        for _ in range(count):
            trainer.step(position)
            position += batch

    take(WARM_UP)
    synchronise(ranks.device)
    clock.take()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    take(steps)
    synchronise(ranks.device)
    seconds = (time.perf_counter() - started) / steps
    phases = {name: value / steps for name, value in clock.take().items() if name}
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    profiler, total = profiled(take, ranks.device, trace)
    share = batch // ranks.world_size
    flops = total / share
    achieved, peak, source = flops * share / seconds / 1e12, *peak_tflops(ranks.device, trainer.precision)
    return {
        "device": measure_device(ranks.device).name,
        "versions": code_version(),
        "backbone": config.model.backbone,
        "width": config.model.width,
        "image_size": config.data.image_size,
        "global_batch_size": batch,
        "micro_batch_size": trainer.micro_batch_size,
        "world_size": ranks.world_size,
        "precision": trainer.precision,
        "images_per_second": batch / seconds,
        "step_ms": seconds * 1e3,
        "phases_ms": {name: value * 1e3 for name, value in phases.items()},
        "gflop_per_sample": flops / 1e9,
        "forward_gflop_per_sample": forward_flops(trainer, share),
        "tflops": achieved,
        "peak_tflops": peak,
        "peak": source,
        "utilisation": achieved / peak,
        "memory_bytes": memory,
        "hours_for_the_papers_budget": {
            n: BUDGET / (batch / ranks.world_size / seconds * n) / 3600 for n in (1, 8, 64)
        },
        **operators(profiler, on_gpu),
    }


def forward_flops(trainer: Trainer, share: int) -> dict[str, float]:
    """GFLOP a sample of one pass through each part of the networks. (Of backward passes torch cannot say whose they are.)"""
    batch = trainer.data.batch(trainer.sample_ids(0)[0])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trainer.generator_engine.module(batch.clean, batch.anomalous, True)
        trainer.discriminator_engine.module(batch.clean)
    counts = {name: sum(count.values()) for name, count in counter.get_flop_counts().items()}

    def of(name: str, module: torch.nn.Module) -> float:
        if name in counts:  # a container whose children are called one by one is not counted itself
            return counts[name] / len(batch.clean) / 1e9
        return sum(of(f"{name}.{child}", part) for child, part in module.named_children())

    generator, segmenter = trainer.generator_engine.module.generator, trainer.generator_engine.module.segmenter
    parts = {f"generator.{name}": of(f"Wads.generator.{name}", part) for name, part in generator.named_children()}
    parts["generator.stack"] /= 2  # on X and on X_a
    parts["generator.code"] /= 2
    parts |= {f"segmenter.{name}": of(f"Wads.segmenter.{name}", part) for name, part in segmenter.named_children()}
    return parts | {"discriminator": of("Discriminator", trainer.discriminator_engine.module)}


def operators(profiler: profile, on_gpu: bool) -> dict[str, Any]:
    """The dearest operators or kernels and their shares, and what of the time was communication and idleness of a GPU."""
    table = profiler.key_averages()
    cost = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in table}
    whole = sum(cost.values()) or 1.0
    sent = sum(value for name, value in cost.items() if name.startswith(("nccl", "gloo")))
    result: dict[str, Any] = {
        "operators": {name: value / whole for name, value in sorted(cost.items(), key=lambda c: -c[1])[:12]},
        "communication": sent / whole,
    }
    if on_gpu:
        spans = sorted(
            (e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == DeviceType.CUDA
        )
        busy, reached = 0.0, spans[0][0]
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        result["idle"] = 1 - busy / (reached - spans[0][0])
    return result


def peak_tflops(device: torch.device, precision: str) -> tuple[float, str]:
    """What model FLOPs are set beside: the data sheet's peak where it is known, else what a large matrix product reaches."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, peak in PEAKS.items():
        if known in name and precision != "fp32":
            return peak, f"data sheet, dense {precision}"
    n, dtype = (8192 if name else 2048), AUTOCAST_DTYPE.get(precision, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    clock = host_clock(lambda: a @ b, device)
    return 2 * n**3 / min(clock() for _ in range(5)) / 1e6, f"a measured {precision} product of {n}×{n} matrices"


def show(result: dict[str, Any], console: Console) -> None:
    """The accounting for people."""
    r = result
    console.print(
        f"{r['backbone']}, width {r['width']}, {r['image_size']}², global batch {r['global_batch_size']} on {r['world_size']} "
        f"ranks, {r['precision']}; {r['device']}",
        highlight=False,
    )
    table = Table("phase", "ms", "share", title="one step", title_justify="left")
    for name, ms in r["phases_ms"].items():
        table.add_row(name, f"{ms:.1f}", f"{100 * ms / r['step_ms']:.1f} %")
    table.add_row("step", f"{r['step_ms']:.1f}", f"{r['images_per_second']:.1f} images/s", style="bold")
    console.print(table)
    table = Table("operator", "share", title="dearest", title_justify="left")
    for name, part in r["operators"].items():
        table.add_row(name[:60], f"{100 * part:.1f} %")
    console.print(table)
    table = Table("one forward pass", "GFLOP/sample", title="arithmetic", title_justify="left")
    for name, value in r["forward_gflop_per_sample"].items():
        table.add_row(name, f"{value:.3f}")
    table.add_row("step, forward and backward", f"{r['gflop_per_sample']:.2f}", style="bold")
    console.print(table)
    hours = ", ".join(f"{h:,.0f} h on {n}" for n, h in r["hours_for_the_papers_budget"].items())
    console.print(
        f"{r['tflops']:.3f} TFLOP/s, {100 * r['utilisation']:.1f} % of {r['peak_tflops']:.3g} ({r['peak']})\n"
        f"memory {r['memory_bytes'] / 2**30:.2f} GiB; communication {100 * r['communication']:.1f} %"
        + (f"; idle {100 * r['idle']:.1f} %" if "idle" in r else "")
        + f"\nthe paper's budget of 210 million samples: {hours} such ranks, if nothing is lost to communication",
        highlight=False,
    )


def profile_step(config: Config, steps: int, to: str | None, trace: Path | None) -> int:
    """Measures, shows and writes; the first rank speaks."""
    ranks = initialise(config, threads_of(config))
    result = measure(config, ranks, steps, trace if ranks.is_first else None)
    if ranks.is_first:
        show(result, Console(stderr=to == "-"))
        text = json.dumps(result, indent=1)
        if to == "-":
            print(text)
        elif to:
            write_text(Path(to), text)
    ranks.barrier()
    return 0
