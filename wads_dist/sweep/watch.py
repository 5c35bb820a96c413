"""What a sweep is doing, for the person who started it: the categories of all runs as one table, or as lines."""

import time
from contextlib import suppress
from dataclasses import replace

from rich.console import Console
from rich.live import Live

from wads_dist.reporting.status import progress_line, status_table
from wads_dist.runs.reader import CategoryStatus, RunReader, RunStatus
from wads_dist.sweep.plan import Sweep
from wads_dist.sweep.slurm import Queued

LOOK_SECONDS, LINE_SECONDS = 2.0, 60.0


class Watch:
    """A live table on a terminal; elsewhere, or if not ``live``, a line whenever something changes.

    Whatever happens to the terminal or the folders, the sweep goes on: its launch has a session of its own and would not end
    with this process. (SystemExit is what rich makes of a pipe that nobody reads any more.)
    """

    def __init__(self, sweep: Sweep, console: Console, live: bool) -> None:
        self.sweep, self.console = sweep, console
        self.queue: dict[int, Queued] = {}
        """The tasks that Slurm has."""
        self._readers = {run.name: RunReader(run.folder, run.categories) for run in sweep.runs}
        self._live = Live(console=console, auto_refresh=False, transient=True) if live and console.is_terminal else None
        self._status = RunStatus(sweep.out, 0.0, [], None, 0.0)
        self._looked = -LOOK_SECONDS
        self._told: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> "Watch":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(Exception, SystemExit):
            if self._live:
                self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        with suppress(Exception, SystemExit):
            self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def look(self) -> RunStatus:
        """Reads where everything stands, at most once in ``LOOK_SECONDS``, and shows it."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            with suppress(Exception, SystemExit):
                self._status = self.read()
                if self._live:
                    self._live.update(status_table(self._status, self.console.height), refresh=True)
                else:
                    self._print_changes(now)
        return self._status

    def read(self) -> RunStatus:
        """All runs as one."""
        found = []
        numbers = {task: number for number, task in enumerate(self.sweep.tasks)}
        for run in self.sweep.runs:
            for category in self._readers[run.name].read().categories:
                queued = self.queue.get(numbers[run.name, category.name])
                name = f"{run.name}/{category.name}" if len(self.sweep.runs) > 1 else category.name
                found.append(replace(in_queue(category, queued) if queued else category, name=name))
        return RunStatus(self.sweep.out, time.time(), found, None, 0.0)

    def _print_changes(self, now: float) -> None:
        for c in self._status.categories:
            state = " ".join(filter(None, (c.state, c.host, f"attempt {c.attempt}" if c.attempt > 1 else "", c.reason)))
            told, since = self._told.get(c.name, ("waiting", now))
            due = c.state == "running" and c.last_step and now - since >= LINE_SECONDS
            if state != told or due:
                self._told[c.name] = state, now
                self.say(f"{time.strftime('%H:%M:%S')} {progress_line(c) if due else f'{c.name}: {state}'}")


def in_queue(category: CategoryStatus, queued: Queued) -> CategoryStatus:
    """What a category does whose task Slurm has in its queue."""
    if category.state in ("done", "running"):
        return category
    if queued.started:
        return replace(category, state="running", host=queued.node, images_per_second=None)
    reason = "" if queued.reason == "None" else f" ({queued.reason})"
    return replace(category, state="waiting", host=f"queued{reason}", reason="")
