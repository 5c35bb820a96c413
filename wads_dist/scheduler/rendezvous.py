"""How the launched ranks agree on what to do next, without a process group: a small key-value store on the first rank.

Every rank posts a heartbeat to it once a second. A rank watches those it depends on: the first, which holds the store, and the
others of its group. So a wait for another rank ends as soon as that rank is gone, and otherwise lasts as long as it needs
(building shards may take hours); a rank of another group may go without harm to this one.
"""

import json
import os
import queue
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from wads_dist.common.errors import LaunchError, PreemptedError, RankLostError, WadsError, exit_code
from wads_dist.common.heartbeat import BEAT_SECONDS, WorkerState
from wads_dist.common.processes import free_port
from wads_dist.shards.addresses import public

JOIN_SECONDS = 600.0
LOST_SECONDS = 30.0
POLL_SECONDS = 0.1
STOP = "stop"
ADVICE = "The same command goes on from the last checkpoint"


def launch_identity() -> str:
    """What the ranks of one launch have in common and those of another on the same port have not: the command, and on a single
    node the process that started them."""
    words = [word for word in sys.argv if not word.startswith("--local_rank")]
    size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    started_by = [f"by {os.getppid()}"] if size == os.environ.get("WORLD_SIZE") else []
    return shlex.join(map(public, [*words, *started_by]))  # word by word: as in sweep.command_line


class CallWithTimeout:
    """Calls that are given up after a while. A store's call waits for ever on a host that has vanished without closing its
    connection, and lets no signal through meanwhile; so a thread of its own makes it."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            function, answer = self._calls.get()
            try:
                answer.put((function(), None))
            except Exception as error:
                answer.put((None, error))

    def call(self, function: Callable[[], Any], timeout: float = LOST_SECONDS) -> Any:
        """What ``function`` returns or raises; TimeoutError if it has done neither after ``timeout`` seconds."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((function, answer))
        try:
            result, error = answer.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no answer for {timeout:.0f} s") from None
        if error is not None:
            raise error
        return result


@dataclass
class Peer:
    """A launched rank as this one sees it."""

    text: bytes = b""
    changed: float = 0.0
    host: str = "an unknown host"
    worker_states: dict[str, WorkerState] = field(default_factory=dict)
    left: tuple[int, str] | None = None
    """Exit code and reason, if it has left before the end."""


class Launch:
    """The launched ranks, and the store they agree through (none for a single process)."""

    def __init__(self, rank: int = 0, world_size: int = 1, address: str = "127.0.0.1", store: Any = None) -> None:
        self.rank, self.world_size, self.address, self.store = rank, world_size, address, store
        self.host = socket.gethostname()
        self.worker_states: dict[str, WorkerState] = {}
        """Of this rank's workers, by group; posted with the next heartbeat."""
        self.stop_asked = threading.Event()
        """A rank was asked to stop, and so all are."""
        self.gone: frozenset[int] = frozenset()
        """Ranks on this node whose process is known to have ended, which a missing heartbeat tells only after a while."""
        self.abandoned = threading.Event()
        """This process ends at once: whatever waits here gives up."""
        self._timed = CallWithTimeout() if store is not None else None
        self._peers: dict[int, Peer] = {}
        self._looked = time.monotonic()
        self._failure: WadsError | None = None
        self._closed = threading.Event()
        # Thousands of ranks must not ask one store five times a second each.
        self.poll_seconds = min(1.0, max(POLL_SECONDS, world_size / 512))
        if store is not None:
            # A rank that has not joined yet is given longer.
            self.watch(range(1, world_size) if self.is_first else [0], JOIN_SECONDS)
            self._exchanging = threading.Thread(target=self._exchange, daemon=True)
            self._exchanging.start()

    @classmethod
    def from_environment(cls) -> "Launch":
        """Reads what the DeepSpeed launcher or torchrun set; without a launcher, one rank.

        Raises:
            WadsError: several Slurm tasks without a launcher's variables: each would train the same run on its own.
            LaunchError: the port is another launch's.
            RankLostError: the first rank cannot be reached.
        """
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ and "RANK" not in os.environ:
            raise WadsError(
                "srun started several tasks, but RANK and WORLD_SIZE are not set: start one task a node and let "
                "`deepspeed` launch the ranks, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            return cls()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's agent may already hold a store at this address.
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        patience = timedelta(seconds=JOIN_SECONDS)

        # torchrun's agent keeps its store when it starts the ranks again: what the last ones agreed on is not ours.
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

        def connect() -> dist.Store:
            store = dist.TCPStore(address, port, world, is_master=hosts, wait_for_workers=False, timeout=patience)
            return dist.PrefixStore(life, store) if life != "0" else store

        line, mine = CallWithTimeout(), launch_identity()
        try:
            store = line.call(connect, JOIN_SECONDS + LOST_SECONDS)
            if rank == 0:
                store.set("identity", mine)
            theirs = line.call(lambda: store.get("identity"), JOIN_SECONDS + LOST_SECONDS).decode()
        except (TimeoutError, dist.DistError) as error:
            reason = str(error).splitlines()[0]
            if hosts:
                raise LaunchError(
                    f"port {port} cannot be opened here; another launch may use it: add --master_port N ({reason})"
                ) from None
            raise RankLostError(
                f"rank {rank} cannot reach rank 0 at {address}:{port} ({reason}): is it running there?"
            ) from None
        if theirs != mine:
            # Before a heartbeat is posted: the other launch must not learn that a rank of its own had joined and left.
            raise LaunchError(
                f"port {port} of {address} belongs to another launch ({theirs}): add --master_port N to this one"
            )
        return cls(rank, world, address, store)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    # --- agreeing ---------------------------------------------------------------------------------------------------

    def group(self, name: str, ranks: Sequence[int], local_size: int | None = None) -> "Group":
        """This rank's group of ``ranks``, which talk among themselves under ``name``."""
        return Group(self, name, tuple(ranks), local_size)

    def everybody(self) -> "Group":
        """All launched ranks."""
        return self.group("", range(self.world_size))

    def raise_flag(self, key: str, reason: str) -> None:
        """Tells every rank ``reason``, unless one has raised this flag already."""
        if self.store is not None:
            self._call("compare_set", key, "", reason)

    def flag(self, key: str) -> str | None:
        """Why a flag is up; None if it is not."""
        return self._call("get", key).decode() if self.store is not None and self._call("check", [key]) else None

    def _call(self, name: str, *arguments: Any) -> Any:
        assert self._timed is not None
        if self._failure is not None:
            raise self._failure
        try:
            return self._timed.call(lambda: getattr(self.store, name)(*arguments))
        except (TimeoutError, dist.DistError) as error:
            self._failure = RankLostError(
                f"rank 0 at {self.address}, which holds the launch together, is gone or cannot be reached "
                f"({str(error).splitlines()[0]}). {ADVICE}."
            )
            raise self._failure from None

    # --- watching ---------------------------------------------------------------------------------------------------

    def watch(self, ranks: Iterable[int], patience: float = LOST_SECONDS) -> None:
        """From now on knows whether ``ranks`` live; the first word of each may take ``patience`` seconds."""
        until = time.monotonic() + patience - LOST_SECONDS
        new = {rank: Peer(changed=until) for rank in ranks if rank != self.rank and rank not in self._peers}
        self._peers = self._peers | new  # replaced, not changed: another thread reads it

    def _exchange(self) -> None:
        count = 0
        while not self._closed.wait(BEAT_SECONDS):
            count += 1
            worker_states = {group: asdict(worker_state) for group, worker_state in list(self.worker_states.items())}
            heartbeat = {"count": count, "host": self.host, "worker_states": worker_states}
            try:
                self._call("set", f"heartbeat/{self.rank}", json.dumps(heartbeat))
                self._look()
                if not self.stop_asked.is_set() and self.flag(STOP):
                    self.stop_asked.set()
            except WadsError:
                return  # kept in self._failure, which check raises

    def _look(self) -> None:
        """Reads the heartbeats of the ranks this one watches: in one call, once they have all joined."""
        peers = self._peers
        unknown = [rank for rank, peer in peers.items() if not peer.text]
        absent = {rank for rank in unknown if not self._call("check", [f"heartbeat/{rank}"])}
        ranks = [rank for rank in peers if rank not in absent]
        texts = self._call("multi_get", [f"heartbeat/{rank}" for rank in ranks]) if ranks else []
        now = time.monotonic()
        for rank, text in zip(ranks, texts, strict=True):
            peer = peers[rank]
            if text != peer.text:
                heartbeat = json.loads(text)
                peer.text, peer.changed, peer.host = text, now, heartbeat["host"]
                peer.worker_states = {
                    group: WorkerState(**s) for group, s in heartbeat.get("worker_states", {}).items()
                }
                peer.left = tuple(heartbeat["left"]) if "left" in heartbeat else None
        self._looked = now

    def check(self, ranks: Iterable[int]) -> None:
        """Raises RankLostError if one of ``ranks``, which must be watched, has left, or was not heard of for too long.

        Raises:
            PreemptedError: this process ends at once.
        """
        if self.abandoned.is_set():
            raise PreemptedError("stopped at once")
        if self._failure is not None:
            raise self._failure
        for rank in ranks:
            if lost := self._lost(rank):
                text = str(lost)
                raise RankLostError(text if ADVICE in text else f"{text} {ADVICE}.", lost.exit_code)

    def _lost(self, rank: int) -> RankLostError | None:
        peer = self._peers[rank]
        if peer.left is not None:
            return RankLostError(peer.left[1], peer.left[0])
        if rank in self.gone:
            return RankLostError(f"rank {rank} on {self.host} is gone: its process has ended without a word.")
        # By the time of the last look, not now: this process may have been stopped for a while itself.
        if self._looked - peer.changed <= LOST_SECONDS:
            return None
        silence = f"{LOST_SECONDS:.0f} s" if peer.text else f"{JOIN_SECONDS:.0f} s, since the start"
        return RankLostError(
            f"rank {rank} on {peer.host} has not been heard of for {silence}: its process or node is gone."
        )

    def worker_state_of(self, rank: int, group: str) -> WorkerState | None:
        """Where a rank's worker stands; None if it has none, or is not watched."""
        worker_states = self.worker_states if rank == self.rank else self._peers[rank].worker_states
        return worker_states.get(group)

    # --- leaving ----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """This rank has nothing more to do."""
        if self.store is not None:
            self._call("set", f"finished/{self.rank}", "")

    def all_finished(self) -> bool:
        """On the first rank: whether every rank has finished or is gone. On the others: whether the first has concluded.

        Raises:
            RankLostError: the first rank is gone.
        """
        if self.store is None:
            return True
        if not self.is_first:
            self.check([0])
            return bool(self._call("check", ["/concluded"]))
        return all(self._call("check", [f"finished/{r}"]) or self._lost(r) for r in range(1, self.world_size))

    def lost(self) -> dict[int, str]:
        """The ranks that this one watches and that are gone, each with what is known of it."""
        return {rank: str(error) for rank in self._peers if (error := self._lost(rank))}

    def leave(self, code: int) -> int:
        """Waits until the first rank has concluded with ``code``, which every rank returns: a launcher ends everybody when the
        first process fails. The first rank hosts the store, so it goes last; it does not wait for ranks that are gone."""
        if self.store is None:
            return code
        code = int(self.everybody().broadcast("concluded", str(code) if self.is_first else None))
        self._call("set", f"left/{self.rank}", "")
        if self.is_first:
            waiting = set(range(1, self.world_size))
            while waiting := {r for r in waiting if not self._call("check", [f"left/{r}"]) and not self._lost(r)}:
                time.sleep(self.poll_seconds)
        self._closed.set()
        return code

    def leave_early(self, error: BaseException) -> None:
        """Tells the others why this rank cannot go on, so that they need not wait to miss it."""
        if self.store is None or self._closed.is_set():
            return
        self._closed.set()
        self._exchanging.join(BEAT_SECONDS)  # this heartbeat must be the last
        known = isinstance(error, RankLostError)
        reason = str(error) if known else f"rank {self.rank} on {self.host} has left: {error or 'interrupted'}"
        try:
            heartbeat = {"host": self.host, "left": (int(exit_code(error)), reason)}
            self._call("set", f"heartbeat/{self.rank}", json.dumps(heartbeat))
            if self.is_first:
                time.sleep(3 * BEAT_SECONDS)  # the store ends with this process; the others read it once a second
        except WadsError:
            pass


class Group:
    """Ranks of a launch that work on one thing together, seen by one of them. The first of them decides."""

    def __init__(self, launch: Launch, name: str, ranks: tuple[int, ...], local_size: int | None = None) -> None:
        self.launch, self.name, self.ranks = launch, name, ranks
        self.local_size = len(ranks) if local_size is None else local_size
        """Ranks of the group on this node."""
        self.rank, self.world_size = ranks.index(launch.rank), len(ranks)
        others = ranks if self.is_first else ranks[:1]
        self.watched = sorted({*others, *(() if launch.is_first else (0,))} - {launch.rank})
        launch.watch(self.watched)
        self.while_waiting: Callable[[], None] = lambda: None
        """Called again and again during every wait: what this rank holds must not expire meanwhile."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def broadcast(self, key: str, value: str | None) -> str:
        """The group's first rank's ``value`` on every rank of it.

        Raises:
            RankLostError: a rank of the group is gone.
        """
        if self.launch.store is None:
            assert value is not None
            return value
        if self.is_first:
            self.launch._call("set", f"{self.name}/{key}", value or "")
            return value or ""
        return self._get(f"{self.name}/{key}")

    def all_gather(self, key: str, value: str = "") -> list[str]:
        """Waits for all ranks of the group; returns each one's ``value`` in rank order.

        Raises:
            RankLostError: a rank of the group is gone.
        """
        values = self.gather(key, value or "-")
        return list(json.loads(self.broadcast(f"{key}/all", json.dumps(values) if self.is_first else None)))

    def gather(self, key: str, value: str) -> list[str]:
        """Each rank's ``value``, in rank order, on the group's first rank; nothing on the others, which do not wait.

        Raises:
            RankLostError: a rank of the group is gone.
        """
        if self.launch.store is None:
            return [value]
        self.launch._call("set", f"{self.name}/{key}/{self.rank}", value)
        return [self._get(f"{self.name}/{key}/{r}") for r in range(self.world_size)] if self.is_first else []

    def raise_flag(self, key: str, reason: str) -> None:
        """Tells every rank of the group ``reason``, unless one has raised this flag already."""
        self.launch.raise_flag(f"{self.name}/{key}", reason)

    def flag(self, key: str) -> str | None:
        """Why a flag is up; None if it is not."""
        return self.launch.flag(f"{self.name}/{key}")

    def check_peers(self) -> None:
        """Raises RankLostError if a rank that this one depends on is gone."""
        self.while_waiting()
        self.launch.check(self.watched)

    @property
    def whole(self) -> bool:
        """Whether all its ranks live, though the launch may be lost with its first rank, which is none of them."""
        return 0 not in self.ranks and not any(self.launch._lost(rank) for rank in self.watched if rank != 0)

    def stand(self, worker_state: WorkerState | None) -> None:
        """Where this rank's worker of the group stands now."""
        if worker_state is None:
            self.launch.worker_states.pop(self.name, None)
        else:
            self.launch.worker_states[self.name] = worker_state

    def worker_states(self) -> dict[int, WorkerState]:
        """Where the workers of all ranks of the group stand that have one, by launched rank. For its first rank."""
        found = {rank: self.launch.worker_state_of(rank, self.name) for rank in self.ranks}
        return {rank: worker_state for rank, worker_state in found.items() if worker_state is not None}

    def _get(self, key: str) -> str:
        while not self.launch._call("check", [key]):
            self.check_peers()
            time.sleep(self.launch.poll_seconds)
        return str(self.launch._call("get", key).decode())


def address_towards(address: str, port: int = 9) -> str:
    """This host's own address, as ``address`` would see it; nothing is sent."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
            found = str(probe.getsockname()[0])
            # Debian's hosts call themselves 127.0.1.1: others know this one by the name that it was given.
            return address if found.startswith("127.") else found
        except OSError:
            return socket.gethostname()


def unless_launched() -> None:
    """Without a launcher this process is a world of one, at a port that nobody else has: a training may run beside it."""
    if "RANK" not in os.environ:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")
