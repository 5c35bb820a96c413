"""What the networks are made of. Every layer keeps its input's type and channels_last, forward and backward: on a GPU one that
does not makes everything behind it slow. On a CPU each is torch's own."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import FeaturePyramidNetwork

from wads_dist.kernels.backend import Backend
from wads_dist.kernels.group_norm import group_norm_act


class GroupNorm(nn.GroupNorm):
    """GroupNorm of at most 32 groups of at least 4 channels, and the leaky ReLU of ``slope`` behind it (0: ReLU; None: none).
    Unlike BatchNorm's, its result does not depend on how a batch is split over ranks."""

    def __init__(self, channels: int, slope: float | None = None) -> None:
        super().__init__(math.gcd(32, channels // 4), channels)
        self.slope = slope
        self.backend: Backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_act(x, self.weight, self.bias, self.num_groups, self.eps, self.slope, self.backend)


def use_kernels(module: nn.Module, backend: Backend) -> None:
    """Which implementation of GroupNorm ``module`` uses (``trainer.kernels``)."""
    for part in module.modules():
        if isinstance(part, GroupNorm):
            part.backend = backend


@torch.no_grad()
def bilinear_init_(up: nn.ConvTranspose2d) -> None:
    """Every 4×4 kernel is bilinear upsampling (as in FCN, Long et al. 2015) times one Gaussian weight per channel pair.

    Independent taps make a decoder that starts from checkerboards and spends its first thousands of samples learning to be
    smooth, which SSIM on a flat background punishes most; 3,000 samples of this one are worth more than 8,000 of that.
    """
    tent = torch.tensor([0.25, 0.75, 0.75, 0.25])
    kernel = torch.outer(tent, tent)
    # Each output sees 2×2 taps of every input channel: with the kernel's mean square at 1, its variance is the input's.
    kernel = kernel / kernel.square().mean().sqrt()
    pair = torch.randn(*up.weight.shape[:2], 1, 1) / math.sqrt(4 * up.in_channels)
    up.weight.copy_(pair * kernel)


class Up(nn.ConvTranspose2d):
    """Doubles the side, by a 4×4 kernel. Each output sees 2×2 inputs; those beyond the edge are zeros, which leave a frame on
    every reconstruction, or (``padding`` "replicate") continue the map."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool, padding: str) -> None:
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1, bias=bias)
        self.replicate = padding == "replicate"

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not self.replicate:
            return super().forward(x, output_size)
        # One input more on either side is two outputs more, which are cut off again.
        return F.conv_transpose2d(replicate(x, 1), self.weight, self.bias, stride=2, padding=3)


class ReplicateConv2d(nn.Conv2d):
    """A square convolution that continues its input beyond the edge by repeating it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(replicate(x, int(self.padding[0])), self.weight, self.bias, self.stride)


def set_padding(module: nn.Module, mode: str) -> None:
    """How the convolutions within ``module`` continue their input beyond its edge ("zeros", "replicate"). Weights stay."""
    if mode == "zeros":
        return
    for parent in list(module.modules()):
        for name, conv in parent.named_children():
            if type(conv) is nn.Conv2d and conv.padding != (0, 0):
                inputs, outputs, side = conv.in_channels, conv.out_channels, conv.kernel_size[0]
                stride, padding, bias = conv.stride[0], int(conv.padding[0]), conv.bias is not None
                new = ReplicateConv2d(
                    inputs, outputs, side, stride, padding, bias=bias, padding_mode="replicate", device="meta"
                )
                new.weight, new.bias = conv.weight, conv.bias
                setattr(parent, name, new)


class Pyramid(FeaturePyramidNetwork):
    """torchvision's feature pyramid, which autocast would upsample in fp32."""

    def levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's maps, the largest first -> as many, all of one width."""
        x, found = self.inner_blocks[-1](maps[-1]), []
        found.append(self.layer_blocks[-1](x))
        for i in reversed(range(len(maps) - 1)):
            lateral = self.inner_blocks[i](maps[i])
            x = lateral + upsample(x, lateral, "nearest")
            found.append(self.layer_blocks[i](x))
        return found[::-1]


def upsample(x: Tensor, like: Tensor, mode: Literal["nearest", "bilinear"] = "bilinear") -> Tensor:
    """x [N, C, h, w] at the size of ``like``."""
    size = tuple(like.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):  # it would do this in fp32 on a GPU
        if mode == "bilinear" and x.device.type != "cpu":
            return Bilinear.apply(x, size)
        return F.interpolate(x, size, mode=mode, align_corners=False if mode == "bilinear" else None)


class Bilinear(torch.autograd.Function):
    """Bilinear upsampling whose gradient is two products of matrices: torch's own on a GPU adds up by atomics, in an order that
    changes from run to run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.sides = x.shape[-2:]
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (height, width), (n, channels, rows, columns) = ctx.sides, gradient.shape
        g = gradient.permute(0, 2, 3, 1).contiguous()
        matrix = interpolation if torch.compiler.is_compiling() else kept_interpolation
        of_rows, of_columns = (matrix(*sides, g.dtype, g.device).T for sides in ((height, rows), (width, columns)))
        g = torch.matmul(of_rows, g.view(n, rows, columns * channels))
        g = torch.matmul(of_columns, g.view(n * height, columns, channels))
        return g.view(n, height, width, channels).permute(0, 3, 1, 2), None


def interpolation(few: int, many: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[many, few]: what each of ``many`` values takes of each of ``few``, by bilinear interpolation."""
    places = torch.arange(few, dtype=torch.float64, device=device)
    source = (torch.arange(many, dtype=torch.float64, device=device) + 0.5) * few / many - 0.5
    return (1 - (source.clamp(0, few - 1)[:, None] - places).abs()).clamp_min(0).to(dtype)


kept_interpolation = lru_cache(interpolation)


def replicate(x: Tensor, width: int) -> Tensor:
    """x [N, C, H, W] with ``width`` pixels more on each side, which repeat its edge."""
    if x.device.type == "cpu":
        return F.pad(x, (width,) * 4, mode="replicate")
    return Replicate.apply(x, width)


class Replicate(torch.autograd.Function):
    """torch's own on a GPU returns NCHW, and its gradient adds up by atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int) -> Tensor:
        ctx.width = width
        for dim in (2, 3):
            first, last = x.narrow(dim, 0, 1), x.narrow(dim, -1, 1)
            x = torch.cat([first] * width + [x] + [last] * width, dim)
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        width = ctx.width
        for dim in (3, 2):
            side = gradient.shape[dim] - 2 * width
            inner = gradient.narrow(dim, width, side).clone(memory_format=torch.channels_last)
            inner.narrow(dim, 0, 1).add_(gradient.narrow(dim, 0, width).sum(dim, keepdim=True))
            inner.narrow(dim, side - 1, 1).add_(gradient.narrow(dim, side + width, width).sum(dim, keepdim=True))
            gradient = inner
        return gradient, None
