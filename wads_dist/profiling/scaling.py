"""The scaling model: seconds of a step, of a category and of a queue of categories on any number of ranks.

Arithmetic only; docs/scaling.md has the terms, where their numbers come from, and how far they were checked, and
``benchmarks/scaling.py`` measures what it can here and prints the predictions. Bytes, seconds, bytes a second.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wads_dist.training.step_check import Report

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
PASSES: dict[Kind, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}
"""Times that a ring moves (n-1)/n of the tensor past each rank."""

FLOAT = 4
AGREEMENT = 8 * len(Report._fields)
"""Bytes a rank adds to the table by which all agree on a step."""
RANK_STATE = 32_000
"""Bytes of random state in each rank's file of a checkpoint, as torch.save writes it on a CPU."""


@dataclass(frozen=True)
class Networks:
    """Elements of every parameter tensor of each of the two engines' modules, and bytes of their buffers."""

    generator_segmenter: tuple[int, ...]
    discriminator: tuple[int, ...]
    buffers: int = 0

    @property
    def parameters(self) -> int:
        return sum(self.generator_segmenter) + sum(self.discriminator)


@dataclass(frozen=True)
class Collective:
    """``count`` collectives over ``size`` bytes each: of the whole tensor, not of one rank's part."""

    kind: Kind
    size: float
    count: int = 1


def step_collectives(
    networks: Networks, stage: int, ranks: int, bucket: int = 30_000_000, persistent: int = 100_000
) -> list[Collective]:
    """What one optimiser step of both engines sends at a ZeRO stage, without accumulation; nothing on one rank.

    ZeRO 1 and 2 reduce whole gradients on every rank (DeepSpeed's ``use_multi_rank_bucket_allreduce``, on by default) and
    gather the weights after the step, so they send half as much again as ZeRO-0, not the same. ZeRO-3 keeps what it gathers
    of generator and segmenter from forward to backward; the discriminator's large tensors it gathers for each of two forward
    passes, L_adv's gradient and the backward, the first time with all others, which come once more, module by module.

    Args:
        bucket: elements DeepSpeed reduces together (``reduce_bucket_size``).
        persistent: ZeRO-3 gathers tensors of up to so many elements one by one after the step.
    """
    if ranks == 1:
        return []

    def padded(tensors: Sequence[int], to: int = ranks) -> int:
        return FLOAT * sum(math.ceil(n / to) * to for n in tensors)

    calls = [Collective("all_reduce", AGREEMENT * ranks)]
    for tensors, is_discriminator in ((networks.generator_segmenter, False), (networks.discriminator, True)):
        elements = sum(tensors)
        buckets = math.ceil(elements / bucket)
        if stage == 0:  # in one piece up to 500 M elements, whatever the bucket
            calls.append(Collective("all_reduce", FLOAT * elements))
        elif stage < 3:
            calls.append(Collective("all_reduce", FLOAT * elements / buckets, buckets))
            calls.append(Collective("all_gather", padded([elements], 2 * ranks)))
        else:
            small, large = [n for n in tensors if n <= persistent], [n for n in tensors if n > persistent]
            calls.append(Collective("reduce_scatter", padded(tensors) / buckets, buckets))
            calls += [Collective("all_gather", padded([n])) for n in small]  # after the step, one by one
            if large and not is_discriminator:
                calls.append(Collective("all_gather", padded(large)))
            if is_discriminator:
                calls.append(Collective("all_gather", padded(tensors)))
                calls += [Collective("all_gather", padded([n]), 3) for n in large]
                modules = math.ceil(len(small) / 2)  # a weight and a bias together
                calls.append(Collective("all_gather", padded(small) / modules, modules))
            calls.append(Collective("all_reduce", 8))  # the gradients' norm
            calls.append(Collective("broadcast", 100, 4))  # whether all ranks use the modules in one order
    return calls


def sent_bytes(call: Collective, ranks: int, gloo: bool = False) -> float:
    """Bytes that each rank sends, on average. Gloo's reduce-scatter is an all-reduce of which each rank keeps its part."""
    passes = 2 if gloo and call.kind == "reduce_scatter" else PASSES[call.kind]
    return call.count * passes * (ranks - 1) / ranks * call.size


@dataclass(frozen=True)
class Protocol:
    """How a library moves a message: seconds to start, seconds a hop (within a node, between nodes) of a ring and of a tree,
    and the part of the link's bandwidth that is left for the message."""

    start: float
    ring: tuple[float, float]
    tree: tuple[float, float] | None = None
    share: float = 1.0


# The constants by which NCCL itself predicts (src/graph/tuning.cc, ncclTunerConstantsDefaults: NVLink and network).
NCCL = (
    Protocol(6.6e-6, (0.6e-6, 2.7e-6), (0.6e-6, 5.0e-6), 0.25),  # LL
    Protocol(14.0e-6, (1.9e-6, 4.0e-6), (1.25e-6, 8.5e-6), 0.92),  # LL128
    Protocol(8.4e-6, (3.4e-6, 14.0e-6), (4.0e-6, 14.0e-6)),  # Simple
)
TREE_SHARE = 0.92


@dataclass(frozen=True)
class Network:
    """Ranks in nodes of ``per_node``: ``link`` is what a rank can send within its node, ``nic`` its share of the node's
    network cards, both one way and as reached, not as printed on the box."""

    per_node: int
    link: float
    nic: float
    protocols: tuple[Protocol, ...] = NCCL

    @classmethod
    def flat(cls, latency: float, bandwidth: float) -> "Network":
        """All ranks alike: a ring's hop takes ``latency``."""
        return cls(2**30, bandwidth, bandwidth, (Protocol(0.0, (latency, latency)),))

    def nodes(self, ranks: int) -> int:
        return math.ceil(ranks / self.per_node)

    def seconds(self, call: Collective, ranks: int) -> float:
        """The fastest of the protocols, as a ring or (all-reduce only) a tree."""
        if ranks == 1:
            return 0.0
        nodes, local, passes = self.nodes(ranks), min(ranks, self.per_node), PASSES[call.kind]
        # A ring crosses into each node once and can use all its cards for that.
        bandwidth = self.link if nodes == 1 else min(self.link, local * self.nic)
        times = []
        for p in self.protocols:
            hops = passes * ((ranks - nodes) * p.ring[0] + (nodes - 1) * p.ring[1])
            times.append(p.start + hops + passes * (ranks - 1) / ranks * call.size / (bandwidth * p.share))
            if p.tree and call.kind == "all_reduce":
                hops = 2 * ((local - 1) * p.tree[0] + math.log2(nodes) * p.tree[1])
                times.append(p.start + hops + 2 * call.size / (bandwidth * p.share * TREE_SHARE))
        return call.count * min(times)


@dataclass(frozen=True)
class Compute:
    """A rank's own work in a step: ``step`` + samples · ``sample``, but never less than ``host``, the time that Python and
    the driver take to launch it all (the step's agreement waits for the device, so steps cannot hide it from each other)."""

    sample: float
    step: float = 0.0
    host: float = 0.0

    def seconds(self, samples: float) -> float:
        return max(self.host, self.step + samples * self.sample)


@dataclass(frozen=True)
class Storage:
    """The file system that all ranks share: ``writer`` is one rank's rate (serialise, hash, write, sync), ``total`` all
    ranks' together, ``files`` how many a second it creates and syncs."""

    writer: float
    total: float
    files: float


def checkpoint_bytes(networks: Networks, stage: int, ranks: int) -> float:
    """Weights and Adam's moments; ZeRO 1 and 2 also keep the optimiser's own copy of the weights."""
    each = 16 if stage in (1, 2) else 12
    return each * networks.parameters + (ranks + 1) * networks.buffers + ranks * RANK_STATE


@dataclass(frozen=True)
class Model:
    """Everything that the time of a category depends on, but the number of ranks and the batch."""

    networks: Networks
    stage: int
    compute: Compute
    network: Network
    storage: Storage
    bucket: int = 30_000_000
    start_up: float = 0.0
    """Seconds from starting a category's processes to the first step, reading apart."""
    evaluation: float = 0.0
    data: float = 0.0
    """Bytes of the category's images, which every node reads."""
    save_every: float = math.inf
    """Seconds between two checkpoints."""

    def communication(self, ranks: int) -> float:
        """Nothing of it overlaps with computing (``overlap_comm`` is off)."""
        calls = step_collectives(self.networks, self.stage, ranks, self.bucket)
        return sum(self.network.seconds(call, ranks) for call in calls)

    def step(self, ranks: int, batch: float) -> float:
        """Seconds of one step of ``batch`` samples over all ranks."""
        return self.compute.seconds(batch / ranks) + self.communication(ranks)

    def save(self, ranks: int, worlds: int = 1) -> float:
        """Seconds of one checkpoint, when ``worlds`` groups of ranks save at the same moment."""
        total = checkpoint_bytes(self.networks, self.stage, ranks)
        own, parts = FLOAT * self.networks.parameters, ranks
        first = {0: 3 * own, 3: 3 * own / parts}.get(self.stage, own + 3 * own / parts)
        files = ranks * (1, 3, 3, 5)[self.stage] + (2 if self.stage < 3 else 0) + 2
        return (
            max(first / self.storage.writer, worlds * total / self.storage.total) + worlds * files / self.storage.files
        )

    def category(self, ranks: int, batch: int, samples: float, worlds: int = 1) -> float:
        """Seconds from starting a category to its metrics, while ``worlds`` groups do the same."""
        reading = worlds * self.network.nodes(ranks) * self.data / self.storage.total
        training = samples / batch * self.step(ranks, batch)
        saves = training / self.save_every + 1
        return self.start_up + reading + training + saves * self.save(ranks, worlds) + self.evaluation


def queue_seconds(durations: list[float], groups: int) -> float:
    """When the last of the categories ends that ``groups`` take from a queue, longest first."""
    free = [0.0] * groups
    for duration in sorted(durations, reverse=True):
        heapq.heapreplace(free, free[0] + duration)
    return max(free)
