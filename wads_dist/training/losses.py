"""The losses of the paper, and their sum."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wads_dist.config.schema import ObjectiveConfig
from wads_dist.kernels.objective import ObjectiveWeights
from wads_dist.training.step_check import StepDecision


@dataclass
class Losses:
    """Sums of detached losses over micro-batches, on the device; read once every ``log_every`` steps."""

    values: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    first: int = 0
    """The step's first sample."""
    decision: StepDecision | None = None
    """What the ranks agreed on; None until they have."""

    def add(self, **terms: Tensor) -> None:
        for name, term in terms.items():
            self.values[name] = self.values.get(name, 0) + term.detach()
        self.count += 1

    def means(self) -> dict[str, float]:
        return {name: (value / self.count).item() for name, value in self.values.items()}


def objective_weights(config: ObjectiveConfig) -> ObjectiveWeights:
    return ObjectiveWeights(
        reconstruction=config.reconstruction.weight,
        ssim=config.reconstruction.ssim,
        l2=config.reconstruction.l2,
        focal=config.focal.weight,
        gamma=config.focal.gamma,
        kl=config.kl.weight,
        rho=config.kl.rho,
        kl_form=config.kl.form,
        kl_direction=config.kl.direction,
    )


def adversarial_loss(form: str, fake: tuple[Tensor, Tensor], real: tuple[Tensor, Tensor]) -> Tensor:
    """L_adv (paper, Eq 3.3).

    Args:
        form: a value of ``objective.adversarial.form``.
        fake, real: feature f [N, C, 4, 4] and logit D [N] of the reconstruction and of the image, which gets no gradient.
    """
    feature, logit = (value.float() for value in fake)
    real_feature, real_logit = (value.detach().float() for value in real)
    if form == "non_saturating":
        return F.binary_cross_entropy_with_logits(logit, torch.ones_like(logit))
    if form == "bce_output":
        return F.binary_cross_entropy_with_logits(logit, torch.sigmoid(real_logit))
    if form == "feature_l2":
        return F.mse_loss(feature, real_feature)
    return F.binary_cross_entropy_with_logits(feature, torch.sigmoid(real_feature))


def discriminator_loss(real_logit: Tensor, fake_logit: Tensor) -> Tensor:
    """L_disc (paper, Eq 3.5): BCE(D(X), 1) + BCE(D(X̂), 0), halved."""
    real, fake = real_logit.float(), fake_logit.float()
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


class WithGradient(torch.autograd.Function):
    """``apply(x, value, gradient, scale)`` is ``value``; its gradient for ``x`` was taken before, times ``scale``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.scale = scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * (upstream / ctx.scale), None, None, None
