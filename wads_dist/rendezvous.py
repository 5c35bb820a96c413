"""How the launched ranks agree on what to do next, without a process group: a small key-value store on the first rank.

Every rank posts a pulse to it once a second. The first rank watches all pulses, the others watch the first's; so a wait for
another rank ends as soon as that rank is gone, and otherwise lasts as long as it needs (building shards may take hours).
"""

import json
import os
import queue
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from wads_dist.errors import LaunchError, RankLostError, WadsError, exit_code
from wads_dist.pulse import BEAT_SECONDS, Standing

JOIN_SECONDS = 600.0
LOST_SECONDS = 30.0
POLL_SECONDS = 0.1


def launch_identity() -> str:
    """What the ranks of one launch have in common and those of another on the same port have not: the command, and on a single
    node the process that started them."""
    words = [word for word in sys.argv if not word.startswith("--local_rank")]
    size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    started_by = [f"by {os.getppid()}"] if size == os.environ.get("WORLD_SIZE") else []
    return shlex.join([*words, *started_by])


class Line:
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
    standing: Standing | None = None
    left: tuple[int, str] | None = None
    """Exit code and reason, if it has left before the end."""


class Launch:
    """The launched ranks, and the store they agree through (none for a single process)."""

    def __init__(self, rank: int = 0, world_size: int = 1, address: str = "127.0.0.1", store: Any = None) -> None:
        self.rank, self.world_size, self.address, self.store = rank, world_size, address, store
        self.host = socket.gethostname()
        self.standing: Standing | None = None
        """Of this rank's worker; posted with the next pulse."""
        self._line = Line() if store is not None else None
        self._peers: dict[int, Peer] = {}
        self._looked = time.monotonic()
        self._failure: WadsError | None = None
        self._closed = threading.Event()
        if store is not None:
            # A rank that has not joined yet is given longer.
            joined = time.monotonic() + JOIN_SECONDS - LOST_SECONDS
            watched = range(1, world_size) if self.is_first else range(1)
            self._peers = {rank: Peer(changed=joined) for rank in watched}
            self._pulse = threading.Thread(target=self._exchange, daemon=True)
            self._pulse.start()

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

        def connect() -> dist.TCPStore:
            return dist.TCPStore(address, port, world, is_master=hosts, wait_for_workers=False, timeout=patience)

        line, mine = Line(), launch_identity()
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
            # Before a pulse is posted: the other launch must not learn that a rank of its own had joined and left.
            raise LaunchError(
                f"port {port} of {address} belongs to another launch ({theirs}): add --master_port N to this one"
            )
        return cls(rank, world, address, store)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    # --- agreeing ---------------------------------------------------------------------------------------------------

    def share(self, key: str, value: str | None) -> str:
        """The first rank's ``value`` on every rank.

        Raises:
            RankLostError: a rank is gone.
        """
        if self.store is None:
            assert value is not None
            return value
        if self.is_first:
            self._call("set", key, value or "")
        return self._get(key)

    def everyone(self, key: str, value: str = "") -> list[str]:
        """Waits for all ranks; returns each one's ``value`` in rank order.

        Raises:
            RankLostError: a rank is gone.
        """
        if self.store is None:
            return [value]
        self._call("set", f"{key}/{self.rank}", value or "-")
        return [self._get(f"{key}/{r}") for r in range(self.world_size)]

    def raise_flag(self, key: str, reason: str) -> None:
        """Tells every rank ``reason``, unless one has raised this flag already."""
        if self.store is not None:
            self._call("compare_set", key, "", reason)

    def flag(self, key: str) -> str | None:
        """Why a flag is up; None if it is not."""
        return self._call("get", key).decode() if self.store is not None and self._call("check", [key]) else None

    def _get(self, key: str) -> str:
        while not self._call("check", [key]):
            self.check_peers()
            time.sleep(POLL_SECONDS)
        return self._call("get", key).decode()

    def _call(self, name: str, *arguments: Any) -> Any:
        assert self._line is not None
        if self._failure is not None:
            raise self._failure
        try:
            return self._line.call(lambda: getattr(self.store, name)(*arguments))
        except (TimeoutError, dist.DistError) as error:
            self._failure = RankLostError(
                f"rank 0 at {self.address}, which holds the launch together, is gone or cannot be reached "
                f"({str(error).splitlines()[0]}). The same command goes on from the last checkpoint."
            )
            raise self._failure from None

    # --- watching ---------------------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        count = 0
        while not self._closed.wait(BEAT_SECONDS):
            count += 1
            pulse = {"count": count, "host": self.host, "standing": self.standing and asdict(self.standing)}
            try:
                self._call("set", f"pulse/{self.rank}", json.dumps(pulse))
                self._look()
            except WadsError:
                return  # kept in self._failure, which check_peers raises

    def _look(self) -> None:
        """Reads the pulses of the ranks this one watches: in one call, once they have all joined."""
        unknown = [rank for rank, peer in self._peers.items() if not peer.text]
        absent = {rank for rank in unknown if not self._call("check", [f"pulse/{rank}"])}
        ranks = [rank for rank in self._peers if rank not in absent]
        texts = self._call("multi_get", [f"pulse/{rank}" for rank in ranks]) if ranks else []
        now = time.monotonic()
        for rank, text in zip(ranks, texts, strict=True):
            peer = self._peers[rank]
            if text != peer.text:
                pulse = json.loads(text)
                peer.text, peer.changed, peer.host = text, now, pulse["host"]
                peer.standing = Standing(**pulse["standing"]) if pulse.get("standing") else None
                peer.left = tuple(pulse["left"]) if "left" in pulse else None
        self._looked = now

    def check_peers(self) -> None:
        """Raises RankLostError if a rank this one depends on has left, or has not been heard of for too long."""
        if self._failure is not None:
            raise self._failure
        for rank, peer in self._peers.items():
            if peer.left is not None:
                raise RankLostError(peer.left[1], peer.left[0])
            # By the time of the last look, not now: this process may have been stopped for a while itself.
            if self._looked - peer.changed > LOST_SECONDS:
                silence = f"{LOST_SECONDS:.0f} s" if peer.text else f"{JOIN_SECONDS:.0f} s, since the start"
                raise RankLostError(
                    f"rank {rank} on {peer.host} has not been heard of for {silence}: its process or node is gone. The same "
                    f"command goes on from the last checkpoint."
                )

    def standings(self) -> dict[int, Standing]:
        """Where the workers of all ranks stand that have one; complete on the first rank only."""
        found = {self.rank: self.standing} | {rank: peer.standing for rank, peer in self._peers.items()}
        return {rank: standing for rank, standing in sorted(found.items()) if standing is not None}

    # --- leaving ----------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Waits until the first rank has concluded: a launcher ends everybody when the first process fails. The first rank
        hosts the store, so it goes last."""
        if self.store is None:
            return
        self.share("concluded", "yes")
        self._call("set", f"left/{self.rank}", "")
        if self.is_first:
            for rank in range(self.world_size):
                self._get(f"left/{rank}")
        self._closed.set()

    def leave_early(self, error: BaseException) -> None:
        """Tells the others why this rank cannot go on, so that they need not wait to miss it."""
        if self.store is None or self._closed.is_set():
            return
        self._closed.set()
        self._pulse.join(BEAT_SECONDS)  # this pulse must be the last
        known = isinstance(error, RankLostError)
        reason = str(error) if known else f"rank {self.rank} on {self.host} has left: {error or 'interrupted'}"
        try:
            pulse = {"host": self.host, "left": (int(exit_code(error)), reason)}
            self._call("set", f"pulse/{self.rank}", json.dumps(pulse))
            if self.is_first:
                time.sleep(3 * BEAT_SECONDS)  # the store ends with this process; the others read it once a second
        except WadsError:
            pass


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
