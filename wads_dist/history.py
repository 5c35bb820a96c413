"""A category's training as one line, from its ``events.jsonl``: what a resume has undone and done again is there once.

That file is appended to by every attempt, each of which goes on from a checkpoint that may lie behind the last line.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
