"""How training scales: the model of docs/scaling.md, checked against what can be measured here, and what it predicts.

    python benchmarks/scaling.py [--predict-only] [--gpu-ms-per-sample 0.1 0.3 1] [--json FILE] [--SECTION.FIELD VALUE ...]

Starts CPU ranks of one thread each, with the networks of configs/demo.toml. One rank, two at once that know nothing of each
other, and two that train together take turns; what the two take is set beside what the model makes of the one. Then every
collective on 1, 2 and 4 ranks is counted, and every checkpoint weighed, at ZeRO 0 to 3. Last come the predictions for the
networks of ``--config``. On a cluster, ``benchmarks/scaling_ranks.py`` measures what they assume.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich import box
from rich.console import Console
from rich.table import Table
from scaling_ranks import World, cpu_seconds_of_others, fit_compute, fit_links, networks_of

from wads_dist.config.deepspeed import read_settings
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.profiling import scaling
from wads_dist.profiling.scaling import Compute, Model, Network, Networks, Storage
from wads_dist.scheduler.plan import form_groups
from wads_dist.shards.arguments import Parser, local_path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GPUS, CATEGORIES = [2**i for i in range(11)], 15
FITTED, CHECKED = (2, 8), (4, 8)  # samples a rank: what one rank is timed at; what two are predicted and timed at
ASSUMED = {  # docs/scaling.md says why
    "gpu_ms_per_step": (0.5, "of the GPU whatever the batch: the optimisers"),
    "host_ms_per_step": (12.0, "of the host, which launches some 2,000 kernels"),
    "gpus_per_node": (8, "GPUs in a node"),
    "nvlink": (450.0, "GB/s of a GPU within its node, one way"),
    "nic": (50.0, "GB/s out of the node for each of its GPUs, one way"),
    "reached": (0.8, "part of both that a long message reaches"),
    "writer": (0.34, "GB/s at which one rank saves"),
    "storage": (10.0, "GB/s of the shared file system, all together"),
    "files": (1000.0, "files a second that it creates and syncs"),
    "start_up": (60.0, "seconds from a category's start to its first step"),
    "evaluation": (30.0, "seconds from its last step to its scores"),
    "data": (0.33, "GB of its shards (MVTec AD's 4.9 GB / 15)"),
}
Rows = list[dict[str, Any]]


def check_time(solo: World, twin: World, pair: World, networks: Networks, rounds: int) -> dict[str, Rows]:
    """Two ranks that train together beside the model: one rank's time, alone or beside another, and a fitted link.

    A reading comes with the CPU seconds a second that other processes took meanwhile.
    """
    readings: dict[Any, list[tuple[float, Any]]] = defaultdict(list)
    worlds = [solo, twin, pair]

    def read(key: Any, asked: list[World], name: str, **arguments: Any) -> None:
        others, started = cpu_seconds_of_others(worlds), time.monotonic()
        for world in asked:
            world.send(name, **arguments)
        answers = [world.result() for world in asked]
        others = (cpu_seconds_of_others(worlds) - others) / (time.monotonic() - started)
        readings[key].append((others, max(answers) if name == "step" else answers[0]))  # all wait for the slower

    for _ in range(rounds):
        for stage in (0, 1):
            for batch in FITTED:
                read(("alone", stage, batch), [solo], "step", stage=stage, batch=batch, count=2)
                read(("beside", stage, batch), [solo, twin], "step", stage=stage, batch=batch, count=2)
            for batch in CHECKED:
                read(("pair", stage, batch), [pair], "step", stage=stage, batch=batch, count=2)
        read("messages", [pair], "messages", count=5)
    # Of each, the half that was disturbed least.
    kept = {key: sorted(values, key=itemgetter(0))[: (len(values) + 1) // 2] for key, values in readings.items()}
    seconds = {key: median(value for _, value in values) for key, values in kept.items() if key != "messages"}
    messages = [reading for _, reading in kept["messages"]]
    links = fit_links({way: [median(m[way][i] for m in messages) for i in (0, 1)] for way in messages[0]}, ranks=2)
    rows = []
    for stage, batch in ((stage, batch) for stage in (0, 1) for batch in CHECKED):
        key = ("pair", stage, batch)
        row = {"ZeRO": stage, "samples a rank": batch, "measured ms": 1000 * seconds[key]}
        for how in ("alone", "beside"):
            compute = fit_compute({few: seconds[how, stage, few] for few in FITTED})
            model = Model(networks, stage, compute, Network.flat(**links["all-reduce"]), Storage(1, 1, 1))
            predicted, row["of it sending"] = model.step(2, 2 * batch), 1000 * model.communication(2)
            row |= {f"from one {how}": 1000 * predicted, f"error, {how} %": 100 * (predicted / seconds[key] - 1)}
        rows.append(row | {"CPUs of others": median(others for others, _ in kept[key])})
    return {
        f"A step of two CPU ranks: medians of the quieter half of {rounds} rounds": rows,
        "Links of two CPU ranks": [
            {"": way, "µs a hop": 1e6 * link["latency"], "GB/s": link["bandwidth"] / 1e9} for way, link in links.items()
        ],
    }


def check_bytes(world: World, ranks: int) -> Rows:
    """What a step sends and a checkpoint takes at every stage, beside the formulas; MB of 1e6 bytes."""
    rows = []
    for stage in range(4):
        world.ask("forget")
        step, saved = world.ask("sends", stage=stage), world.ask("saves", stage=stage)
        row = {"ranks": ranks, "ZeRO": stage, "calls": step["calls"], "formula": step["calls, formula"]}
        for name, found, key in (("MB", step, "bytes"), ("TCP MB", step, "TCP"), ("saved MB", saved, "bytes")):
            formula = found[f"{key}, formula"]
            row |= {name: found[key] / 1e6, f"{name}, error %": 100 * (formula / found[key] - 1) if formula else None}
        rows.append(row)
    return rows


def check(rounds: int) -> dict[str, Rows]:
    options = ["--config", str(CONFIGS / "demo.toml"), "--trainer.threads", "1"]
    solo, twin, pair = (World(size, options) for size in (1, 1, 2))
    found = check_time(solo, twin, pair, networks_of(load_config(options)), rounds)
    twin.close()
    weighed: Rows = []
    for ranks in (1, 2, 4):
        world = {1: solo, 2: pair}.get(ranks) or World(ranks, options)
        weighed += check_bytes(world, ranks)
        world.close()
    return found | {"Collectives of a step, bytes a rank sends by TCP, and checkpoints": weighed}


def models(config: Config, given: argparse.Namespace) -> dict[float, Model]:
    """By milliseconds a sample takes on a GPU."""
    zero = json.loads(read_settings(config)[0].read_text())["zero_optimization"]
    base = Model(
        networks_of(config),
        zero["stage"],
        Compute(0.0),
        Network(int(given.gpus_per_node), given.reached * given.nvlink * 1e9, given.reached * given.nic * 1e9),
        Storage(given.writer * 1e9, given.storage * 1e9, given.files),
        int(zero["reduce_bucket_size"]),
        given.start_up,
        given.evaluation,
        given.data * 1e9,
        config.checkpoint.every_minutes * 60 or float("inf"),
    )
    step, host = given.gpu_ms_per_step / 1000, given.host_ms_per_step / 1000
    return {ms: replace(base, compute=Compute(ms / 1000, step, host)) for ms in given.gpu_ms_per_sample}


def one_category(each: dict[float, Model], samples: int, batch: int, grow: bool) -> Rows:
    """One category on all GPUs: at a constant global batch or, to ``grow``, at ``batch`` samples a GPU. Efficiency is samples a
    second and GPU over those of one GPU: in a step, and over all of a category."""
    rows = []
    for gpus in GPUS:
        total = batch * gpus if grow else batch
        if total % gpus:
            break  # the trainer refuses it
        model = next(iter(each.values()))
        row = {"GPUs": gpus, "samples a GPU": total // gpus}
        row |= {"sending ms": 1000 * model.communication(gpus), "saving s": model.save(gpus)}
        for ms, model in each.items():
            row[f"step, {ms} ms"] = 100 * total / batch * model.step(1, batch) / (gpus * model.step(gpus, total))
        for ms, model in each.items():
            one = model.category(1, batch, samples)
            row[f"all, {ms} ms"] = 100 * one / (gpus * model.category(gpus, total, samples))
        rows.append(row)
    return rows


def by_stage(model: Model) -> Rows:
    """What a step sends at each ZeRO stage, and how long its collectives take; the agreement is one of them."""
    rows = []
    for gpus in GPUS[1:]:
        row: dict[str, Any] = {"GPUs": gpus}
        for stage in (0, 1, 3):  # ZeRO-2 sends what ZeRO-1 does
            calls = scaling.step_collectives(model.networks, stage, gpus, model.bucket)
            row[f"ZeRO-{stage} MB"] = sum(scaling.sent_bytes(call, gpus) for call in calls) / 1e6
            row[f"ZeRO-{stage} ms"] = 1000 * replace(model, stage=stage).communication(gpus)
        rows.append(row | {"agreement µs": 1e6 * model.network.seconds(calls[0], gpus)})
    return rows


def all_categories(each: dict[float, Model], config: Config, per_node: int, straddle: bool) -> Rows:
    """CATEGORIES of one length from a queue; efficiency is what one GPU would take, over GPUs times what they take."""
    parallel, batch = config.parallel.model_copy(update={"straddle_nodes": straddle}), config.trainer.global_batch_size
    rows = []
    for gpus in GPUS:
        groups = form_groups([str(gpu // per_node) for gpu in range(gpus)], parallel, CATEGORIES, batch)
        size = len(groups[0])
        row: dict[str, Any] = {}
        hours: dict[str, float] = {}
        for ms, model in each.items():
            one = model.category(size, batch, config.trainer.samples, min(len(groups), CATEGORIES))
            seconds = scaling.queue_seconds([one] * CATEGORIES, len(groups))
            row |= {"GPUs": gpus, "a category": size, "idle %": 100 - 100 * CATEGORIES * size * one / (gpus * seconds)}
            alone = CATEGORIES * model.category(1, batch, config.trainer.samples)
            hours |= {f"{ms} ms, %": 100 * alone / (gpus * seconds), f"{ms} ms, h": seconds / 3600}
        rows.append(row | hours)
    return rows


def predict(config: Config, given: argparse.Namespace) -> dict[str, Rows]:
    each, batch, samples = models(config, given), config.trainer.global_batch_size, config.trainer.samples
    inside, across = (all_categories(each, config, int(given.gpus_per_node), straddle) for straddle in (False, True))
    return {
        "What a GPU sends in a step": by_stage(next(iter(each.values()))),
        f"One category, global batch {batch}: efficiency, %": one_category(each, samples, batch, False),
        "One category, global batch 1024: efficiency, %": one_category(each, samples, 1024, False),
        f"One category, {batch} samples a GPU: efficiency, %": one_category(each, samples, batch, True),
        f"{CATEGORIES} categories, groups within nodes": inside,
        f"{CATEGORIES} categories, parallel.straddle_nodes": across,
    }


def show(tables: dict[str, Rows], console: Console) -> None:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.{1 if abs(value) >= 10 else 2}f}"
        return "–" if value is None else str(value)

    for title, rows in tables.items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for column in rows[0]:
            table.add_column(column.replace(" ", "\n"), justify="right")
        for row in rows:
            table.add_row(*map(text, row.values()))
        console.print(table)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIGS / "mvtec.toml"), help="what is predicted")
    parser.add_argument("--predict-only", action="store_true", help="measure nothing")
    parser.add_argument("--rounds", type=int, default=5, help="in which the timings take turns (default: 5)")
    parser.add_argument(
        "--gpu-ms-per-sample", type=float, nargs="+", default=[0.1, 0.3, 1.0], help="(default: 0.1 0.3 1)"
    )
    parser.add_argument("--json", type=local_path, help="also write the numbers to this file")
    for name, (value, meaning) in ASSUMED.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=value, help=f"{meaning} (default: {value})", metavar="X")
    given, settings = parser.parse_known_args()
    config, console = load_config(["--config", given.config, *settings]), Console()
    result: dict[str, Any] = {"assumed": {name: getattr(given, name) for name in ASSUMED}}
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, {packages}"
    console.print(result["machine"], highlight=False)
    if not given.predict_only:
        result["load"] = [os.getloadavg()[0]]
        result["checked"] = check(given.rounds)
        result["load"].append(os.getloadavg()[0])
        result["cpu_seconds"] = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        show(result["checked"], console)
        console.print(
            "load {:.1f} before, {:.1f} after;".format(*result["load"]), f"{result['cpu_seconds']:.0f} s of CPU"
        )
    console.print("\nPREDICTIONS: no GPU has run this code. docs/scaling.md says what they assume.", style="bold")
    result["predicted"] = predict(config, given)
    show(result["predicted"], console)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
