"""Reading a built data set from a folder, over HTTP(S), or from object storage.

Nothing is used unverified: a shard is compared with the manifest's size and SHA-256 before its first byte is read, once
a process. Remote shards go to a cache on local disk, where every process of a machine shares one copy.
"""

import hashlib
import io
import os
import select
import shutil
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from .addresses import VARIABLE, address_problem, is_remote, public, take_credentials, with_credentials
from .errors import DataError
from .files import CHUNK, locked, sha256_file
from .manifest import (
    MANIFEST,
    CategoryManifest,
    CategorySummary,
    DatasetManifest,
    Member,
    SampleEntry,
    ShardEntry,
    parse_manifest,
)
from .names import printable, quoted, within
from .tars import differences, members

BACKOFF_SECONDS = 0.5
STALL_SECONDS = 60.0
# A manifest of the demo has 315 bytes for each sample.
MANIFEST_BYTES = 512 << 20
_CURL_HTTP_ERROR = 22
_TRY_AGAIN = ("408", "429", "500", "502", "503", "504")
_T = TypeVar("_T")


class _Interrupted(Exception):
    """A transfer that went wrong in a way that trying again may mend; says what was received and expected."""


class Dataset:
    """A built data set at a location. Holds no open files, so it may be pickled and used from threads.

    `location` has no credentials: those that an address came with are in the environment (`shards.addresses`).
    """

    def __init__(self, location: str, cache: Path, retries: int, manifest: DatasetManifest) -> None:
        self.location = location
        self.cache = cache
        self.retries = retries
        self.index = manifest
        self._manifests: dict[str, CategoryManifest] = {}
        self._verified: dict[tuple[str, str], Path] = {}

    @classmethod
    def open(cls, location: str | Path, cache: Path | None = None, retries: int = 5) -> "Dataset":
        """Open a data set.

        Args:
            location: a folder, `http(s)://…` (needs curl), or `s3://…` (needs fsspec and s3fs).
            cache: folder for remote shards; by default `wads-dist` in the user's cache folder.
            retries: how often a failed transfer is tried again, with exponentially growing pauses.

        Raises:
            DataError: there is no data set, its manifest is damaged, or it cannot be reached.
        """
        if problem := address_problem(str(location)):
            raise DataError(problem)
        text = take_credentials(str(location)).removeprefix("file://").rstrip("/") or "/"
        if cache is None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wads-dist"
        where = _join(text, MANIFEST)
        try:
            data = _fetch_bytes(where, retries) if is_remote(text) else _read_bytes(where)
        except FileNotFoundError as error:
            raise DataError(
                f"{text}: no {MANIFEST} there, so no built data set; build one with "
                f"`wads shards build --root IMAGES --out {text}`"
            ) from error
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error.strerror or error})") from error
        return cls(text, cache, retries, parse_manifest(DatasetManifest, data, where))

    @property
    def categories(self) -> list[str]:
        """Names of the image categories, sorted; texture banks are not among them."""
        return [name for name, summary in self.index.categories.items() if summary.kind == "images"]

    @property
    def texture_banks(self) -> list[str]:
        """Names of the texture banks, sorted."""
        return [name for name, summary in self.index.categories.items() if summary.kind == "textures"]

    @property
    def is_remote(self) -> bool:
        return is_remote(self.location)

    def manifest(self, category: str) -> CategoryManifest:
        """The manifest of a category or texture bank.

        Raises:
            DataError: no such category, a damaged manifest, or one that is not of the data set's manifest.
        """
        if category not in self._manifests:
            if category not in self.index.categories:
                known = ", ".join(self.index.categories) or "none"
                raise DataError(f"{self.location}: no category {quoted(category)}; it has {known}")
            where = _join(self.location, category, MANIFEST)
            try:
                data = _fetch_bytes(where, self.retries) if self.is_remote else _read_bytes(where)
            except OSError as error:
                raise DataError(
                    f"{where}: cannot be read ({error.strerror or error}); build the category again"
                ) from error
            manifest = parse_manifest(CategoryManifest, data, where)
            listed, found = self.index.categories[category].model_dump(), CategorySummary.of(manifest).model_dump()
            different = [name for name in found if listed[name] != found[name]]
            if different or manifest.category != category:
                raise DataError(
                    f"{where}: not the category that {_join(self.location, MANIFEST)} lists "
                    f"({', '.join(different) or 'its name'} differs); copy the whole data set again, or build it again"
                )
            self._manifests[category] = manifest
        return self._manifests[category]

    def shard(self, category: str, entry: ShardEntry) -> Path:
        """Local path of a shard whose size and hash have been checked; fetched into the cache where it is remote.

        Raises:
            DataError: it is missing or not what the manifest says, after the allowed number of tries where remote.
        """
        key = (category, entry.name)
        if key not in self._verified:
            where = _join(self.location, category, entry.name)
            if self.is_remote:
                self._verified[key] = self._cached(category, where, entry)
            else:
                if difference := _difference(Path(where), entry):
                    raise DataError(f"{where}: {difference}; copy the shard again or build the category again")
                self._verified[key] = Path(where)
        return self._verified[key]

    def read(self, category: str, shard: ShardEntry, member: Member) -> bytes:
        """The payload of one member of a verified shard.

        Raises:
            DataError: as for `shard`, or the shard has become shorter since it was verified.
        """
        path = self.shard(category, shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(descriptor, member.size, member.offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(f"{path}: cannot read {member.name} ({error.strerror}); start again") from error
        if len(data) != member.size:
            raise DataError(
                f"{path}: {member.name} is cut, {len(data)} of {member.size} bytes; the shard was changed while in use"
            )
        return data

    def stream(self, category: str, shard: ShardEntry) -> Iterator[tuple[SampleEntry, bytes]]:
        """Every sample of a verified shard with its encoded image, read from the first byte to the last by WebDataset.

        Raises:
            DataError: as for `shard`, or it does not hold the samples that the manifest lists, whole and in that order.
        """
        from webdataset import DataPipeline  # here, because importing webdataset imports torch
        from webdataset.tariterators import group_by_keys, tar_file_expander

        path = self.shard(category, shard)
        try:
            with path.open("rb") as file:
                # Before WebDataset opens it: that unpacks whatever a header claims, compressed and sparse files too.
                found, broken = members(path)
                if problem := broken or next(differences(shard, found), None):
                    raise ValueError(problem)
                # The stages of wds.WebDataset without its first: that draws from Python's random state, and obeys variables of
                # the environment which lead elsewhere than to the file that was verified.
                source = [{"url": str(path), "stream": file}]
                found = DataPipeline(lambda: iter(source), tar_file_expander, group_by_keys)
                for sample, listed in zip_longest(found, shard.samples):
                    yield _image_of(sample, listed)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error.args[0]}); start again") from error
        except (ValueError, tarfile.TarError) as error:  # WebDataset adds the file's name to their arguments
            raise DataError(f"{path}: {error.args[0]}; build the category again") from error

    def _cached(self, category: str, url: str, entry: ShardEntry) -> Path:
        # Named by content: another data set with equal names must not evict this one's shards, nor be taken for it.
        path = within(self.cache, category, f"{entry.sha256[:16]}-{entry.name}")
        lock = within(self.cache, category, path.with_suffix(".lock").name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
            with locked(lock, wait=True):  # the other ranks of this machine wait for the one that fetches
                if path.exists():
                    if _difference(path, entry) is None:
                        return path
                    path.unlink()
                return _with_retries(lambda: self._fetch(url, path, entry), url, self.retries)
        except OSError as error:
            raise DataError(
                f"{self.cache}: {entry.name} of {entry.bytes:,} bytes cannot be written there ({error.strerror or error}); "
                "make room, or give another folder (data.cache, XDG_CACHE_HOME)"
            ) from error

    def _fetch(self, url: str, path: Path, entry: ShardEntry) -> Path:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".fetch-", delete=False) as stream:
            temporary = Path(stream.name)
            try:
                received, digest = _transfer(url, stream, entry.bytes)
                if received != entry.bytes:
                    raise _Interrupted(f"received {received} bytes, expected {entry.bytes}")
                if digest != entry.sha256:
                    raise _Interrupted(f"received SHA-256 {digest}, expected {entry.sha256}")
                stream.flush()
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return path


def _image_of(found: dict[str, Any] | None, listed: SampleEntry | None) -> tuple[SampleEntry, bytes]:
    """A sample of the manifest, and the encoded image of what WebDataset has found there.

    Raises:
        ValueError: that is another sample, or a part of this one.
    """
    if found is None or listed is None or found["__key__"] != listed.key:
        there, wanted = printable(found["__key__"]) if found else "nothing", listed.key if listed else "nothing more"
        raise ValueError(f"holds {there} where the manifest lists {wanted}")
    for member in filter(None, (listed.mask, listed.image)):
        data = found.get(member.name.removeprefix(f"{listed.key}.").lower(), b"")
        if len(data) != member.size:
            raise ValueError(f"holds {len(data)} bytes of {member.name}, the manifest lists {member.size}")
    return listed, data


def _difference(path: Path, entry: ShardEntry) -> str | None:
    """How a file differs from its entry of the manifest; None if it does not."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "no regular file"
        if status.st_size != entry.bytes:
            return f"{status.st_size} bytes, the manifest says {entry.bytes}"
        digest = sha256_file(path)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == entry.sha256 else f"SHA-256 is {digest}, the manifest says {entry.sha256}"


def _join(location: str, *parts: str) -> str:
    if location.startswith(("http://", "https://")):
        parts = tuple(quote(part) for part in parts)
    return "/".join((location.rstrip("/"), *parts))


def _read_bytes(where: str) -> bytes:
    """A manifest in a folder. Raises OSError, also where a device or a pipe stands in its place."""
    status = os.stat(where)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no regular file")
    with open(where, "rb") as stream:
        data = stream.read(min(status.st_size, MANIFEST_BYTES) + 1)  # which is room that is made at once
    if len(data) > MANIFEST_BYTES:
        raise OSError(f"more than {MANIFEST_BYTES >> 20} MiB")
    return data


def _fetch_bytes(url: str, retries: int) -> bytes:
    def attempt() -> bytes:
        stream = io.BytesIO()
        received, _ = _transfer(url, stream, MANIFEST_BYTES)
        if received > MANIFEST_BYTES:
            raise DataError(f"{url}: no manifest has more than {MANIFEST_BYTES >> 20} MiB; check the address")
        return stream.getvalue()

    return _with_retries(attempt, url, retries)


def _with_retries(attempt: Callable[[], _T], url: str, retries: int) -> _T:
    for number in range(retries + 1):
        try:
            return attempt()
        except _Interrupted as error:
            reason = error
        if number < retries:
            time.sleep(min(BACKOFF_SECONDS * 2**number, 30.0))
    raise DataError(f"{url}: {reason}; gave up after {retries + 1} tries: check the server and the network")


def _transfer(url: str, target: BinaryIO | Any, most: int) -> tuple[int, str]:
    """Copy a URL to a stream; returns the number of bytes and their SHA-256. It ends with the first byte after `most`.

    Raises:
        _Interrupted: the connection failed, broke or stalled.
        DataError: the server has refused, or something needed is not installed.
    """
    digest = hashlib.sha256()
    received = 0
    chunks = _http_chunks(url) if url.startswith(("http://", "https://")) else _object_chunks(url)
    try:
        for chunk in chunks:
            kept = chunk[: most + 1 - received]
            digest.update(kept)
            target.write(kept)
            received += len(kept)
            if received > most:
                break
    except _Interrupted as error:
        raise _Interrupted(f"{error} after {received} bytes") from error
    return received, digest.hexdigest()


def _http_chunks(url: str) -> Iterator[bytes]:
    """The body of a URL through curl, which is told the credentials on its standard input: other users see command lines.

    (WebDataset's opener puts the address on curl's command line, and importing it imports torch.)
    """
    if shutil.which("curl") is None:
        raise DataError(f"{url}: reading http(s) needs the program curl; install it (apt-get install curl)")
    options = "--fail --silent --location --globoff --netrc-optional --connect-timeout 30 --proto =http,https"
    command = ["curl", *options.split(), "--write-out", "%{stderr}%{http_code}", "--config", "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin and process.stdout and process.stderr
        address = with_credentials(url).replace("\\", r"\\").replace('"', r"\"")
        with suppress(BrokenPipeError):  # it has ended already, with a status that tells
            process.stdin.write(f'url = "{address}"\n'.encode())
            process.stdin.close()
        try:
            descriptor = process.stdout.fileno()
            while True:
                # A server that stops sending keeps its connection open for ever; curl would wait.
                if not select.select([descriptor], [], [], STALL_SECONDS)[0]:
                    raise _Interrupted(f"no data for {STALL_SECONDS:.0f} s")
                chunk = os.read(descriptor, CHUNK)
                if not chunk:
                    break
                yield chunk
            said, status = process.stderr.read().decode(errors="replace")[-3:], process.wait()
        finally:
            process.kill()
    if status == _CURL_HTTP_ERROR:
        if said in _TRY_AGAIN:
            raise _Interrupted(f"the server answered with HTTP {said}")
        raise DataError(
            f"{url}: the server answered with an HTTP error ({said}); check the address and the permissions "
            f"(credentials are taken from the address, ~/.netrc or {VARIABLE})"
        )
    if status != 0:
        raise _Interrupted(f"curl ended with exit status {status}")


def _object_chunks(url: str) -> Iterator[bytes]:
    """The body of an object, through fsspec."""
    scheme = url.split(":", 1)[0]
    try:
        import fsspec

        opened = fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url}: reading {scheme}:// needs fsspec and its driver ({_told(error)}); "
            "install them (for s3: pip install fsspec s3fs)"
        ) from None  # whose text may hold the credentials
    try:
        with opened as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(
            f"{url}: {_told(error)}; check the address and the permissions (of s3: AWS's own environment and files)"
        ) from None
    except Exception as error:  # each driver has its own exceptions for a lost connection
        raise _Interrupted(f"{type(error).__name__}: {_told(error)}") from None


def _told(error: Exception) -> str:
    return printable(public(str(error)))
