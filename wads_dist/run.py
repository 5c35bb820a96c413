"""A run: prepares its folder, trains every category in child processes of their own, and sums up.

Every launched rank is a supervisor (``supervisor.py``). For each category it starts one worker with the same rank and a fresh
rendezvous. A worker that dies ends its peers and fails its category; the next category starts anew.
"""

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from rich.console import Console

from shards.build import build
from shards.errors import DataError
from shards.files import locked
from shards.source import Dataset
from wads_dist.checkpoint import write_text
from wads_dist.config import Config, config_difference, load_config
from wads_dist.data import open_texture_bank
from wads_dist.deepspeed_config import deepspeed_config, read_settings, resolve_precision
from wads_dist.distributed import Ranks
from wads_dist.errors import ExitCode, PreemptedError, ResumeError, WadsError, exit_code
from wads_dist.evaluate import evaluate, load_model
from wads_dist.rendezvous import Launch
from wads_dist.signals import StopRequest, stop_with_launcher, supervisor_signals
from wads_dist.supervisor import supervise
from wads_dist.tables import reconstruction_table, results_table
from wads_dist.worker import METRICS

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG, DEEPSPEED, SUMMARY, CODE, LOCK = "config.toml", "deepspeed.json", "summary.json", "code.json", ".lock"
# Settings that may differ between a run and its continuation: none changes what is learnt.
FREE_TO_CHANGE = (
    "run.",
    "data.cache",
    "data.categories",
    "data.root",
    "data.shards",
    "checkpoint.",
    "trainer.log_every",
    "trainer.max_rejected",
    "trainer.hang_timeout",
)
# Longer than the ranks of a launch outlive their launcher.
LOCK_SECONDS = 45.0


@dataclass
class Outcome:
    """What became of the categories of a run."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    preempted: bool = False
    """Asked to stop; what was not done yet is neither done nor failed."""

    @property
    def status(self) -> int:
        """The exit code: a lone category's own, else one that says that some failed."""
        if self.preempted:
            return ExitCode.PREEMPTED
        if not self.failed:
            return ExitCode.OK
        lone = len(self.failed) == 1 and not self.done
        return next(iter(self.failed.values())) if lone else ExitCode.CATEGORY_FAILED


def train_run(config: Config) -> int:
    """Trains what is missing of a run; returns the exit code. Every launched rank calls it.

    Raises:
        ConfigError, DataError, ResumeError: before anything is trained; on every rank.
        RankLostError: another launched rank is gone.
        PreemptedError: asked to stop while nothing was being trained, or asked twice.
    """
    config.require_data()
    stop = supervisor_signals()
    stop_with_launcher()
    launch = Launch.from_environment()
    try:
        with ExitStack() as held:
            outcome = train_categories(config, launch, stop, held)
            launch.leave()
        stop.leaving = True
    except BaseException as error:
        stop.leaving = True
        launch.leave_early(error)
        raise
    return outcome.status


def train_categories(config: Config, launch: Launch, stop: StopRequest, held: ExitStack) -> Outcome:
    """Trains the run's missing categories one after the other; the first rank records what became of them."""
    location, categories = prepare(config, launch, held)
    outcome = Outcome()
    console = Console()
    for category in categories:
        if (config.run.dir / category / METRICS).is_file():
            outcome.done.append(category)
            if launch.is_first:
                console.print(f"{category}: done already", highlight=False)
            continue
        code = supervise(config, launch, stop, location, category)
        if code == ExitCode.OK:
            outcome.done.append(category)
        elif code == ExitCode.PREEMPTED:
            outcome.preempted = True
            break
        else:
            outcome.failed[category] = code
            if launch.is_first:
                console.print(f"[red]{category}: failed with exit code {code}[/red]", highlight=False)
        if launch.is_first:
            record_summary(config.run.dir, outcome, categories, over=False)
        if stop.requested:  # too late for the category that has just ended
            raise PreemptedError("stopped as asked; the same command goes on with the next category")
    if launch.is_first:
        conclude(config, outcome, categories, console)
    return outcome


def prepare(config: Config, launch: Launch, held: ExitStack) -> tuple[str, list[str]]:
    """Builds shards where only images were given, opens the run's folder, and settles what is to be trained.

    ``held`` keeps the folder locked on the first rank.
    """
    plan: dict[str, Any] = {}
    if launch.is_first:
        try:
            check_settings(config, launch.world_size)  # before shards are built, which may take hours
            location = locate_shards(config)
            dataset = Dataset.open(location, cache=config.data.cache)
            categories = chosen_categories(config, dataset)
            hold_run(config.run.dir, held)
            open_run(config, {name: dataset.index.categories[name].fingerprint for name in categories})
            record_summary(config.run.dir, Outcome(), categories, over=False)
            plan = {"location": location, "categories": categories}
        except BaseException as error:
            launch.share("plan", json.dumps({"refused": exit_code(error)}))
            launch.leave()
            raise
    plan = json.loads(launch.share("plan", json.dumps(plan)))
    if "refused" in plan:
        launch.leave()
        raise SystemExit(plan["refused"])  # the first rank says what was wrong
    return plan["location"], plan["categories"]


def locate_shards(config: Config) -> str:
    """The location of the shards; those of ``data.root`` are built into the cache first (or found up to date)."""
    if config.data.shards is not None:
        return config.data.shards
    root = config.data.root
    assert root is not None
    if not root.is_dir():
        raise DataError(f"data.root {root}: no such folder; give the folder that holds the images")
    name = f"{root.resolve().name}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]}"
    out = config.data.cache / "built" / name
    wanted = None if config.data.categories == ["all"] else config.data.categories
    build(root, out, wanted, overwrite=True, progress=sys.stderr.isatty())
    return str(out)


def chosen_categories(config: Config, dataset: Dataset) -> list[str]:
    """The categories to train, in the order given (``all``: in the data set's)."""
    names = list(dataset.categories if config.data.categories == ["all"] else config.data.categories)
    missing = [c for c in names if c not in dataset.categories]
    if missing:
        raise DataError(
            f"data.categories: {', '.join(missing)} not in {dataset.location}; it has {', '.join(dataset.categories)}"
        )
    untested = [c for c in names if not dataset.index.categories[c].test]
    if untested:
        raise DataError(
            f"{dataset.location}: no test images of {', '.join(untested)}; there would be nothing to score after training. "
            f"Add test/good and test/<defect>, or leave the category out of data.categories"
        )
    return names


def check_settings(config: Config, world_size: int) -> None:
    """Finds what every worker would fail on, before the first one starts.

    Raises:
        ConfigError, DataError: batch and ranks, DeepSpeed's file, precision, or the texture bank do not work.
    """
    deepspeed_config(config, world_size)
    resolve_precision(config.trainer.precision, get_accelerator().device_name())
    open_texture_bank(config.data.textures, config.data.cache)


def hold_run(folder: Path, held: ExitStack) -> None:
    """Locks the run's folder until ``held`` is closed or this process ends.

    Raises:
        ResumeError: another launch still uses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    path.touch()
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            held.enter_context(locked(path, wait=False))
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ResumeError(
                    f"{folder} is in use by another launch ({path.read_text()}): end that one, or give another --run.dir"
                ) from None
            time.sleep(1)
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}")


def open_run(config: Config, fingerprints: dict[str, str]) -> None:
    """Creates the run's folder and records configuration and code, or checks that it belongs to this configuration.

    Raises:
        ResumeError: the folder's run has other settings, or finished categories of other data; shows them.
    """
    folder = config.run.dir
    record = folder / CONFIG
    settings = json.dumps(read_settings(config)[1], indent=1, sort_keys=True)
    for category, fingerprint in fingerprints.items():
        check_fingerprint(folder / category / METRICS, fingerprint)
    if (folder / DEEPSPEED).is_file() and (folder / DEEPSPEED).read_text() != settings:
        raise ResumeError(
            f"{config.trainer.deepspeed} is not what this run was started with ({folder / DEEPSPEED} has it): restore it, "
            "or give another --run.dir"
        )
    if record.is_file():
        changed = [
            line
            for line in config_difference(load_config(["--config", str(record)]), config)
            if not line.startswith(FREE_TO_CHANGE)
        ]
        if changed:
            raise ResumeError(
                f"{folder} holds a run with other settings (its value → yours):\n  "
                + "\n  ".join(changed)
                + "\nGive the same settings to go on with it, or another --run.dir to start anew."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record, config.to_toml())
    write_text(folder / DEEPSPEED, settings)
    write_text(folder / CODE, json.dumps(code_version(), indent=1))


def check_fingerprint(metrics: Path, fingerprint: str) -> None:
    """Raises ResumeError if the numbers in ``metrics`` are of other data than ``fingerprint``'s."""
    if metrics.is_file() and (of := json.loads(metrics.read_text())["fingerprint"]) != fingerprint:
        raise ResumeError(
            f"{metrics} is of data with fingerprint {of[:12]}, the data now has {fingerprint[:12]}: give the same shards, "
            "or another --run.dir"
        )


def code_version() -> dict[str, str]:
    """The commit of the checkout and the versions that decide numbers."""
    packages = ("torch", "torchvision", "deepspeed", "webdataset", "numpy")
    git = ("git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40")
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown (not a git checkout)"
    return {"commit": commit, "python": platform.python_version()} | {p: version(p) for p in packages}


def conclude(config: Config, outcome: Outcome, categories: list[str], console: Console) -> None:
    """Writes ``summary.json``, prints the table and says where everything is."""
    summary = record_summary(config.run.dir, outcome, categories, over=True)
    if summary["categories"]:
        console.print(results_table(summary))
        console.print(reconstruction_table(summary))
    console.print(f"Run: {config.run.dir}  (summary.json; per category metrics.json, samples.png)", highlight=False)
    for name, code in outcome.failed.items():
        console.print(f"[red]{name} failed (exit code {code})[/red]; the same command tries it again", highlight=False)


def record_summary(folder: Path, outcome: Outcome, categories: list[str], *, over: bool) -> dict[str, Any]:
    """Writes and returns ``summary.json``: what is done and failed so far, and whether all of ``categories`` are done.

    A launcher's exit code cannot be trusted (DeepSpeed's exits 0 after its inner process was killed); ``complete`` can.
    """
    summary = summarise(folder, outcome.failed)
    missing = [name for name in categories if name not in summary["categories"]]
    summary |= {
        "complete": over and not missing,
        "missing": missing,
        "exit_code": int(outcome.status) if over else None,
    }
    write_text(folder / SUMMARY, json.dumps(summary, indent=1))
    return summary


def summarise(run: Path, failed: dict[str, int]) -> dict[str, Any]:
    """``metrics.json`` of every category the run has finished so far, by whichever command, and their mean."""
    paths = sorted(run.glob(f"*/{METRICS}"))
    categories = {path.parent.name: json.loads(path.read_text()) for path in paths}
    return {"categories": categories, "mean": mean_of(list(categories.values())), "failed": failed}


def mean_of(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Element-wise mean of the numbers in ``trees``, each over the trees that have it (None: not defined there)."""
    result: dict[str, Any] = {}
    for key in trees[0] if trees else ():
        values = [tree[key] for tree in trees if tree.get(key) is not None]
        if values and all(isinstance(value, dict) for value in values):
            result[key] = mean_of(values)
        elif values and all(isinstance(value, int | float) for value in values):
            result[key] = sum(values) / len(values)
    return result


def evaluate_run(config: Config) -> int:
    """Scores the finished categories of ``config.run.dir`` again, in this process, and rewrites their numbers.

    Raises:
        WadsError, ResumeError: a category that was named has no weights, or was trained on other data.
    """
    config.require_data()
    dataset = Dataset.open(locate_shards(config), cache=config.data.cache)
    device = Ranks.from_environment().device
    categories = chosen_categories(config, dataset)
    if config.data.categories == ["all"]:
        categories = [c for c in categories if (config.run.dir / c / METRICS).is_file()]
    if not categories:
        raise WadsError(f"{config.run.dir}: no category has finished training; run launch/train.py first")
    for category in categories:
        path = config.run.dir / category / METRICS
        model = load_model(path.parent, config, device)
        check_fingerprint(path, dataset.manifest(category).fingerprint)
        evaluation = evaluate(model, config, dataset, category, Ranks(0, 1, 0, 1, device))
        write_text(path, json.dumps(json.loads(path.read_text()) | evaluation.metrics, indent=1))
    conclude(config, Outcome(), categories, Console())
    return ExitCode.OK
