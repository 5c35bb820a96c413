"""Files that are whole or absent, and their hashes."""

import hashlib
import json
import os
import secrets
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
"""``wads_dist``; with kernels, shards, launch and configs in it, in a checkout by links."""


def python_path() -> str:
    """PYTHONPATH for a child that is to import this copy: what it is here, behind a checkout's root. The folder of installed
    packages is on every child's path by itself, and behind the standard library."""
    installed = str(PACKAGE.parent) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    return os.pathsep.join(filter(None, ["" if installed else str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))


def shipped(path: Path) -> Path:
    """A file from the working folder, or else, where there is none, the package's of that name (``configs/…``)."""
    return PACKAGE / path if not path.exists() and (PACKAGE / path).is_file() else path


@dataclass(frozen=True)
class FileEntry:
    """One file's line in the manifest."""

    bytes: int
    sha256: str


class HashedFile:
    """A file being written, hashed as it passes through so that nothing has to be read back.

    What the disk then holds is compared with what was meant to be written, not with itself.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=0)
        self.sha256, self.bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        try:
            written = 0
            while written < len(view):  # one call writes 2 GiB at most
                written += self.file.write(view[written:])
        except OSError as error:
            self.error = error  # torch turns it into a RuntimeError that no longer says why
            raise
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def entry(self) -> FileEntry:
        return FileEntry(self.bytes, self.sha256.hexdigest())


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """Writes ``path`` and syncs it to the disk.

    Raises:
        OSError: it could not be written, whatever the writer made of that.
    """
    out = HashedFile(path)
    try:
        yield out
        os.fsync(out.file.fileno())
    except Exception as error:
        cause = out.error or error
        if isinstance(cause, OSError) and cause.filename is None:
            cause.filename = str(path)
        raise cause from None
    finally:
        out.file.close()


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` in one step: a reader sees the old text or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # two nodes may have equal pids
    try:
        with hashed_file(temporary) as out:
            out.write(text.encode())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_object(path: Path) -> dict[str, Any]:
    """A file of one JSON object; empty if it is not there or is something else."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    return {}


def sync_folder(folder: Path) -> None:
    """A new name in ``folder`` outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
