"""What a report is made of: everything that a run's folder says, and what it lacks.

A run that goes on, has failed or is of an earlier version lacks some of it; that is said and is no error. Imports no torch.
"""

import math
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wads_dist.common.files import read_object
from wads_dist.reporting import paper
from wads_dist.runs.events import History, read_history
from wads_dist.runs.folder import CURVES, EVENTS, EXAMPLES, EXAMPLES_FILE, THRESHOLD
from wads_dist.runs.leases import Attempt, attempts_of
from wads_dist.runs.reader import CategoryStatus, RunStatus, launches, read_status
from wads_dist.shards.addresses import public

FILES = ("config.toml", "deepspeed.json", "code.json")
PIXEL_SCORES = {
    "pixel_auroc": "pixel AUROC",
    "trivial.pixel_auroc": "trivial AUROC",
    "pixel_ap": "pixel AP",
    "trivial.pixel_ap": "trivial AP",
    "pixel_aupro": "AUPRO",
    "pixel_f1_max": "F1-max",
    "pixel_iou_max": "IoU-max",
}
IMAGE_SCORES = {"image_auroc": "image AUROC", "image_ap": "image AP", "image_f1_max": "image F1-max"}
SCORES = PIXEL_SCORES | IMAGE_SCORES
EXPERT_SCORES = {
    f"experts.{expert}.pixel_{metric}": f"{expert} {metric.upper()}"
    for metric in ("auroc", "ap", "aupro")
    for expert in ("segmenter", "error", "bank")
}
"""Of each expert of a model with a frozen network by itself (docs/metrics.md)."""


def lookup(tree: Any, path: str) -> Any:
    """What stands at a dotted path; None if nothing does."""
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def number(tree: Any, path: str) -> float | None:
    """The finite number at a dotted path."""
    value = lookup(tree, path)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def show(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


@dataclass(frozen=True)
class Category:
    """What the folder knows of a category; empty what it does not."""

    status: CategoryStatus
    folder: Path
    curves: dict[str, Any]
    threshold: dict[str, Any]
    examples: dict[str, Any]
    history: History
    attempts: list[Attempt]

    @property
    def name(self) -> str:
        return self.status.name

    @property
    def done(self) -> bool:
        return self.status.state == "done"

    @property
    def paper(self) -> float | None:
        return paper.mean([self.name])

    def score(self, path: str) -> float | None:
        """A number of ``metrics.json``; a trivial one is that of the detector that is better at it."""
        group, _, metric = path.partition(".")
        each = lookup(self.status.metrics, "trivial.each") if group == "trivial" else None
        known = [number(of, metric) for of in each.values()] if isinstance(each, dict) else []
        return max((value for value in known if value is not None), default=number(self.status.metrics, path))

    @property
    def mask_rule(self) -> str:
        """How the truth was brought to the network's resolution; before there was a choice, by nearest."""
        return str(self.status.metrics.get("mask_rule", "nearest"))

    def margin(self, path: str) -> float:
        """How far the exact score may be from ``score``: 0 unless pixels were counted in a histogram."""
        match lookup(self.status.metrics, f"bounds.{path}"):
            case [int() | float() as low, int() | float() as high]:
                return (high - low) / 2
        return 0.0


@dataclass(frozen=True)
class Mean:
    """A mean over those categories of a group that are done."""

    name: str
    categories: list[Category]
    of: int
    """How many the group has."""

    @property
    def paper(self) -> float | None:
        """Over the categories whose mean it stands beside."""
        return paper.mean([c.name for c in self.having("pixel_auroc")])

    @property
    def paper_printed(self) -> float | None:
        """What the paper prints for that mean."""
        return paper.printed_mean([c.name for c in self.having("pixel_auroc")])

    def having(self, path: str) -> list[Category]:
        """The categories that have a score, which is what its mean is over."""
        return [c for c in self.categories if c.score(path) is not None]

    def score(self, path: str) -> float | None:
        values = [value for c in self.having(path) if (value := c.score(path)) is not None]
        return sum(values) / len(values) if values else None

    def margin(self, path: str) -> float:
        having = self.having(path)
        return sum(c.margin(path) for c in having) / (len(having) or 1)


@dataclass(frozen=True)
class RunRecord:
    """A run's folder, read."""

    status: RunStatus
    categories: list[Category]
    files: dict[str, str]
    """Text of ``FILES``, those that are there."""
    launches: Mapping[str, dict[str, Any]]
    """Launch id → its ``launch`` event."""

    @property
    def done(self) -> list[Category]:
        return [c for c in self.categories if c.done]

    @property
    def means(self) -> list[Mean]:
        """Over textures and objects of MVTec AD, where the run has some of them, and over all, which is the last."""
        names = [c.name for c in self.categories]
        groups = {"textures": paper.TEXTURES, "objects": paper.OBJECTS}
        mine = {group: [name for name in names if name in of] for group, of in groups.items()}
        chosen = {group: members for group, members in mine.items() if members} | {"all": names}
        return [Mean(group, [c for c in self.done if c.name in of], len(of)) for group, of in chosen.items()]

    @property
    def has_paper(self) -> bool:
        """Whether there are categories that the paper has numbers for."""
        return any(c.name in paper.MVTEC for c in self.categories)

    @property
    def config(self) -> dict[str, Any]:
        with suppress(ValueError):
            return tomllib.loads(self.files.get("config.toml", ""))
        return {}


def read_run(run: Path) -> RunRecord:
    """Reads all that a run's folder has; whatever is missing or damaged stays empty."""
    status = read_status(run)
    categories = []
    for state in status.categories:
        folder = run / state.name
        curves, threshold = read_object(folder / CURVES), read_object(folder / THRESHOLD)
        examples, history = read_object(folder / EXAMPLES / EXAMPLES_FILE), read_history(folder / EVENTS)
        categories.append(Category(state, folder, curves, threshold, examples, history, attempts_of(run, state.name)))
    files = {}
    for name in FILES:
        with suppress(OSError, UnicodeDecodeError):
            files[name] = public((run / name).read_text())  # an earlier version may have written credentials there
    return RunRecord(status, categories, files, launches(run))


def missing(record: RunRecord) -> Iterator[str]:
    """What a reader would look for and not find, a sentence each."""
    if not record.categories:
        yield "No category has left a trace yet."
    for c in record.categories:
        if not c.done:
            at = f" at {c.status.samples:,} samples" if c.status.samples is not None else ""
            code = f", exit code {c.status.code}" if c.status.code else ""
            reason = f": {c.status.reason}" if c.status.reason else ""
            yield f"{c.name} is not done: {c.status.state}{at}{code}{reason}"
    has = {label: [c.score(path) is not None for c in record.done] for path, label in SCORES.items()}
    has |= {
        "curves": [bool(c.curves) for c in record.done],
        "pictures": [bool(c.examples) for c in record.done],
        "thresholds": [bool(c.threshold) for c in record.done],
        "losses": [bool(c.history.steps) for c in record.done],
    }
    lacking: dict[tuple[str, ...], list[str]] = {}
    for what, there in has.items():
        names = tuple(c.name for c, found in zip(record.done, there, strict=True) if not found)
        lacking.setdefault(names, []).append(what)
    for names, things in lacking.items():
        if names:
            of = "any category" if len(names) == len(record.done) > 1 else ", ".join(names)
            yield f"No {', '.join(things)} of {of}: not defined there, or of an earlier version."
    for name in FILES:
        if name not in record.files:
            yield f"{name} is not in the run's folder, or cannot be read."
    if not record.launches:
        yield "No log of a launch is in the run's folder, so it is not known which machines it ran on."


def as_json(record: RunRecord) -> dict[str, Any]:
    """The report's numbers, for machines."""

    def scores(of: Category | Mean) -> dict[str, Any]:
        return {"paper": of.paper} | {path: of.score(path) for path in SCORES}

    def counts(mean: Mean) -> dict[str, Any]:
        over = {path: len(mean.having(path)) for path in SCORES}
        return {"done": len(mean.categories), "of": mean.of, "over": over, "paper_printed": mean.paper_printed}

    return {
        "run": str(record.status.run),
        "complete": record.status.complete,
        "categories": {
            c.name: {"state": c.status.state, "attempts": len(c.attempts), "mask_rule": c.mask_rule if c.done else None}
            | scores(c)
            for c in record.categories
        },
        "means": {mean.name: counts(mean) | scores(mean) for mean in record.means},
        "missing": list(missing(record)),
    }
