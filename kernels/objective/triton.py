"""The objective of ``reference.py`` in Triton: three launches, forward and backward together.

    launch 1  one warp a tile of a plane: SSIM and L2, values and gradient; one warp a block of logits: focal and KL sums
    launch 2  one program adds the partial sums in a fixed order: per-image terms, batch means, total
    launch 3  backward: dL/dX̂ · g and dL/dlogits · g, with g = grad_output read on the device

Bytes (el = one value of one channel, px = one pixel). Launch 1 reads x and X̂ and writes dL/dX̂: 12 B/el in fp32, 6 in bf16.
It reads logits and a uint8 mask: 5 (3) B/px. Launch 3 reads and writes dL/dX̂, 8 (4) B/el, and makes dL/dlogits anew from
logits, mask and two numbers per image, 9 (5) B/px, less than reading one that launch 1 had written. Together 74 B/px in fp32 at
3 channels, 38 in bf16: for 3×128×128 at 3.0 TB/s (what a copy reaches on an H100) 26 µs at B = 64 and 104 µs at B = 256. To
this come the staged rows (below), which L1 writes through to L2: 2 · (64 + 16) + 3 · 64 = 352 floats a turn and tile, about
109 MB at B = 64 and 346 MB at B = 256. They need not reach HBM, but L2's writes may bind: that is left for a GPU to say.

Operations: four blurs forward and three backward, 22 FMAs each, and about 60 more per element for squares, SSIM and its
derivative: 214 lane-operations, at 132 SMs × 128 lanes × 1.755 GHz 23 µs at B = 64 and 91 µs at B = 256 for launch 1, above its
own bytes (14 and 56 µs). So launch 1 is bound by issue slots, and everything below is arranged to spend few of them:

* Rows stream through registers. A vertical blur in transposed form, ``state[j] ← state[j + 1] + w[j] · row``, costs exactly its
  11 FMAs and no register moves; a lane owns two columns, which makes 140 registers of state for the seven blurs.
* A horizontal blur needs neighbouring lanes. A row is staged in a few hundred bytes that only this warp touches (they stay in
  L1) and read back as six overlapping pairs. A program is one warp, so the barrier between is one warp wide and no other
  program can race; two buffers alternate, so that one barrier a row is enough.
* Each element of x and X̂ is fetched once, and once more where its gradient is written, whatever the strides: NCHW and
  channels_last cost the same arithmetic.

What sm_90's code has (``compiled.py``): 240 to 254 registers and no spill, so 8 warps an SM; a row costs a warp some 600
instructions in fp32, 300 an element where the arithmetic alone is 215; loads of taps are 30, addresses and predicates about
50. With the rows that bands repeat this is 43 M warp instructions at B = 64 and 146 M at B = 256, 46 and 157 µs if every
issue slot were used: an estimate, nothing here was measured on a GPU.

Precision: s = x + X̂ and d = x − X̂, centred by the mean of one row of the tile (variances do not move). With ε = var_d / V and
λ = (μ_x − μ_X̂)² / P, where V = σ_x² + σ_X̂² + C2 and P = μ_x² + μ_X̂² + C1, the dissimilarity 1 − SSIM = λ + ε − λε holds no
difference of nearly equal numbers: it keeps its relative precision as X̂ approaches x.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiled import WARP_SIZE, KernelSpec
from .reference import C1, C2, SIGMA, WINDOW, ObjectiveWeights, computed_in

_GAUSS = [math.exp(-((t - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for t in range(WINDOW)]
TAPS = tl.constexpr(tuple(g / math.fsum(_GAUSS) for g in _GAUSS))
HALO = tl.constexpr(WINDOW - 1)
SSIM_C1, SSIM_C2 = tl.constexpr(C1), tl.constexpr(C2)
LOG_CLAMP = tl.constexpr(math.log(1e-12))
LOWEST = tl.constexpr(-(2.0**100))  # stands for log 0: its differences are finite, their exponentials zero
STAGED = tl.constexpr(5)  # rows in a scratch buffer: s, d, and the three that the gradient blurs

# What may change from call to call without another compilation.
COUNTS = "images channels strips bands rows blocks blocks_per_image tiles_per_image elementwise_blocks".split()
LANES = 64 if torch.version.hip else 32
MASK_BLOCK, MASK_STEP = 1024, 256
BACKWARD_BLOCK = 1024


# --- launch 1: SSIM and L2 -------------------------------------------------------------------------------------------------


@triton.jit
def _blur_row(row, SQUARES: tl.constexpr):
    """Horizontal blur [LANES, 2] of a staged row at each lane's two columns, and of its squares if asked for.

    row: pointers [LANES, 2] to the first two of the twelve values under a lane's two windows.
    """
    first, second = tl.split(tl.load(row))
    even, odd = TAPS[0] * first + TAPS[1] * second, TAPS[0] * second
    even_squares, odd_squares = even, odd
    if SQUARES:
        first, second = first * first, second * second
        even_squares, odd_squares = TAPS[0] * first + TAPS[1] * second, TAPS[0] * second
    for k in tl.static_range(1, 6):
        first, second = tl.split(tl.load(row + 2 * k))
        even += TAPS[2 * k] * first
        odd += TAPS[2 * k - 1] * first
        odd += TAPS[2 * k] * second
        if k < 5:
            even += TAPS[2 * k + 1] * second
        if SQUARES:
            first, second = first * first, second * second
            even_squares += TAPS[2 * k] * first
            odd_squares += TAPS[2 * k - 1] * first
            odd_squares += TAPS[2 * k] * second
            if k < 5:
                even_squares += TAPS[2 * k + 1] * second
    return tl.join(even, odd), tl.join(even_squares, odd_squares)


@triton.jit
def _blur_column(state, row):
    """Feeds a row to a vertical blur: the output whose window ends with it, and the ten sums still open."""
    return state[0] + TAPS[10] * row, (
        state[1] + TAPS[9] * row,
        state[2] + TAPS[8] * row,
        state[3] + TAPS[7] * row,
        state[4] + TAPS[6] * row,
        state[5] + TAPS[5] * row,
        state[6] + TAPS[4] * row,
        state[7] + TAPS[3] * row,
        state[8] + TAPS[2] * row,
        state[9] + TAPS[1] * row,
        TAPS[0] * row,
    )


@triton.jit
def _fetch(x, y, row, columns, height, sx_h, sx_w, sy_h, sy_w):
    """One row of x and X̂ in storage type at three vectors of columns. Beyond the image it repeats the last row and column."""
    row = tl.minimum(row, height - 1)
    x, y = x + row * sx_h, y + row * sy_h
    even, odd, more = columns
    return (
        tl.load(x + even * sx_w), tl.load(x + odd * sx_w), tl.load(x + more * sx_w),
        tl.load(y + even * sy_w), tl.load(y + odd * sy_w), tl.load(y + more * sy_w),
    )  # fmt: skip


@triton.jit
def _ssim_forward(buffer, pair, extra, raw, centre_x, centre_y, states, REAL: tl.constexpr, PITCH: tl.constexpr):
    """Stages a row of s and d, blurs them and their squares; returns the four means of the windows that end here."""
    x = tl.join(raw[0].to(REAL), raw[1].to(REAL)) - centre_x
    y = tl.join(raw[3].to(REAL), raw[4].to(REAL)) - centre_y
    more_x, more_y = raw[2].to(REAL) - centre_x, raw[5].to(REAL) - centre_y
    tl.store(buffer + pair, x + y)
    tl.store(buffer + PITCH + pair, x - y)
    tl.store(buffer + extra, more_x + more_y)
    tl.store(buffer + PITCH + extra, more_x - more_y)
    tl.debug_barrier()
    s, s_squares = _blur_row(buffer + pair, True)
    d, d_squares = _blur_row(buffer + PITCH + pair, True)
    mean_s, state_s = _blur_column(states[0], s)
    mean_d, state_d = _blur_column(states[1], d)
    mean_ss, state_ss = _blur_column(states[2], s_squares)
    mean_dd, state_dd = _blur_column(states[3], d_squares)
    return mean_s, mean_d, mean_ss, mean_dd, (state_s, state_d, state_ss, state_dd)


@triton.jit
def _reconstruction_tile(
    x, y, dy, scratch, partials, tile, tiles,
    channels, height, width, strips, bands, rows,
    sx_n, sx_c, sx_h, sx_w, sy_n, sy_c, sy_h, sy_w, sg_n, sg_c, sg_h, sg_w,
    ssim_weight, l2_weight,
    GRADIENT: tl.constexpr, REAL: tl.constexpr, LANES: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Sums of 1 − SSIM and of squared errors over one tile, and the gradient of the weighted terms on it.

    A tile is ``rows`` rows of one plane by up to 2 · LANES columns (the last strip's reach to the border). It owns both its
    pixels and the windows that begin at them. The gradient at a pixel needs the windows that begin up to 10 before it, and
    they need pixels up to 10 beyond it.

    x, y, dy: [N, C, H, W] with the strides sx, sy, sg. partials: [2, tiles]. scratch: [tiles, 2, STAGED, PITCH].
    """
    SPAN: tl.constexpr = 2 * LANES
    PITCH: tl.constexpr = SPAN + 32  # room for ten columns on either side
    channel, strip = tile % channels, tile // channels % strips
    band = tile // (channels * strips) % bands
    image = (tile // (channels * strips * bands)).to(tl.int64)
    x += image * sx_n + channel * sx_c
    y += image * sy_n + channel * sy_c
    dy += image * sg_n + channel * sg_c
    scratch += tile.to(tl.int64) * (2 * STAGED * PITCH)

    # Strips after the first begin ten columns early, at windows which the strip before owns but whose derivatives this one
    # needs; ``shift`` leads from a lane's windows to its pixels.
    shift = tl.minimum(strip, 1) * HALO
    start = strip * (SPAN - HALO)
    end = tl.where(strip == strips - 1, width, start + SPAN)
    top = band * rows
    bottom = tl.minimum(top + rows, height)
    first = tl.maximum(top - HALO, 0)

    lane = tl.arange(0, LANES)
    pair = 2 * lane[:, None] + tl.arange(0, 2)[None, :]
    extra = SPAN + tl.arange(0, 16)
    is_window = start + pair < width - HALO
    is_owned = is_window & (pair >= shift) & (start + pair < end)
    column = start + shift + 2 * lane
    even, odd, more = start + 2 * lane, start + 2 * lane + 1, start + extra
    columns = (tl.minimum(even, width - 1), tl.minimum(odd, width - 1), tl.minimum(more, width - 1))

    middle = (first + tl.minimum(bottom + HALO, height)) // 2
    raw = _fetch(x, y, middle, columns, height, sx_h, sx_w, sy_h, sy_w)
    centre_x = tl.sum(raw[0].to(REAL) + raw[1].to(REAL), 0) / SPAN
    centre_y = tl.sum(raw[3].to(REAL) + raw[4].to(REAL), 0) / SPAN
    offset_s, offset_d = centre_x + centre_y, centre_x - centre_y

    dissimilarity, squared_error = tl.zeros([LANES], REAL), tl.zeros([LANES], REAL)
    none = tl.join(dissimilarity, dissimilarity)
    empty = (none, none, none, none, none, none, none, none, none, none)
    states, slopes = (empty, empty, empty, empty), (empty, empty, empty)
    if GRADIENT:
        # What lies beside the windows is zero: it has no part in any gradient.
        margin = tl.arange(0, 16)
        for k in tl.static_range(2):
            for j in tl.static_range(2, STAGED):
                blank = scratch + (k * STAGED + j) * PITCH + margin
                tl.store(blank, tl.zeros([16], REAL), mask=margin < HALO)
                tl.store(blank + SPAN + HALO, tl.zeros([16], REAL), mask=margin < HALO)

    raw = _fetch(x, y, first, columns, height, sx_h, sx_w, sy_h, sy_w)
    for turn in range(0, HALO, TURN):
        for k in tl.static_range(TURN):
            buffer = scratch + (k if TURN == 2 else turn % 2) * (STAGED * PITCH)
            _, _, _, _, states = _ssim_forward(buffer, pair, extra, raw, centre_x, centre_y, states, REAL, PITCH)
            raw = _fetch(x, y, first + turn + k + 1, columns, height, sx_h, sx_w, sy_h, sy_w)

    # Each row of pixels completes a row of windows ten rows up and, a row later (so that everything staged waits at one
    # barrier), the gradient of the row of pixels where those windows begin. With two rows a TURN it is known which buffer is
    # used; a row too many owns nothing.
    for turn in range(first + HALO, bottom + HALO + 1, TURN):
        for k in tl.static_range(TURN):
            row = turn + k
            odd_row = k if TURN == 2 else (row - first) % 2
            buffer = scratch + odd_row * (STAGED * PITCH)
            mean_s, mean_d, mean_ss, mean_dd, states = _ssim_forward(
                buffer, pair, extra, raw, centre_x, centre_y, states, REAL, PITCH
            )
            raw = _fetch(x, y, row + 1, columns, height, sx_h, sx_w, sy_h, sy_w)

            pixel = row - HALO - 1
            if (pixel >= top) & (pixel < bottom):
                own_even, own_odd = column < end, column + 1 < end
                x_row, y_row = x + pixel * sx_h + column * sx_w, y + pixel * sy_h + column * sy_w
                x_pixel = tl.join(
                    tl.load(x_row, mask=own_even, other=0.0).to(REAL),
                    tl.load(x_row + sx_w, mask=own_odd, other=0.0).to(REAL),
                )
                y_pixel = tl.join(
                    tl.load(y_row, mask=own_even, other=0.0).to(REAL),
                    tl.load(y_row + sy_w, mask=own_odd, other=0.0).to(REAL),
                )
                difference = y_pixel - x_pixel
                error_even, error_odd = tl.split(difference)
                squared_error += error_even * error_even
                squared_error += error_odd * error_odd
                if GRADIENT:
                    blurred = buffer + 2 * PITCH + shift + pair
                    of_mean, _ = _blur_row(blurred, False)
                    of_s, _ = _blur_row(blurred + PITCH, False)
                    of_d, _ = _blur_row(blurred + 2 * PITCH, False)
                    slope = of_mean + (x_pixel + y_pixel - offset_s) * of_s + (difference + offset_d) * of_d
                    gradient_even, gradient_odd = tl.split(ssim_weight * slope + l2_weight * difference)
                    gradient_row = dy + pixel * sg_h + column * sg_w
                    tl.store(gradient_row, gradient_even.to(dy.dtype.element_ty), mask=own_even)
                    tl.store(gradient_row + sg_w, gradient_odd.to(dy.dtype.element_ty), mask=own_odd)

            window = row - HALO
            var_s, var_d = mean_ss - mean_s * mean_s, mean_dd - mean_d * mean_d
            mu_s, mu_d = mean_s + offset_s, mean_d + offset_d
            mu_d_squared = mu_d * mu_d
            V = 0.5 * (var_s + var_d) + SSIM_C2
            P = 0.5 * (mu_s * mu_s + mu_d_squared) + SSIM_C1
            both = 1.0 / (V * P)
            over_V, over_P = both * P, both * V
            epsilon, lam = var_d * over_V, mu_d_squared * over_P
            counted = is_owned & (window >= top) & (window < tl.minimum(bottom, height - HALO))
            dissimilarity += tl.sum(tl.where(counted, lam + epsilon - lam * epsilon, 0.0), 1)
            if GRADIENT:
                # Half the derivatives of SSIM by E[s²] and E[d²], and by the mean of X̂ (through both and by itself).
                real = is_window & (window < height - HALO)
                half = 0.5 * (1.0 - lam) * over_V
                by_ss = half * epsilon
                by_dd = by_ss - 2.0 * half
                by_mean = mean_d * by_dd - mean_s * by_ss
                by_mean += (1.0 - epsilon) * over_P * (mu_d + 0.5 * (mu_s - mu_d) * lam)
                mean_slope, mean_state = _blur_column(slopes[0], tl.where(real, by_mean, 0.0))
                s_slope, s_state = _blur_column(slopes[1], tl.where(real, by_ss, 0.0))
                d_slope, d_state = _blur_column(slopes[2], tl.where(real, by_dd, 0.0))
                slopes = (mean_state, s_state, d_state)
                following = scratch + (1 - odd_row) * (STAGED * PITCH) + HALO + pair
                tl.store(following + 2 * PITCH, mean_slope)
                tl.store(following + 3 * PITCH, s_slope)
                tl.store(following + 4 * PITCH, d_slope)

    tl.store(partials + tile, tl.sum(dissimilarity, 0))
    tl.store(partials + tiles + tile, tl.sum(squared_error, 0))


# --- launch 1: focal loss and sparsity KL ----------------------------------------------------------------------------------


@triton.jit
def _log_probabilities(z, truth):
    """log σ(z), log σ(−z), and the same of the wrong and of the true class; finite and right where σ saturates."""
    u = z * (1.0 - 2.0 * truth)  # |u| = |z|: one logarithm serves all four, and NaN in either input reaches them
    tail = tl.log(1.0 + tl.exp(-tl.abs(u)))
    return tl.minimum(z, 0.0) - tail, tl.minimum(-z, 0.0) - tail, tl.minimum(u, 0.0) - tail, tl.minimum(-u, 0.0) - tail


@triton.jit
def _add_exponential(total, most, log_value):
    """``total`` · exp(``most``) is a sum; adds exp(``log_value``). A maximum may pass over NaN, the sum does not."""
    step = tl.exp(-tl.abs(log_value - most))
    return tl.where(log_value > most, total * step + 1.0, total + step), tl.maximum(most, log_value)


@triton.jit
def _log_of_sums(total, most, axis: tl.constexpr):
    """log of the sum along ``axis`` of the sums that ``_add_exponential`` gathered."""
    highest = tl.max(most, axis, keep_dims=True)
    return tl.max(highest, axis) + tl.log(tl.sum(total * tl.exp(most - highest), axis))


@triton.jit
def _mask_block(
    logits, mask, partials, block, blocks, blocks_per_image, pixels, gamma,
    PIXEL_KL: tl.constexpr, REVERSE_KL: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Over one block of an image's logits: the sum of the focal loss, and two that Eq 3.6 is made of: log Σ σ(z) and
    log Σ σ(−z) (``area``); Σ log σ(z) and Σ log σ(−z) (``pixel``, reverse); Σ −H(σ(z)) and Σ σ(z), H the entropy (``pixel``).

    logits, mask: [N, pixels]. partials: [3, blocks].
    """
    logits += (block // blocks_per_image).to(tl.int64) * pixels
    mask += (block // blocks_per_image).to(tl.int64) * pixels
    first = block % blocks_per_image * BLOCK
    zero = tl.zeros([STEP], REAL)
    focal, sum_p, sum_q = zero, zero, zero
    most_p, most_q = zero + LOWEST, zero + LOWEST
    for start in range(first, tl.minimum(first + BLOCK, pixels), STEP):
        offset = start + tl.arange(0, STEP)
        inside = offset < pixels
        z = tl.load(logits + offset, mask=inside, other=0.0).to(REAL)
        truth = tl.load(mask + offset, mask=inside, other=0).to(REAL)
        log_p, log_q, log_miss, log_hit = _log_probabilities(z, truth)
        power = tl.exp(tl.cast(gamma, REAL) * tl.maximum(log_miss, LOG_CLAMP))
        focal -= tl.where(inside, power * log_hit, 0.0)
        if PIXEL_KL:
            if REVERSE_KL:
                sum_p += tl.where(inside, log_p, 0.0)
                sum_q += tl.where(inside, log_q, 0.0)
            else:
                p = tl.exp(log_p)
                sum_p += tl.where(inside, p * log_p + tl.exp(log_q) * log_q, 0.0)
                sum_q += tl.where(inside, p, 0.0)
        else:
            sum_p, most_p = _add_exponential(sum_p, most_p, tl.where(inside, log_p, LOWEST))
            sum_q, most_q = _add_exponential(sum_q, most_q, tl.where(inside, log_q, LOWEST))
    tl.store(partials + block, tl.sum(focal, 0))
    if PIXEL_KL:
        tl.store(partials + blocks + block, tl.sum(sum_p, 0))
        tl.store(partials + 2 * blocks + block, tl.sum(sum_q, 0))
    else:
        tl.store(partials + blocks + block, _log_of_sums(sum_p, most_p, 0))
        tl.store(partials + 2 * blocks + block, _log_of_sums(sum_q, most_q, 0))


@triton.jit(do_not_specialize=COUNTS)
def objective_forward_kernel(
    x, y, dy, logits, mask, scratch, tile_partials, block_partials,
    images, channels, height, width, strips, bands, rows, blocks, blocks_per_image,
    sx_n, sx_c, sx_h, sx_w, sy_n, sy_c, sy_h, sy_w, sg_n, sg_c, sg_h, sg_w,
    reconstruction_weight, ssim_weight, l2_weight, gamma,
    GRADIENT: tl.constexpr, PIXEL_KL: tl.constexpr, REVERSE_KL: tl.constexpr, REAL: tl.constexpr,
    LANES: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Launch 1. The first ``blocks`` programs take a block of logits each, the others a tile each."""
    program = tl.program_id(0)
    if program < blocks:
        _mask_block(
            logits, mask, block_partials, program, blocks, blocks_per_image, height * width, gamma,
            PIXEL_KL, REVERSE_KL, REAL, BLOCK, STEP,
        )  # fmt: skip
    else:
        tiles = images * channels * strips * bands
        planes = tl.cast(images * channels, REAL)
        scale = 2.0 * tl.cast(reconstruction_weight, REAL) / planes
        ssim_scale = scale * tl.cast(ssim_weight, REAL) / tl.cast((height - HALO) * (width - HALO), REAL)
        l2_scale = scale * tl.cast(l2_weight, REAL) / tl.cast(height * width, REAL)
        _reconstruction_tile(
            x, y, dy, scratch, tile_partials, program - blocks, tiles,
            channels, height, width, strips, bands, rows,
            sx_n, sx_c, sx_h, sx_w, sy_n, sy_c, sy_h, sy_w, sg_n, sg_c, sg_h, sg_w,
            -ssim_scale, l2_scale,
            GRADIENT, REAL, LANES, TURN,
        )  # fmt: skip


# --- launch 2: from partial sums to terms ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=COUNTS)
def objective_reduce_kernel(
    tile_partials, block_partials, per_image, means, total, log_areas,
    images, channels, height, width, tiles_per_image, blocks_per_image,
    reconstruction_weight, ssim_weight, l2_weight, focal_weight, kl_weight, rho,
    PIXEL_KL: tl.constexpr, REVERSE_KL: tl.constexpr, REAL: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Launch 2, one program. Every sum is taken in an order that depends on shapes alone.

    tile_partials: [2, N · tiles_per_image]. block_partials: [3, N · blocks_per_image]. per_image: [4, N]. means: [4].
    total: []. log_areas: [2, N], log of the mean of σ(z) and of σ(−z), which the backward of the ``area`` KL needs.
    """
    tiles, blocks = images * tiles_per_image, images * blocks_per_image
    pixels = tl.cast(height * width, REAL)
    windows = tl.cast((height - HALO) * (width - HALO), REAL)
    planes = tl.cast(channels, REAL)
    rho = tl.cast(rho, REAL)
    zero = tl.zeros([IMAGES], REAL)
    sum_dissimilarity, sum_mse, sum_focal, sum_kl = zero, zero, zero, zero
    for first in range(0, images, IMAGES):
        image = first + tl.arange(0, IMAGES)
        inside = image < images

        dissimilarity, squared_error = zero, zero
        for start in range(0, tiles_per_image, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            at = tile_partials + image[:, None] * tiles_per_image + offset[None, :]
            present = inside[:, None] & (offset < tiles_per_image)[None, :]
            dissimilarity += tl.sum(tl.load(at, mask=present, other=0.0), 1)
            squared_error += tl.sum(tl.load(at + tiles, mask=present, other=0.0), 1)

        focal = zero
        sum_p = tl.zeros([IMAGES, BLOCK], REAL)
        sum_q, most_p, most_q = sum_p, sum_p + LOWEST, sum_p + LOWEST
        for start in range(0, blocks_per_image, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            at = block_partials + image[:, None] * blocks_per_image + offset[None, :]
            present = inside[:, None] & (offset < blocks_per_image)[None, :]
            focal += tl.sum(tl.load(at, mask=present, other=0.0), 1)
            if PIXEL_KL:
                sum_p += tl.load(at + blocks, mask=present, other=0.0)
                sum_q += tl.load(at + 2 * blocks, mask=present, other=0.0)
            else:
                log_p = tl.load(at + blocks, mask=present, other=LOWEST)
                log_q = tl.load(at + 2 * blocks, mask=present, other=LOWEST)
                sum_p, most_p = _add_exponential(sum_p, most_p, log_p)
                sum_q, most_q = _add_exponential(sum_q, most_q, log_q)
        if PIXEL_KL:
            log_p, log_q = tl.sum(sum_p, 1) / pixels, tl.sum(sum_q, 1) / pixels
        else:
            log_p = _log_of_sums(sum_p, most_p, 1) - tl.log(pixels)
            log_q = _log_of_sums(sum_q, most_q, 1) - tl.log(pixels)
        if REVERSE_KL:
            kl = rho * (tl.log(rho) - log_p) + (1.0 - rho) * (tl.log(1.0 - rho) - log_q)
        elif PIXEL_KL:
            minus_entropy, mean_p = log_p, log_q
            kl = minus_entropy - mean_p * tl.log(rho) - (1.0 - mean_p) * tl.log(1.0 - rho)
        else:
            kl = tl.exp(log_p) * (log_p - tl.log(rho)) + tl.exp(log_q) * (log_q - tl.log(1.0 - rho))

        dissimilarity, squared_error = dissimilarity / (planes * windows), squared_error / (planes * pixels)
        focal = focal / pixels
        tl.store(per_image + image, dissimilarity, mask=inside)
        tl.store(per_image + images + image, squared_error, mask=inside)
        tl.store(per_image + 2 * images + image, focal, mask=inside)
        tl.store(per_image + 3 * images + image, kl, mask=inside)
        tl.store(log_areas + image, log_p, mask=inside)
        tl.store(log_areas + images + image, log_q, mask=inside)
        sum_dissimilarity += dissimilarity
        sum_mse += squared_error
        sum_focal += focal
        sum_kl += tl.where(inside, kl, 0.0)

    count = tl.cast(images, REAL)
    dissimilarity, mse = tl.sum(sum_dissimilarity, 0) / count, tl.sum(sum_mse, 0) / count
    focal, kl = tl.sum(sum_focal, 0) / count, tl.sum(sum_kl, 0) / count
    tl.store(means, dissimilarity)
    tl.store(means + 1, mse)
    tl.store(means + 2, focal)
    tl.store(means + 3, kl)
    reconstruction = tl.cast(ssim_weight, REAL) * dissimilarity + tl.cast(l2_weight, REAL) * mse
    segmentation = tl.cast(focal_weight, REAL) * focal + tl.cast(kl_weight, REAL) * kl
    tl.store(total, tl.cast(reconstruction_weight, REAL) * reconstruction + segmentation)


# --- launch 3: backward ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=COUNTS)
def objective_backward_kernel(
    upstream, saved_dy, dy, logits, mask, log_areas, dlogits,
    elements, elementwise_blocks, blocks_per_image, images, pixels,
    focal_weight, gamma, kl_weight, rho,
    PIXEL_KL: tl.constexpr, REVERSE_KL: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Launch 3. The first ``elementwise_blocks`` programs scale the saved gradient, the others make that of the logits.

    upstream: [], dL/dtotal. saved_dy, dy: ``elements`` values in one order. logits, mask, dlogits: [N, pixels].
    """
    program = tl.program_id(0)
    g = tl.load(upstream).to(REAL)
    if program < elementwise_blocks:
        at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < elements
        slope = tl.load(saved_dy + at, mask=inside, other=0.0).to(REAL)
        tl.store(dy + at, (g * slope).to(dy.dtype.element_ty), mask=inside)
    else:
        block = program - elementwise_blocks
        image = block // blocks_per_image
        offset = block % blocks_per_image * BLOCK + tl.arange(0, BLOCK)
        inside = offset < pixels
        at = image.to(tl.int64) * pixels + offset
        z = tl.load(logits + at, mask=inside, other=0.0).to(REAL)
        truth = tl.load(mask + at, mask=inside, other=0).to(REAL)
        rho = tl.cast(rho, REAL)
        log_p, log_q, log_miss, log_hit = _log_probabilities(z, truth)
        miss, hit = tl.exp(log_miss), tl.exp(log_hit)
        power = tl.exp(tl.cast(gamma, REAL) * tl.maximum(log_miss, LOG_CLAMP))
        of_power = tl.where(log_miss >= LOG_CLAMP, tl.cast(gamma, REAL) * hit, 0.0)  # d log(power) / du
        focal = (1.0 - 2.0 * truth) * power * (miss - of_power * log_hit)
        if PIXEL_KL and REVERSE_KL:
            kl = tl.exp(log_p) - rho
        else:
            both = tl.where(inside, log_p + log_q, LOWEST)  # log of σ(z) · σ(−z), the derivative of σ
            if PIXEL_KL:
                kl = tl.exp(both) * (z - (tl.log(rho) - tl.log(1.0 - rho)))
            else:
                mean_log_p, mean_log_q = tl.load(log_areas + image), tl.load(log_areas + images + image)
                if REVERSE_KL:
                    kl = (1.0 - rho) * tl.exp(both - mean_log_q) - rho * tl.exp(both - mean_log_p)
                else:
                    kl = tl.exp(both) * ((mean_log_p - mean_log_q) - (tl.log(rho) - tl.log(1.0 - rho)))
        slope = tl.cast(focal_weight, REAL) * focal + tl.cast(kl_weight, REAL) * kl
        tl.store(
            dlogits + at,
            (g / (tl.cast(images, REAL) * tl.cast(pixels, REAL)) * slope).to(dlogits.dtype.element_ty),
            mask=inside,
        )


# --- launchers -------------------------------------------------------------------------------------------------------------

# Contraction of a·b + c is what the operation count above counts on; Triton's default for it changes in 3.10.
ONE_WARP: dict[str, Any] = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
REDUCE: dict[str, Any] = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
BACKWARD: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Schedule:
    """What only a measurement can decide (``launch/profile_kernels.py`` has candidates): rows that launch 1 takes a turn (1;
    2 where a warp has 32 lanes: one of 64 has no registers for it), and those of a band (None: see ``tiling``)."""

    turn: int = 1
    rows: int | None = None


SCHEDULE = Schedule()


def tiling(images: int, channels: int, height: int, width: int) -> tuple[int, int, int]:
    """(strips, bands, rows a band) of each plane, from shapes alone so that results do not depend on the machine.

    A band repeats 10 rows of the forward and 10 of the backward of its neighbour, so bands are as tall as keeps a GPU busy.
    """
    span, halo = 2 * LANES, WINDOW - 1
    # The last strip reaches ten columns further than the others: no windows begin in an image's last ten columns.
    strips = 1 if width <= span else max(2, math.ceil((width - span - halo) / (span - halo)) + 1)
    rows = SCHEDULE.rows or (64 if images * channels * strips * math.ceil(height / 64) >= 2048 else 32)
    return strips, math.ceil(height / rows), rows


def forward(
    x: Tensor, reconstruction: Tensor, logits: Tensor, mask: Tensor, weights: ObjectiveWeights, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches 1 and 2.

    Args:
        x, reconstruction: [N, C, H, W], any strides, H and W at least 11.
        logits, mask: [N, 1, H, W]; copied if they are not contiguous.
        gradients: whether to make dL/dX̂.

    Returns:
        total [], means [4], per_image [4, N] in float32 (float64 if the reconstruction or the logits are); dL/dX̂ in the
        reconstruction's strides (empty without ``gradients``); log_areas [2, N]. The gradient has the type of the
        reconstruction, but for float16: a loss scale may lift into its range what underflows alone, so that gradient stays
        in float32.
    """
    images, channels, height, width = x.shape
    real = computed_in(reconstruction, logits)
    logits, mask = logits.contiguous(), _bytes(mask).contiguous()
    strips, bands, rows = tiling(images, channels, height, width)
    tiles_per_image, blocks_per_image = channels * strips * bands, math.ceil(height * width / MASK_BLOCK)
    tiles, blocks = images * tiles_per_image, images * blocks_per_image

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=real, device=x.device)

    saved = torch.float32 if reconstruction.dtype == torch.float16 else reconstruction.dtype
    dy = torch.empty_like(reconstruction, dtype=saved) if gradients else torch.empty(0, dtype=saved, device=x.device)
    strides = dy.stride() if gradients else (0, 0, 0, 0)
    scratch = new(tiles, 2, STAGED.value, 2 * LANES + 32)
    tile_partials, block_partials = new(2, tiles), new(3, blocks)
    total, means, per_image, log_areas = new(), new(4), new(4, images), new(2, images)
    w = weights
    types = {"REAL": _TRITON[real], **_reading(w)}
    with _on(x.device):
        objective_forward_kernel[(blocks + tiles,)](
            x, reconstruction, dy, logits, mask, scratch, tile_partials, block_partials,
            images, channels, height, width, strips, bands, rows, blocks, blocks_per_image,
            *x.stride(), *reconstruction.stride(), *strides,
            w.reconstruction, w.ssim, w.l2, w.gamma,
            GRADIENT=gradients, LANES=LANES, TURN=SCHEDULE.turn, BLOCK=MASK_BLOCK, STEP=MASK_STEP, **types, **ONE_WARP,
        )  # fmt: skip
        objective_reduce_kernel[(1,)](
            tile_partials, block_partials, per_image, means, total, log_areas,
            images, channels, height, width, tiles_per_image, blocks_per_image,
            w.reconstruction, w.ssim, w.l2, w.focal, w.kl, w.rho,
            IMAGES=64, BLOCK=32, **types, **REDUCE,
        )  # fmt: skip
    return total, means, per_image, dy, log_areas


def backward(
    upstream: Tensor, saved: Tensor, log_areas: Tensor, logits: Tensor, mask: Tensor, weights: ObjectiveWeights,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch 3: the gradients for reconstruction (in ``dtype``) and logits, from dL/dtotal [] and what ``forward`` returned."""
    images, pixels = logits.shape[0], math.prod(logits.shape[1:])
    logits, mask = logits.contiguous(), _bytes(mask).contiguous()
    dy, dlogits = torch.empty_like(saved, dtype=dtype), torch.empty_like(logits)
    elementwise, blocks_per_image = math.ceil(saved.numel() / BACKWARD_BLOCK), math.ceil(pixels / BACKWARD_BLOCK)
    with _on(logits.device):
        objective_backward_kernel[(elementwise + images * blocks_per_image,)](
            upstream, saved, dy, logits, mask, log_areas, dlogits,
            saved.numel(), elementwise, blocks_per_image, images, pixels,
            weights.focal, weights.gamma, weights.kl, weights.rho,
            REAL=_TRITON[log_areas.dtype], BLOCK=BACKWARD_BLOCK, **_reading(weights), **BACKWARD,
        )  # fmt: skip
    return dy, dlogits


_TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


def _reading(weights: ObjectiveWeights) -> dict[str, bool]:
    return {"PIXEL_KL": weights.kl_form == "pixel", "REVERSE_KL": weights.kl_direction == "reverse"}


def _bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def compile_specs() -> list[KernelSpec]:
    """The variants that training uses, for the report of ``compiled.py``: types, layouts, rows a turn, readings of the KL."""
    specs = []
    variants = (
        ("fp32", "fp32", "contiguous", 1, ""), ("fp32", "fp32", "channels_last", 1, ""),
        ("bf16", "bf16", "channels_last", 1, ""), ("fp32", "bf16", "channels_last", 1, ""),
        ("bf16", "bf16", "channels_last", 2, ""), ("bf16", "bf16", "channels_last", 1, "PIXEL_KL"),
        ("bf16", "bf16", "channels_last", 1, "REVERSE_KL"),
    )  # fmt: skip
    for of_x, kind, layout, turn, reading in variants:
        kinds = {"x": f"*{of_x}", "y": f"*{kind}", "dy": f"*{kind}", "logits": f"*{kind}", "mask": "*u8"}
        kinds |= {name: "*fp32" for name in ("scratch", "tile_partials", "block_partials")}
        kinds |= {name: "i32:16" for name in ("height", "width")}
        kinds |= {
            name: "i32" for name in ("images", "channels", "strips", "bands", "rows", "blocks", "blocks_per_image")
        }
        kinds |= {name: "fp32" for name in ("reconstruction_weight", "ssim_weight", "l2_weight", "gamma")}
        constants = {"GRADIENT": True, "PIXEL_KL": False, "REVERSE_KL": False, "REAL": tl.float32, "LANES": WARP_SIZE}
        constants |= {reading: True} if reading else {}
        constants |= {"BLOCK": MASK_BLOCK, "STEP": MASK_STEP, "TURN": turn}
        # As Triton specialises the strides of 3×128×128: one is a constant, multiples of 16 are known to be that.
        for tensor in ("sx", "sy", "sg"):
            unit, odd = ("w", "") if layout == "contiguous" else ("c", "w")
            kinds |= {f"{tensor}_{axis}": "i32" if axis == odd else "i32:16" for axis in "nchw" if axis != unit}
            constants[f"{tensor}_{unit}"] = 1
        name = f"objective_forward {kind if of_x == kind else f'{of_x}/{kind}'} {layout}" + ", two rows" * (turn == 2)
        name += f", {reading.lower().replace('_kl', ' KL')}" if reading else ""
        lanes = 32 if turn == 2 else None
        specs.append(KernelSpec(name, objective_forward_kernel, kinds, constants, num_warps=1, lanes=lanes))

    kinds = {name: "*fp32" for name in objective_reduce_kernel.arg_names[:6]}
    kinds |= {name: "i32" for name in ("images", "channels", "tiles_per_image", "blocks_per_image")}
    kinds |= {name: "i32:16" for name in ("height", "width")}
    kinds |= {name: "fp32" for name in objective_reduce_kernel.arg_names[12:18]}
    constants = {"PIXEL_KL": False, "REVERSE_KL": False, "REAL": tl.float32, "IMAGES": 64, "BLOCK": 32}
    specs.append(KernelSpec("objective_reduce", objective_reduce_kernel, kinds, constants, num_warps=8))

    kinds = {name: "*bf16" for name in ("saved_dy", "dy", "logits", "dlogits")}
    kinds |= {"upstream": "*fp32", "mask": "*u8", "log_areas": "*fp32"}
    kinds |= {name: "i32:16" for name in ("elements", "pixels")}
    kinds |= {name: "i32" for name in ("elementwise_blocks", "blocks_per_image", "images")}
    kinds |= {name: "fp32" for name in ("focal_weight", "gamma", "kl_weight", "rho")}
    constants = {"PIXEL_KL": False, "REVERSE_KL": False, "REAL": tl.float32, "BLOCK": BACKWARD_BLOCK}
    specs.append(KernelSpec("objective_backward bf16", objective_backward_kernel, kinds, constants, num_warps=4))
    return specs
