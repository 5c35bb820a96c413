"""A category's training as one line, from its ``events.jsonl``: what a resume has undone and done again is there once.

That file is appended to by every attempt, each of which goes on from a checkpoint that may lie behind the last line.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wads_dist.runs.folder import EVENTS


@dataclass
class History:
    """``steps``, ``rejected`` and ``scores`` (of early stopping): the lines of that name which still stand. ``resumes``: the
    samples at which training went on."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)

    def add(self, event: dict[str, Any]) -> None:
        """Takes in the next line of the file."""
        kind, step = event.get("event"), event.get("step")
        if kind not in ("start", "resume", "step", "rejected", "score") or not isinstance(step, int):
            return
        if kind in ("start", "resume"):
            for lines in (self.steps, self.rejected, self.scores):
                lines[:] = [e for e in lines if e["step"] <= step]
            samples = event.get("samples")
            if kind == "start":
                self.resumes = []
            elif isinstance(samples, int):
                self.resumes = [*(s for s in self.resumes if s < samples), samples]
        else:
            {"step": self.steps, "rejected": self.rejected, "score": self.scores}[kind].append(event)

    def losses(self, name: str, most: int) -> tuple[list[float], list[float | None]]:
        """Samples and a loss, as means over equally many logged steps so that there are at most ``most`` points.

        Steps that had no finite loss do not count; None where a mean has no other.
        """
        width = -(-len(self.steps) // most) or 1
        samples: list[float] = []
        means: list[float | None] = []
        for first in range(0, len(self.steps), width):
            part = self.steps[first : first + width]
            values = [e[name] for e in part if isinstance(e.get(name), int | float)]
            samples.append(part[-1].get("samples") or 0)
            means.append(sum(values) / len(values) if values else None)
        return samples, means


def read_history(path: Path) -> History:
    """The history in ``events.jsonl``; an empty one if that is not there. Lines that a crash has cut are left out."""
    history = History()
    with suppress(OSError), path.open("rb") as stream:
        for line in stream:
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    history.add(event)
    return history


# Of events.jsonl, which may have many MB; a step of a thousand ranks has a line of 6 KB.
TAIL_BYTES = 65536


def json_objects(lines: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects among ``lines``; a line that is none was cut by a crash, or by where reading began."""
    for line in lines.splitlines():
        with suppress(ValueError):
            if isinstance(value := json.loads(line), dict):
                yield value


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
        for event in json_objects(lines):
            self.time = event.get("time", self.time)
            if event.get("event") == "failed":
                self.last_failure = event
            if event.get("event") in ("start", "resume", "step", "preempted"):
                self.last = event
                self.last_step = event if event["event"] == "step" else self.last_step
                self.last_resume = event if event["event"] == "resume" else self.last_resume


class Events:
    """``RUN/<category>/events.jsonl``: one JSON object a line, appended; for machines. Rank 0 only."""

    def __init__(self, folder: Path, enabled: bool) -> None:
        self.file = (folder / EVENTS).open("a") if enabled else None

    def write(self, event: str, **values: Any) -> None:
        if self.file:
            values = finite_or_none(values)
            self.file.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")
            self.file.flush()


def finite_or_none(values: dict[str, Any]) -> dict[str, Any]:
    """A rejected step's losses are not finite, and NaN is no JSON."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
