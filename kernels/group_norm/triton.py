"""``group_norm.py`` in Triton: two passes over x forward, two over x and dL/dy backward.

    forward   1  partial sums of x − x₀ and its square, a channel and a chunk of pixels (x₀: the channel's first pixel, which
                 keeps the variance's digits where a mean is large)
              2  mean and 1/deviation of each group, from the partial sums in a fixed order
              3  y
    backward  4  partial sums of g and g · x̂, a channel and a chunk; g is dL/dy behind the activation, whose sign is made again
              5  a group's two means, an image's two sums a channel
              6  dL/dx

Bytes an element: 6 forward and 10 backward in bf16; twice that in fp32. No atomics: results do not depend on the order in which
programs run. Nothing here was measured on a GPU.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiled import KernelSpec

TILE = 4096
"""Elements that a program holds at a time."""
TILES = 4
"""Tiles a program reduces, one after the other, in launches 1 and 4."""


@triton.jit
def _tile(first, pixels, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets [ROWS, CHANNELS] of the pixels from ``first`` within an image, which of them there are, and the channels."""
    row, channel = first + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    inside = (row < pixels)[:, None] & (channel < channels)[None, :]
    return row[:, None] * channels + channel[None, :], inside, channel


@triton.jit
def _affine(statistics, weight, bias, image, channel, channels, groups):
    """mean, 1/deviation, weight and bias of every channel."""
    there = channel < channels
    group = (image * groups + channel // (channels // groups)) * 2
    mean = tl.load(statistics + group, mask=there, other=0.0)
    inverse = tl.load(statistics + group + 1, mask=there, other=0.0)
    w = tl.load(weight + channel, mask=there, other=0.0).to(mean.dtype)
    b = tl.load(bias + channel, mask=there, other=0.0).to(mean.dtype)
    return mean, inverse, w, b


@triton.jit
def group_norm_sums_kernel(
    x, partials, pixels, channels, chunks,
    REAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Launch 1. x: [N, pixels, channels]. partials: [N, chunks, 2, channels], the sums of x − x₀ and of its square."""
    image, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x += image * pixels * channels
    channel = tl.arange(0, CHANNELS)
    there = channel < channels
    origin = tl.load(x + channel, mask=there, other=0.0).to(REAL)
    sums, squares = tl.zeros([CHANNELS], REAL), tl.zeros([CHANNELS], REAL)
    for turn in range(TILES):
        at, inside, _ = _tile((chunk * TILES + turn) * ROWS, pixels, channels, ROWS, CHANNELS)
        shifted = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(REAL) - origin[None, :], 0.0)
        sums += tl.sum(shifted, 0)
        squares += tl.sum(shifted * shifted, 0)
    partials += (image * chunks + chunk) * 2 * channels
    tl.store(partials + channel, sums, mask=there)
    tl.store(partials + channels + channel, squares, mask=there)


@triton.jit
def group_norm_statistics_kernel(
    x, partials, statistics, pixels, channels, chunks, groups, eps, REAL: tl.constexpr, MEMBERS: tl.constexpr
):
    """Launch 2: a program a group of an image. statistics: [N, groups, 2], the mean and 1/sqrt(variance + ε)."""
    program = tl.program_id(0)
    image, group = (program // groups).to(tl.int64), program % groups
    members = channels // groups
    member = tl.arange(0, MEMBERS)
    there = member < members
    channel = group * members + member
    sums, squares = tl.zeros([MEMBERS], REAL), tl.zeros([MEMBERS], REAL)
    partials += image * chunks * 2 * channels
    for chunk in range(chunks):
        sums += tl.load(partials + chunk * 2 * channels + channel, mask=there, other=0.0)
        squares += tl.load(partials + (chunk * 2 + 1) * channels + channel, mask=there, other=0.0)
    origin = tl.load(x + image * pixels * channels + channel, mask=there, other=0.0).to(REAL)
    # Chan's rule: what varies within the channels, and what varies between their means.
    of_channel = tl.where(there, origin + sums / pixels, 0.0)
    mean = tl.sum(of_channel, 0) / members
    between = tl.where(there, of_channel - mean, 0.0)
    variance = (tl.sum(squares - sums * sums / pixels, 0) / pixels + tl.sum(between * between, 0)) / members
    tl.store(statistics + program * 2, mean)
    tl.store(statistics + program * 2 + 1, 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + tl.cast(eps, REAL)))


@triton.jit
def group_norm_apply_kernel(
    x, weight, bias, statistics, y, pixels, channels, groups, slope,
    ACTIVATION: tl.constexpr, REAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Launch 3. y: as x."""
    image = tl.program_id(0).to(tl.int64)
    at, inside, channel = _tile(tl.program_id(1) * ROWS, pixels, channels, ROWS, CHANNELS)
    at += image * pixels * channels
    mean, inverse, w, b = _affine(statistics, weight, bias, image, channel, channels, groups)
    value = (tl.load(x + at, mask=inside, other=0.0).to(REAL) - mean[None, :]) * (inverse * w)[None, :] + b[None, :]
    if ACTIVATION:
        value = tl.where(value > 0, value, value * tl.cast(slope, REAL))
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _behind(dy, x, at, inside, mean, inverse, w, b, slope, ACTIVATION: tl.constexpr, REAL: tl.constexpr):
    """g = dL/dy behind the activation, and x̂; zero where there is no pixel."""
    normal = tl.where(
        inside, (tl.load(x + at, mask=inside, other=0.0).to(REAL) - mean[None, :]) * inverse[None, :], 0.0
    )
    g = tl.load(dy + at, mask=inside, other=0.0).to(REAL)
    if ACTIVATION:
        g = tl.where(normal * w[None, :] + b[None, :] > 0, g, g * tl.cast(slope, REAL))
    return g, normal


@triton.jit
def group_norm_slopes_kernel(
    dy, x, weight, bias, statistics, partials, pixels, channels, chunks, groups, slope,
    ACTIVATION: tl.constexpr, REAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Launch 4. partials: [N, chunks, 2, channels], the sums of g and of g · x̂."""
    image, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dy, x = dy + image * pixels * channels, x + image * pixels * channels
    channel = tl.arange(0, CHANNELS)
    there = channel < channels
    mean, inverse, w, b = _affine(statistics, weight, bias, image, channel, channels, groups)
    sums, products = tl.zeros([CHANNELS], REAL), tl.zeros([CHANNELS], REAL)
    for turn in range(TILES):
        at, inside, _ = _tile((chunk * TILES + turn) * ROWS, pixels, channels, ROWS, CHANNELS)
        g, normal = _behind(dy, x, at, inside, mean, inverse, w, b, slope, ACTIVATION, REAL)
        sums += tl.sum(g, 0)
        products += tl.sum(g * normal, 0)
    partials += (image * chunks + chunk) * 2 * channels
    tl.store(partials + channel, sums, mask=there)
    tl.store(partials + channels + channel, products, mask=there)


@triton.jit
def group_norm_means_kernel(
    partials, weight, means, of_channel, pixels, channels, chunks, groups, REAL: tl.constexpr, MEMBERS: tl.constexpr
):
    """Launch 5: a program a group of an image. means: [N, groups, 2], of weight · g and weight · g · x̂; of_channel:
    [N, 2, channels], the sums of g and g · x̂."""
    program = tl.program_id(0)
    image, group = (program // groups).to(tl.int64), program % groups
    members = channels // groups
    member = tl.arange(0, MEMBERS)
    there = member < members
    channel = group * members + member
    sums, products = tl.zeros([MEMBERS], REAL), tl.zeros([MEMBERS], REAL)
    partials += image * chunks * 2 * channels
    for chunk in range(chunks):
        sums += tl.load(partials + chunk * 2 * channels + channel, mask=there, other=0.0)
        products += tl.load(partials + (chunk * 2 + 1) * channels + channel, mask=there, other=0.0)
    of_channel += image * 2 * channels
    tl.store(of_channel + channel, sums, mask=there)
    tl.store(of_channel + channels + channel, products, mask=there)
    w = tl.load(weight + channel, mask=there, other=0.0).to(REAL)
    tl.store(means + program * 2, tl.sum(w * sums, 0) / pixels / members)
    tl.store(means + program * 2 + 1, tl.sum(w * products, 0) / pixels / members)


@triton.jit
def group_norm_backward_kernel(
    dy, x, weight, bias, statistics, means, dx, pixels, channels, groups, slope,
    ACTIVATION: tl.constexpr, REAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Launch 6: dL/dx = (weight · g − mean(weight · g) − x̂ · mean(weight · g · x̂)) / deviation."""
    image = tl.program_id(0).to(tl.int64)
    at, inside, channel = _tile(tl.program_id(1) * ROWS, pixels, channels, ROWS, CHANNELS)
    at += image * pixels * channels
    mean, inverse, w, b = _affine(statistics, weight, bias, image, channel, channels, groups)
    g, normal = _behind(dy, x, at, inside, mean, inverse, w, b, slope, ACTIVATION, REAL)
    of_g, of_product, _, _ = _affine(means, weight, bias, image, channel, channels, groups)
    value = (g * w[None, :] - of_g[None, :] - normal * of_product[None, :]) * inverse[None, :]
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)


# --- launchers -------------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
SMALL: dict[str, Any] = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


def _blocks(channels: int) -> dict[str, int]:
    width = triton.next_power_of_2(channels)
    return {"ROWS": max(1, TILE // width), "CHANNELS": width}


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float | None
) -> tuple[Tensor, Tensor]:
    """Launches 1 to 3.

    Args:
        x: [N, C, H, W], channels_last.
        weight, bias: [C].

    Returns:
        y as x; statistics [N, groups, 2] (mean, 1/deviation) in float32, float64 if x is.
    """
    images, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    real, blocks = _real(x.dtype), _blocks(channels)
    chunks = math.ceil(pixels / (blocks["ROWS"] * TILES))
    partials = torch.empty(images, chunks, 2, channels, dtype=real, device=x.device)
    statistics = torch.empty(images, groups, 2, dtype=real, device=x.device)
    y, types = torch.empty_like(x), {"REAL": _TRITON[real]}
    members = triton.next_power_of_2(channels // groups)
    with _on(x.device):
        group_norm_sums_kernel[(images, chunks)](
            x, partials, pixels, channels, chunks, TILES=TILES, **blocks, **types, **OPTIONS
        )
        group_norm_statistics_kernel[(images * groups,)](
            x, partials, statistics, pixels, channels, chunks, groups, eps, MEMBERS=members, **types, **SMALL
        )
        group_norm_apply_kernel[(images, math.ceil(pixels / blocks["ROWS"]))](
            x, weight, bias, statistics, y, pixels, channels, groups, slope or 0.0,
            ACTIVATION=slope is not None, **blocks, **types, **OPTIONS,
        )  # fmt: skip
    return y, statistics


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, groups: int, slope: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches 4 to 6: the gradients of x (as x), weight and bias [C], from dL/dy [N, C, H, W], channels_last."""
    images, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    blocks = _blocks(channels)
    chunks = math.ceil(pixels / (blocks["ROWS"] * TILES))
    partials, of_channel = statistics.new_empty(images, chunks, 2, channels), statistics.new_empty(images, 2, channels)
    means, dx = torch.empty_like(statistics), torch.empty_like(x)
    constants = {"ACTIVATION": slope is not None, "REAL": _TRITON[statistics.dtype]}
    with _on(x.device):
        group_norm_slopes_kernel[(images, chunks)](
            dy, x, weight, bias, statistics, partials, pixels, channels, chunks, groups, slope or 0.0,
            TILES=TILES, **blocks, **constants, **OPTIONS,
        )  # fmt: skip
        group_norm_means_kernel[(images * groups,)](
            partials, weight, means, of_channel, pixels, channels, chunks, groups,
            MEMBERS=triton.next_power_of_2(channels // groups), REAL=constants["REAL"], **SMALL,
        )  # fmt: skip
        group_norm_backward_kernel[(images, math.ceil(pixels / blocks["ROWS"]))](
            dy, x, weight, bias, statistics, means, dx, pixels, channels, groups, slope or 0.0,
            **blocks, **constants, **OPTIONS,
        )  # fmt: skip
    dbias, dweight = of_channel.sum(0).to(weight.dtype).unbind(0)
    return dx, dweight, dbias


_TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


def compile_specs() -> list[KernelSpec]:
    """The variants that training uses in bf16, at 64 channels in 16 groups, for the report of ``compiled.py``."""
    kinds = {name: "*bf16" for name in ("x", "y", "dy", "dx")}
    kinds |= {name: "*fp32" for name in ("weight", "bias", "partials", "statistics", "means", "of_channel")}
    kinds |= {name: "i32:16" for name in ("pixels", "channels", "groups")} | {
        "chunks": "i32",
        "eps": "fp32",
        "slope": "fp32",
    }
    constants = {"REAL": tl.float32, "ACTIVATION": True, "TILES": TILES, "MEMBERS": 4, **_blocks(64)}
    specs = []
    for kernel in (
        group_norm_sums_kernel, group_norm_statistics_kernel, group_norm_apply_kernel,
        group_norm_slopes_kernel, group_norm_means_kernel, group_norm_backward_kernel,
    ):  # fmt: skip
        names, options = kernel.arg_names, SMALL if "MEMBERS" in kernel.arg_names else OPTIONS
        specs.append(
            KernelSpec(
                f"{kernel.fn.__name__.removesuffix('_kernel')} bf16",
                kernel,
                {name: kinds[name] for name in names if name in kinds},
                {name: constants[name] for name in names if name in constants},
                num_warps=options["num_warps"],
            )
        )
    return specs
