"""Prediction for many files: ``launch/predict.py``.

Reading, the network and writing overlap. Every picture and both tables appear by a rename, so none is ever half a file, and
what was finished when a run is broken off is there and listed. A file that cannot be read costs its own row only.
"""

import csv
import errno
import glob
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from wads_dist.common.errors import ExitCode, WadsError
from wads_dist.deploy.predict import Detector, Result, read_image, stored_image
from wads_dist.shards.errors import DataError
from wads_dist.shards.layout import IMAGE_SUFFIXES
from wads_dist.shards.names import printable

# Decoded pixels (but for the last image's) that wait for the network at a time: read ahead, and of the batch being gathered,
# which has half of them at most. As much as a batch more is being scored, and as much being written.
MAX_PIXELS = 64_000_000
COLUMNS = (
    *("path", "width", "height", "score", "decision", "threshold", "pixel_threshold", "threshold_source"),
    *("anomalous_area", "box", "pictures", "problem"),
)
SUFFIXES = IMAGE_SUFFIXES | {".webp"}  # of images in folders; training does without the latter
Row = dict[str, Any]


@dataclass
class Item:
    """A file: its path as it was given, the name of its pictures below the output folder, and what is known of it."""

    path: str
    name: str = ""
    problem: str | None = None
    image: Image.Image | None = None
    stored: Tensor | None = None
    result: Result | None = None


@dataclass
class Prediction:
    """What became of all files; ``skipped`` maps a file's path to its problem."""

    images: int = 0
    decisions: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def exit_code(self) -> ExitCode:
        if self.interrupted:
            return ExitCode.INTERRUPTED
        return ExitCode.BAD_DATA if self.skipped else ExitCode.OK


def find_images(inputs: Sequence[str], out: Path | None = None) -> list[Item]:
    """The files that ``inputs`` (folders, searched recursively; files; patterns) name, each once, and what is wrong.

    In folders and patterns files count by their suffix; what is inside ``out`` never does, because it may be a picture of
    an earlier prediction. Pictures are named after the files' paths below the folder that holds them all, so that namesakes
    in different folders do not meet.
    """
    found: dict[str, Item] = {}
    roots: list[str] = []
    named: list[str] = []  # by the current input
    inside: list[str] = []  # of ``out``, likewise

    def add(path: str, problem: str | None = None) -> None:
        absolute = os.path.abspath(path)
        if out is not None and Path(absolute).is_relative_to(os.path.abspath(out)):
            inside.append(absolute)
        else:
            found.setdefault(absolute, Item(path, problem=problem))
            named.append(absolute)

    def walk(top: str) -> None:
        def unlisted(error: OSError) -> None:
            add(str(error.filename), f"cannot be listed ({error.strerror}); check its permissions")

        seen = set()
        for directory, folders, files in os.walk(top, onerror=unlisted, followlinks=True):
            seen.add(os.path.realpath(directory))  # links may form a circle
            folders[:] = sorted(f for f in folders if os.path.realpath(os.path.join(directory, f)) not in seen)
            # A folder with an image's name is tried as one, too, because its owner will miss it.
            for name in sorted([*files, *folders]):
                if _is_image_name(name):
                    add(os.path.join(directory, name))

    for given in inputs:
        named.clear()
        inside.clear()
        # A file's own name may hold what would make it a pattern.
        for match in [given] if os.path.lexists(given) else sorted(glob.glob(given, recursive=True)):
            if os.path.isdir(match):
                roots.append(os.path.abspath(match))
                walk(match)
            elif match == given or _is_image_name(match):
                roots.append(os.path.dirname(os.path.abspath(match)))
                add(match)
        if not named:
            problem = f"{'holds' if os.path.isdir(given) else 'matches'} no image; give images, or folders of them"
            if not (glob.has_magic(given) or os.path.lexists(given)):
                problem = "no such file or folder"
            if inside:
                problem = f"lies inside --out ({out}), where nothing is scored; give another --out"
            found.setdefault(os.path.abspath(given), Item(given, problem=problem))
    base = os.path.commonpath(roots) if roots else ""
    for absolute, item in found.items():
        item.name = os.path.relpath(absolute, base or None)
    return list(found.values())


def _is_image_name(path: str) -> bool:
    name = Path(path)
    return name.suffix.lower() in SUFFIXES and not name.name.startswith(".")


@contextmanager
def results_files(out: Path) -> Iterator[Callable[[Row], None]]:
    """A function that adds a row to ``results.csv`` and ``results.jsonl``, which get these names at the end."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("results.csv", "results.jsonl")
    with ExitStack() as stack:
        for name in names:
            stack.callback((out / f".{name}").replace, out / name)  # runs after the file is closed
        # Linux file names need not be UTF-8: what is not comes back as the bytes it was.
        table, lines = (
            stack.enter_context((out / f".{name}").open("w", encoding="utf-8", errors="surrogateescape", newline=""))
            for name in names
        )
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()

        def add(row: Row) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            writer.writerow(row | {"box": " ".join(map(str, row["box"] or []))})

        yield add


def predict_files(
    detector: Detector, items: Sequence[Item], out: Path, tile: int | None, overlap: float, console: Console
) -> Prediction:
    """Scores every file and writes its pictures and the tables below ``out``; Ctrl-C ends it early.

    Raises:
        OSError: the results cannot be written.
        WadsError: the model gives numbers that are not finite.
    """
    started, prediction = time.monotonic(), Prediction()
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    writing: deque[Future[Row]] = deque()
    with ThreadPoolExecutor() as pool, progress, results_files(out) as add_row:
        bar = progress.add_task("", total=len(items))

        def record() -> None:
            """Takes the rows of all writing in progress."""
            while writing:
                row = writing[0].result()
                add_row(row)
                writing.popleft()
                progress.advance(bar)
                if row["problem"]:
                    prediction.skipped[row["path"]] = row["problem"]
                    told = printable(f"skipped {row['path']}: {row['problem']}").encode("utf-8", "replace").decode()
                    console.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)
                else:
                    prediction.images += 1
                    if decision := row["decision"]:
                        prediction.decisions[decision] = prediction.decisions.get(decision, 0) + 1

        try:
            for batch in _batches(pool, detector, items, tile):
                _score(detector, batch, tile, overlap)
                record()  # of the batch before, which was written while this one was scored
                writing.extend(pool.submit(_write, item, out) for item in batch)
            record()
        except KeyboardInterrupt:
            prediction.interrupted = True
        finally:
            # Broken off: what is being written is finished and counts, what has not begun does not.
            pool.shutdown(cancel_futures=True)
            finished = [future for future in writing if not future.cancelled() and future.exception() is None]
            writing = deque(finished)
            record()
    prediction.seconds = time.monotonic() - started
    return prediction


def _batches(
    pool: ThreadPoolExecutor, detector: Detector, items: Iterable[Item], tile: int | None
) -> Iterator[list[Item]]:
    """Files in order, decoded ahead by the pool: a file a core and MAX_PIXELS at most, but for the last image."""

    def read(item: Item) -> Item:
        try:
            if item.problem is None:
                item.image = read_image(item.path)
                if tile is None or max(item.image.size) <= tile:
                    item.stored = stored_image(item.image, detector.description.store_size)
        except DataError as error:
            item.problem = str(error).removeprefix(f"{item.path} ")
        return item

    ahead: deque[tuple[int, Future[Item]]] = deque()
    batch: list[Item] = []
    pixels = waiting = 0  # of the batch; of the batch and ahead
    left = deque(items)
    while left or ahead:
        while left and len(ahead) <= (os.cpu_count() or 1) and waiting < MAX_PIXELS:
            item = left.popleft()
            size = _pixels(item)
            ahead.append((size, pool.submit(read, item)))
            waiting += size
        # Never empty: with ``left``, the batch alone would have MAX_PIXELS, and would be gone.
        size, future = ahead.popleft()
        batch.append(future.result())
        pixels += size
        # Half, so that the other half is decoded while this one is scored.
        if not (left or ahead) or len(batch) >= detector.batch_size or pixels >= MAX_PIXELS / 2:
            yield batch
            waiting -= pixels
            batch, pixels = [], 0


def _pixels(item: Item) -> int:
    """As the file's header has it; 0 of what is no image."""
    if item.problem is None and os.path.isfile(item.path):  # a pipe would be waited for
        with suppress(Exception), Image.open(item.path) as image:
            return image.width * image.height
    return 0


def _score(detector: Detector, batch: Sequence[Item], tile: int | None, overlap: float) -> None:
    """Sets ``result`` of every item that has an image."""
    stored = [item.stored for item in batch if item.stored is not None]
    scored = zip(*detector.score(torch.stack(stored)), strict=True) if stored else iter(())
    for item in batch:
        if item.image is not None and item.stored is not None:
            item.result = detector.result(item.image, *next(scored))
        elif item.image is not None and tile is not None:
            item.result = detector.predict_tiles(item.image, tile, overlap)


def _write(item: Item, out: Path) -> Row:
    """Writes the pictures of one image, if there is one; returns its row."""
    row: Row = dict.fromkeys(COLUMNS) | {"path": item.path, "problem": item.problem}
    if (result := item.result) is None:
        return row
    try:
        # The longest name first: if it is too long, nothing has been written.
        for kind, picture in sorted(result.pictures().items(), key=lambda pair: -len(pair[0])):
            save_png(picture, out / f"{item.name}.{kind}.png")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return row | {"problem": "its name is too long for those of its pictures; make it shorter"}
    thresholds, (width, height) = result.thresholds, result.image.size
    return row | {
        "width": width,
        "height": height,
        "score": result.score,
        "decision": result.decision,
        "threshold": thresholds.image,
        "pixel_threshold": thresholds.pixel,
        "threshold_source": thresholds.source,
        "anomalous_area": result.area,
        "box": result.box,
        "pictures": item.name,
    }


def save_png(picture: Image.Image, path: Path) -> None:
    temporary = path.with_name(f".{threading.get_ident()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture.save(temporary, format="PNG", compress_level=1)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def predict_command(
    detector: Detector, inputs: Sequence[str], out: Path, tile: int | None, overlap: float, as_json: bool
) -> int:
    """Predicts, and tells a person or a program; returns the exit code.

    Raises:
        DataError: no input names an image; nothing is written.
        WadsError: the results cannot be written, or the model gives numbers that are not finite.
    """
    console, asked = Console(stderr=True), detector.batch_size
    for threshold, of, without, option in (
        (detector.thresholds.image, "images", "a decision", "--threshold"),
        (detector.thresholds.pixel, "pixels", "a mask", "--pixel-threshold"),
    ):
        if threshold is None:
            text = f"The model has no threshold for {of}: results come without {without}. Give {option} to have one."
            console.print(text, style="yellow", soft_wrap=True)
    aimed_at = (detector.description.threshold or {}).get("warning")
    if aimed_at and "saved with the model" in detector.thresholds.source:
        console.print(f"Of the saved thresholds: {aimed_at}", style="yellow", soft_wrap=True, highlight=False)
    items = find_images(inputs, out)
    if all(item.problem for item in items):  # what an earlier prediction has left in ``out`` stays
        raise DataError("\n".join(f"{item.path}: {item.problem}" for item in items))
    try:
        prediction = predict_files(detector, items, out, tile, overlap, console)
    except OSError as error:
        where = error.filename or out
        raise WadsError(f"{where}: cannot be written ({error.strerror}); make room, or give another --out") from error
    if detector.batch_size < asked:
        console.print(
            f"Batches of {asked} did not fit into memory; went on with {detector.batch_size}.", style="yellow"
        )
    if as_json:
        more = {"thresholds": asdict(detector.thresholds), "batch_size": detector.batch_size, "out": str(out)}
        print(json.dumps(asdict(prediction) | more | {"exit_code": int(prediction.exit_code)}, indent=1))
    else:
        decisions = "".join(f", {count} {decision}" for decision, count in sorted(prediction.decisions.items()))
        print(
            f"{'interrupted: ' if prediction.interrupted else ''}{prediction.images} of {len(items)} files scored"
            f"{decisions}, {len(prediction.skipped)} skipped, in {prediction.seconds:.1f} s: {out / 'results.csv'}"
        )
    return prediction.exit_code
