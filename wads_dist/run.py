"""A run: prepares its folder, trains every category in child processes of their own, and sums up.

Every launched rank is a supervisor (``supervisor.py``). For each category it starts one worker with the same rank and a fresh
rendezvous. A worker that dies ends its peers and fails its category; the next category starts anew.
"""

import hashlib
import json
import os
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from rich.console import Console

from shards.build import build
from shards.errors import DataError
from shards.files import locked
from shards.source import Dataset
from wads_dist.checkpoint import write_text
from wads_dist.config import Config
from wads_dist.data import open_texture_bank
from wads_dist.deepspeed_config import deepspeed_config, resolve_precision
from wads_dist.distributed import Ranks
from wads_dist.errors import ExitCode, PreemptedError, ResumeError, WadsError, exit_code
from wads_dist.evaluate import evaluate, load_model
from wads_dist.record import Outcome, check_fingerprint, open_run, record_summary
from wads_dist.rendezvous import Launch
from wads_dist.signals import StopRequest, stop_with_launcher, supervisor_signals
from wads_dist.supervisor import supervise
from wads_dist.tables import reconstruction_table, results_table
from wads_dist.worker import METRICS

LOCK = ".lock"
# Longer than the ranks of a launch outlive their launcher.
LOCK_SECONDS = 45.0


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


def conclude(config: Config, outcome: Outcome, categories: list[str], console: Console) -> None:
    """Writes ``summary.json``, prints the table and says where everything is."""
    summary = record_summary(config.run.dir, outcome, categories, over=True)
    if summary["categories"]:
        console.print(results_table(summary))
        console.print(reconstruction_table(summary))
    console.print(f"Run: {config.run.dir}  (summary.json; per category metrics.json, samples.png)", highlight=False)
    for name, code in outcome.failed.items():
        console.print(f"[red]{name} failed (exit code {code})[/red]; the same command tries it again", highlight=False)


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
