"""What a run is doing, read from its folder alone.

No process is asked, so a run on another node or cluster can be looked at wherever its folder is mounted. Nothing is decided
by what is read either, because nodes' clocks may differ. Imports no torch, so that it starts at once.
"""

import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from wads_dist.common.errors import ExitCode
from wads_dist.common.files import read_object
from wads_dist.runs.events import Tail, json_objects
from wads_dist.runs.folder import EVENTS, METRICS, QUEUE
from wads_dist.runs.leases import Attempt, attempts_of
from wads_dist.shards.names import category_problem

State = Literal["running", "waiting", "failed", "stopped", "lost", "done"]
# By so much may clocks differ before a lease that is renewed looks lost.
CLOCK_SECONDS = 60.0


@dataclass(frozen=True)
class CategoryStatus:
    """One category; what is not known yet is None, 0 or empty."""

    name: str
    state: State
    attempt: int = 0
    host: str = ""
    group: str = ""
    step: int | None = None
    samples: int | None = None
    total_samples: int | None = None
    images_per_second: float | None = None
    """Of the whole group; None until the current attempt has logged a step."""
    loss: float | None = None
    pixel_auroc: float | None = None
    code: int | None = None
    """Exit code of the last attempt, if that is over."""
    reason: str = ""
    quiet: float | None = None
    """Seconds since the last event or heartbeat, by this node's clock."""
    last_step: dict[str, Any] = field(default_factory=dict)
    """The current attempt's newest ``step`` line of ``events.jsonl``; empty before its first."""
    last_resume: dict[str, Any] = field(default_factory=dict)
    """The newest ``resume`` line."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Content of ``metrics.json``, once that is there."""


@dataclass(frozen=True)
class RunStatus:
    """A run at ``time`` (unix)."""

    run: Path
    time: float
    categories: list[CategoryStatus]
    exit_code: int | None
    """Of the last launch, if that came to its end."""
    lost_after: float
    """Seconds of silence after which an attempt that has not ended is called lost."""

    @property
    def counts(self) -> Counter[str]:
        return Counter(c.state for c in self.categories)

    @property
    def images_per_second(self) -> float:
        return sum(c.images_per_second or 0.0 for c in self.categories if c.state == "running")

    @property
    def complete(self) -> bool:
        return bool(self.categories) and self.counts["done"] == len(self.categories)

    @property
    def over(self) -> bool:
        """Nothing runs, and nothing will: the launch has said so, or has been silent for long."""
        if self.complete or self.counts["running"]:
            return self.complete
        quiet = min((c.quiet for c in self.categories if c.quiet is not None), default=0.0)
        return self.exit_code is not None or quiet > self.lost_after

    @property
    def status_code(self) -> int:
        """``launch/status.py``'s exit code."""
        if self.complete:
            return ExitCode.OK
        return ExitCode.CATEGORY_FAILED if self.counts["failed"] and not self.counts["running"] else ExitCode.NOT_DONE


@dataclass
class RankTimes:
    """What a rank's time went into, in seconds."""

    worked: float = 0.0
    startup: float = 0.0
    """From a worker's start to its first step."""
    waited: float = 0.0
    """Without work while categories could be taken."""
    nothing_left: float = 0.0
    """Without work because others train all that is left."""

    @property
    def idle(self) -> float:
        """Share of the time that was waited, 0 to 1."""
        total = self.worked + self.startup + self.waited + self.nothing_left
        return self.waited / total if total else 0.0


def launches(run: Path) -> dict[str, dict[str, Any]]:
    """Launch id → its ``launch`` event, oldest first."""
    found = []
    for path in run.glob("log/*/rank-00000.jsonl"):
        events = (e for e in json_objects(path.read_bytes()) if e.get("event") == "launch")
        found += [(e.get("time", path.stat().st_mtime), path.parent.name, e) for e in events]
    return {name: event for _, name, event in sorted(found, key=lambda entry: entry[:2])}


def rank_times(run: Path, launch: str | None = None) -> dict[int, RankTimes]:
    """What every rank of a launch (none: the newest) did with its time, up to what it has logged last."""
    launch = launch or next(reversed(launches(run)), None)
    ranks: dict[int, RankTimes] = {}
    for path in sorted(run.glob(f"log/{launch}/rank-*.jsonl")):
        times = ranks[int(path.stem.removeprefix("rank-"))] = RankTimes()
        for event in json_objects(path.read_bytes()):
            if event.get("event") == "worked":
                seconds, startup = event["seconds"], event.get("startup")
                startup = seconds if startup is None else startup  # None: it took no step
                times.startup += startup
                times.worked += seconds - startup
            times.waited += event.get("waited") or 0.0
            times.nothing_left += event.get("nothing_left") or 0.0
    return ranks


class RunReader:
    """Reads a run again and again, and remembers how far. ``categories``: only these; empty: all that the folder knows of."""

    def __init__(self, run: Path, categories: Sequence[str] = ()) -> None:
        self.run, self.categories = run, list(categories)
        self.config: dict[str, Any] = {}
        self.tails: dict[str, Tail] = {}
        self.done: dict[str, tuple[CategoryStatus, float]] = {}
        """What changes no more is not read again; with the time of its last event."""

    def read(self) -> RunStatus:
        """A folder that is not there yet is a run in which all waits."""
        if not self.config:
            with suppress(OSError, ValueError):
                self.config = tomllib.loads((self.run / "config.toml").read_text())
        summary, now = read_object(self.run / "summary.json"), time.time()
        lost_after = self.config.get("parallel", {}).get("lease_seconds", 60.0) + CLOCK_SECONDS
        names = self.categories or self._names(summary)
        found = [self._category(name, summary.get("failed", {}).get(name), now, lost_after) for name in names]
        return RunStatus(self.run, now, found, summary.get("exit_code"), lost_after)

    def _names(self, summary: dict[str, Any]) -> list[str]:
        """The newest launch's, in its order, then all others that have left a trace."""
        names = next(reversed(launches(self.run).values()), {}).get("categories", [])
        traces = {path.parent.name for name in (EVENTS, METRICS) for path in self.run.glob(f"*/{name}")}
        traces |= {path.name for path in self.run.glob(f"{QUEUE}/*")} | {*summary.get("missing", ())}
        # They become paths, and the log and the summary may have been changed.
        return [
            name
            for name in [*names, *sorted({str(name) for name in traces} - {*map(str, names)})]
            if isinstance(name, str) and not category_problem(name)
        ]

    def _category(self, name: str, failed: int | None, now: float, lost_after: float) -> CategoryStatus:
        """``failed``: the code in the summary, for a category that failed without an attempt."""
        if name in self.done:
            return replace(self.done[name][0], quiet=now - self.done[name][1])
        tail = self.tails.setdefault(name, Tail(self.run / name / EVENTS))
        tail.read()
        metrics = read_object(self.run / name / METRICS)
        attempt = next(reversed(attempts_of(self.run, name)), Attempt(0, Path(), None, None))
        claim, end = attempt.claim, attempt.end
        times = [tail.time, end.time if end else None]
        with suppress(OSError):
            times.append(attempt.path.stat().st_mtime if attempt.number else None)
        quiet = min((max(0.0, now - t) for t in times if t is not None), default=None)
        code = end.code if end else None if attempt.number else failed
        state: State = "stopped" if code == ExitCode.PREEMPTED else "failed" if code else "waiting"
        if metrics:
            state = "done"
        elif attempt.number and not end:
            state = "running" if (quiet or 0.0) <= lost_after else "lost"
        # The last step in the file may be that of an earlier attempt, or be undone by the one that goes on from a checkpoint.
        began = claim.time if claim else 0.0
        stale = tail.last.get("event") in ("start", "resume") or tail.last.get("time", 0.0) < began
        current = {} if stale and not metrics else tail.last_step
        result = CategoryStatus(
            name=name,
            state=state,
            attempt=attempt.number,
            host=claim.host if claim else "",
            group=claim.group if claim else "",
            step=tail.last.get("step"),
            samples=metrics.get("samples", tail.last.get("samples")),
            total_samples=self.config.get("trainer", {}).get("samples"),
            images_per_second=metrics.get("images_per_second", current.get("images_per_second")),
            loss=current.get("total"),
            pixel_auroc=metrics.get("pixel_auroc"),
            code=code,
            reason=end.reason if end else "",
            quiet=quiet,
            last_step=current,
            last_resume=tail.last_resume,
            metrics=metrics,
        )
        if state == "done":
            self.done[name] = result, now - (quiet or 0.0)
        return result


def read_status(run: Path) -> RunStatus:
    """What the run in the folder ``run`` is doing now."""
    return RunReader(run).read()
