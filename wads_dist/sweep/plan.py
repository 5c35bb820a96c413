"""The plan of a sweep: the runs that a grid and seeds make of one command line, with their configurations and categories; and
its record in the sweep's folder, by which the same command goes on and another one is refused.
"""

import hashlib
import itertools
import json
import os
import re
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from wads_dist.common.errors import ConfigError, ResumeError
from wads_dist.common.files import write_text
from wads_dist.config.deepspeed import deepspeed_config
from wads_dist.config.load import config_difference, load_config
from wads_dist.config.schema import Config
from wads_dist.data.locate import chosen_categories, locate_shards
from wads_dist.runs.folder import METRICS
from wads_dist.runs.record import FREE_TO_CHANGE, code_version
from wads_dist.shards.addresses import without_addresses
from wads_dist.shards.files import locked
from wads_dist.shards.layout import find_categories
from wads_dist.shards.names import category_problem, quoted, text_problem
from wads_dist.shards.source import Dataset

RECORD, CONFIGS, ENDED, LOCK = "sweep.json", "configs", "ended", ".lock"
# What else lies beside the runs.
TAKEN = frozenset({RECORD, CONFIGS, ENDED, "logs", "slurm", "summary.json", "ablations.md", "ablations.json"})
FOLDER = re.compile(r"[\w.+-]+")
LONE = "run"
SEED = "trainer.seed"
# Decided by the sweep itself.
NOT_IN_GRID = ("config", "local_rank", "run.dir", "data.categories")


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str
    point: str
    """Its place in the grid: the name without the seed."""
    settings: dict[str, Any]
    """What makes it differ from the others, by dotted path."""
    config: Config
    categories: list[str]

    @property
    def folder(self) -> Path:
        return self.config.run.dir

    @property
    def missing(self) -> list[str]:
        """The categories that are not done."""
        # By listing: NFS may go on for a minute believing that a name which was looked up is missing.
        folders = {name: self.folder / name for name in self.categories}
        return [name for name, path in folders.items() if not path.is_dir() or METRICS not in os.listdir(path)]


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, its runs, and how they are launched."""

    out: Path
    runs: list[Run]
    tasks: list[tuple[str, str]]
    """(run, category) by the task's number, which never changes."""
    ranks: int | None

    def run(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    @property
    def job_name(self) -> str:
        """Tells its jobs from those of other sweeps in Slurm's queue."""
        return f"wads-{hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:8]}"

    def config_file(self, run: Run) -> Path:
        return self.out / CONFIGS / f"{run.name}.toml"

    def ended_file(self, run: Run, category: str) -> Path:
        """Holds the exit code of the last launch for this category, when that is over."""
        return self.out / ENDED / run.name / category

    @property
    def open_tasks(self) -> list[int]:
        missing = {(run.name, category) for run in self.runs for category in run.missing}
        return [number for number, task in enumerate(self.tasks) if task in missing]


# --- planning ----------------------------------------------------------------------------------------------------


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """``["objective.kl.rho=0.03,0.1"]`` → path → values; values that hold commas themselves are separated by semicolons.

    Raises:
        ConfigError: with every problem.
    """
    grid: dict[str, list[str]] = {}
    problems = []
    for text in texts:
        name, _, listed = text.partition("=")
        path = name.strip().removeprefix("--").replace("-", "_")
        values = [value.strip() for value in listed.split(";" if ";" in listed else ",") if value.strip()]
        if not values:
            problems.append(f"--grid {without_addresses(text)}: give SECTION.FIELD=VALUE,VALUE,...")
        elif path in grid:
            problems.append(f"--grid {path}: given twice; list all of its values once")
        elif path in NOT_IN_GRID:
            problems.append(f"--grid {path}: cannot be varied within a sweep")
        grid[path] = values
    if problems:
        raise ConfigError(problems)
    return grid


def run_problem(name: str) -> str | None:
    """Why ``name`` cannot name a run's folder in that of a sweep; None if it can."""
    taken = name.casefold() in TAKEN
    return text_problem(name, 240) or ("is the name of something else in a sweep's folder" if taken else None)


def read_variants(path: Path, only: str | None = None) -> dict[str, dict[str, str]]:
    """A TOML file with a table for each variant, of the settings that it changes: name → path → value.

    Args:
        only: names of those that are wanted, separated by commas; None: all.

    Raises:
        ConfigError: it cannot be read, holds anything else, or lacks one that is wanted.
    """

    def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, value in settings.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value if isinstance(value, str) else json.dumps(value)

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError([f"--variants {path}: {error}"]) from None
    problems = [f"--variants {path}: {n} is no table of settings" for n, v in tables.items() if not isinstance(v, dict)]
    problems += [
        f"--variants {path}: {quoted(n)} cannot name a folder"
        for n in tables
        if run_problem(n) or not FOLDER.fullmatch(n)
    ]
    if problems or not tables:
        raise ConfigError(problems or [f"--variants {path}: holds no variant"])
    variants = {name: dict(flat(table)) for name, table in tables.items()}
    for name, settings in variants.items():
        problems += [
            f"--variants {path}: {name}: {s} cannot be varied within a sweep" for s in settings if s in NOT_IN_GRID
        ]
    wanted = list(variants) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    problems += [f"--only {name}: {path} has {', '.join(variants)}" for name in wanted if name not in variants]
    if problems or not wanted:
        raise ConfigError(problems or [f"--only {only!r}: names no variant"])
    return {name: variants[name] for name in wanted}


def plan_runs(
    out: Path,
    arguments: Sequence[str],
    grid: Mapping[str, Sequence[str]],
    seeds: int | None,
    *,
    build: bool,
    variants: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Run]:
    """Every run, its configuration validated and its categories known.

    Args:
        arguments: settings that all runs share, as on the command line of ``launch/train.py``.
        seeds: runs for each point of the grid, with ``trainer.seed`` counting up from the one set; None: that seed alone.
        build: build the shards of ``data.root``; otherwise look at its folders only.
        variants: combinations of settings that have a name (name → path → value); every point of the grid in each of them.

    Raises:
        ConfigError, DataError: with every problem of every run.
    """
    problems: list[str] = []
    variants = variants or {"": {}}
    varied = [path for fixed in variants.values() for path in fixed]
    problems += [f"--grid {path}: {', '.join(variants)} set it" for path in grid if path in varied]
    if any(argument.partition("=")[0] in ("--run.dir", "--run-dir") for argument in arguments):
        problems.append("run.dir: --out decides where the runs of a sweep are")
    if seeds is not None and SEED in grid:
        problems.append(f"--grid {SEED} and --seeds: give one of them")
    fields = [*grid, *([SEED] if seeds is not None else [])]
    planned: dict[str, tuple[str, Config]] = {}
    for (variant, fixed), values in itertools.product(variants.items(), itertools.product(*grid.values())):
        chosen = [*fixed.items(), *zip(grid, values, strict=True)]
        point = [*arguments, *(f"--{path}={value}" for path, value in chosen)]
        try:
            first = load_config(point).trainer.seed
            for seed in range(first, first + (seeds or 1)):
                config = load_config([*point, f"--{SEED}={seed}"])
                config.require_data()
                deepspeed_config(config.trainer, config.parallel.ranks_per_category or 1)
                if problem := run_problem(_name(config, fields, variant)):
                    problems.append(f"--grid: the name of a run {problem}; give fewer or shorter values")
                if (name := _name(config, fields, variant)) in planned:
                    problems.append(f"--grid: two runs would be {name}")
                planned[name] = _name(config, list(grid), variant), config
        except ConfigError as error:
            problems += [
                f"variant {variant}: {problem}" if problem.partition(":")[0] in fixed else problem
                for problem in error.problems
            ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))

    return _located(planned, out, list(dict.fromkeys([*varied, *fields])), build)


def _located(planned: Mapping[str, tuple[str, Config]], out: Path, fields: list[str], build: bool) -> list[Run]:
    """The runs, with where their shards are and which categories they train."""
    located: dict[Any, tuple[str | None, list[str]]] = {}
    runs = []
    for name, (point_name, config) in planned.items():
        settings = {path: _value(config, path) for path in fields}
        key = (config.data.root, config.data.shards)
        if key not in located:
            located[key] = _locate(config, build)
        location, categories = located[key]
        if location is not None:
            config = _with(config, "data", root=None, shards=location)
        runs.append(Run(name, point_name, settings, _with(config, "run", dir=out / name), categories))
    return runs


def _locate(config: Config, build: bool) -> tuple[str | None, list[str]]:
    """Where the shards are (None: not built yet), and the categories to train."""
    if config.data.root is not None and not build:
        wanted = config.data.categories
        return None, list(find_categories(config.data.root)) if wanted == ["all"] else wanted
    location = locate_shards(config.data)
    categories = chosen_categories(config.data, Dataset.open(location, cache=config.data.cache))
    return str(Path(location).absolute()) if Path(location).is_dir() else location, categories


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _value(config: Config, path: str) -> Any:
    return json.loads(json.dumps(reduce(getattr, path.split("."), config), default=str))


def _name(config: Config, fields: Sequence[str], variant: str) -> str:
    """A folder's name from the variant and the values of ``fields``: ``noKL,kl.rho=0.03,seed=1``."""
    short = [path.partition(".")[2] or path for path in fields]
    paths = short if len(set(short)) == len(short) else fields
    values = [re.sub(r"[^\w.+-]+", "-", json.dumps(_value(config, path)).strip('"[]')).strip("-") for path in fields]
    named = [f"{path}={value}" for path, value in zip(paths, values, strict=True)]
    return ",".join([variant] * bool(variant) + named) or LONE


# --- the record --------------------------------------------------------------------------------------------------


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Inside, no other command changes the sweep's record or submits its tasks."""
    out.mkdir(parents=True, exist_ok=True)
    (out / LOCK).touch()
    with locked(out / LOCK, wait=True):
        yield


def open_sweep(out: Path, runs: Sequence[Run], ranks: int | None) -> Sweep:
    """The sweep of ``runs``, with the tasks that an earlier start has numbered. Writes nothing.

    Raises:
        ResumeError: the folder holds another sweep; shows the difference.
    """
    before = read_record(out)
    if problems := list(_difference(out, before, runs)):
        raise ResumeError(
            f"{out} holds another sweep (its value → yours):\n  "
            + "\n  ".join(problems)
            + "\nGive the same settings and all of its runs to go on with it (runs may be added), or another --out."
        )
    tasks = dict.fromkeys(
        [*(tuple(task) for task in before["tasks"]), *((run.name, c) for run in runs for c in run.categories)]
    )
    return Sweep(out, list(runs), list(tasks), ranks)


def record(sweep: Sweep, command: str) -> None:
    """Writes ``sweep.json`` and every run's configuration."""
    (sweep.out / CONFIGS).mkdir(parents=True, exist_ok=True)
    for run in sweep.runs:
        write_text(sweep.config_file(run), run.config.to_toml())
    before = read_record(sweep.out)
    start = {"time": time.time(), "command": command, "ranks": sweep.ranks, "code": code_version()}
    fields = ("name", "point", "settings", "categories")
    runs = [{name: getattr(run, name) for name in fields} for run in sweep.runs]
    _write_record(sweep.out, before | {"starts": [*before["starts"], start], "runs": runs, "tasks": sweep.tasks})


def add_job(out: Path, job: str, tasks: Sequence[int]) -> None:
    """Notes a submission."""
    before = read_record(out)
    _write_record(out, before | {"jobs": [*before["jobs"], {"job": job, "time": time.time(), "tasks": list(tasks)}]})


def load(out: Path) -> Sweep:
    """The sweep as recorded.

    Raises:
        ConfigError: there is none, or it holds what cannot be a name.
    """
    values = read_record(out)
    if not values["runs"]:
        raise ConfigError([f"{out}: no {RECORD} there, so no sweep"])
    names = {run_problem(entry["name"]) for entry in values["runs"]}
    names |= {category_problem(name) for entry in values["runs"] for name in entry["categories"]}
    names |= {category_problem(name) for _, name in values["tasks"]}
    if problems := sorted(filter(None, names)):
        raise ConfigError([f"{out / RECORD}: a name in it {problem}" for problem in problems])
    runs = [Run(**entry, config=_recorded(out, entry["name"])) for entry in values["runs"]]
    return Sweep(out, runs, [tuple(task) for task in values["tasks"]], values["starts"][-1]["ranks"])


def read_record(out: Path) -> dict[str, Any]:
    """``sweep.json``; without lists of anything where there is none."""
    path = out / RECORD
    return json.loads(path.read_text()) if path.is_file() else {"starts": [], "jobs": [], "runs": [], "tasks": []}


def _write_record(out: Path, values: dict[str, Any]) -> None:
    write_text(out / RECORD, json.dumps(values, indent=1))


def _recorded(out: Path, run: str) -> Config:
    return load_config(["--config", str(out / CONFIGS / f"{run}.toml")])


def _difference(out: Path, before: Mapping[str, Any], runs: Sequence[Run]) -> Iterator[str]:
    """What the recorded sweep has otherwise, or has and ``runs`` have not."""
    mine = {run.name: run for run in runs}
    of: dict[str, list[str]] = {}
    for entry in before["runs"]:
        run = mine.get(entry["name"])
        if run is None:
            yield f"run {entry['name']}: → not among yours"
            continue
        for name in [c for c in entry["categories"] if c not in run.categories]:
            of.setdefault(f"data.categories: {name} → not among yours", []).append(run.name)
        for line in config_difference(_recorded(out, run.name), run.config):
            if not line.startswith(FREE_TO_CHANGE):
                of.setdefault(line, []).append(run.name)
    for line, names in of.items():
        others = f" and {len(names) - 1} more runs" if len(names) > 1 else ""
        yield line if len(mine) == len(names) else f"{line}  ({names[0]}{others})"
