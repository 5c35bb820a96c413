"""A run's folder: the settings and the code it belongs to, and the summary of what is done."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wads_dist import __version__
from wads_dist.common.errors import ConfigError, ExitCode, ResumeError
from wads_dist.common.files import PACKAGE, write_text
from wads_dist.config.deepspeed import read_settings
from wads_dist.config.load import config_difference, recorded_config
from wads_dist.config.schema import Config
from wads_dist.runs.folder import CODE, CONFIG, DEEPSPEED, METRICS, QUEUE, SUMMARY
from wads_dist.runs.leases import attempts_of
from wads_dist.shards.errors import DataError
from wads_dist.shards.names import RESERVED, category_problem, within

# Settings that may differ between a run and its continuation: none changes what is learnt.
FREE_TO_CHANGE = (
    "run.",
    "data.cache",
    "data.categories",
    "data.root",
    "data.shards",
    "checkpoint.",
    "parallel.",
    "trainer.log_every",
    "trainer.max_rejected",
    "trainer.hang_timeout",
)


@dataclass
class Outcome:
    """What became of the categories of a run."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    preempted: bool = False
    """Asked to stop; what was not done yet is neither done nor failed."""
    missing: list[str] = field(default_factory=list)
    """Neither done nor failed."""

    @property
    def status(self) -> int:
        """The exit code: a lone category's own, else one that says that some failed."""
        if self.preempted:
            return ExitCode.PREEMPTED
        if not self.failed:
            return ExitCode.RANK_LOST if self.missing else ExitCode.OK
        lone = len(self.failed) == 1 and not self.done
        return next(iter(self.failed.values())) if lone else ExitCode.CATEGORY_FAILED


def open_run(config: Config, fingerprints: dict[str, str]) -> None:
    """Creates the run's folder, or checks that it belongs to this configuration, and records configuration and code.

    Raises:
        ResumeError: as ``check_run``.
    """
    settings = check_run(config, fingerprints)
    folder = config.run.dir
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, config.to_toml())
    write_text(folder / DEEPSPEED, settings)
    write_text(folder / CODE, json.dumps(code_version(), indent=1))


def check_run(config: Config, fingerprints: dict[str, str]) -> str:
    """Checks that the run's folder, if there is one, belongs to this configuration; returns DeepSpeed's settings as JSON.

    Raises:
        ResumeError: the folder's run has other settings, or finished categories of other data; shows them.
        ConfigError: as ``refuse_links``.
    """
    folder = config.run.dir
    refuse_links(folder, [*RESERVED, *fingerprints])
    record = folder / CONFIG
    settings = json.dumps(read_settings(config.trainer)[1], indent=1, sort_keys=True)
    for category, fingerprint in fingerprints.items():
        check_fingerprint(folder / category / METRICS, fingerprint)
    if (folder / DEEPSPEED).is_file() and (folder / DEEPSPEED).read_text() != settings:
        raise ResumeError(
            f"{config.trainer.deepspeed} is not what this run was started with ({folder / DEEPSPEED} has it): restore it, "
            "or give another --run.dir"
        )
    if record.is_file():
        # A finished category's metrics.json keeps the rule that it was scored by. The tables of a sweep have one rule
        # for all its runs, so there it is not free.
        free = (*FREE_TO_CHANGE, "evaluation.mask_rule:")
        changed = [line for line in config_difference(_recorded(record), config) if not line.startswith(free)]
        if changed:
            raise ResumeError(
                f"{folder} holds a run with other settings (its value → yours):\n  "
                + "\n  ".join(changed)
                + "\nGive the same settings to go on with it, or another --run.dir to start anew."
            )
    return settings


def _recorded(path: Path) -> Config:
    try:
        return recorded_config(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"{path}: not the settings of a run that this version of WADS-dist can go on with ({error}); restore the file, or "
            "give another --run.dir"
        ) from error


def refuse_links(run: Path, names: Iterable[str]) -> None:
    """Raises ConfigError if a link leads what is written below ``names`` in a run's folder out of that."""
    try:
        for name in names:
            within(run, name)
            for folder, below, files in os.walk(run / name):
                for path in (Path(folder, entry) for entry in (*below, *files)):
                    if path.is_symlink():
                        within(run, *path.relative_to(run).parts)
    except DataError as error:
        raise ConfigError([f"run.dir: {error}"]) from error


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
    checkout = PACKAGE.parent
    git = ("git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40")
    try:
        (checkout / ".git").stat()  # an installed package may lie within somebody else's
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown (not a git checkout)"
    return {"wads_dist": __version__, "commit": commit, "python": platform.python_version()} | {
        p: version(p) for p in packages
    }


def record_summary(folder: Path, outcome: Outcome, categories: list[str], *, over: bool) -> dict[str, Any]:
    """Writes and returns ``summary.json``: what is done and failed so far, and whether all is done: ``categories``, and what
    other launches of the run have begun, which may be at work beside this one.

    A launcher's exit code cannot be trusted (DeepSpeed's exits 0 after its inner process was killed); ``complete`` can.
    """
    begun = sorted(
        path.name for path in (folder / QUEUE).glob("*") if path.is_dir() and not category_problem(path.name)
    )
    failed = {}
    for name in dict.fromkeys([*categories, *begun]):
        attempts = attempts_of(folder, name)
        if attempts and (end := attempts[-1].end) and end.code not in (ExitCode.OK, ExitCode.PREEMPTED):
            failed[name] = end.code
    summary = summarise(folder, failed | outcome.failed)
    done = summary["categories"].keys()
    summary["failed"] = {name: code for name, code in summary["failed"].items() if name not in done}
    missing = [name for name in dict.fromkeys([*categories, *begun]) if name not in done]
    summary |= {
        "complete": over and not missing,
        "missing": missing,
        "exit_code": int(outcome.status) if over else None,
    }
    write_text(folder / SUMMARY, json.dumps(summary, indent=1))
    return summary


def summarise(run: Path, failed: dict[str, int]) -> dict[str, Any]:
    """``metrics.json`` of every category the run has finished so far, by whichever command, and their mean."""
    paths = sorted(path for path in run.glob(f"*/{METRICS}") if not category_problem(path.parent.name))
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
