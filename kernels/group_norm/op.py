"""GroupNorm and the activation behind it (Wu & He 2018), over images whose channels lie next to each other (channels_last).

    y = act((x − mean) / sqrt(var + ε) · weight + bias),  mean and biased variance over a group of channels of one image

torch's own kernel on a GPU returns NCHW whatever it is given, and autocast runs it, and what follows it up to the next
convolution, in fp32: every convolution behind it then leaves the fast layout. The Triton form (``triton.py``) keeps
layout and type, both ways, and fuses the activation. Statistics are fp32 in either form.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Backend


def group_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float | None, backend: Backend = "auto"
) -> Tensor:
    """GroupNorm, and leaky ReLU of ``slope`` (0: ReLU; None: no activation).

    Args:
        x: [N, C, H, W], of a floating type; C a multiple of ``groups``.
        weight, bias: [C] of one type, float32 where x has half precision.
        backend: ``triton`` on a GPU by default; ``torch`` elsewhere (there is no C++ form: ``native`` is ``torch``).

    Returns:
        [N, C, H, W] of x's type; channels_last from ``triton``, x's or NCHW from ``torch``.

    Raises:
        ValueError: C is no multiple of ``groups``.
    """
    if x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels cannot be put into {groups} groups")
    if torch.compiler.is_compiling():  # a compiler fuses the reference by itself, in any layout
        return reference(x, weight, bias, groups, eps, slope)
    if backend == "triton" or (backend == "auto" and x.device.type != "cpu"):
        return _GroupNormAct.apply(x, weight, bias, groups, eps, slope)
    return reference(x, weight, bias, groups, eps, slope)


def reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float | None) -> Tensor:
    """The definition, in torch's operators."""
    if x.device.type == "cpu":
        y = F.group_norm(x, groups, weight, bias, eps)
    else:
        with torch.autocast(x.device.type, enabled=False):  # it would widen x
            y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if slope is None:
        return y
    return F.leaky_relu_(y, slope) if slope else F.relu_(y)


class _GroupNormAct(torch.autograd.Function):
    """Past the dispatcher, as ``objective.op``. Keeps x and two numbers a group; makes the activation's sign again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float | None
    ) -> Tensor:
        from . import triton

        x = x.contiguous(memory_format=torch.channels_last)
        y, statistics = triton.forward(x, weight, bias, groups, eps, slope)
        ctx.groups, ctx.slope = groups, slope
        ctx.save_for_backward(x, weight, bias, statistics)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from . import triton

        x, weight, bias, statistics = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = triton.backward(dy, x, weight, bias, statistics, ctx.groups, ctx.slope)
        return dx, dweight, dbias, None, None, None
