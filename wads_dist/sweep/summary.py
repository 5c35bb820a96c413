"""What a sweep came to: for every point of the grid, the scores' mean and deviation over its seeds, as data and as tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

from wads_dist.common.errors import ExitCode
from wads_dist.runs.folder import METRICS, SUMMARY
from wads_dist.runs.reader import RunReader
from wads_dist.sweep.plan import Run, Sweep

STOPPED = (ExitCode.PREEMPTED, ExitCode.INTERRUPTED)
SCORES = {"pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP", "image_auroc": "image AUROC"}
# More rows than this are for summary.json alone.
MOST_ROWS = 60


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and standard deviation of a sample (n − 1; None for fewer than two)."""
    mean = fmean(values) if values else None
    return {"mean": mean, "std": stdev(values) if len(values) > 1 else None, "n": len(values), "values": list(values)}


def summarise(sweep: Sweep) -> dict[str, Any]:
    """The summary of what is done.

    ``points``: for every point of the grid ``mean``, of the means over categories, from the runs that have them all, and
    ``categories``; each score a ``spread`` over seeds. ``missing`` (run → categories) and ``failed`` (run → category → code).
    """
    points: dict[str, Any] = {}
    for name in dict.fromkeys(run.point for run in sweep.runs):
        runs = [run for run in sweep.runs if run.point == name]
        found = [_scores(run) for run in runs]
        whole = [list(of.values()) for run, of in zip(runs, found, strict=True) if len(of) == len(run.categories)]
        by_category = {c: [of[c] for of in found if c in of] for c in runs[0].categories}
        points[name] = {
            "runs": {run.name: run.settings for run in runs},
            "mean": {score: spread([fmean(v) for of in whole if (v := _defined(of, score))]) for score in SCORES},
            "categories": {
                c: {score: spread(_defined(of, score)) for score in SCORES} for c, of in by_category.items()
            },
        }
    missing = {run.name: run.missing for run in sweep.runs if run.missing}
    summary = {"sweep": str(sweep.out), "points": points, "complete": not missing}
    return summary | {"missing": missing, "failed": failed(sweep)}


def failed(sweep: Sweep) -> dict[str, dict[str, int]]:
    """Run → category → exit code of its last attempt, where that has failed and was not stopped."""
    found: dict[str, dict[str, int]] = {}
    for run in sweep.runs:
        for c in RunReader(run.folder, run.missing).read().categories if run.missing else ():
            code, ended = c.code, sweep.ended_file(run, c.name)
            if code is None and ended.is_file():
                code = int(ended.read_text())  # of a launch that had not come to this category, or has lost it
            if code not in (None, ExitCode.OK, *STOPPED):
                found.setdefault(run.name, {})[c.name] = int(code)
    return found


def exit_code_of(summary: dict[str, Any]) -> ExitCode:
    """The exit code that a summary amounts to."""
    if summary["complete"]:
        return ExitCode.OK
    codes = {code for of in summary["failed"].values() for code in of.values()}
    if not _scored(summary) and len(codes) == 1 and codes <= set(ExitCode):
        return ExitCode(codes.pop())
    return ExitCode.CATEGORY_FAILED if codes else ExitCode.PREEMPTED


def _scored(summary: dict[str, Any]) -> bool:
    """Whether anything is done. One score may be undefined where others are not."""
    return any(of["n"] for scores in _by_category(summary) for of in scores.values())


def _scores(run: Run) -> dict[str, dict[str, Any]]:
    missing = run.missing
    return {c: json.loads((run.folder / c / METRICS).read_text()) for c in run.categories if c not in missing}


def _defined(metrics: Sequence[dict[str, Any]], score: str) -> list[float]:
    """Some scores are not defined for some categories, as pixel scores without masks."""
    return [m[score] for m in metrics if m.get(score) is not None]


# --- for people --------------------------------------------------------------------------------------------------


def tables(summary: dict[str, Any]) -> Group:
    """A row for each point of the grid, then one for each category of each point."""
    seeds = max((len(point["runs"]) for point in summary["points"].values()), default=1)
    whole, single = _table("Mean over categories", "run"), _table("By category", "category")
    if seeds > 1:
        single.caption = f"± standard deviation over {seeds} seeds; runs: those counted"
    for name, point in summary["points"].items():
        _row(whole, name, point["mean"], len(point["runs"]))
        if len(summary["points"]) > 1:
            single.add_section()
            single.add_row(name, style="bold")
        for category, scores in point["categories"].items():
            _row(single, category, scores, len(point["runs"]))
    path = Path(summary["sweep"]) / SUMMARY
    return Group(whole, "", single if single.row_count <= MOST_ROWS else f"Scores by category: {path}")


def _table(title: str, first: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.add_column(first)
    for name in SCORES.values():
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("runs", justify="right", no_wrap=True)
    return table


def _row(table: Table, name: str, scores: dict[str, Any], runs: int) -> None:
    counted = max(of["n"] for of in scores.values())
    table.add_row(name, *(cell(scores[score]) for score in SCORES), f"{counted}/{runs}")


def cell(of: dict[str, Any]) -> str:
    """A mean and its deviation, as ``spread`` gives them."""
    if of["mean"] is None:
        return "–"
    return f"{of['mean']:.3f}" + (f" ± {of['std']:.3f}" if of["std"] is not None else "")


def show(summary: dict[str, Any], console: Console) -> None:
    """Prints the tables, once there is a score, and what is not done."""
    if _scored(summary):
        console.print(tables(summary))
    for run, names in summary["missing"].items():
        codes = summary["failed"].get(run, {})
        told = ", ".join(f"{name} (exit code {codes[name]})" if name in codes else name for name in names)
        style = "red" if codes else "yellow"
        console.print(f"not done: {run}: {told}", style=style, highlight=False, markup=False, soft_wrap=True)


def _by_category(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [of for point in summary["points"].values() for of in point["categories"].values()]
