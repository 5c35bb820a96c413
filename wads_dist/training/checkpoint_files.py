"""Checkpoints as files: what makes one complete, which one to use, and which to keep. Needs no torch.

    checkpoints/step-00001200/        published by one rename, after every rank has written and synced beside that name
        …                             whatever was saved
        manifest.json                 SHA-256 and size of every other file; the last file written
    checkpoints/latest                names the newest one; moves last
    checkpoints/quarantine/           damaged checkpoints, moved here instead of deleted

A directory is a good checkpoint if and only if it holds exactly what its manifest says. docs/checkpoints.md has the protocol.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wads_dist.common.errors import ExitCode
from wads_dist.common.files import FileEntry, hashed_file, sha256_of, sync_folder, write_text
from wads_dist.shards.arguments import Parser, local_path
from wads_dist.shards.names import file_problem, quoted

MANIFEST, PROGRESS, LATEST, QUARANTINE = "manifest.json", "progress.json", "latest", "quarantine"
FORMAT = 1
STEP = re.compile(r"step-\d{8,}")


# --- writing -----------------------------------------------------------------------------------------------------


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def partial_of(folder: Path, name: str) -> Path:
    """Where the checkpoint ``name`` is written before it is published."""
    return folder / f".partial-{name}"


def start(folder: Path, name: str) -> None:
    """An empty directory to write the checkpoint ``name`` into; what earlier crashes left behind is removed."""
    for kind in (".partial-*", ".removed-*", ".universal-*"):
        for left in folder.glob(kind):
            shutil.rmtree(left)
    partial_of(folder, name).mkdir(parents=True)


def write_manifest(partial: Path, entries: dict[str, FileEntry]) -> None:
    """The last file of a checkpoint: with it, the directory is complete.

    Raises:
        OSError: a file that a rank wrote is not visible here.
    """
    for name, entry in entries.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != entry.bytes:
            raise OSError(f"{partial / name} is not what its rank wrote: run.dir must be a folder that all nodes share")
    content = {"format": FORMAT, "files": {name: asdict(entries[name]) for name in sorted(entries)}}
    with hashed_file(partial / MANIFEST) as out:
        out.write(json.dumps(content, indent=1).encode())
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        sync_folder(folder)


def publish(folder: Path, name: str) -> Path:
    """Gives a complete partial directory its name, then points to it."""
    final = folder / name
    if final.exists():  # of an earlier life that died before it was pointed to
        remove(folder, name)
    os.rename(partial_of(folder, name), final)
    sync_folder(folder)
    write_text(folder / LATEST, name)
    return final


def retain(folder: Path, current: str, keep: int, keep_best: bool) -> None:
    """Removes old checkpoints: what stays is ``current``, the newest ``keep``, and the one with the lowest loss.

    A crash before the pointer moved can have left a later step than ``current``: it must not push that one out.
    """
    others = [name for name in steps(folder) if name != current]
    stay = {current, *others[: keep - 1]}
    if keep_best and (best := best_of(folder)):
        stay.add(best)
    for name in sorted(set(others) - stay):
        remove(folder, name)


def remove(folder: Path, name: str) -> None:
    """Deletes a checkpoint; a crash on the way does not leave half of one under its name."""
    removed = folder / f".removed-{name}"
    os.rename(folder / name, removed)
    shutil.rmtree(removed)


def best_of(folder: Path) -> str | None:
    """The checkpoint with the lowest loss, if any has one."""
    losses = {name: summary(folder / name).get("loss") for name in steps(folder)}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    return min(known, key=lambda name: known[name]) if known else None


# --- choosing ----------------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[str]:
    """Names of the published checkpoints, newest first."""
    return sorted((path.name for path in folder.glob("step-*") if STEP.fullmatch(path.name)), reverse=True)


def pointed_to(folder: Path) -> str | None:
    pointer = folder / LATEST
    return pointer.read_text(errors="replace").strip() if pointer.is_file() else None


def candidate(folder: Path) -> str | None:
    """The checkpoint to try first: the one pointed to, or else the newest there is."""
    names = steps(folder)
    pointer = pointed_to(folder)
    return pointer if pointer in names else (names[0] if names else None)


def had_checkpoints(folder: Path) -> bool:
    """Whether a run has ever published one here."""
    return pointed_to(folder) is not None or any((folder / QUARANTINE).glob("*"))


def problems(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint; empty if it holds exactly what its manifest says.

    With ``parts`` > 1 this call hashes one part of the files only; the others are another rank's.
    """
    try:
        content = json.loads((checkpoint / MANIFEST).read_bytes())
        entries = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        if content["format"] != FORMAT:
            return [f"{MANIFEST} has format {content['format']!r}; this version reads {FORMAT}"]
        if not all(isinstance(e.bytes, int) and isinstance(e.sha256, str) for e in entries.values()):
            return [f"{MANIFEST} has sizes that are no numbers, or hashes that are no text"]
        if unusable := [f"{quoted(name)} {problem}" for name in entries if (problem := file_problem(name))]:
            return [f"{MANIFEST} names a file that none can be: {unusable[0]}"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing: incomplete, or of a version that wrote none"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    found = []
    if part == 0:
        there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if not path.is_dir()}
        found += [f"{name} does not belong here" for name in sorted(there - entries.keys() - {MANIFEST})]
    by_size = sorted(entries, key=lambda name: (-entries[name].bytes, name))
    for name in sorted(by_size[part::parts]):
        try:
            size = (checkpoint / name).stat().st_size
            if size != entries[name].bytes:
                found.append(f"{name} has {size} bytes, the manifest says {entries[name].bytes}")
            elif sha256_of(checkpoint / name) != entries[name].sha256:
                found.append(f"{name} has other bytes than were written (SHA-256)")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror or error}")
    return found


def quarantine(folder: Path, name: str) -> Path:
    """Moves a damaged checkpoint out of the way; nothing is deleted. Returns where it is now."""
    (folder / QUARANTINE).mkdir(exist_ok=True)
    target, count = folder / QUARANTINE / name, 1
    while target.exists():
        target, count = folder / QUARANTINE / f"{name}.{count}", count + 1
    os.rename(folder / name, target)
    return target


# --- for people --------------------------------------------------------------------------------------------------


def summary(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says about itself; empty if that cannot be read."""
    try:
        meta = json.loads((checkpoint / PROGRESS).read_bytes())
        files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        return {
            "step": meta["progress"]["step"],
            "samples": meta["progress"]["next_sample"],
            "loss": meta.get("loss"),
            "world_size": meta["world_size"],
            "zero_stage": meta["zero_stage"],
            "saved": meta["saved"],
            "files": len(files),
            "bytes": sum(entry["bytes"] for entry in files.values()),
            "versions": meta["versions"],
            "fingerprint": meta["data"]["fingerprint"],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def find(path: Path) -> list[Path]:
    """Every checkpoint at or below ``path`` (a checkpoint, its folder, a category's or a run's), oldest first."""
    if STEP.fullmatch(path.name) or ((path / MANIFEST).is_file() and (path / PROGRESS).is_file()):
        return [path]
    found = [p for p in path.rglob("step-*") if p.is_dir() and STEP.fullmatch(p.name) and p.parent.name != QUARANTINE]
    return sorted(found)


def report(checkpoint: Path, verify: bool) -> dict[str, Any]:
    """One checkpoint as JSON: its summary, its marks, and what is wrong with it (None: not looked at)."""
    folder = checkpoint.parent
    marks = [
        mark for mark, name in (("latest", pointed_to(folder)), ("best", best_of(folder))) if name == checkpoint.name
    ]
    return {
        "path": str(checkpoint),
        "marks": marks,
        **summary(checkpoint),
        "problems": problems(checkpoint) if verify else None,
    }


def show(reports: Sequence[dict[str, Any]], console: Console) -> None:
    """A table for people, one for each folder; within 80 columns."""
    for folder in dict.fromkeys(Path(entry["path"]).parent for entry in reports):
        table = Table(title=str(folder), title_justify="left", box=None, padding=(0, 1, 0, 0))
        for name in ("checkpoint", "samples", "loss", "ranks", "ZeRO", "MiB", "saved", "state"):
            table.add_column(
                name, justify="left" if name in ("checkpoint", "state") else "right", no_wrap=name != "state"
            )
        for entry in (entry for entry in reports if Path(entry["path"]).parent == folder):
            table.add_row(Path(entry["path"]).name, *_cells(entry))
        console.print(table)


def _cells(entry: dict[str, Any]) -> list[str]:
    state = " ".join(entry["marks"])
    if entry["problems"] is not None:
        state = f"[red]damaged[/red] {state}" if entry["problems"] else f"good {state}"
    if "step" not in entry:
        return ["?"] * 6 + [state]
    loss = "" if entry["loss"] is None else f"{entry['loss']:.3f}"
    when = entry["saved"][5:16].replace("T", " ")
    size = f"{entry['bytes'] / 2**20:.0f}"
    return [f"{entry['samples']:,}", loss, str(entry["world_size"]), str(entry["zero_stage"]), size, when, state]


def main(argv: Sequence[str] | None = None) -> int:
    """``wads checkpoint``: exit code 0 good, 3 damaged, 2 wrong usage or nothing there."""
    parser = Parser(
        prog="wads checkpoint",
        description="Show or verify training checkpoints. Exit code: 0 good, 3 damaged, 2 wrong usage or none there.",
    )
    parser.add_argument("command", choices=("inspect", "verify"), help="verify reads and hashes every file")
    parser.add_argument("path", type=local_path, help="a checkpoint, a folder of them, a category's folder or a run's")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    found = find(arguments.path)
    if not found:
        print(f"{arguments.path}: no checkpoint here (they are named step-00000000)", file=sys.stderr)
        return ExitCode.BAD_CONFIG
    reports = [report(checkpoint, arguments.command == "verify") for checkpoint in found]
    if arguments.json:
        print(json.dumps(reports, indent=1))
    else:
        show(reports, Console())
        for entry in reports:
            for problem in entry["problems"] or ():
                print(f"{entry['path']}: {problem}", file=sys.stderr)
    return ExitCode.BAD_DATA if any(entry["problems"] for entry in reports) else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
