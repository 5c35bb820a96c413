"""Anomaly synthesis in two Triton launches: ``reference.py`` says what is computed, this file how.

1. ``_prepare_kernel`` makes everything random about a sample. One lane a sample draws its 40-round shuffle, both maps, the
   texture's jitter and β (88 bytes); beside it one program a sample writes the lattice gradients that the sample's window can
   touch, 8 bytes a point, one Philox call for four points.
2. ``_pixel_kernel``, one warp for a tile of 4×32 pixels of one sample, samples, thresholds, blends and writes.

Why two: a pixel needs the gradients of four lattice points. Drawing those per pixel takes 2 to 4 Philox calls, 20 wide
products each, as much as all the rest; and drawing a sample's scalars in each of its programs takes 3,000 instructions of a
warp whose pixels take 750.

Per pixel of H² at 3 channels, from stores of S², crops of scale s ~ U(0.8, 1) (s² averages 0.81), half of the samples clean:

    bytes out     clean 3e + anomalous 3e + mask 1, e bytes a value: 13 in bf16, 25 in fp32
    bytes in      image 3·s²·(S/H)²: 2.4 at S = H, 9.8 at S = 2H, where every stored byte counts. Texture: only under the mask,
                  5.6 % of the pixels of half of the samples, 0.1 to 0.3
    scratch       the lattice, 2.2 kB a sample on average: 0.1, and it stays in L2 (allocated: 18 kB a sample)
    instructions  sm_90, counted in the compiled code: 131 for the clean sample and the stores; 55 for the noise, in half of the
                  samples; 123 for texture and blend, in the 43 % of those samples' tiles that meet their mask. 185 on average

    The roofs of an H100 (3.35 TB/s, 132 SMs of 128 lanes at 1.98 GHz), S = 256, H = 128, bf16:

                                        B = 64    B = 256
    23 bytes a pixel                    7.2 µs    29 µs
    185 instructions a pixel            5.8 µs    23 µs

so bytes bind, barely; at S = H, with 15.5 bytes a pixel, instructions do. The first launch adds its latency, some 2 µs: 2,700
instructions of one warp for the shuffle.

Nothing returns to the host. ``sample`` and ``seed`` may be device tensors that change between replays of a CUDA graph.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiled import KernelSpec
from ..philox import Purpose
from .reference import LATTICE_ORIGIN, LATTICE_STRIDE, SynthesisSettings, empty_outputs, lattice_window

ORDER = tl.constexpr(int(Purpose.ORDER))
GEOMETRY = tl.constexpr(int(Purpose.GEOMETRY))
MASK = tl.constexpr(int(Purpose.MASK))
LATTICE = tl.constexpr(int(Purpose.LATTICE))
TEXTURE = tl.constexpr(int(Purpose.TEXTURE))
SHUFFLE_ROUNDS = tl.constexpr(40)
ORIGIN = tl.constexpr(LATTICE_ORIGIN)
STRIDE = tl.constexpr(LATTICE_STRIDE)

# A row of the table of draws: two maps (cos, sin, x, y), gain and bias of three channels, the noise's (cos, sin, step x,
# step y), β.
DRAWS = tl.constexpr(20)
IMAGE, TEXTURE_MAP, GAIN, BIAS, NOISE, BETA = (tl.constexpr(column) for column in (0, 4, 8, 11, 14, 18))

SCALARS = "seed_low seed_high batch images textures image_side texture_side size choices".split()
# Rows and columns of a program's tile. One warp each: the smaller the tile, the more of them see no mask; 32 columns are six
# sectors of bf16.
TILE = (4, 32)
PREPARE_BLOCK, PREPARE_WARPS = 128, 4

HALF_PI = tl.constexpr(math.pi / 2)
S3, S5, S7, S9 = (tl.constexpr((-1) ** (n // 2) * (math.pi / 2) ** n / math.factorial(n)) for n in (3, 5, 7, 9))
C2, C4, C6, C8, C10 = (
    tl.constexpr((-1) ** (n // 2) * (math.pi / 2) ** n / math.factorial(n)) for n in (2, 4, 6, 8, 10)
)
SQRT2 = tl.constexpr(math.sqrt(2))
OVERHANG = tl.constexpr(0.2072)  # (√2 − 1)/2, rounded up: how far a rotated unit square reaches out of the upright one


@triton.jit
def _uniform(word):
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24


@triton.jit
def _cos_sin(turns):
    """cos and sin of 2π·turns to 1e-7. A turn's fraction reduces exactly, and a polynomial is the same on every device
    (the hardware's sine is not, and is off by 5e-7)."""
    quarter = tl.floor(4 * turns + 0.5)
    r = 4 * turns - quarter
    q = r * r
    sine = r * (HALF_PI + q * (S3 + q * (S5 + q * (S7 + q * S9))))
    cosine = 1 + q * (C2 + q * (C4 + q * (C6 + q * (C8 + q * C10))))
    quadrant = quarter.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((quadrant == 1) | (quadrant == 2), -c, c), tl.where(quadrant >= 2, -s, s)


@triton.jit
def _philox(seed_low, seed_high, purpose: tl.constexpr, sample, index):
    """``philox.philox``: four uint32 words for int64 ``sample`` and ``index`` (uint32 or a number)."""
    key = tl.full([], purpose, tl.uint32)
    return tl.philox_impl(sample.to(tl.uint32), (sample >> 32).to(tl.uint32), index, seed_high, seed_low, key)


@triton.jit
def _seed_words(seed_ptr, seed_low, seed_high):
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    else:
        return seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)


@triton.jit
def _word(number: tl.constexpr):
    return tl.full([], number, tl.uint32)


@triton.jit
def _shuffled(seed_low, seed_high, position, length):
    """``philox.shuffled``: the image at int64 ``position``, as uint32."""
    cycle, rest = position // length, position % length  # truncated, as in C: floor them
    cycle, rest = tl.where(rest < 0, cycle - 1, cycle), tl.where(rest < 0, rest + length, rest)
    x = rest.to(tl.uint32)
    count = length.to(tl.uint32)
    # Unrolled, so that the Philox calls of eight rounds overlap: they do not wait for x.
    for r in tl.range(0, SHUFFLE_ROUNDS, loop_unroll_factor=8):
        pair, salt, _, _ = _philox(seed_low, seed_high, ORDER, cycle, tl.cast(r, tl.uint32))
        pair = pair % count
        partner = tl.where(pair >= x, pair - x, pair + (count - x))
        bits = tl.maximum(x, partner) ^ salt
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
        x = tl.where(((bits >> 16) & 1) == 1, partner, x)
    return x


@triton.jit
def _store_map(row, column: tl.constexpr, scale, turns, shift_x, shift_y, zoom, half, inside):
    """Four columns of ``_similarity``, in source pixels: u -> zoom·scale·R·u + half·shift, u from the output's centre."""
    cos, sin = _cos_sin(turns)
    tl.store(row + column, zoom * scale * cos, mask=inside)
    tl.store(row + column + 1, zoom * scale * sin, mask=inside)
    tl.store(row + column + 2, half * shift_x + (half - 0.5), mask=inside)
    tl.store(row + column + 3, half * shift_y + (half - 0.5), mask=inside)


@triton.jit
def _draw(
    first,
    sample_ptr,  # int64 [B]
    image_index_ptr,  # int64 [B] or None
    rows_ptr,  # int32 [B, 2]: image, texture (−1: a clean sample)
    draws_ptr,  # float32 [B, DRAWS]
    seed_low,
    seed_high,
    batch,
    images,  # how many the shuffle orders or, with image_index, rows there are
    textures,
    image_side,
    texture_side,
    size,
    choices,
    scale_low,
    scale_span,
    rotation,
    clean_fraction,
    blend_max,
    jitter,
    GREY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``synthesis.draw``, one lane a sample."""
    b = first + tl.arange(0, BLOCK)
    inside = b < batch
    sample = tl.load(sample_ptr + b, mask=inside, other=0)
    row = draws_ptr + b * DRAWS

    word, turn, x, y = _philox(seed_low, seed_high, GEOMETRY, sample, _word(0))
    scale = scale_low + scale_span * _uniform(word)
    shift_x, shift_y = (1 - scale) * (2 * _uniform(x) - 1), (1 - scale) * (2 * _uniform(y) - 1)
    half = image_side.to(tl.float32) * 0.5
    zoom = image_side.to(tl.float32) / size.to(tl.float32)
    _store_map(row, IMAGE, scale, (2 * _uniform(turn) - 1) * rotation, shift_x, shift_y, zoom, half, inside)

    which, t_turn, t_size, t_x = _philox(seed_low, seed_high, TEXTURE, sample, _word(0))
    t_y, contrast, invert, _ = _philox(seed_low, seed_high, TEXTURE, sample, _word(1))
    tint = _philox(seed_low, seed_high, TEXTURE, sample, _word(2))
    offset = _philox(seed_low, seed_high, TEXTURE, sample, _word(3))
    scale = (1 - jitter) + jitter * _uniform(t_size)
    shift_x, shift_y = jitter * (2 * _uniform(t_x) - 1), jitter * (2 * _uniform(t_y) - 1)
    half = texture_side.to(tl.float32) * 0.5
    zoom = texture_side.to(tl.float32) / size.to(tl.float32)
    _store_map(row, TEXTURE_MAP, scale, _uniform(t_turn) - 0.5, shift_x, shift_y, zoom, half, inside)
    contrast = (1 - jitter) + 2 * jitter * _uniform(contrast)
    contrast = tl.where(_uniform(invert) < 0.5 * jitter, -contrast, contrast)
    for c in tl.static_range(3):
        gain = contrast * ((1 - 0.5 * jitter) + jitter * _uniform(tint[0 if GREY else c]))
        tl.store(row + GAIN + c, gain, mask=inside)
        tl.store(row + BIAS + c, 0.5 - 0.5 * gain + jitter * (_uniform(offset[0 if GREY else c]) - 0.5), mask=inside)

    kind, k_x, k_y, turn = _philox(seed_low, seed_high, MASK, sample, _word(0))
    blend, _, _, _ = _philox(seed_low, seed_high, MASK, sample, _word(1))
    cos, sin = _cos_sin((_uniform(turn) - 0.5) * 0.5)
    tl.store(row + NOISE, cos, mask=inside)
    tl.store(row + NOISE + 1, sin, mask=inside)
    tl.store(row + NOISE + 2, _cells(k_x, choices).to(tl.float32) / size.to(tl.float32), mask=inside)
    tl.store(row + NOISE + 3, _cells(k_y, choices).to(tl.float32) / size.to(tl.float32), mask=inside)
    tl.store(row + BETA, blend_max * _uniform(blend), mask=inside)

    if image_index_ptr is not None:
        image = tl.load(image_index_ptr + b, mask=inside, other=0)
        image = tl.minimum(tl.maximum(image, 0), images - 1).to(tl.int32)  # no row outside the store is ever read
    else:
        image = _shuffled(seed_low, seed_high, sample, images).to(tl.int32)
    texture = tl.umulhi(which, textures.to(tl.uint32)).to(tl.int32)
    tl.store(rows_ptr + 2 * b, image, mask=inside)
    tl.store(rows_ptr + 2 * b + 1, tl.where(_uniform(kind) >= clean_fraction, texture, -1), mask=inside)


@triton.jit
def _cells(word, choices):
    """2^k, k ~ U{0..choices − 1}, int32."""
    return _word(1).to(tl.int32) << tl.umulhi(word, choices.to(tl.uint32)).to(tl.int32)


@triton.jit
def _pack(x, y):
    """Two float32 as one int64, so that a gradient is one load."""
    low, high = x.to(tl.uint32, bitcast=True).to(tl.uint64), y.to(tl.uint32, bitcast=True).to(tl.uint64)
    return ((high << 32) | low).to(tl.int64, bitcast=True)


@triton.jit
def _unpack(packed):
    x, y = packed.to(tl.uint32), (packed >> 32).to(tl.uint32)
    return x.to(tl.float32, bitcast=True), y.to(tl.float32, bitcast=True)


@triton.jit
def _draw_lattice(
    sample,
    lattice_ptr,  # int64 [POINTS, POINTS]: packed gradients
    seed_low,
    seed_high,
    clean_fraction,
    choices,
    MARGIN: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``synthesis.lattice_gradients``, where the rotated window of an anomalous sample can reach."""
    kind, k_x, k_y, _ = _philox(seed_low, seed_high, MASK, sample, _word(0))
    if _uniform(kind) >= clean_fraction:
        x_0, x_1 = _reach(_cells(k_x, choices))
        y_0, y_1 = _reach(_cells(k_y, choices))
        quad_0 = (x_0 + MARGIN) // 4
        quads = (x_1 + MARGIN) // 4 + 1 - quad_0
        count = quads * (y_1 + 1 - y_0)
        start = 0
        while start < count:
            i = start + tl.arange(0, BLOCK)
            row, quad = i // quads + (y_0 + MARGIN), i % quads + quad_0
            index = (row - MARGIN + ORIGIN) * (STRIDE // 4) + quad + (ORIGIN - MARGIN) // 4
            words = _philox(seed_low, seed_high, LATTICE, sample, index.to(tl.uint32))
            for n in tl.static_range(4):
                cos, sin = _cos_sin(_uniform(words[n]))
                tl.store(lattice_ptr + row * POINTS + 4 * quad + n, _pack(cos, sin), mask=i < count)
            start += BLOCK


@triton.jit
def _reach(cells):
    """The first and last lattice line that a window of ``cells`` cells touches, however it is turned."""
    overhang = OVERHANG * cells.to(tl.float32)
    last = tl.floor(cells.to(tl.float32) + overhang).to(tl.int32) + 1
    return tl.floor(-overhang).to(tl.int32), last


@triton.jit(do_not_specialize=SCALARS)
def _prepare_kernel(
    sample_ptr,  # int64 [B]
    seed_ptr,  # int64 [] or None: then seed_low, seed_high
    image_index_ptr,  # int64 [B] or None
    rows_ptr,  # int32 [B, 2]
    draws_ptr,  # float32 [B, DRAWS]
    lattice_ptr,  # int64 [B, POINTS, POINTS]
    seed_low,
    seed_high,
    batch,
    images,  # how many the shuffle orders or, with image_index, rows there are
    textures,
    image_side,
    texture_side,
    size,
    choices,
    scale_low,
    scale_span,
    rotation,
    clean_fraction,
    blend_max,
    jitter,
    GREY: tl.constexpr,
    MARGIN: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs 0..⌈B/BLOCK⌉−1 draw; they start first, the shuffle takes longest. The B others make a lattice each."""
    program = tl.program_id(0)
    drawing = (batch + BLOCK - 1) // BLOCK
    low, high = _seed_words(seed_ptr, seed_low, seed_high)
    if program < drawing:
        _draw(
            program * BLOCK, sample_ptr, image_index_ptr, rows_ptr, draws_ptr, low, high, batch, images, textures,
            image_side, texture_side, size, choices, scale_low, scale_span, rotation, clean_fraction, blend_max, jitter,
            GREY, BLOCK,
        )  # fmt: skip
    else:
        b = program - drawing
        lattice_ptr += b.to(tl.int64) * (POINTS * POINTS)
        sample = tl.load(sample_ptr + b)
        _draw_lattice(sample, lattice_ptr, low, high, clean_fraction, choices, MARGIN, POINTS, BLOCK)


@triton.jit
def _reflected(x, SIDE: tl.constexpr):
    """A coordinate in pixels, reflected at −1/2 and SIDE − 1/2 as often as it takes, then clamped to pixel centres."""
    period: tl.constexpr = 2.0 * SIDE
    x += 0.5
    x -= tl.floor(x * (1 / period)) * period
    return tl.clamp(tl.minimum(x, period - x) - 0.5, 0.0, SIDE - 1.0)


@triton.jit
def _byte(ptr, wanted):
    """2^23 + the uint8, as float32: one instruction at full rate, where a conversion runs at an eighth."""
    bits = tl.load(ptr, mask=wanted, other=0).to(tl.int32) | 0x4B000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bilinear(ptr, f, g, SIDE: tl.constexpr, wanted):
    """Between the uint8 pixel at ``ptr``, its right, lower and diagonal neighbour, as float32 in [0, 1]."""
    p00, p10 = _byte(ptr, wanted), _byte(ptr + 1, wanted)
    p01, p11 = _byte(ptr + SIDE, wanted), _byte(ptr + (SIDE + 1), wanted)
    top, bottom = (p00 - 8388608.0) + f * (p10 - p00), (p01 - 8388608.0) + f * (p11 - p01)
    return (top + g * (bottom - top)) * (1 / 255)


@triton.jit
def _sample(image_ptr, map_ptr, u, v, SIDE: tl.constexpr, wanted):
    """``synthesis.sample_affine`` at output coordinates (u, v) from the centre: three float32 channels.

    The corner pixel stays within SIDE − 2 and the fraction reaches 1, so that one address serves all twelve loads."""
    cos, sin = tl.load(map_ptr), tl.load(map_ptr + 1)
    x = _reflected(cos * u - sin * v + tl.load(map_ptr + 2), SIDE)
    y = _reflected(sin * u + cos * v + tl.load(map_ptr + 3), SIDE)
    i, j = tl.minimum(x.to(tl.int32), SIDE - 2), tl.minimum(y.to(tl.int32), SIDE - 2)
    f, g = x - i.to(tl.float32), y - j.to(tl.float32)
    ptr = image_ptr + (j * SIDE + i)
    r = _bilinear(ptr, f, g, SIDE, wanted)
    return r, _bilinear(ptr + SIDE * SIDE, f, g, SIDE, wanted), _bilinear(ptr + 2 * SIDE * SIDE, f, g, SIDE, wanted)


@triton.jit
def _fade(t):
    return t * t * t * ((6.0 * t - 15.0) * t + 10.0)


@triton.jit
def _perlin(lattice_ptr, draws_ptr, u, v, SIZE: tl.constexpr, MARGIN: tl.constexpr, POINTS: tl.constexpr, wanted):
    """``synthesis.perlin_noise`` at output coordinates (u, v) from the centre."""
    cos, sin = tl.load(draws_ptr + NOISE), tl.load(draws_ptr + NOISE + 1)
    u, v = u - 0.5, v - 0.5  # pixel (x, y) lies at its corner, as in DRAEM
    x = (cos * u - sin * v + SIZE / 2) * tl.load(draws_ptr + NOISE + 2)
    y = (sin * u + cos * v + SIZE / 2) * tl.load(draws_ptr + NOISE + 3)
    i, j = tl.floor(x), tl.floor(y)
    f, g = x - i, y - j
    ptr = lattice_ptr + ((j.to(tl.int32) + MARGIN) * POINTS + (i.to(tl.int32) + MARGIN))
    n00 = _ramp(ptr, f, g, wanted)
    n10 = _ramp(ptr + 1, f - 1, g, wanted)
    n01 = _ramp(ptr + POINTS, f, g - 1, wanted)
    n11 = _ramp(ptr + (POINTS + 1), f - 1, g - 1, wanted)
    fade = _fade(f)
    top, bottom = n00 + fade * (n10 - n00), n01 + fade * (n11 - n01)
    return SQRT2 * (top + _fade(g) * (bottom - top))


@triton.jit
def _ramp(ptr, f, g, wanted):
    x, y = _unpack(tl.load(ptr, mask=wanted, other=0))
    return x * f + y * g


@triton.jit
def _blended(normal, texture, draws_ptr, channel: tl.constexpr):
    """Eq 3.1 where the mask is one."""
    texture = texture * tl.load(draws_ptr + GAIN + channel) + tl.load(draws_ptr + BIAS + channel)
    return normal + (1 - tl.load(draws_ptr + BETA)) * (tl.clamp(texture, 0.0, 1.0) - normal)


@triton.jit
def _store_pixels(ptr, pixel, r, g, b, inside, BLOCK: tl.constexpr):
    """Three channels side by side. Stored one by one they would touch every sector of L2 three times; as rows of a
    [BLOCK, 4] tile they go out in order. The fourth lane repeats the third, which is cheaper than masking it."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    r, g, b = r.to(dtype), g.to(dtype), b.to(dtype)
    tile = tl.reshape(tl.join(tl.join(r, b), tl.join(g, b)), [BLOCK, 4])
    channel = tl.minimum(tl.arange(0, 4), 2)[None, :]
    tl.store(ptr + (3 * pixel[:, None] + channel), tile, mask=inside[:, None])


@triton.jit
def _pixel_kernel(
    images_ptr,  # uint8 [N, 3, IMAGE_SIDE, IMAGE_SIDE]
    textures_ptr,  # uint8 [T, 3, TEXTURE_SIDE, TEXTURE_SIDE]
    rows_ptr,  # int32 [B, 2]
    draws_ptr,  # float32 [B, DRAWS]
    lattice_ptr,  # int64 [B, POINTS, POINTS]
    clean_ptr,  # [B, SIZE, SIZE, 3]
    anomalous_ptr,  # [B, SIZE, SIZE, 3]
    mask_ptr,  # uint8 [B, SIZE, SIZE]
    threshold,
    SIZE: tl.constexpr,
    IMAGE_SIDE: tl.constexpr,
    TEXTURE_SIDE: tl.constexpr,
    MARGIN: tl.constexpr,
    POINTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One warp, one tile of one sample."""
    BLOCK: tl.constexpr = ROWS * COLUMNS
    across: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    tiles: tl.constexpr = across * ((SIZE + ROWS - 1) // ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    x_0, y_0 = tile % across * COLUMNS, tile // across * ROWS
    first = b * (SIZE * SIZE) + y_0 * SIZE + x_0
    lane = tl.arange(0, BLOCK)
    pixel = lane // COLUMNS * SIZE + lane % COLUMNS  # counted from the tile's first
    x, y = x_0 + lane % COLUMNS, y_0 + lane // COLUMNS
    inside = (x < SIZE) & (y < SIZE)
    u, v = x.to(tl.float32) - (SIZE - 1) / 2, y.to(tl.float32) - (SIZE - 1) / 2
    draws_ptr += b * DRAWS
    image = tl.load(rows_ptr + 2 * b).to(tl.int64)
    texture = tl.load(rows_ptr + 2 * b + 1).to(tl.int64)

    images_ptr += image * (3 * IMAGE_SIDE * IMAGE_SIDE)
    r, g, b_ = _sample(images_ptr, draws_ptr + IMAGE, u, v, IMAGE_SIDE, inside)
    _store_pixels(clean_ptr + 3 * first, pixel, r, g, b_, inside, BLOCK)

    m = tl.zeros([BLOCK], tl.int1)
    if texture >= 0:
        lattice_ptr += b * (POINTS * POINTS)
        m = inside & (_perlin(lattice_ptr, draws_ptr, u, v, SIZE, MARGIN, POINTS, inside) > threshold)
        # Masks are blobs that cover 6 %: most programs see none of theirs, and then there is no texture to sample.
        if tl.max(m.to(tl.int32), 0) > 0:
            textures_ptr += texture * (3 * TEXTURE_SIDE * TEXTURE_SIDE)
            t_r, t_g, t_b = _sample(textures_ptr, draws_ptr + TEXTURE_MAP, u, v, TEXTURE_SIDE, m)
            r = tl.where(m, _blended(r, t_r, draws_ptr, 0), r)
            g = tl.where(m, _blended(g, t_g, draws_ptr, 1), g)
            b_ = tl.where(m, _blended(b_, t_b, draws_ptr, 2), b_)
    _store_pixels(anomalous_ptr + 3 * first, pixel, r, g, b_, inside, BLOCK)
    # As a column: in the pixels' own shape, four bytes a thread would spread a warp's gathers over 128 pixels instead of 32.
    tl.store(mask_ptr + first + pixel[:, None], m.to(tl.uint8)[:, None], mask=inside[:, None])


def _signed(number: int) -> int:
    """The number modulo 2^32 as a signed integer, so that an argument has one type whatever its value."""
    number &= 2**32 - 1
    return number - 2**32 if number >> 31 else number


def _prepare(
    images: Tensor,
    textures: Tensor,
    sample: Tensor,
    seed: int | Tensor,
    settings: SynthesisSettings,
    image_index: Tensor | None,
    image_count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """First launch. Rows int32 [B, 2], draws float32 [B, DRAWS], lattice int64 [B, points, points] (parts of it unset)."""
    batch, device = len(sample), images.device
    margin, points = lattice_window(settings.lattice_max)
    rows = torch.empty(batch, 2, dtype=torch.int32, device=device)
    draws = torch.empty(batch, DRAWS.value, dtype=torch.float32, device=device)
    lattice = torch.empty(batch, points, points, dtype=torch.int64, device=device)
    seed_tensor, number = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    low, high = settings.scale
    ordered = image_count if image_index is None else len(images)
    _prepare_kernel[(triton.cdiv(batch, PREPARE_BLOCK) + batch,)](
        sample, seed_tensor, image_index, rows, draws, lattice, _signed(number), _signed(number >> 32),
        batch, ordered, len(textures), images.shape[-1], textures.shape[-1], settings.image_size,
        settings.lattice_max + 1, float(low), float(high - low), settings.rotation / 360,
        float(settings.clean_fraction), float(settings.blend_max), float(settings.texture_jitter),
        settings.grey, margin, points, PREPARE_BLOCK, num_warps=PREPARE_WARPS,
    )  # fmt: skip
    return rows, draws, lattice


def synthesise(
    images: Tensor,
    textures: Tensor,
    sample: Tensor,
    seed: int | Tensor,
    settings: SynthesisSettings,
    image_index: Tensor | None,
    image_count: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of ``kernels.synthesis.synthesise``'s batch; it checks the arguments. Nothing waits for the device."""
    sample = sample.contiguous()
    image_index = None if image_index is None else image_index.contiguous()
    size, batch = settings.image_size, len(sample)
    clean, anomalous, mask = empty_outputs(images, batch, size, dtype)
    if batch == 0:
        return clean, anomalous, mask
    with torch.cuda.device_of(images):
        rows, draws, lattice = _prepare(images, textures, sample, seed, settings, image_index, image_count)
        tiles = triton.cdiv(size, TILE[0]) * triton.cdiv(size, TILE[1])
        _pixel_kernel[(batch * tiles,)](
            images, textures, rows, draws, lattice, clean, anomalous, mask, float(settings.threshold),
            size, images.shape[-1], textures.shape[-1], *lattice_window(settings.lattice_max), *TILE, num_warps=1,
        )  # fmt: skip
    return clean, anomalous, mask


def compile_specs() -> list[KernelSpec]:
    """Training's calls at 128² from stores of 256², for the report of ``compiled.py``."""
    margin, points = lattice_window(5)
    window = {"MARGIN": margin, "POINTS": points}
    pointers = {"rows_ptr": "*i32", "draws_ptr": "*fp32", "lattice_ptr": "*i64"}
    kinds = {"sample_ptr": "*i64", **pointers, **dict.fromkeys(SCALARS, "i32")}
    kinds |= dict.fromkeys("scale_low scale_span rotation clean_fraction blend_max jitter".split(), "fp32")
    constants = {"seed_ptr": None, "image_index_ptr": None, "GREY": False, **window, "BLOCK": PREPARE_BLOCK}
    specs = [KernelSpec("synthesis_prepare", _prepare_kernel, kinds, constants, PREPARE_WARPS)]
    for dtype in ("fp32", "bf16"):
        kinds = pointers | {"images_ptr": "*u8", "textures_ptr": "*u8", "mask_ptr": "*u8", "threshold": "fp32"}
        kinds |= {"clean_ptr": f"*{dtype}", "anomalous_ptr": f"*{dtype}"}
        sides = {"SIZE": 128, "IMAGE_SIDE": 256, "TEXTURE_SIDE": 256, "ROWS": TILE[0], "COLUMNS": TILE[1]}
        specs.append(KernelSpec(f"synthesis_pixels {dtype}", _pixel_kernel, kinds, {**sides, **window}, num_warps=1))
    return specs
