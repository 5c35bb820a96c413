"""The report of a run: one HTML file that holds everything itself, made from the run's folder alone.

Nobody needs this project to read it: it asks for nothing from the network (its own policy forbids that), runs no script, and
fits a phone and a printer. Imports no torch, so that it is made in a moment.
"""

import base64
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from wads_dist.common.errors import ExitCode
from wads_dist.common.files import write_text
from wads_dist.reporting import paper
from wads_dist.reporting.charts import Chart, Series
from wads_dist.reporting.report_data import (
    EXPERT_SCORES,
    IMAGE_SCORES,
    PIXEL_SCORES,
    SCORES,
    Category,
    Mean,
    RunRecord,
    as_json,
    lookup,
    missing,
    number,
    read_run,
    show,
)
from wads_dist.runs.folder import EXAMPLES, METRICS, REPORT
from wads_dist.runs.reader import rank_times

TEMPLATE = "report.html.j2"
NOT_WRITTEN = 1
# Of all pictures together, as they stand in the file: it must go through mail.
PICTURE_BYTES = 4_000_000
CURVE_POINTS = 200
TILES = dict(input="input", reconstruction="reconstruction", truth="ground truth", heat="prediction", mask="mask")
MIME = {".jpg": "image/jpeg", ".png": "image/png"}
LOSSES = {
    "Objective and reconstruction": dict(total="total", dissimilarity="1 − SSIM", mse="MSE", latent="latent"),
    "Segmentation and adversary": dict(focal="focal", kl="sparsity KL", adversarial="adversarial", discriminator="D"),
}


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.0f} s"


# --- tables ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """``style`` is a CSS class, ``href`` where the text leads."""

    text: str
    style: str = ""
    href: str = ""


@dataclass(frozen=True)
class Table:
    """``rows`` are cells and the CSS class of the row."""

    columns: Sequence[str]
    rows: Sequence[tuple[Sequence[Cell], str]]


def anchors(record: RunRecord) -> list[str]:
    """Names for links, which a category's own may not be fit for."""
    return [f"category-{position}" for position in range(1, len(record.categories) + 1)]


def score_table(record: RunRecord, scores: dict[str, str]) -> Table:
    """A row a category, then the means; pixel AUROC, the first of its table, has the paper's beside it."""
    first = next(iter(scores))
    columns, has_paper = ["category", *scores.values()], record.has_paper and first == "pixel_auroc"
    if has_paper:
        columns.insert(2, "paper")

    def row(name: Cell, of: Category | Mean) -> list[Cell]:
        cells = [score_cell(of, path, first) for path in scores]
        return [name, cells[0], *([Cell(show_paper(of))] if has_paper else []), *cells[1:]]

    rows = []
    for c, anchor in zip(record.categories, anchors(record), strict=True):
        name = c.name if c.done else f"{c.name} ({c.status.state})"
        rows.append((row(Cell(name, href=f"#{anchor}"), c), "" if c.done else "open"))
    for mean in record.means if len(record.categories) > 1 else ():
        over = len(mean.having(first))
        count = "" if over == mean.of else f" ({over} of {mean.of})"
        rows.append((row(Cell(f"mean, {mean.name}{count}"), mean), "mean"))
    return Table(columns, rows)


def show_paper(of: Category | Mean) -> str:
    """The paper's number; of a mean that it prints, that of its values and what is printed."""
    printed = of.paper_printed if isinstance(of, Mean) else None
    return show(of.paper) if printed is None else f"{show(of.paper, 4)} (printed {show(printed)})"


def score_cell(of: Category | Mean, path: str, first: str) -> Cell:
    """A score that does not beat the trivial one is marked. A mean over fewer or more categories than that of ``first``, which
    the row's name counts, has their number."""
    value, trivial, text = of.score(path), of.score(f"trivial.{path}"), show_score(of, path)
    if isinstance(of, Mean) and (over := len(of.having(path))) != len(of.having(first)):
        text += f" ({over})"
    below = value is not None and trivial is not None and value <= trivial
    return Cell(f"{text} ▼", "below") if below else Cell(text)


def show_score(of: Category | Mean, path: str) -> str:
    """With how far the exact score may be from it, if that shows in three digits."""
    margin = of.margin(path)
    return show(of.score(path)) + (f" ± {show(margin)}" if margin >= 0.0005 else "")


def category_table(categories: Sequence[Category], columns: dict[str, Callable[[Category], str]]) -> Table:
    """A row a category, a column for each of ``columns``."""
    rows = [([Cell(c.name), *(Cell(text(c)) for text in columns.values())], "") for c in categories]
    return Table(["category", *columns], rows)


def score_columns(columns: dict[str, str]) -> dict[str, Callable[[Category], str]]:
    """Columns of numbers in ``metrics.json``, by their paths."""
    return {label: lambda c, path=path: show(c.score(path)) for label, path in columns.items()}  # type: ignore[misc]


EFFORT: dict[str, Callable[[Category], str]] = {
    "samples": lambda c: show(c.status.samples, 0),
    "images/s": lambda c: show(c.status.images_per_second, 1),
    "time": lambda c: duration(c.score("seconds")),
    "ranks": lambda c: show(c.score("world_size"), 0),
    "attempts": lambda c: str(len(c.attempts) or "–"),
    "resumes": lambda c: str(len(c.history.resumes)),
    "rejected steps": lambda c: show(c.score("rejected_steps") if c.done else len(c.history.rejected), 0),
    "of them spikes": lambda c: show(c.score("spikes"), 0),
}
DECISIONS: dict[str, Callable[[Category], str]] = {
    "pixel threshold": lambda c: show(number(c.threshold, "pixel")),
    **score_columns({name: f"at_threshold.pixel_{key}" for name, key in
                     (("F1", "f1"), ("IoU", "iou"), ("recall", "recall"), ("false-positive rate", "false_positive_rate"))}),
    "image threshold": lambda c: show(number(c.threshold, "image")),
    **score_columns({f"{name} (images)": f"at_threshold.image_{key}" for name, key in
                     (("F1", "f1"), ("recall", "recall"), ("false-positive rate", "false_positive_rate"))}),
}  # fmt: skip
HEALTH = score_columns(
    {
        "SSIM": "reconstruction.ssim",
        "SSIM of the mean image": "reconstruction.mean_image_ssim",
        "follows": "reconstruction.follows_input",
        "spread": "reconstruction.code_spread",
    }
)


def launch_table(record: RunRecord) -> Table:
    """What every launch's ranks did with their time."""
    rows = []
    for name, event in record.launches.items():
        times = list(rank_times(record.status.run, name).values())
        spent = [sum(getattr(t, key) for t in times) for key in ("worked", "startup", "waited", "nothing_left")]
        counts = [str(event.get("ranks", "–")), str(len(event.get("groups") or ()) or "–")]
        texts = [name, ", ".join(_hosts(event)) or "–", *counts, *map(duration, spent)]
        rows.append(([Cell(text) for text in texts], ""))
    return Table(["launch", "hosts", "ranks", "groups", "trained", "starting", "waiting", "nothing left to do"], rows)


def _hosts(launch: dict[str, Any]) -> list[str]:
    """Each once, in order."""
    hosts = launch.get("hosts")
    return list(dict.fromkeys(map(str, hosts))) if isinstance(hosts, list) else []


def headline(record: RunRecord) -> list[tuple[str, str, str]]:
    """Label, value and remark of the numbers that a reader wants first."""
    mean = record.means[-1]

    def over(path: str) -> str:
        having, (_, _, margin) = mean.having(path), show_score(mean, path).partition(" ± ")
        text = having[0].name if len(having) == 1 else f"mean of {len(having)}"
        return f"± {margin}, {text}" if margin else text

    beside = [over("pixel_auroc"), f"trivial {show(mean.score('trivial.pixel_auroc'))}"]
    if mean.paper is not None:
        beside.append(f"paper {show_paper(mean)}")
    seconds = [(c.score("seconds") or 0.0, c.score("world_size") or 1) for c in record.done]
    return [
        ("pixel AUROC", show(mean.score("pixel_auroc")), ", ".join(beside)),
        *((SCORES[path], show(mean.score(path)), over(path)) for path in ("pixel_ap", "pixel_aupro", "image_auroc")),
        ("categories", f"{len(record.done)} of {len(record.categories)}", "done"),
        ("training", duration(sum(s for s, _ in seconds)), f"{sum(s * n for s, n in seconds) / 3600:,.1f} rank-hours"),
    ]


def settings(record: RunRecord) -> list[tuple[str, str]]:
    """What decides a run's numbers, in short."""

    def get(path: str) -> str:
        value = lookup(record.config, path)
        return "–" if value is None else f"{value:,}" if type(value) is int else str(value)

    code: Any = {}
    with suppress(ValueError):
        code = json.loads(record.files.get("code.json", ""))
    code = code if isinstance(code, dict) else {}
    metrics = [c.status.metrics for c in record.done]
    hosts = [host for launch in record.launches.values() for host in _hosts(launch)]
    machine = [*hosts, *(str(m[key]) for m in metrics for key in ("device", "precision") if key in m)]
    return [
        ("preset", get("preset")),
        ("seed", get("trainer.seed")),
        ("budget", f"{get('trainer.samples')} samples a category, {get('trainer.global_batch_size')} a step"),
        ("image size", f"{get('data.image_size')} (stored at {get('data.store_size')})"),
        ("segmenter", f"{get('model.backbone')}, {get('model.weights')} weights"),
        ("learning rate", f"{get('trainer.learning_rate')}, {get('trainer.schedule')}"),
        ("data", get("data.shards") if get("data.shards") != "–" else get("data.root")),
        ("machine", ", ".join(dict.fromkeys(machine)) or "–"),
        ("code", str(code.get("commit", "–"))),
        ("versions", ", ".join(f"{name} {version}" for name, version in code.items() if name != "commit") or "–"),
    ]


# --- categories --------------------------------------------------------------------------------------------------


def charts(c: Category) -> list[Chart]:
    """ROC, PRO and precision-recall curves, then the losses."""
    found = []
    for key, title, x, y, label, x_max in (
        ("roc", "ROC", "fpr", "tpr", "false positive rate", 1.0),
        ("pro", "PRO", "fpr", "pro", "false positive rate", 0.3),
        ("pr", "Precision and recall", "recall", "precision", "recall", 1.0),
    ):
        xs, ys = lookup(c.curves, f"{key}.{x}"), lookup(c.curves, f"{key}.{y}")
        if isinstance(xs, list) and isinstance(ys, list):
            found.append(Chart(title, label, [Series("", xs, ys)], x_max))
    end = max((number(step, "samples") or 0 for step in c.history.steps), default=0)
    for title, names in LOSSES.items() if end else ():
        series = [Series(label, *c.history.losses(name, CURVE_POINTS)) for name, label in names.items()]
        found.append(Chart(title, "samples", series, float(end), log=True, marks=c.history.resumes))
    if c.history.scores:
        points = [(number(event, "samples"), number(event, "score")) for event in c.history.scores]
        known = [(x, y) for x, y in points if x is not None]
        series = [Series("", [x for x, _ in known], [y for _, y in known])]
        end = max([end, *(x for x, _ in known)])
        found.append(Chart("Pixel AP of synthetic anomalies", "samples", series, float(end), marks=c.history.resumes))
    return found


def pictures(c: Category, allowance: int) -> list[dict[str, Any]]:
    """The examples with their tiles as data URIs, within ``allowance`` bytes; the first of every rank before the second."""
    found = c.examples.get("examples")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    kinds = [(str(entry.get("rank")), entry.get("defect") == "good") for entry in entries]
    turns = [kinds[:position].count(kind) for position, kind in enumerate(kinds)]
    kept = {}
    for position in sorted(range(len(entries)), key=lambda i: turns[i]):
        tiles = list(_tiles(c.folder / EXAMPLES, entries[position]))
        allowance -= sum(len(uri) for _, uri in tiles)
        if tiles and allowance >= 0:
            kept[position] = {"caption": caption(entries[position]), "tiles": tiles}
    return [kept[position] for position in sorted(kept)]


def _tiles(folder: Path, entry: dict[str, Any]) -> Iterator[tuple[str, Markup]]:
    for key, label in TILES.items():
        name = lookup(entry, f"tiles.{key}")
        if isinstance(name, str) and Path(name).name == name and (mime := MIME.get(Path(name).suffix)):
            with suppress(OSError):
                coded = base64.b64encode((folder / name).read_bytes()).decode()
                yield label, Markup(f"data:{mime};base64,{coded}")


def caption(entry: dict[str, Any]) -> tuple[str, str]:
    """What an example is, and its numbers."""
    place, of, rank = number(entry, "place"), number(entry, "of"), entry.get("rank", "?")
    normal, ap = entry.get("defect") == "good", number(entry, "ap")
    kind = "normal images" if normal else "defects" if ap is not None else "defects without a mask"
    scores = {"AP": ap, "IoU": number(entry, "iou"), "score": number(entry, "score")}
    told = [f"{name} {value:.2f}" for name, value in scores.items() if value is not None]
    position = f"{rank}: {place:.0f} of {of:.0f} {kind}" if place and of else f"{rank} of the {kind}"
    return position, ", ".join([str(entry.get("key", "?")), *told])


def facts(c: Category) -> Iterator[str]:
    """Sentences about a category."""
    status, ranks, images = c.status, c.score("world_size"), c.score("test_images")
    if c.done:
        parts = [f"{status.samples or 0:,} samples in {duration(c.score('seconds'))}"]
        parts += [f"{status.images_per_second:,.1f} images/s"] if status.images_per_second else []
        parts += [f"{ranks:.0f} rank{'s' * (ranks != 1)}"] if ranks else []
        parts += [str(status.metrics[key]) for key in ("precision", "backbone") if key in status.metrics]
        yield ", ".join([*parts, *([f"{images:,.0f} test images"] if images else [])]) + "."
        if (best := c.score("stopping.samples")) is not None:
            early = "Stopped early" if lookup(status.metrics, "stopping.early") else "Not stopped early"
            scores = f"{show(c.score('stopping.scores'), 0)} scores ({show(c.score('stopping.score'))})"
            source = lookup(status.metrics, "stopping.source")
            yield (
                f"{early}: the weights are those after {best:,.0f} samples, which had the best of {scores} of synthetic "
                f"anomalies on {source}."
            )
    else:
        yield f"Not done: {status.state}" + (f" at {status.samples:,} samples." if status.samples else ".")
    if c.threshold:
        count = number(c.threshold, "images")
        yield f"Thresholds from {f'{count:,.0f} ' if count else ''}{c.threshold.get('source', 'an unknown source')}."
        if warning := c.threshold.get("warning"):
            yield str(warning)
    elif reason := status.metrics.get("no_threshold"):
        yield f"No threshold: {reason}."
    if c.done:
        small = number(status.metrics, "small_components")
        kept = "cover no pixel by half: kept as the pixels that they cover most"
        lost = "under no pixel's centre: lost, they count as normal"
        told = f"; of their components, {small:,.0f} {kept if c.mask_rule == 'area' else lost}" if small else ""
        yield f"Masks at the network's resolution: by {c.mask_rule}{told}."
    undefined = status.metrics.get("undefined")
    for kind, reason in undefined.items() if isinstance(undefined, dict) else ():
        yield f"Scores of {kind}s are not defined: {reason}."
    if "bounds" in status.metrics:
        yield "Pixels were counted in a histogram: exact scores lie within bounds, whose middles are shown (±: half as wide)."
    for attempt in c.attempts:
        if attempt.end and attempt.end.code:
            host = f" on {attempt.claim.host}" if attempt.claim else ""
            after = f"exit code {attempt.end.code} after {duration(attempt.end.seconds)}"
            yield f"Attempt {attempt.number}{host} ended with {after}{': ' if attempt.end.reason else ''}{attempt.end.reason}."
    for event in c.history.rejected[:3]:
        yield f"Step {event['step']:,} was rejected: {event.get('reason', 'no reason recorded')}."
    if (more := len(c.history.rejected) - 3) > 0:
        yield f"{more:,} more steps were rejected; rejected.jsonl has them."


# --- the page ----------------------------------------------------------------------------------------------------


def render(record: RunRecord) -> str:
    """The HTML document."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    allowance = PICTURE_BYTES // max(1, sum(bool(c.examples) for c in record.categories))
    sections = [
        {
            "anchor": anchor,
            "name": c.name,
            "auroc": show_score(c, "pixel_auroc"),
            "facts": list(facts(c)),
            "pictures": pictures(c, allowance),
            "charts": [(chart, Markup(chart.svg())) for chart in charts(c)],
            "resumes": [f"{samples:,}" for samples in c.history.resumes],
        }
        for c, anchor in zip(record.categories, anchors(record), strict=True)
    ]
    experts = [EXPERT_SCORES] if any(c.score(path) is not None for c in record.done for path in EXPERT_SCORES) else []
    return environment.get_template(TEMPLATE).render(
        name=record.status.run.absolute().name,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record.status.time)),
        complete=record.status.complete,
        headline=headline(record),
        missing=list(missing(record)),
        scores=[score_table(record, scores) for scores in (PIXEL_SCORES, IMAGE_SCORES, *experts)],
        paper=paper,
        has_paper=record.has_paper,
        mask_rules=" and ".join(sorted({c.mask_rule for c in record.done})),
        decisions=category_table([c for c in record.done if c.threshold], DECISIONS),
        sections=sections,
        effort=category_table(record.categories, EFFORT),
        launches=launch_table(record),
        health=category_table(record.done, HEALTH),
        settings=settings(record),
        files=record.files,
    )


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the report of ``run`` to ``out`` (none: into the run's folder) and returns where it is.

    Raises:
        OSError: it cannot be written.
    """
    out = out or run / REPORT
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(read_run(run)))
    return out


def show_report(run: Path, out: Path | None, machine: bool) -> int:
    """``launch/report.py``: writes the report, or for a ``machine`` prints its numbers as JSON; returns the exit code."""
    if not (run / "config.toml").is_file() and not any(run.glob(f"*/{METRICS}")):
        print(
            f"{run}: no run in this folder, which would hold config.toml and a folder for each category",
            file=sys.stderr,
        )
        return ExitCode.BAD_DATA
    if machine:
        print(json.dumps(as_json(read_run(run)), indent=1))
    if not machine or out:
        try:
            path = write_report(run, out)
        except OSError as error:
            print(f"{out or run / REPORT}: cannot be written: {error.strerror}", file=sys.stderr)
            return NOT_WRITTEN
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", file=sys.stderr if machine else sys.stdout)
    return 0
