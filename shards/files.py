"""Publishing files so that a reader never sees half of one, and locks between processes."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 20


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` by way of a temporary neighbour and one rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on an existing file or folder; it ends with the process, however that dies.

    Raises:
        BlockingIOError: `wait` is false and another process holds the lock.
    """
    # NFS grants an exclusive lock on a file only to one who may write it.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # some network file systems have no locks; renames keep every reader safe there all the same
        yield
    finally:
        os.close(descriptor)
