"""Building shards: plan, write in parallel, publish a category with one rename.

    sources ─ plan ─► shard tasks ─ workers ─► OUT/.building-<category>/{*.tar, *.json} ─ rename ─► OUT/<category>/

A shard is written under a temporary name and renamed when whole, with its entry of the manifest in `<shard>.json`. So
whatever stops a build (Ctrl-C, kill -9, a full disk), the same command goes on from the finished shards. The bytes of a
shard depend on its samples alone: tar headers carry neither times nor owners.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .errors import DataError, DataProblems
from .files import locked, sha256_file, write_atomically
from .layout import category_name_problem, find_categories, scan_category, scan_textures
from .manifest import (
    MANIFEST,
    VERSION,
    CategoryManifest,
    DatasetManifest,
    Kind,
    Member,
    SampleEntry,
    ShardEntry,
    parse_manifest,
    write_dataset_manifest,
)
from .names import within
from .samples import USUAL_SIZE, EncodedSample, SampleSource, sidecar

Overwrite = bool | Literal["outdated"]


@dataclass
class CategoryPlan:
    """What is to be written for one category, and what scanning it has found wrong."""

    category: str
    kind: Kind
    samples: Sequence[SampleSource]
    problems: list[str] = field(default_factory=list)
    shard_mb: int = 64
    resize: int | None = None

    def digest(self) -> str:
        """Hash of inputs and options: the identity by which a build is resumed or found up to date."""
        samples = [sample.identity() for sample in self.samples]
        # Before masks were resized by area, and images upright, the size alone stood here: those shards hold other pixels.
        # "half": a small component keeps what it covers half as much as the pixel that it covers most.
        resized = self.resize and [self.resize, "area", "half", "upright"]
        content = [VERSION, self.category, self.kind, self.shard_mb, resized, samples]
        # What is stored anew without `resize` was not turned either; of other categories the digest stays as it was.
        if not self.resize and any(sample.stored_turned() for sample in self.samples):
            content.append("upright")
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    def tasks(self, folder: Path) -> list["ShardTask"]:
        """One task a shard; a shard holds samples of one split and at most `shard_mb` MiB (or one larger sample)."""
        tasks: list[ShardTask] = []
        limit = self.shard_mb << 20
        for split in ("train", "test"):
            groups: list[list[SampleSource]] = []
            filled = limit
            for sample in self.samples:
                if sample.split != split:
                    continue
                payload = sample.payload(self.resize)
                if filled + payload > limit or not groups:
                    groups.append([])
                    filled = 0
                groups[-1].append(sample)
                filled += payload
            for number, group in enumerate(groups):
                tasks.append(ShardTask(self.category, folder, f"{split}-{number:06d}", tuple(group), self.resize))
        return tasks


@dataclass(frozen=True)
class ShardTask:
    """One shard for a worker to write: `<name>.tar` and `<name>.json` in `folder`."""

    category: str
    folder: Path
    name: str
    samples: tuple[SampleSource, ...]
    resize: int | None

    @property
    def tar(self) -> Path:
        return self.folder / f"{self.name}.tar"

    @property
    def entry(self) -> Path:
        return self.folder / f"{self.name}.json"

    def finished(self) -> ShardEntry | None:
        """The entry of a shard that an earlier build finished, if it is still whole."""
        try:
            entry = ShardEntry.model_validate_json(self.entry.read_bytes())
            whole = self.tar.stat().st_size == entry.bytes and sha256_file(self.tar) == entry.sha256
        except (OSError, ValidationError):
            return None
        return entry if whole else None


class _HashingWriter(io.RawIOBase):
    """Hashes what passes through on its way to the disk, so that no shard is read a second time."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.sha256 = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        self.stream.write(data)
        self.sha256.update(data)
        self.position += len(data)
        return len(data)

    def tell(self) -> int:
        return self.position


@dataclass(frozen=True)
class Written:
    """A shard, and sums over its samples of what `EncodedSample` says of each."""

    entry: ShardEntry
    small: int
    turned_alone: int


def write_shard(task: ShardTask) -> Written | list[str]:
    """Read, check and write the samples of one shard; runs in a worker process.

    Returns:
        What was written; or, where samples are bad, all of their problems, and then no file is left.
    """
    temporary = task.folder / f".{task.name}.{os.getpid()}.tmp"
    entries: list[SampleEntry] = []
    problems: list[str] = []
    small = turned_alone = 0
    try:
        with open(temporary, "wb") as stream:
            writer = _HashingWriter(stream)
            # tarfile and not wds.TarWriter: importing webdataset imports torch, which a build machine need not have.
            with tarfile.open(fileobj=writer, mode="w:", format=tarfile.GNU_FORMAT) as tar:
                for sample in task.samples:
                    try:
                        encoded = sample.read(task.resize)
                    except DataProblems as error:
                        problems += error.problems
                        continue
                    if not problems:
                        entries.append(_add_sample(tar, writer, sample, encoded))
                        small += encoded.small
                        turned_alone += encoded.turned_alone
            stream.flush()
            os.fsync(stream.fileno())
        if problems:
            return problems
        entry = ShardEntry(name=task.tar.name, sha256=writer.sha256.hexdigest(), bytes=writer.position, samples=entries)
        os.replace(temporary, task.tar)
        write_atomically(task.entry, entry.to_json())
        return Written(entry, small, turned_alone)
    finally:
        temporary.unlink(missing_ok=True)


def _add_sample(
    tar: tarfile.TarFile, writer: _HashingWriter, sample: SampleSource, encoded: EncodedSample
) -> SampleEntry:
    def add(name: str, data: bytes) -> Member:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o644
        tar.addfile(header, io.BytesIO(data))
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return Member(name=name, offset=writer.position - padded, size=len(data))

    image = add(f"{sample.key}.{encoded.extension}", encoded.image)
    mask = None if encoded.mask is None else add(f"{sample.key}.mask.png", encoded.mask)
    add(f"{sample.key}.json", sidecar(sample))
    return SampleEntry(
        key=sample.key,
        split=sample.split,
        defect=sample.defect,
        width=encoded.width,
        height=encoded.height,
        image=image,
        mask=mask,
    )


def build(
    root: Path,
    out: Path,
    categories: Sequence[str] | None = None,
    *,
    shard_mb: int = 64,
    resize: int | None = None,
    workers: int | None = None,
    overwrite: Overwrite = False,
    progress: bool = True,
) -> DatasetManifest:
    """Build shards of image categories (see `shards.layout` for what `root` may look like).

    Args:
        root: the data set's folder, or one category's.
        out: where the shards go; what lies there already stays.
        categories: names to build; all by default.
        shard_mb: a shard holds at most this many MiB of samples.
        resize: store images as PNG of `resize`×`resize` pixels; by default the original bytes of JPEG and PNG are kept.
        workers: processes; one per CPU core by default.
        overwrite: replace what was built: "outdated" a category that was built from other input or options, True every one,
            also one that is up to date (such as after a change of how images are read).
        progress: show progress on stderr.

    Returns:
        The manifest of everything in `out`.

    Raises:
        DataProblems: all that is wrong with the input. Nothing is written for the categories concerned; the others are
            published.
    """
    folders = find_categories(root)
    problems = [
        f"category {name!r}: not in {root}; it has {', '.join(folders)}"
        for name in categories or ()
        if name not in folders
    ]
    plans = []
    for name, folder in folders.items():
        if categories is not None and name not in categories:
            continue
        samples, found = scan_category(folder)
        plans.append(CategoryPlan(name, "images", samples, found, shard_mb, resize))
    return build_plans(plans, out, problems=problems, workers=workers, overwrite=overwrite, progress=progress)


def build_textures(
    folder: Path,
    out: Path,
    name: str = "textures",
    *,
    shard_mb: int = 64,
    resize: int | None = None,
    workers: int | None = None,
    overwrite: Overwrite = False,
    progress: bool = True,
) -> DatasetManifest:
    """Build a texture bank under OUT/<name> from every image below `folder`; arguments and errors as for `build`."""
    samples, problems = scan_textures(folder)
    plan = CategoryPlan(name, "textures", samples, problems, shard_mb, resize)
    return build_plans([plan], out, workers=workers, overwrite=overwrite, progress=progress)


def build_plans(
    plans: Sequence[CategoryPlan],
    out: Path,
    *,
    problems: Sequence[str] = (),
    workers: int | None = None,
    overwrite: Overwrite = False,
    progress: bool = True,
) -> DatasetManifest:
    """Write and publish planned categories; `problems` found while planning are raised with those found here.

    Raises:
        DataProblems: as for `build`.
        DataError: the output cannot be written, or a worker process died.
    """
    for plan in plans:
        if plan.shard_mb < 1 or (plan.resize is not None and plan.resize < 1):
            raise DataError("--shard-mb and --resize must be at least 1")
    console = Console(stderr=True, quiet=not progress, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        out.mkdir(parents=True, exist_ok=True)
        with Progress(*columns, console=console, disable=not progress) as bars, contextlib.ExitStack() as stack:
            found = _build_all(plans, out, workers or _cores(), overwrite, bars, stack)
        if problems or found:
            raise DataProblems([*problems, *found])
        return write_dataset_manifest(out)
    except BrokenProcessPool as error:
        raise DataError(
            f"{out}: a worker process died (out of memory?); use fewer --workers, the same command resumes"
        ) from error
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}; mend it, the same command resumes") from error


def _build_all(
    plans: Sequence[CategoryPlan],
    out: Path,
    workers: int,
    overwrite: Overwrite,
    bars: Progress,
    stack: contextlib.ExitStack,
) -> list[str]:
    """Build every plan; returns the problems. Locks on the building folders live in `stack`."""
    problems: list[str] = []
    building: dict[str, _Building] = {}
    names = {path.parent.name.casefold(): path.parent.name for path in out.glob(f"*/{MANIFEST}")}
    for plan in plans:
        if name_problem := category_name_problem(plan.category):
            problems.append(name_problem)
            continue
        if (other := names.setdefault(plan.category.casefold(), plan.category)) != plan.category:
            problems.append(f"category {plan.category}: only large and small letters tell it from {other}; rename one")
            continue
        try:
            category = _Building(plan, out, overwrite)
        except DataError as error:
            problems.append(str(error))
            continue
        state = category.published()
        if state == "up to date":
            bars.console.print(f"{plan.category}: up to date")
        elif state is not None:
            problems.append(state)
        else:
            try:
                category.start(stack)
            except BlockingIOError:
                problems.append(f"{category.folder}: another build is writing it; wait for that, then try again")
                continue
            building[plan.category] = category
            if category.entries:
                bars.console.print(f"{plan.category}: resuming, {len(category.entries)} shards were finished before")

    pending = [task for category in building.values() for task in category.pending()]
    bar = bars.add_task("building", total=sum(len(task.samples) for task in pending))
    for category in building.values():  # those with nothing left to write
        _finish(category, out, bars)
    for task, result in _run(pending, workers):
        category = building[task.category]
        if isinstance(result, Written):
            category.entries[task.name] = result.entry
            category.small += result.small
            category.turned_alone += result.turned_alone
        else:
            category.failed[task.name] = result
        bars.advance(bar, len(task.samples))
        _finish(category, out, bars)
    return problems + [problem for category in building.values() for problem in category.problems()]


def _finish(category: "_Building", out: Path, bars: Progress) -> None:
    """Publish or discard a category once nothing of it is pending."""
    if category.pending() or category.done:
        return
    category.done = True
    if category.problems():
        shutil.rmtree(category.folder)
        return
    manifest = category.publish()
    write_dataset_manifest(out)
    size = sum(shard.bytes for shard in manifest.shards) / (1 << 20)
    bars.console.print(
        f"{manifest.category}: {sum(manifest.counts.values())} samples in {len(manifest.shards)} shards, {size:.1f} MiB"
        + category.small_components()
    )
    if category.turned_alone:
        bars.console.print(
            f"{manifest.category}: {category.turned_alone} images were turned by their EXIF orientation and their masks were "
            "not: masks are taken as drawn on what viewers show"
        )


class _Building:
    """A category on its way from plan to publication."""

    def __init__(self, plan: CategoryPlan, out: Path, overwrite: Overwrite) -> None:
        self.plan = plan
        self.digest = plan.digest()
        self.final = out / plan.category
        self.folder = within(out, f".building-{plan.category}")  # which is emptied
        self.replaced = out / f".replaced-{plan.category}"
        self.overwrite = overwrite
        self.tasks = plan.tasks(self.folder)
        self.entries: dict[str, ShardEntry] = {}
        self.failed: dict[str, list[str]] = {}
        self.small = self.turned_alone = 0
        self.resumed = False
        self.done = False

    def published(self) -> str | None:
        """ "up to date", or why the category cannot be built, or None where it is to be built."""
        if not self.final.exists():
            return None
        with contextlib.suppress(OSError, DataError):
            path = self.final / MANIFEST
            built = parse_manifest(CategoryManifest, path.read_bytes(), str(path))
            if built.kind != self.plan.kind:
                return f"{self.final}: holds {built.kind}, which {self.plan.kind} do not replace; choose another --out"
            if built.plan == self.digest and self.overwrite is not True:
                return "up to date"
        if self.overwrite:
            return None
        return (
            f"{self.final}: exists and was built from other input or options; "
            "pass --overwrite to replace it, or choose another --out"
        )

    def start(self, stack: contextlib.ExitStack) -> None:
        """Lock the building folder, and take over the finished shards in it if they are of the same plan."""
        self.folder.mkdir(exist_ok=True)
        stack.enter_context(locked(self.folder, wait=False))
        plan_file = self.folder / "plan"
        if not plan_file.exists() or plan_file.read_text() != self.digest:
            for path in self.folder.iterdir():
                path.unlink()
            write_atomically(plan_file, self.digest)
        for path in self.folder.glob(".*.tmp"):
            path.unlink()
        for task in self.tasks:
            if entry := task.finished():
                self.entries[task.name] = entry
        self.resumed = bool(self.entries)

    def small_components(self) -> str:
        """The end of a sentence about marks that a network of few pixels hardly sees; "" if there are none."""
        if not self.small:
            return ""
        size = f"{self.plan.resize}²" if self.plan.resize else f"{USUAL_SIZE}², the usual size to score at"
        of = " (in the shards written now)" if self.resumed else ""
        kept = "kept as the pixels that they cover most"
        return f"; of its marked components, {self.small}{of} cover no pixel by half at {size}: {kept}"

    def pending(self) -> list[ShardTask]:
        return [task for task in self.tasks if task.name not in self.entries and task.name not in self.failed]

    def problems(self) -> list[str]:
        found = [problem for task in self.tasks for problem in self.failed.get(task.name, [])]
        return self.plan.problems + found

    def publish(self) -> CategoryManifest:
        """Write the manifest and rename the folder into place."""
        shards = [self.entries[task.name] for task in self.tasks]
        manifest = CategoryManifest.of(self.plan.category, self.plan.kind, shards, self.digest)
        write_atomically(self.folder / MANIFEST, manifest.to_json())
        (self.folder / "plan").unlink()
        shutil.rmtree(self.replaced, ignore_errors=True)
        if self.final.exists():
            os.rename(self.final, self.replaced)
        os.rename(self.folder, self.final)
        shutil.rmtree(self.replaced, ignore_errors=True)
        return manifest


def _run(tasks: list[ShardTask], workers: int) -> Iterator[tuple[ShardTask, Written | list[str]]]:
    """Results of the tasks as they come, from processes where more than one is of use."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield task, write_shard(task)
        return
    # spawn: the caller may hold threads, CUDA or a process group, none of which survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        futures = {pool.submit(write_shard, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # On Ctrl-C the shards in progress are finished, so that they need not be written again.
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: a pool's idle workers would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
