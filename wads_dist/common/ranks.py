"""This process's place among its peers, and the few collectives the framework needs besides DeepSpeed's own."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

T = TypeVar("T")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Ranks:
    """Rank and world size of one DeepSpeed world, and the device this rank computes on."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as every launcher sets them (one process without)."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        accelerator = get_accelerator()
        device = torch.device(accelerator.device_name(local) if accelerator.device_name() != "cpu" else "cpu")
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            world_size=world,
            local_rank=local,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world),
            device=device,
        )

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def gather_rows(self, row: Tensor) -> list[list[float]]:
        """``row`` ([K] on the device) of every rank, in rank order, on every rank. One collective, one host synchronisation."""
        if self.world_size == 1:
            return [row.tolist()]
        rows = row.new_zeros(self.world_size, len(row))
        rows[self.rank] = row
        dist.all_reduce(rows)  # each entry is one rank's number and zeros
        return rows.tolist()

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def average_buffers(self, module: nn.Module) -> dict[str, Tensor]:
        """The floating-point buffers of ``module`` averaged over ranks: each rank's BatchNorm saw its own part of the data."""
        averaged = {}
        for name, buffer in module.named_buffers():
            value = buffer.detach().clone()
            if value.is_floating_point() and self.world_size > 1:
                dist.all_reduce(value)
                value /= self.world_size
            averaged[name] = value
        return averaged


def unname_shared_memory(ranks: Ranks) -> None:
    """Takes away the name of the shared memory that DeepSpeed's CPU all-reduce has opened, once every rank has opened it.

    The memory lives on for as long as a rank has it. With its name it would outlive a rank that is killed: 66 MiB each time,
    until the machine has none left.
    """
    if ranks.device.type == "cpu":
        ranks.barrier()
        place = f"{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}_{ranks.rank}"
        (SHARED_MEMORY / f"deepspeed_allreduce_buffer_{os.getuid()}_{place}").unlink(missing_ok=True)
