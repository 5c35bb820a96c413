"""Which launched ranks train together: every group of ranks is a DeepSpeed world of its own, with a category of its own."""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from wads_dist.common.errors import ConfigError
from wads_dist.common.processes import start_time, this_machine
from wads_dist.config.schema import ParallelConfig


@dataclass(frozen=True)
class RankInfo:
    """Where a launched rank runs."""

    node: str
    address: str = "127.0.0.1"
    """Its host, as the other hosts of the launch see it."""
    pid: int = 0
    started: str = ""
    """Start time of the process, which tells it from a later one of its number."""
    machine: str = ""
    """Boot and pid namespace: where they are others, nothing can be said of the process."""

    @classmethod
    def here(cls, address: str) -> "RankInfo":
        """The launcher's number of the node, if it has given one, tells two containers of one name apart."""
        number = os.environ.get("CROSS_RANK") or os.environ.get("GROUP_RANK") or ""
        pid = os.getpid()
        return cls(f"{number}/{socket.gethostname()}", address, pid, start_time(pid) or "", this_machine())

    def is_alive(self) -> bool:
        """False if the process has ended, as far as that can be told from here."""
        return self.machine != this_machine() or start_time(self.pid) == self.started

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankInfo":
        return cls(**json.loads(text))


def form_groups(nodes: Sequence[str], parallel: ParallelConfig, categories: int, batch: int) -> list[tuple[int, ...]]:
    """The groups' ranks. A rank that is in none has nothing to do.

    Args:
        nodes: of every launched rank, in rank order.
        parallel: says how large groups are, or that they are as small as gives every category one.
        categories: of the run, whether done or not, so that a second start of the command forms the same groups.
        batch: the global batch size, which the ranks of a group share, in units of the micro-batch where that is given.

    Raises:
        ConfigError: no group can be so large.
    """
    size = parallel.ranks_per_category or choose_size(nodes, parallel, categories, batch)
    groups = groups_of(nodes, size, parallel.straddle_nodes)
    if not groups:
        largest = max(nodes.count(node) for node in nodes)
        raise ConfigError(
            [
                f"parallel.ranks_per_category: {size}, but no node has more than {largest} of the {len(nodes)} launched ranks; "
                "give no more than that, or --parallel.straddle_nodes true"
                if len(nodes) >= size
                else f"parallel.ranks_per_category: {size}, but {len(nodes)} ranks were launched"
            ]
        )
    return groups


def choose_size(nodes: Sequence[str], parallel: ParallelConfig, categories: int, batch: int) -> int:
    """The largest size that can share the batch and at which every category has a group of its own; 1 if there is none."""

    def suffices(size: int) -> bool:
        groups = groups_of(nodes, size, parallel.straddle_nodes)
        return len(groups) * parallel.categories_per_gpu >= categories

    return max((size for size in range(1, len(nodes) + 1) if batch % size == 0 and suffices(size)), default=1)


def groups_of(nodes: Sequence[str], size: int, straddle: bool) -> list[tuple[int, ...]]:
    """As many groups of ``size`` neighbouring ranks as there can be."""
    pools = [list(range(len(nodes)))]
    if not straddle:
        pools = [[rank for rank, node in enumerate(nodes) if node == name] for name in dict.fromkeys(nodes)]
    return [tuple(pool[i : i + size]) for pool in pools for i in range(0, len(pool) - size + 1, size)]
