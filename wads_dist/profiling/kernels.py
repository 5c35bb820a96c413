"""Kernel throughput: measures both kernels and their peers on this device, and says how close each comes to what it could do.

A result's bound is the larger of two times: the fewest bytes an implementation can move over what a large copy on this device
moves, and the operations that the best known scheme needs over the device's fp32 peak (``bytes_and_operations``).
"""

import csv
import io
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console

from wads_dist.common.errors import ExitCode
from wads_dist.common.files import python_path, write_text
from wads_dist.kernels import library
from wads_dist.profiling.names import KERNELS, Kernel, Layout
from wads_dist.profiling.peers import (
    DTYPES,
    IMPLEMENTATIONS,
    OURS,
    PACKAGES,
    TERMS,
    Case,
    Implementation,
    version,
)
from wads_dist.profiling.tables import compile_tables, left_out, result_tables, save_roofline
from wads_dist.profiling.timing import Clock, Device, cold_sets, graph_clock, host_clock, measure_device, take_turns
from wads_dist.training.timing import synchronise


@dataclass(frozen=True)
class Options:
    """What to measure (``only`` these implementations, if any is named) and where to put it (``json`` may be ``-``)."""

    device: torch.device
    batches: Sequence[int]
    size: int = 128
    dtypes: Sequence[str] = ("fp32",)
    kernels: Sequence[Kernel] = KERNELS
    only: Sequence[str] = ()
    seconds: float = 1.0
    layouts: Sequence[Layout] = ("contiguous",)
    compiled: bool = True
    json: str | None = None
    csv: Path | None = None
    plot: Path | None = None
    trace: Path | None = None


def bytes_and_operations(case: Case, terms: tuple[str, ...] = TERMS) -> tuple[float, float]:
    """The fewest bytes that must reach or leave memory, and the operations (a fused multiply-add is one) of ``case``.

    With P pixels of C channels in the batch and e bytes a value:

    objective, forward: x, X̂, logits and a uint8 mask are read: P·(2C·e + e + 1).
    objective, forward and backward: launch one reads x and X̂ and writes the gradient, launch two reads it and writes it scaled
        by grad_output; the gradient for the logits is made anew from logits and mask: P·(5C·e + 3e + 2).
    synthesis: clean and anomalous image and a uint8 mask are written, P·(2C·e + 1); read are the stored bytes of the crops,
        of mean area 0.81, up to four a value, and the texture under the masks, 3 % of the pixels in jittered crops of 0.65.

    Operations: four blurs of 22 taps a value forward and three backward, 30 more each for SSIM, 30 a pixel for focal loss and
    KL; synthesis 185 a pixel on average, half of the samples clean, as counted in ``kernels/synthesis/triton.py``.
    Where only some ``terms`` of the objective are computed, the others' bytes and operations are left out.
    """
    pixels, e = case.batch * case.size**2, DTYPES[case.dtype].itemsize
    values = 3 * pixels
    if case.kernel == "synthesis":
        per_value = (case.store_size / case.size) ** 2
        read = min(0.81 * per_value, 4) + 0.03 * min(0.65 * per_value, 4)
        return pixels + values * (2 * e + read), 185.0 * pixels
    moved = operations = 0.0
    if {"ssim", "mse"} & set(terms):
        moved += values * (5 if case.backward else 2) * e
        blurs = (118 + 96 * case.backward) if "ssim" in terms else 3
        operations += values * blurs
    if {"focal", "kl"} & set(terms):
        moved += pixels * (3 * e + 2 if case.backward else e + 1)
        operations += pixels * 30 * (1 + case.backward)
    return moved, operations


def cases(options: Options) -> list[Case]:
    """Every combination that was asked for; synthesis has no backward pass, and one layout."""
    o = options
    return [
        Case(kernel, batch, o.size, dtype, backward, o.device, layout)
        for kernel, batch, layout, dtype, backward in itertools.product(
            o.kernels, o.batches, o.layouts, o.dtypes, (False, True)
        )
        if not (kernel == "synthesis" and (backward or layout != o.layouts[0]))
    ]


def candidates(case: Case, only: Sequence[str] = ()) -> list[Implementation]:
    """What can be measured here: installed, for this device and type, and among the names asked for."""
    return [
        i
        for i in IMPLEMENTATIONS
        if i.kernel == case.kernel
        and case.dtype in i.dtypes
        and case.device.type in i.devices
        and (not only or i.name in only)
        and not i.missing()
        and (i.name != "native" or library.available())
    ]


def measure(
    case: Case, implementations: Sequence[Implementation], device: Device, seconds: float
) -> list[dict[str, Any]]:
    """A result per implementation, as the JSON file has it. One that raises gets ``error`` and no numbers.

    ``median_us`` is the cold median where there is one, as the bound is that of memory; ``warm_us`` the one out of L2.
    """
    torch.compiler.reset()  # past a few shapes torch.compile would silently run eagerly
    sets = [case.inputs(seed) for seed in range(cold_sets(bytes_and_operations(case)[0], case.device))]
    clocks: dict[tuple[str, str], Clock] = {}
    errors: dict[str, str] = {}
    for implementation in implementations:
        try:
            made = _clocks(implementation, case, sets)
            clocks |= {(implementation.name, kind): clock for kind, clock in made.items()}
        except Exception as error:  # a peer's failure is a result, and the others' numbers are still wanted
            errors[implementation.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    medians = take_turns(clocks, seconds)
    results = []
    for i in implementations:
        own = {kind: t for (name, kind), t in medians.items() if name == i.name}
        results.append(_result(case, i, device, own, errors.get(i.name)))
        results[-1]["peak_mib"] = None if i.name in errors else peak_mib(i, case, sets[0])
    return results


def peak_mib(implementation: Implementation, case: Case, inputs: tuple[torch.Tensor, ...]) -> float | None:
    """Device memory that a call takes beside its inputs, results included; None on a CPU, where it is not counted."""
    if case.device.type != "cuda":
        return None
    call = implementation.prepare(case, inputs)
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _clocks(implementation: Implementation, case: Case, sets: Sequence[tuple[torch.Tensor, ...]]) -> dict[str, Clock]:
    """``warm`` and, if there are several sets of inputs, ``cold``: of a graph. ``host`` where there is none."""
    if case.device.type == "cuda" and not implementation.waits:
        calls = [implementation.prepare(case, inputs) for inputs in sets]
        try:
            warm = graph_clock(calls[:1])
            return {"warm": warm, "cold": graph_clock(calls)} if len(calls) > 1 else {"warm": warm}
        except RuntimeError:  # another version of a peer may wait after all; what fails as such raises again
            torch.cuda.synchronize()
    return {"host": host_clock(implementation.prepare(case, sets[0]), case.device)}


def _result(
    case: Case,
    implementation: Implementation,
    device: Device,
    medians: Mapping[str, float],
    error: str | None,
) -> dict[str, Any]:
    moved, operations = bytes_and_operations(case, implementation.terms)
    memory, arithmetic = moved / device.copy_gbps / 1e3, operations / device.peak_gops / 1e3
    median = next((medians[kind] for kind in ("cold", "warm", "host") if kind in medians), None)
    gbps = moved / median / 1e3 if median else None
    result: dict[str, Any] = {
        "kernel": case.kernel,
        "implementation": implementation.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "pass": case.passes,
        "median_us": median,
        "cold_us": medians.get("cold"),
        "warm_us": medians.get("warm"),
        "clock": "host" if "host" in medians else "graph",
        "bytes": round(moved),
        "operations": round(operations),
        "gbps": gbps,
        "copy_fraction": gbps / device.copy_gbps if gbps else None,
        "roof": "bytes" if memory > arithmetic else "operations",
        "roof_us": max(memory, arithmetic),
        "fraction_of_roof": max(memory, arithmetic) / median if median else None,
    }
    if case.kernel == "objective":
        result["terms"] = list(implementation.terms)
        result["layout"] = case.layout
    return result | ({"error": error} if error else {})


def versions(device: torch.device) -> dict[str, str]:
    """What ran, and for each peer its version or why it was not measured."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device.type == "cuda":
        found["cuda" if torch.version.cuda else "hip"] = str(torch.version.cuda or torch.version.hip)
    else:
        found["native kernels"] = "compiled here" if library.available() else "no C++ compiler that works"
    for package in PACKAGES:
        uses = [i for i in IMPLEMENTATIONS if package in i.packages]
        unfit = all(device.type not in i.devices for i in uses)
        installed = version(package)
        found[package] = "not installed" if installed is None else f"{installed}, needs a GPU" if unfit else installed
    return found


def compiled_kernels() -> list[dict[str, Any]]:
    """``kernels.compiled``'s report, from its own process: here kernels may be interpreted.

    Raises:
        RuntimeError: it failed; holds the last line of what it said.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = python_path()
    command = [sys.executable, "-P", "-m", "wads_dist.kernels.compiled", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise RuntimeError(f"wads_dist.kernels.compiled exited with {done.returncode} and said: {said[-1]}")
    report: list[dict[str, Any]] = json.loads(done.stdout)
    return report


def save_trace(path: Path, options: Options) -> None:
    """A Chrome trace (chrome://tracing, Perfetto) of one call of everything measured, the first set of inputs, warm."""
    from torch.profiler import ProfilerActivity, profile, record_function

    calls = []
    for case in cases(options):
        inputs = case.inputs(0)
        for implementation in candidates(case, options.only):
            try:
                call = implementation.prepare(case, inputs)
                call()
            except Exception:  # the results say why
                continue
            calls.append((f"{implementation.name}: {case}", call))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (options.device.type == "cuda")
    synchronise(options.device)
    with profile(activities=activities) as recorded:
        for label, call in calls:
            with record_function(label):
                call()
                synchronise(options.device)
    recorded.export_chrome_trace(str(path))


def gather(options: Options, progress: Console) -> tuple[Device, dict[str, Any], list[str]]:
    """Measures everything: the device, the report as the JSON file has it, and a line for each thing of ours that failed.

    The files asked for are written as results come: a machine that is lent by the minute may be gone before the last. What
    fails is said on ``progress`` and hides none of the rest.
    """
    results: list[dict[str, Any]] = []
    with progress.status("the device's bandwidth and peak") as status:
        device = measure_device(options.device)
        report = {
            "device": device.name,
            "versions": versions(options.device),
            "copy_gbps": device.copy_gbps,
            "results": results,
            "compiled": [],
        }
        for case in cases(options):
            status.update(str(case))
            results += measure(case, candidates(case, options.only), device, options.seconds)
            write(report, options)
    failures = {
        f"{r['kernel']} {r['implementation']}: {r['error']}": r["implementation"] for r in results if "error" in r
    }
    if options.compiled:
        try:
            with progress.status("compiling for other devices"):
                report["compiled"] = compiled_kernels()
            write(report, options)
        except RuntimeError as error:
            failures[str(error)] = "triton"
    for failure in failures:
        progress.print(f"failed: {failure}", style="red", highlight=False, markup=False, soft_wrap=True)
    return device, report, [failure for failure, implementation in failures.items() if implementation in OURS]


CSV = (
    "device", "torch", "triton", "kernel", "implementation", "batch", "size", "layout", "dtype", "pass", "median_us", "cold_us",
    "warm_us", "clock", "gbps", "fraction_of_roof", "peak_mib", "error",
)  # fmt: skip
"""Columns of ``--csv``; a line is a result, and names its device, so that files of several can be joined."""


def write(report: Mapping[str, Any], options: Options) -> None:
    """The files of numbers that were asked for."""
    if options.json not in (None, "-"):
        write_text(Path(options.json), json.dumps(report, indent=1, allow_nan=False) + "\n")
    if options.csv:
        text = io.StringIO()
        lines = csv.DictWriter(text, CSV, extrasaction="ignore", lineterminator="\n")
        lines.writeheader()
        for result in report["results"]:
            shape = {"batch": result["shape"][0], "size": result["shape"][-1]}
            lines.writerow(report["versions"] | {"device": report["device"]} | shape | result)
        write_text(options.csv, text.getvalue())


def profile_kernels(options: Options) -> ExitCode:
    """Measures, prints, and writes the files asked for. ``CRASHED`` if a kernel of ours or the compile report failed."""
    console = Console(stderr=options.json == "-")
    device, report, broken = gather(options, Console(stderr=True))
    console.print(*result_tables(report["results"], device), sep="\n")
    console.print(left_out(report["versions"]), style="dim", highlight=False)
    console.print(*compile_tables(report["compiled"]), sep="\n")
    if options.json == "-":
        print(json.dumps(report, indent=1, allow_nan=False))
    if options.plot:
        save_roofline(options.plot, report["results"], device)
    if options.trace:
        save_trace(options.trace, options)
    return ExitCode.CRASHED if broken else ExitCode.OK
