"""The queue of a run's categories: leases in its folder, which is all that groups on many nodes and several launches share.

    RUN/queue/<category>/<NNN>.json         attempt NNN and who makes it; the highest is the current one, mtime the heartbeat
    RUN/queue/<category>/<NNN>.ended.json   how it ended
    RUN/<category>/metrics.json             the category is done

No server and no clock is shared, so nothing is lost with a node. An attempt is claimed by linking a complete file to the next
name, which fails if the name is there. A heartbeat is only ever compared with itself, on the observer's own clock. Folders are
listed rather than names looked up: NFS may go on for a minute believing that a name is missing, but asks the server whenever a
folder is opened. Imports no torch, because those who only watch a run read this too.
"""

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from pydantic import BaseModel, ConfigDict

from wads_dist.common.errors import ExitCode, WadsError
from wads_dist.common.files import write_text
from wads_dist.common.processes import start_time, this_machine
from wads_dist.runs.folder import METRICS, QUEUE

# What another try would only repeat.
REPEATS = frozenset({ExitCode.BAD_CONFIG, ExitCode.BAD_DATA, ExitCode.REFUSED_RESUME, ExitCode.NOT_FINITE})
NAME = re.compile(r"(\d{3,})(\.ended)?\.json")
# A renewal is due after a twelfth of the time, so that a few may be late or get lost.
BEATS, LONGEST_BEAT = 12, 5.0
# At most so much of the time until expiry passes between two looks: if more did, it may be the observer that was stopped, or
# the file system for all, and a holder needs a moment to renew.
LOOKS = 4


@dataclass(frozen=True)
class Owner:
    """Who claims. The process, its start time and its machine are added when a lease is written."""

    launch: str
    group: str
    ranks: tuple[int, ...]
    host: str


class Claim(BaseModel):
    """Content of a lease."""

    model_config = ConfigDict(frozen=True)

    attempt: int
    launch: str
    group: str
    ranks: tuple[int, ...]
    host: str
    machine: str
    pid: int
    started: str
    time: float


class End(BaseModel):
    """How an attempt ended: ``code`` is one of ``ExitCode``, or 128 + a signal's number."""

    model_config = ConfigDict(frozen=True)

    code: int
    reason: str
    time: float
    seconds: float


@dataclass(frozen=True)
class Attempt:
    """An attempt as its files tell it."""

    number: int
    path: Path
    claim: Claim | None
    """None: cannot be read. Someone's all the same, until its heartbeat stops."""
    end: End | None
    """None: not ended, lost to the attempt that follows, or its file cannot be read."""


class Lease:
    """This process's right to train a category, for as long as it renews it and nobody has taken over."""

    def __init__(self, category: str, attempt: int, path: Path, lease_seconds: float) -> None:
        self.category, self.attempt, self.path = category, attempt, path
        self._lease_seconds = lease_seconds
        self._claimed = self._beaten = time.monotonic()
        self._over = False

    def beat(self) -> None:
        """Renews the lease if that is due; may be called at any rate. Failures show in ``held``.

        A process that was stopped for long renews what nobody has taken over meanwhile, and goes on.
        """
        if not self._over and time.monotonic() - self._beaten >= min(LONGEST_BEAT, self._lease_seconds / BEATS):
            with suppress(OSError):
                os.utime(self.path)  # not given a time: on NFS the server's
                self._beaten = time.monotonic()

    @property
    def held(self) -> bool:
        """False once it has ended, was taken over or removed, or could not be renewed for ``lease_seconds``."""
        if self._over or time.monotonic() - self._beaten > self._lease_seconds:
            return False
        try:
            return still_held(self.path)
        except OSError:
            return True  # cannot be told now, nor renewed; that lasts for lease_seconds at most

    def end(self, code: int, reason: str = "") -> None:
        """Records how the attempt ended; only the first call counts. One that was taken over stays without an end.

        Never raises: an end that cannot be written is found out as any holder's that falls silent.
        """
        if self._over:
            return
        self._over = True
        end = End(code=code, reason=reason, time=time.time(), seconds=round(time.monotonic() - self._claimed, 3))
        with suppress(OSError):
            if still_held(self.path):
                write_text(_ended(self.path), end.model_dump_json())


class Queue:
    """The categories of a run as one group of one launch sees them; several groups in a process have one each."""

    def __init__(
        self, run: Path, categories: Sequence[str], owner: Owner, *, attempts: int, lease_seconds: float
    ) -> None:
        """``categories``: in the order in which they are to be taken. ``attempts``: tries of each within this launch.
        ``lease_seconds``: a holder that is silent for so long has lost its category."""
        self.run, self.categories, self.owner = run, list(categories), owner
        self.attempts, self.lease_seconds = attempts, lease_seconds
        self._known: dict[str, dict[int, Attempt]] = {category: {} for category in categories}
        self._watched: dict[Path, _Heartbeat] = {}

    def take(self) -> Lease | None:
        """Claims the first category that is neither done, nor given up, nor being trained; None if there is none now.

        Raises:
            WadsError: the lease cannot be written: the disk is full, or the file system has no hard links.
        """
        for category in self.categories:
            if self._done(category):
                continue
            attempts = self._look(category)
            if self._running(attempts) or self._given_up(attempts) is not None:
                continue
            lease = self._claim(category, attempts[-1].number + 1 if attempts else 1)
            if lease and self._done(category):  # by the previous holder, since the look above
                lease.end(0, "done already")
            elif lease:
                return lease
        return None

    def remaining(self) -> list[str]:
        """Categories neither done nor given up in this launch; those that others are training included."""
        return [c for c in self.categories if not self._done(c) and self._given_up(self._look(c)) is None]

    def failed(self) -> dict[str, int]:
        """Categories given up in this launch, each with the exit code of its last try (RANK_LOST: its holder fell silent)."""
        codes = {c: self._given_up(self._look(c)) for c in self.categories if not self._done(c)}
        return {category: code for category, code in codes.items() if code is not None}

    def _done(self, category: str) -> bool:
        return category in _names(self.run) and METRICS in _names(self.run / category)

    def _look(self, category: str) -> list[Attempt]:
        return _read_attempts(self.run / QUEUE / category, self._known[category])

    def _running(self, attempts: list[Attempt]) -> bool:
        return bool(attempts) and attempts[-1].end is None and not self._expired(attempts[-1])

    def _given_up(self, attempts: list[Attempt]) -> int | None:
        """The exit code of this launch's last try, if there will be no other."""
        codes = [
            attempt.end.code if attempt.end else int(ExitCode.RANK_LOST)
            for attempt in attempts
            if attempt.claim and attempt.claim.launch == self.owner.launch
            # Without an end: taken over, or silent now. (The current one is last.)
            if attempt.end or attempt is not attempts[-1] or self._expired(attempt)
        ]
        failures = [code for code in codes if code not in (ExitCode.OK, ExitCode.PREEMPTED)]
        return failures[-1] if len(failures) >= self.attempts or REPEATS & set(failures) else None

    def _expired(self, attempt: Attempt) -> bool:
        """Whether the holder's process is gone (told on its own machine only), or its heartbeat was seen unchanged for
        ``lease_seconds``."""
        claim = attempt.claim
        if claim and claim.machine == this_machine() and start_time(claim.pid) != claim.started:
            return True
        try:
            mtime = _stat_anew(attempt.path).st_mtime_ns
        except OSError:
            return False  # removed, or cannot be told now
        now = time.monotonic()
        heartbeat = self._watched.get(attempt.path)
        if heartbeat is None or heartbeat.mtime != mtime:
            self._watched[attempt.path] = _Heartbeat(mtime, now)
            return False
        heartbeat.silent += min(now - heartbeat.seen, self.lease_seconds / LOOKS)
        heartbeat.seen = now
        return heartbeat.silent >= self.lease_seconds

    def _claim(self, category: str, number: int) -> Lease | None:
        """None: another was faster.

        Raises:
            WadsError: as ``take``.
        """
        folder = self.run / QUEUE / category
        path, pid = folder / f"{number:03d}.json", os.getpid()
        lease = Lease(category, number, path, self.lease_seconds)
        claim = Claim(
            attempt=number,
            **asdict(self.owner),
            machine=this_machine(),
            pid=pid,
            started=start_time(pid) or "",
            time=time.time(),
        )
        temporary = folder / f".{path.name}.{uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(claim.model_dump_json())
            os.link(temporary, path)
        except FileExistsError:
            # NFS says so too of a link that it made, if the answer got lost and the request was sent again.
            if _stat_anew(temporary).st_nlink == 1:
                return None
        except OSError as error:
            raise WadsError(
                f"run.dir: the lease {path} could not be written ({error.strerror}): the folder must be writable, with space "
                "left, on a file system that has hard links (local disks, NFS, Lustre, GPFS and CephFS have)"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink()
        return lease


@dataclass
class _Heartbeat:
    """What one observer saw of one lease: its mtime (ns), when (s, own clock), and how long it has been the same (s)."""

    mtime: int
    seen: float
    silent: float = 0.0


def still_held(lease: Path) -> bool:
    """Whether a lease is there and no later attempt is. A worker asks right before it publishes something.

    Raises:
        OSError: its folder cannot be read; what is not there is no error.
    """
    names = _names(lease.parent)
    return lease.name in names and max(_numbers(names)) == int(lease.stem)


def attempts_of(run: Path, category: str) -> list[Attempt]:
    """All attempts at a category so far, oldest first; those of files that cannot be read included."""
    return _read_attempts(run / QUEUE / category, {})


def _read_attempts(folder: Path, known: dict[int, Attempt]) -> list[Attempt]:
    """The attempts whose files are in ``folder``, oldest first. What ``known`` has of them is not read again."""
    names = set(_names(folder))
    for number in _numbers(names):
        path = folder / f"{number:03d}.json"
        claim, end = (known[number].claim, known[number].end) if number in known else (None, None)
        if end is None and _ended(path).name in names:
            end = _read(End, _ended(path))
        known[number] = Attempt(number, path, claim or _read(Claim, path), end)
    return [known[number] for number in sorted(_numbers(names))]


Record = TypeVar("Record", bound=BaseModel)


def _read(kind: type[Record], path: Path) -> Record | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _stat_anew(path: Path) -> os.stat_result:
    """NFS asks the server for a file's attributes whenever that is opened; before, they may be a minute old."""
    with suppress(PermissionError), path.open("rb"):
        pass
    return path.stat()


def _ended(lease: Path) -> Path:
    return lease.with_suffix(".ended.json")


def _numbers(names: Sequence[str] | set[str]) -> list[int]:
    """Of the attempts among the names in a folder; an end without its lease is none."""
    found = map(NAME.fullmatch, names)
    return [int(match[1]) for match in found if match and not match[2]]


def _names(folder: Path) -> list[str]:
    """What is in ``folder``; nothing if it is not there."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
