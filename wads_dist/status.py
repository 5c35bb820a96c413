"""What a run is doing, read from its folder alone: for ``launch/status.py``, and for the first rank while it trains.

No process is asked, so a run on another node or cluster can be looked at wherever its folder is mounted. Nothing is decided
by what is read either, because nodes' clocks may differ. Imports no torch, so that it starts at once.
"""

import json
import os
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from shards.names import category_problem
from wads_dist.leases import METRICS, QUEUE, Attempt, attempts_of

State = Literal["running", "waiting", "failed", "stopped", "lost", "done"]
STYLES = dict(running="cyan", waiting="dim", failed="bold red", stopped="yellow", lost="magenta", done="green")
# Exit codes of launch/status.py. Those of errors.ExitCode, whose import takes longer than all of this one's.
DONE, NOT_DONE, NO_RUN, FAILED, INTERRUPTED = 0, 1, 3, 4, 130
PREEMPTED = 7
EVENTS = "events.jsonl"
# Of events.jsonl, which may have many MB; a step of a thousand ranks has a line of 6 KB.
TAIL_BYTES = 65536
# By so much may clocks differ before a lease that is renewed looks lost.
CLOCK_SECONDS = 60.0
REFRESH_SECONDS, QUIET_SECONDS = 1.0, 15.0
# A rank is called slow on the terminal from here on; events.jsonl has every rank's score.
SLOW = 1.5


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
            return DONE
        return FAILED if self.counts["failed"] and not self.counts["running"] else NOT_DONE


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


# --- reading -----------------------------------------------------------------------------------------------------


def _objects(lines: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects among ``lines``; a line that is none was cut by a crash, or by where reading began."""
    for line in lines.splitlines():
        with suppress(ValueError):
            if isinstance(value := json.loads(line), dict):
                yield value


def _read(path: Path) -> dict[str, Any]:
    """A file of one JSON object; empty if it is not there."""
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_bytes()))
    return {}


class Tail:
    """The end of a growing ``events.jsonl``: every ``read`` takes in what was added since the last."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self.time: float | None = None
        self.last: dict[str, Any] = {}
        """Newest event that says how far training is."""
        self.last_step: dict[str, Any] = {}
        self.last_resume: dict[str, Any] = {}
        self.last_failure: dict[str, Any] = {}
        """Why a worker could not go on."""

    def read(self) -> None:
        try:
            with self.path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if not 0 <= size - self.offset <= TAIL_BYTES:  # long when first seen, or replaced by a shorter one
                    self.offset = max(0, size - TAIL_BYTES)
                stream.seek(self.offset)
                block = stream.read(size - self.offset)
        except OSError:
            return
        lines = block[: block.rfind(b"\n") + 1]  # the last may be half-written
        self.offset += len(lines)
        for event in _objects(lines):
            self.time = event.get("time", self.time)
            if event.get("event") == "failed":
                self.last_failure = event
            if event.get("event") in ("start", "resume", "step", "preempted"):
                self.last = event
                self.last_step = event if event["event"] == "step" else self.last_step
                self.last_resume = event if event["event"] == "resume" else self.last_resume


def launches(run: Path) -> dict[str, dict[str, Any]]:
    """Launch id → its ``launch`` event, oldest first."""
    found = []
    for path in run.glob("log/*/rank-00000.jsonl"):
        events = (e for e in _objects(path.read_bytes()) if e.get("event") == "launch")
        found += [(e.get("time", path.stat().st_mtime), path.parent.name, e) for e in events]
    return {name: event for _, name, event in sorted(found, key=lambda entry: entry[:2])}


def rank_times(run: Path, launch: str | None = None) -> dict[int, RankTimes]:
    """What every rank of a launch (none: the newest) did with its time, up to what it has logged last."""
    launch = launch or next(reversed(launches(run)), None)
    ranks: dict[int, RankTimes] = {}
    for path in sorted(run.glob(f"log/{launch}/rank-*.jsonl")):
        times = ranks[int(path.stem.removeprefix("rank-"))] = RankTimes()
        for event in _objects(path.read_bytes()):
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
        summary, now = _read(self.run / "summary.json"), time.time()
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
        metrics = _read(self.run / name / METRICS)
        attempt = next(reversed(attempts_of(self.run, name)), Attempt(0, Path(), None, None))
        claim, end = attempt.claim, attempt.end
        times = [tail.time, end.time if end else None]
        with suppress(OSError):
            times.append(attempt.path.stat().st_mtime if attempt.number else None)
        quiet = min((max(0.0, now - t) for t in times if t is not None), default=None)
        code = end.code if end else None if attempt.number else failed
        state: State = "stopped" if code == PREEMPTED else "failed" if code else "waiting"
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


# --- showing -----------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _row(c: CategoryStatus) -> list[Text]:
    state: str = c.state
    if c.state == "running" and c.images_per_second is None:
        state = "starting"
    elif c.state == "failed":
        state = f"failed ({c.code})"
    elif c.state == "lost" and c.quiet:
        state = f"lost {c.quiet / 60:,.0f} min"
    samples = "–" if c.samples is None else f"{c.samples:,}"
    if (
        c.samples is not None and c.total_samples and c.state != "done"
    ):  # early stopping may have left some of the budget
        samples = f"{100 * c.samples / c.total_samples:.0f} %"
    scores = [_number(*pair) for pair in ((c.images_per_second, 1), (c.loss, 3), (c.pixel_auroc, 3))]
    node = Text(f"{c.group} {c.host}".strip(), no_wrap=True)
    return [Text(c.name), Text(state, STYLES[c.state]), *map(Text, [samples, *scores, f"{c.attempt or '–'}"]), node]


def status_table(status: RunStatus, height: int | None = None) -> Table:
    """A row a category, within 80 columns. Where ``height`` lines are too few, categories that are done share one, and then
    those that wait."""
    counts, rows, short = status.counts, list(status.categories), height is not None
    rate = f", {status.images_per_second:,.0f} img/s" if counts["running"] else ""
    done = f"{status.run.absolute().name}: {counts['done']} of {len(rows)} done"
    title = Text(done + rate, no_wrap=short, overflow="ellipsis")
    for state in ("running", "failed", "stopped", "lost", "waiting"):
        title.append(f", {counts[state]} {state}" if counts[state] else "", STYLES[state])
    reasons = [f"{c.name}: {c.reason}" for c in rows if c.state == "failed" and c.reason]
    if short and len(reasons) > 3:
        reasons[2:] = [f"… and {len(reasons) - 2} more"]
    caption = Text("\n".join(reasons), no_wrap=short, overflow="ellipsis")
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.show_edge, table.padding = False, (0, 1, 0, 0)
    for name in ("category", "state", "samples", "img/s", "loss", "AUROC", "try", "node"):
        words = name in ("category", "state", "node")
        table.add_column(name, justify="left" if words else "right", no_wrap=name != "node")
    # Title, header, rule, and the line the cursor stands on.
    room = height - 4 - len(reasons) if height is not None else len(rows)
    for state in ("done", "waiting"):
        of, excess = [c for c in rows if c.state == state], len(rows) - room
        if excess > 0 and len(of) > 1:
            folded = of[: excess + 1] if state == "done" else of[-excess - 1 :]
            scores = [c.pixel_auroc for c in folded if c.pixel_auroc is not None]
            line = CategoryStatus(f"({len(folded)} more)", of[0].state, pixel_auroc=fmean(scores) if scores else None)
            rows[rows.index(folded[0])] = line
            rows = [c for c in rows if c not in folded]
    for c in rows:
        table.add_row(*_row(c))
    return table


def progress_line(c: CategoryStatus) -> str:
    """A category's newest step, for a log file."""
    step, total = c.last_step, f"/{c.total_samples:,}" if c.total_samples else ""
    names = {"dissimilarity": "1-SSIM", "focal": "focal", "adversarial": "adv", "discriminator": "disc"}
    losses = "  ".join(f"{text} {_number(step.get(name), 4)}" for name, text in names.items())
    slowness = step.get("slowness") or [0.0]
    worst = max(slowness)
    slow = f"  slowest: rank {slowness.index(worst)}, {worst:.1f} times" if worst > SLOW else ""
    return f"{c.name}: {c.samples or 0:,}{total} samples  {_number(step.get('images_per_second'), 1)} img/s  {losses}{slow}"


def news(before: CategoryStatus, now: CategoryStatus) -> Iterator[str]:
    """What has happened to a category meanwhile, for people."""
    if before.code and before.state == "failed" and now.attempt > before.attempt:
        yield f"{now.name}: tried again (attempt {now.attempt}) from its last checkpoint"
    if now.last_resume and now.last_resume != before.last_resume:
        yield f"{now.name}: resumed at sample {now.last_resume['samples']:,} (step {now.last_resume['step']:,})"
    if now.state == "failed" and (before.state, before.attempt) != (now.state, now.attempt):
        yield f"{now.name}: failed with exit code {now.code}" + (f": {now.reason}" if now.reason else "")
    if now.state == "done" != before.state:
        health = {"pixel AUROC": now.pixel_auroc} | now.metrics.get("reconstruction", {})
        yield f"{now.name}: done, " + ", ".join(f"{name} {_number(value, 3)}" for name, value in health.items())


class Live:
    """Shows a run from a thread while the block works: a table on a terminal, elsewhere a line a category now and then.

    Nothing that happens to the folder or to the terminal reaches the block: training goes on whether or not anyone can look.
    ``categories``: only these; empty: all that the folder knows of.
    """

    def __init__(self, run: Path, categories: Sequence[str] = (), console: Console | None = None) -> None:
        self.console, self.reader = console or Console(), RunReader(run, categories)
        self.over = threading.Event()
        """Set once the run is over, or nobody is left to show it to."""
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="status", daemon=True)
        self._screen: RichLive | None = None
        self._printed: dict[str, tuple[float, int | None]] = {}
        self._before: dict[str, CategoryStatus] = {}

    def __enter__(self) -> "Live":
        # SystemExit is what rich makes of a pipe that nobody reads any more.
        with suppress(Exception, SystemExit):
            # What was there before is no news.
            self._before = {c.name: c for c in self.reader.read().categories}
            self._printed = {c.name: (-QUIET_SECONDS, c.samples) for c in self._before.values()}
            if self.console.is_terminal and not self.console.is_dumb_terminal:
                self._screen = RichLive(console=self.console, auto_refresh=False, transient=True)
                self._screen.start()
                self.console.show_cursor(True)  # a terminal must not be left without one by a process that is killed
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        try:
            self._thread.join(2.0)  # no longer: a file system may not answer
        finally:
            with suppress(Exception, SystemExit):
                if self._screen:
                    self._screen.stop()

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._left.is_set()  # before looking, so that the last look sees all that the block did
            try:
                with suppress(Exception):
                    self._show(self.reader.read())
            except SystemExit:
                self.over.set()
            self._left.wait(REFRESH_SECONDS)

    def _show(self, status: RunStatus) -> None:
        if status.over:
            self.over.set()
        lines = [line for c in status.categories for line in news(self._before.get(c.name, c), c)]
        self._before = {c.name: c for c in status.categories}
        if self._screen:
            self._say(lines)
            return self._screen.update(status_table(status, self.console.height), refresh=True)
        now = time.monotonic()
        for c in status.categories:
            printed, samples = self._printed.get(c.name, (-QUIET_SECONDS, None))
            finished = c.total_samples is not None and (c.samples or 0) >= c.total_samples
            due = finished or (c.state == "running" and now - printed >= QUIET_SECONDS)
            if due and c.samples != samples and c.last_step:
                self._printed[c.name] = now, c.samples
                lines.append(progress_line(c))
        # A category's last step comes before the news that it is done.
        self._say(sorted(lines, key=lambda line: ": done, " in line))

    def _say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


# --- launch/status.py --------------------------------------------------------------------------------------------


def as_json(status: RunStatus) -> dict[str, Any]:
    """Everything in ``status``, and what the newest launch's ranks did with their time (``RankTimes``)."""
    derived = ("counts", "images_per_second", "complete", "over", "status_code")
    ranks = {rank: asdict(times) | {"idle": times.idle} for rank, times in rank_times(status.run).items()}
    return asdict(status) | {"run": str(status.run)} | {k: getattr(status, k) for k in derived} | {"ranks": ranks}


def show_status(run: Path, watch: bool, machine: bool) -> int:
    """Prints what a run is doing, with ``watch`` until it is over, for a ``machine`` as JSON; returns the exit code."""
    if not (run / "config.toml").is_file():
        text = f"{run}: no run in this folder, which would hold config.toml, queue/ and a folder for each category"
        Console(stderr=True).print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        return NO_RUN
    console, interrupted = Console(), False
    try:
        if watch:
            with Live(run, console=console) as live:
                live.over.wait()
    except KeyboardInterrupt:
        interrupted = True
    status = read_status(run)
    if machine:
        print(json.dumps(as_json(status), indent=1))
    else:
        console.print(status_table(status))
    return INTERRUPTED if interrupted else status.status_code
