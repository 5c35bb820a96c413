"""Anomaly synthesis, Eq 3.1: I_a = M ∘ (β·I_b + (1 − β)·I) + (1 − M) ∘ I_b, from global sample indices alone.

A sample index determines a normal image I_b, its crop, scale and rotation, a Perlin mask M, a texture I with its own jitter,
and β.
The draws are Philox words (``philox.py``), so any rank, device or restart that asks for index i gets the same sample.

This is the PyTorch form, which says what the others must compute, and runs anywhere.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import Purpose, philox, shuffled, uniform

# Lattice points are numbered from this corner, so that a point's gradient depends on its position only and the rotated
# window (which reaches 0.21 of its side beyond the square) never meets a negative number. Both are multiples of 4 because
# one Philox call serves four neighbouring points. They hold windows of up to 2^LATTICE_LIMIT cells.
LATTICE_ORIGIN = 64
LATTICE_STRIDE = 256
LATTICE_LIMIT = 7
FADE = (6.0, -15.0, 10.0)


@dataclass(frozen=True)
class SynthesisSettings:
    """What is drawn, and from which range. Lengths are fractions of the image's side, angles degrees.

    Raises:
        ValueError: ``lattice_max`` is not in 0..LATTICE_LIMIT.
    """

    image_size: int = 128
    scale: tuple[float, float] = (0.8, 1.0)
    rotation: float = 10.0
    clean_fraction: float = 0.5
    blend_max: float = 0.8
    lattice_max: int = 5
    threshold: float = 0.5
    texture_jitter: float = 0.4
    grey: bool = False
    """The texture's jitter is the same for R, G and B, so that a grey one stays grey."""

    def __post_init__(self) -> None:
        if not 0 <= self.lattice_max <= LATTICE_LIMIT:
            raise ValueError(f"lattice_max must be 0 to {LATTICE_LIMIT}, got {self.lattice_max}")


@dataclass(frozen=True)
class Draws:
    """Everything random about B samples.

    ``image_map`` and ``texture_map`` [B, 2, 3] float32 take output coordinates in [−1, 1] to source coordinates in [−1, 1].
    ``gain`` and ``bias`` [B, 3] act on the texture. ``lattice`` [B, 2] int64 holds k of the resolutions 2^k (x, y), ``angle``
    [B] the mask's rotation in radians, ``beta`` [B] the blend, ``anomalous`` [B] bool whether the sample gets a mask at all.
    """

    image_index: Tensor
    texture_index: Tensor
    image_map: Tensor
    texture_map: Tensor
    gain: Tensor
    bias: Tensor
    lattice: Tensor
    angle: Tensor
    beta: Tensor
    anomalous: Tensor


@dataclass(frozen=True)
class Batch:
    """Clean image X and anomalous image X_a [B, 3, H, H] in [0, 1], channels_last; mask M [B, 1, H, H] uint8 in {0, 1}."""

    clean: Tensor
    anomalous: Tensor
    mask: Tensor


def _between(word: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform(word)


def _similarity(scale: Tensor, angle: Tensor, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """[B, 2, 3] maps u -> scale · R(angle) · u + shift."""
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    return torch.stack([torch.stack([cos, -sin, shift_x], -1), torch.stack([sin, cos, shift_y], -1)], -2)


def draw(seed: int, sample: Tensor, images: int, textures: int, settings: SynthesisSettings) -> Draws:
    """The random choices of the samples with global indices ``sample`` (int64 [B]) out of ``images`` and ``textures``."""
    size, turn, x, y = philox(seed, Purpose.GEOMETRY, sample)
    scale = _between(size, *settings.scale)
    angle = _between(turn, -1.0, 1.0) * math.radians(settings.rotation)
    image_map = _similarity(scale, angle, (1 - scale) * _between(x, -1.0, 1.0), (1 - scale) * _between(y, -1.0, 1.0))

    kind, k_x, k_y, mask_turn = philox(seed, Purpose.MASK, sample, 0)
    blend, _, _, _ = philox(seed, Purpose.MASK, sample, 1)
    choices = settings.lattice_max + 1

    which, t_turn, t_size, t_x = philox(seed, Purpose.TEXTURE, sample, 0)
    t_y, contrast, invert, _ = philox(seed, Purpose.TEXTURE, sample, 1)
    tint = torch.stack(philox(seed, Purpose.TEXTURE, sample, 2)[:3], -1)
    offset = torch.stack(philox(seed, Purpose.TEXTURE, sample, 3)[:3], -1)
    if settings.grey:
        tint, offset = tint[:, :1].expand(-1, 3), offset[:, :1].expand(-1, 3)
    jitter = settings.texture_jitter
    t_scale = _between(t_size, 1 - jitter, 1.0)
    texture_map = _similarity(
        t_scale, _between(t_turn, -math.pi, math.pi), _between(t_x, -jitter, jitter), _between(t_y, -jitter, jitter)
    )
    # Contrast acts around mid-grey and may be inverted; tint and offset act per channel.
    sign = torch.where(uniform(invert) < 0.5 * jitter, -1.0, 1.0)
    gain = (sign * _between(contrast, 1 - jitter, 1 + jitter))[:, None] * _between(tint, 1 - jitter / 2, 1 + jitter / 2)
    bias = 0.5 - 0.5 * gain + _between(offset, -jitter / 2, jitter / 2)
    return Draws(
        image_index=shuffled(seed, sample, images),
        texture_index=(which * textures) >> 32,
        image_map=image_map,
        texture_map=texture_map,
        gain=gain,
        bias=bias,
        lattice=torch.stack([(k_x * choices) >> 32, (k_y * choices) >> 32], -1),
        angle=_between(mask_turn, -0.5, 0.5) * math.pi,
        beta=settings.blend_max * uniform(blend),
        anomalous=uniform(kind) >= settings.clean_fraction,
    )


def lattice_gradients(seed: int, sample: Tensor, margin: int, points: int) -> Tensor:
    """Unit gradients [B, 2, points, points] (x, y) of the infinite lattice, from lattice point (−margin, −margin) on.

    ``margin`` and ``points`` are multiples of 4: the four words of a Philox call are four neighbours along x.
    """
    row = torch.arange(points, device=sample.device) - margin + LATTICE_ORIGIN
    quad = row[::4] // 4
    index = row[:, None] * (LATTICE_STRIDE // 4) + quad[None, :]
    words = torch.stack(philox(seed, Purpose.LATTICE, sample[:, None, None], index), -1)
    angle = uniform(words).flatten(2) * (2 * math.pi)
    return torch.stack([torch.cos(angle), torch.sin(angle)], 1)


def lattice_window(lattice_max: int) -> tuple[int, int]:
    """(margin, points): lattice points −margin … points − margin − 1 along each axis hold every rotated window of up to
    2^lattice_max cells. Both are multiples of 4."""
    resolution = 2**lattice_max
    margin = 4 * math.ceil((math.ceil(resolution * (math.sqrt(2) - 1) / 2) + 1) / 4)
    return margin, 4 * math.ceil((resolution + 2 * margin) / 4)


def perlin_noise(seed: int, sample: Tensor, lattice: Tensor, angle: Tensor, size: int, lattice_max: int) -> Tensor:
    """Perlin noise [B, size, size] float32, scaled by √2 as in DRAEM, its window rotated about the centre by ``angle``.

    Pixel (x, y) lies at lattice coordinates 2^k/size · R(angle)·(x, y); unrotated this is DRAEM's ``rand_perlin_2d``. The
    coordinates are rotated, not the picture, and the lattice has no edge, so that a rotated window has no empty corners.
    """
    margin, points = lattice_window(lattice_max)
    gradient = lattice_gradients(seed, sample, margin, points)

    pixel = torch.arange(size, device=sample.device, dtype=torch.float32) - size / 2
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    step = (2.0**lattice / size)[:, :, None, None]
    u = (cos * pixel[None, None, :] - sin * pixel[None, :, None] + size / 2) * step[:, 0]
    v = (sin * pixel[None, None, :] + cos * pixel[None, :, None] + size / 2) * step[:, 1]
    i, j = torch.floor(u), torch.floor(v)
    f, g = u - i, v - j
    # Perlin's fade 6t⁵ − 15t⁴ + 10t³
    a, b, c = FADE
    fade_f, fade_g = f * f * f * ((a * f + b) * f + c), g * g * g * ((a * g + b) * g + c)

    corner = (j.long() + margin) * points + i.long() + margin
    table = gradient.flatten(2)

    def ramp(dx: int, dy: int) -> Tensor:
        g_x, g_y = torch.gather(table, 2, (corner + dy * points + dx).flatten(1)[:, None].expand(-1, 2, -1)).unbind(1)
        return g_x.view_as(f) * (f - dx) + g_y.view_as(f) * (g - dy)

    n00, n10, n01, n11 = ramp(0, 0), ramp(1, 0), ramp(0, 1), ramp(1, 1)
    top = n00 + fade_f * (n10 - n00)
    bottom = n01 + fade_f * (n11 - n01)
    return math.sqrt(2) * (top + fade_g * (bottom - top))


def sample_affine(images: Tensor, maps: Tensor, size: int) -> Tensor:
    """Bilinear samples [B, 3, size, size] float32 in [0, 1] of uint8 ``images`` [B, 3, S, S] under ``maps`` [B, 2, 3].

    Half-pixel centres, reflected at the border. At S = 2·size and the identity map each output pixel is the mean of a 2×2
    block: store images at twice the training size and there is no aliasing.
    """
    # Written out rather than F.affine_grid, whose batched matrix product costs as much as the sampling does.
    axis = (2 * torch.arange(size, device=maps.device, dtype=torch.float32) + 1) / size - 1
    m = maps[:, :, :, None, None]
    grid = (m[:, :, 0] * axis[None, None, None, :] + m[:, :, 1] * axis[None, None, :, None] + m[:, :, 2]).movedim(1, -1)
    return F.grid_sample(images.float(), grid, "bilinear", "reflection", align_corners=False) * (1 / 255)


def whole_images(images: Tensor, size: int) -> Tensor:
    """Whole uint8 images [B, 3, S, S] at the training size, sampled exactly as the training crops are."""
    identity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], device=images.device).expand(len(images), 2, 3)
    return sample_affine(images, identity, size)


def reference(
    images: Tensor,
    textures: Tensor,
    sample: Tensor,
    seed: int,
    settings: SynthesisSettings,
    image_index: Tensor | None,
    image_count: int,
) -> Batch:
    """Eq 3.1 in PyTorch, in float32."""
    size = settings.image_size
    draws = draw(seed, sample, image_count, len(textures), settings)
    rows = draws.image_index if image_index is None else image_index
    if image_index is not None and bool(((rows < 0) | (rows >= len(images))).any()):
        # Indexing would count negative rows from the end.
        raise IndexError(f"rows of {len(images)} images are wanted, got {rows.tolist()}")
    clean = sample_affine(images[rows], draws.image_map, size)
    anomalous, mask = clean.clone(), clean.new_zeros(len(sample), 1, size, size)
    # Only the samples that carry an anomaly pay for one.
    which = draws.anomalous.nonzero().squeeze(1)
    if len(which):
        noise = perlin_noise(seed, sample[which], draws.lattice[which], draws.angle[which], size, settings.lattice_max)[
            :, None
        ]
        m = (noise > settings.threshold).float()
        texture = sample_affine(textures[draws.texture_index[which]], draws.texture_map[which], size)
        texture = (texture * draws.gain[which, :, None, None] + draws.bias[which, :, None, None]).clamp_(0, 1)
        beta = draws.beta[which, None, None, None]
        normal = clean[which]
        mask[which] = m
        anomalous[which] = normal + m * (1 - beta) * (texture - normal)
    return Batch(clean, anomalous, mask)


def empty_outputs(images: Tensor, batch: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unset clean and anomalous images and masks, as ``Batch`` has them."""
    shape, layout = (batch, 3, size, size), torch.channels_last
    clean = torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)
    return clean, torch.empty_like(clean), torch.empty(batch, 1, size, size, dtype=torch.uint8, device=images.device)
