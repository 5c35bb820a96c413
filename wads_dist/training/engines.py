"""Two DeepSpeed engines that step together or not at all.

Generator and segmenter share one engine, the discriminator has the other. Autocast and the loss scale are ours rather than each
engine's own, because a rejected step must be rejected in both: DeepSpeed keeps one scaler an engine and looks for overflow only
inside ``step()``, too late to agree.
Parameters, gradients and optimiser state are therefore fp32 to DeepSpeed, at ZeRO 0 to 3 alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor, nn

from wads_dist.common.errors import ResumeError

ENGINES, TAG = ("generator-segmenter", "discriminator"), "state"
"""Folders of the engines' state in a checkpoint, and DeepSpeed's name for what is in them."""


@dataclass
class LossScale:
    """Dynamic loss scale for fp16 (Micikevicius et al. 2018): halved on overflow, doubled after ``interval`` good steps."""

    scale: float = 1.0
    dynamic: bool = False
    interval: int = 1000
    good_steps: int = 0

    @classmethod
    def for_precision(cls, precision: str) -> "LossScale":
        return cls(scale=2.0**16, dynamic=True) if precision == "fp16" else cls()

    def update(self, finite: bool) -> None:
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps % self.interval == 0:
            self.scale *= 2

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])


def initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> DeepSpeedEngine:
    """A DeepSpeed engine around ``module`` that prints nothing about itself."""
    deepspeed.utils.logger.setLevel("WARNING")
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    if engine.zero_optimization_stage() == 0 and engine.world_size == 1:
        # There is nobody to average gradients with, and DeepSpeed would copy them all into one buffer and back.
        engine.enable_backward_allreduce = False
    return engine


def adam(module: nn.Module, learning_rate: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """Adam as a torch object: an Adam named in DeepSpeed's JSON means FusedAdam and a compiler at start-up."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.Adam(trainable, lr=learning_rate, betas=betas, fused=True)


def gradients(engine: DeepSpeedEngine) -> list[Tensor]:
    """The fp32 gradients this rank would step with: whole at ZeRO-0, its partition at ZeRO 1 to 3."""
    if engine.zero_optimization_stage() == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    groups = engine.optimizer.averaged_gradients.values()
    return [g for group in groups if group is not None for g in group if g is not None]


def finite(tensors: list[Tensor]) -> Tensor:
    """Bool scalar: no NaN or infinity in any of them, without a host synchronisation."""
    return torch.isfinite(torch.nn.utils.get_total_norm(tensors))


def copy_all(to: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Copies each into its counterpart, in a launch a type instead of one a tensor."""
    for dtype in {t.dtype for t in tensors}:
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        torch._foreach_copy_([to[i] for i in chosen], [tensors[i] for i in chosen])
    return to


def discard(engine: DeepSpeedEngine) -> None:
    """Forget the gradients of this step, as if its batch had never been seen (``engine.zero_grad`` leaves ZeRO's buffers)."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        engine.zero_grad()
    elif stage == 3:
        optimizer._overflow_clean_up(1.0)
    else:
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for group in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID  # as its step() would have restored
    engine.micro_steps += 1


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def local_parameters(module: nn.Module) -> list[Tensor]:
    """The parameter data this rank holds: partitions under ZeRO-3, whole tensors otherwise."""
    return [p.ds_tensor.data if hasattr(p, "ds_tensor") else p.data for p in module.parameters()]


def release_gathered(module: nn.Module) -> None:
    """ZeRO-3 keeps small parameters gathered between steps; without this, a later gather would not look at the partitions."""
    sharded = [p for p in module.parameters() if hasattr(p, "ds_tensor")]
    if sharded:
        sharded[0].partition(sharded, has_been_updated=False)  # type: ignore[attr-defined]


class ParameterAverage:
    """Exponential moving average of the weights, kept on what each rank holds, so that it works at every ZeRO stage."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = [p.clone() for p in local_parameters(module)]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After step ``step`` (from 1); the decay warms up so that a short run is not averaged with its start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, local_parameters(module), 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The module holds the averaged weights inside."""
        own = [p.clone() for p in local_parameters(module)]
        release_gathered(module)
        torch._foreach_copy_(local_parameters(module), self.shadow)
        try:
            yield
        finally:
            release_gathered(module)
            torch._foreach_copy_(local_parameters(module), own)


def full_state(engine: DeepSpeedEngine, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole fp32 weights of the module on the CPU with the given buffers in place of its own. Collective at ZeRO-3."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        state = {name: p.detach().cpu().clone().contiguous() for name, p in engine.module.named_parameters()}
    state.update({name: value.cpu().contiguous() for name, value in buffers.items()})
    return state


def load_engines(both: Sequence[DeepSpeedEngine], folder: Path) -> None:
    """DeepSpeed's state of both engines from ``folder``.

    Raises:
        ResumeError: DeepSpeed does not take it.
    """
    for name, engine in zip(ENGINES, both, strict=True):
        loaded, _ = engine.load_checkpoint(str(folder / name), tag=TAG)
        if loaded is None:
            raise ResumeError(f"{folder / name} could not be loaded by DeepSpeed {version('deepspeed')}")


def load_rank(checkpoint: Path, rank: int) -> dict[str, Any]:
    """A rank's ``rank_state``; its hash has been found right."""
    return torch.load(checkpoint / f"rank-{rank:05d}.pt", map_location="cpu", weights_only=False)
