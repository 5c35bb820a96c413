"""Kernel measurements for people: tables that fit 80 columns, and a roofline plot."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich import box
from rich.table import Table

from wads_dist.profiling.peers import TERMS
from wads_dist.profiling.timing import Device

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

Result = Mapping[str, Any]


def _table(title: str, **more: Any) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, **more)


def _is_whole(result: Result) -> bool:
    """Whether it is all of the objective, or synthesis."""
    return tuple(result.get("terms", TERMS)) == TERMS


def _label(result: Result) -> str:
    return result["implementation"] + ("" if _is_whole(result) else f" ({', '.join(result['terms'])})")


def _number(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1}f}" if value >= 1 else f"{value:.2g}"


def result_tables(results: Sequence[Result], device: Device) -> Iterator[Table]:
    """A table per kernel and shape, in it a section per type and pass, in that a row per implementation."""
    warm = any(r["warm_us"] is not None for r in results)
    caption = (
        f"{device.name}: a copy moves {device.copy_gbps:,.0f} GB/s; fp32 peak {device.peak_gops:,.0f} G operations/s "
        f"({device.peak}). Of copy, of roof: of the time that the fewest bytes take at the copy's rate, and of that or of the "
        "operations' time at peak, whichever is longer. Slower: than the first row of the section."
        + " Host: not a CUDA graph, timed by the host's clock."
        * warm
    )
    kinds = itertools.groupby(results, lambda r: (r["kernel"], r["shape"], r.get("layout")))
    groups = [(key, list(rows)) for key, rows in kinds]
    for (kernel, shape, of_objective), rows in groups:
        last = rows is groups[-1][1]
        layout = " channels_last" if of_objective == "channels_last" else ""
        title = f"{kernel} {'×'.join(map(str, shape))}{layout}"
        table = _table(title, caption=caption if last else None, caption_justify="left")
        table.add_column("implementation", overflow="fold")
        columns = ["cold µs" if warm else "µs", *(["warm µs"] if warm else []), "GB/s", "of copy", "of roof", "slower"]
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for (dtype, passes), section in itertools.groupby(rows, lambda r: (r["dtype"], r["pass"])):
            _add_section(table, f"{dtype} {passes}", list(section), warm)
        yield table


def _add_section(table: Table, name: str, rows: Sequence[Result], warm: bool) -> None:
    whole = next((r for r in rows if _is_whole(r)), rows[0])
    blank = [""] * warm
    bound = f"bound by {'bytes' if whole['roof'] == 'bytes' else 'ops'}, {whole['bytes'] / 1e6:.1f} MB"
    gbps = whole["bytes"] / whole["roof_us"] / 1e3
    table.add_section()
    table.add_row(name, style="bold")
    table.add_row(bound, _number(whole["roof_us"]), *blank, _number(gbps), style="dim")
    fastest = next((r["median_us"] for r in rows if r["median_us"]), None)
    for r in rows:
        if "error" in r:
            table.add_row(_label(r), "failed", style="red")
            continue
        times = [_number(r["median_us"])] + ["host" if r["warm_us"] is None else _number(r["warm_us"])] * warm
        fractions = [f"{_number(100 * r[name])} %" for name in ("copy_fraction", "fraction_of_roof")]
        table.add_row(_label(r), *times, _number(r["gbps"]), *fractions, f"{_number(r['median_us'] / fastest)}×")


def left_out(versions: Mapping[str, str]) -> str:
    """One sentence on the peers that could not be measured."""
    absent = [name for name, text in versions.items() if text == "not installed"]
    unfit = [f"{name} ({text.partition(', ')[2]})" for name, text in versions.items() if ", needs" in text]
    parts = [f"not installed: {', '.join(absent)}"] * bool(absent) + [f"not measured: {', '.join(unfit)}"] * bool(unfit)
    return "; ".join(parts) or "every peer is installed"


MIX = dict(total="all", fma="fma", float="float", mufu="mufu", integer="int", load="ld", store="st", shuffle="shfl")
"""Classes of instructions in the tables, and their columns' names."""


def compile_tables(compiled: Sequence[Result]) -> Iterator[Table]:
    """For each kernel a row per target: registers of a thread, bytes spilled, shared memory of a block, and how many
    instructions of each class its code has (each counted once, however often a loop runs it)."""
    for kernel, rows in itertools.groupby(compiled, lambda k: k["kernel"]):
        table = _table(f"compiled: {kernel}")
        table.add_column("target", no_wrap=True)
        for name in ("regs", "spills", "shared", *MIX.values()):
            table.add_column(name, justify="right", no_wrap=True)
        for k in rows:
            mix = k.get("instructions", {})
            numbers = [k["registers"], k["spills"], k["shared_bytes"], *(mix.get(name, "–") for name in MIX)]
            table.add_row(k["target"], *map(str, numbers))
        yield table


def save_roofline(path: Path, results: Sequence[Result], device: Device) -> None:
    """Writes a PNG: operations per second over operations per byte, both axes logarithmic, a panel per kernel.

    Operations and bytes are the fewest that the computation needs (``kernel_profile.bytes_and_operations``), the same for every
    implementation of it, so that one that moves more or computes more lies lower, not further left or right.
    """
    kernels = list(dict.fromkeys(r["kernel"] for r in results))
    figure = Figure(figsize=(6.2 * len(kernels), 5.6), layout="constrained")
    for axis, kernel in zip(figure.subplots(1, len(kernels), squeeze=False)[0], kernels, strict=True):
        _roofline(axis, kernel, [r for r in results if r["kernel"] == kernel and r["median_us"]], device)
    figure.suptitle(f"{device.name}: copy {device.copy_gbps:,.0f} GB/s, peak {device.peak}", fontsize=9)
    figure.savefig(path, dpi=130, format="png")


def _roofline(axis: Axes, kernel: str, results: Sequence[Result], device: Device) -> None:
    """A column of points for each type and pass: its intensity is that of the whole objective, or of the samples."""
    ridge = device.peak_gops / device.copy_gbps
    points = [(r, r["operations"] / r["bytes"], r["operations"] / r["median_us"] / 1e3) for r in results]
    intensities = [ridge, *(x for _, x, _ in points)]
    low, high = min(intensities) / 1.6, max(intensities) * 1.6
    floor = min([device.peak_gops, *(y for _, _, y in points)]) / 4
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(floor, device.peak_gops * 2))
    axis.plot([low, ridge, high], [low * device.copy_gbps, device.peak_gops, device.peak_gops], color="black", lw=1.5)
    near: dict[str, Any] = {"fontsize": 7.5, "va": "bottom", "rotation_mode": "anchor", "transform_rotates_text": True}
    slope = math.degrees(math.atan(device.copy_gbps))
    axis.text(low * 1.05, low * 1.15 * device.copy_gbps, f"copy {device.copy_gbps:,.0f} GB/s", rotation=slope, **near)
    axis.text(high / 1.05, device.peak_gops * 1.1, f"{device.peak_gops:,.0f} G/s", ha="right", **near)

    batches = sorted({r["shape"][0] for r in results})
    for i, label in enumerate(dict.fromkeys(map(_label, results))):
        own = [p for p in points if _label(p[0]) == label]
        areas = [25 + 60 * batches.index(r["shape"][0]) / max(1, len(batches) - 1) for r, _, _ in own]
        face = f"C{i}" if _is_whole(own[0][0]) else "white"
        axis.scatter([x for _, x, _ in own], [y for _, _, y in own], areas, face, edgecolors=f"C{i}", label=label)
    columns: dict[float, dict[str, str]] = {}
    for r, x, _ in points:
        if _is_whole(r):
            columns.setdefault(round(x, 2), {})[r["dtype"]] = r["pass"].replace("+", "\n+ ")
    for x, names in columns.items():
        axis.axvline(x, color="0.85", lw=0.8, zorder=0)
        text = f"{', '.join(names)}\n{next(iter(names.values()))}"
        axis.text(x, 1.01, text, transform=axis.get_xaxis_transform(), fontsize=7, color="0.35", ha="center")

    title = f"batch {', '.join(map(str, batches))}: small to large" if len(batches) > 1 else None
    axis.legend(title=title, fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    axis.set(xlabel="operations per byte", ylabel="G operations/s")
    axis.set_title(kernel, pad=32)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.grid(which="major", axis="y", alpha=0.3)
