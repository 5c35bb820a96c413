"""How the launched ranks agree on what to do next, without a process group: a small key-value store on the first rank."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from wads_dist.errors import WadsError

PREPARE_TIMEOUT = timedelta(hours=6)
PEER_TIMEOUT = timedelta(minutes=30)


@dataclass
class Launch:
    """The launched ranks, and the store they agree through (none for a single process)."""

    rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    store: dist.TCPStore | None = None

    @classmethod
    def from_environment(cls) -> "Launch":
        """Reads what the DeepSpeed launcher or torchrun set; without a launcher, one rank.

        Raises:
            WadsError: several Slurm tasks without a launcher's variables: each would train the same run on its own.
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
        store = dist.TCPStore(address, port, world, is_master=hosts, wait_for_workers=False, timeout=PREPARE_TIMEOUT)
        return cls(rank, world, address, store)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, key: str, value: str | None) -> str:
        """The first rank's ``value`` on every rank."""
        if self.store is None:
            assert value is not None
            return value
        if self.is_first:
            self.store.set(key, value or "")
        return self._get(key, "rank 0")

    def _get(self, key: str, whose: str) -> str:
        assert self.store is not None
        try:
            return self.store.get(key).decode()
        except dist.DistError as error:
            raise WadsError(
                f"rank {self.rank} waited in vain for {whose} ({key}): its process or node is gone. Start the same "
                f"command again; it goes on from the last checkpoints. ({str(error).splitlines()[0]})"
            ) from None

    def prepared(self) -> None:
        """Building shards may take hours; from here on a peer that is silent for this long is gone."""
        if self.store is not None:
            self.store.set_timeout(PEER_TIMEOUT)

    def everyone(self, key: str, value: str = "") -> list[str]:
        """Waits for all ranks; returns each one's ``value`` in rank order."""
        if self.store is None:
            return [value]
        self.store.set(f"{key}/{self.rank}", value or "-")
        return [self._get(f"{key}/{r}", f"rank {r}") for r in range(self.world_size)]

    def leave(self) -> None:
        """Waits until the first rank has concluded: a launcher ends everybody when the first process fails. The first rank
        hosts the store, so it goes last."""
        if self.store is None:
            return
        self.share("concluded", "yes")
        self.store.set(f"left/{self.rank}", "")
        if self.is_first:
            self.store.wait([f"left/{r}" for r in range(self.world_size)])

    def raise_flag(self, key: str) -> None:
        if self.store is not None:
            self.store.set(key, "1")

    def flag_is_up(self, key: str) -> bool:
        return self.store is not None and self.store.check([key])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
