"""What a run is doing, for people: ``launch/status.py``, and what the first rank shows while it trains."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from wads_dist.common.errors import ExitCode
from wads_dist.reporting.report_data import show
from wads_dist.runs.reader import CategoryStatus, RunReader, RunStatus, rank_times, read_status

STYLES = dict(running="cyan", waiting="dim", failed="bold red", stopped="yellow", lost="magenta", done="green")
REFRESH_SECONDS, QUIET_SECONDS = 1.0, 15.0
# A rank is called slow on the terminal from here on; events.jsonl has every rank's score.
SLOW = 1.5


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
    scores = [show(*pair) for pair in ((c.images_per_second, 1), (c.loss, 3), (c.pixel_auroc, 3))]
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
    losses = "  ".join(f"{text} {show(step.get(name), 4)}" for name, text in names.items())
    slowness = step.get("slowness") or [0.0]
    worst = max(slowness)
    slow = f"  slowest: rank {slowness.index(worst)}, {worst:.1f} times" if worst > SLOW else ""
    return (
        f"{c.name}: {c.samples or 0:,}{total} samples  {show(step.get('images_per_second'), 1)} img/s  {losses}{slow}"
    )


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
        yield f"{now.name}: done, " + ", ".join(f"{name} {show(value, 3)}" for name, value in health.items())


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
        return ExitCode.BAD_DATA
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
    return ExitCode.INTERRUPTED if interrupted else status.status_code
