"""Fewer launches for the same step: networks compiled by torch.compile, and all but the update as one CUDA graph.

Both are off by default. A compiled network rounds differently; a graph repeats the very kernels that were captured.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch._functorch.config
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from wads_dist.common.errors import ConfigError
from wads_dist.training.engines import copy_all

WARM_UP = 3
"""Runs before the capture: kernels are compiled and chosen in them, and memory is taken."""

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a body that reads and writes fixed tensors; returns what runs it again."""


class Networks(Protocol):
    """What of a trainer a graph needs."""

    def micro_batch(self, ids: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]: ...
    def parameters(self) -> list[Tensor]: ...
    def buffers(self) -> list[Tensor]: ...


def compile_networks(engines: Sequence[DeepSpeedEngine], mode: str, backend: str = "inductor") -> None:
    """Has each engine's network compile itself at its first pass, as a whole (a break in the graph is an error).

    Only ``forward`` is compiled: ``engine.compile`` takes DeepSpeed's hooks along, which not every torch can trace. The
    discriminator's compiled backward takes gradients of its weights for L_adv as well, where the eager one stops at X̂.

    Raises:
        ConfigError: at ZeRO-3, whose hooks gather weights between the layers, or where the CUDA graphs of several micro-batches
            would overwrite each other's gradients.
    """
    why = f"trainer.compile {mode}:"
    for engine in engines:
        if engine.zero_optimization_stage() == 3:
            raise ConfigError([f"{why} works at the ZeRO stages 0 to 2; take such a file for trainer.deepspeed"])
        if mode != "default" and engine.gradient_accumulation_steps() > 1:
            raise ConfigError(
                [f"{why} a step must be one micro-batch; take default, or leave trainer.micro_batch_size out"]
            )
    torch._functorch.config.donated_buffer = False  # the discriminator's graph serves two backward passes
    for network in (engine.module for engine in engines):
        network.forward = torch.compile(network.forward, backend=backend, mode=mode, fullgraph=True, dynamic=False)


def why_no_graph(wanted: bool, device_type: str, world_size: int, stage: int) -> str | None:
    """None if a step can be a CUDA graph; else what stands against it."""
    if not wanted:
        return "trainer.cuda_graph is off"
    if device_type != "cuda":
        return "there is no GPU"
    if world_size > 1:
        return f"{world_size} ranks train together, and what they exchange cannot be captured"
    if stage:
        return f"it trains at ZeRO-{stage}, which moves gradients itself"
    return None


def cuda_recorder(body: Callable[[], None]) -> Callable[[], None]:
    """Captures ``body``, on a stream of its own as torch asks for, after ``WARM_UP`` runs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


class StepGraph:
    """Synthesis, passes and gradients of a micro-batch, recorded once and run again on other sample ids.

    Everything that changes from step to step is in tensors that stay where they are: the ids, the weights, BatchNorm's buffers.
    The seed is the run's, the learning rate the optimiser's, and the decision is read after the last run of a step.
    """

    def __init__(
        self, networks: Networks, micro_batch_size: int, device: torch.device, record: Recorder = cuda_recorder
    ):
        self.networks, self.record = networks, record
        self.ids = torch.zeros(micro_batch_size, dtype=torch.int64, device=device)
        self.gradients = [torch.zeros_like(p) for p in networks.parameters()]
        self.losses: dict[str, Tensor] = {}
        self.run: Callable[[], None] | None = None

    def begin(self) -> None:
        """Before a step: the parameters' gradients are those that the graph adds to, and zero."""
        torch._foreach_zero_(self.gradients)
        for parameter, gradient in zip(self.networks.parameters(), self.gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, ids: Tensor) -> dict[str, Tensor]:
        """Adds the micro-batch's gradients to the parameters'; returns its losses, which the next call overwrites."""
        self.ids.copy_(ids)
        if self.run is None:
            buffers = self.networks.buffers()
            before = copy_all([torch.empty_like(b) for b in buffers], buffers)
            self.run = self.record(self._body)
            copy_all(buffers, before)  # the runs before the capture have moved them
            torch._foreach_zero_(self.gradients)
        self.run()
        return self.losses

    def _body(self) -> None:
        self.losses, gradients = self.networks.micro_batch(self.ids)
        torch._foreach_add_(self.gradients, gradients)
