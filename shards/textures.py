"""A procedural texture bank: the stand-in for DTD where no folder of textures is given.

Each texture is a scalar field through a random palette. Everything is drawn from one Philox generator, so a bank is a
function of (count, size, seed).
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.float32]


def procedural_textures(count: int = 64, size: int = 256, seed: int = 0) -> NDArray[np.uint8]:
    """Draw `count` varied textures.

    Returns:
        uint8 [count, 3, size, size], RGB; the kinds (noise, gratings, checkers, cells, dots, fabric, marble, speckle)
        take turns. The first textures of a larger bank are those of a smaller one.
    """
    textures = np.empty((count, 3, size, size), dtype=np.uint8)
    for index in range(count):
        rng = Generator(Philox(key=[seed, index]))
        field = KINDS[index % len(KINDS)](rng, size)
        textures[index] = _colour(rng, field).transpose(2, 0, 1)
    return textures


def value_noise(rng: Generator, size: int, cells: int, octaves: int = 4, persistence: float = 0.55) -> Field:
    """Octaves of random lattices, enlarged bicubically; float32 [size, size] stretched to [0, 1]."""
    total = np.zeros((size, size), dtype=np.float32)
    for octave in range(octaves):
        lattice = rng.random((min(cells << octave, size) + 3,) * 2, dtype=np.float32)
        total += persistence**octave * np.asarray(
            Image.fromarray(lattice).resize((size, size), Image.Resampling.BICUBIC)
        )
    return _stretch(total)


def _stretch(field: Field) -> Field:
    low, high = float(field.min()), float(field.max())
    return np.asarray((field - low) / max(high - low, 1e-6), dtype=np.float32)


def _axes(rng: Generator, size: int) -> tuple[Field, Field]:
    """Coordinates in [0, 1] in a frame turned by a random angle."""
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    u = np.cos(angle) * x + np.sin(angle) * y
    v = np.cos(angle) * y - np.sin(angle) * x
    return u.astype(np.float32), v.astype(np.float32)


def _colour(rng: Generator, field: Field) -> NDArray[np.uint8]:
    """Map a field in [0, 1] through 3 to 5 random colours, with light grain; uint8 [size, size, 3]."""
    stops = int(rng.integers(3, 6))
    # Mostly shades of one subdued colour, as surfaces are; one palette in four is of unrelated colours.
    base = rng.uniform(40, 215) + rng.normal(0, 28, 3)
    if rng.random() < 0.25:
        palette = rng.uniform(0, 255, (stops, 3))
    else:
        palette = base + rng.normal(0, rng.uniform(25, 70), (stops, 1)) + rng.normal(0, 15, (stops, 3))
    palette = np.clip(palette, 0, 255)
    positions = np.linspace(0, 1, stops)
    table = np.stack(
        [np.interp(np.linspace(0, 1, 1024), positions, palette[:, channel]) for channel in range(3)], axis=1
    )
    rgb = table.astype(np.float32)[(field * 1023).astype(np.int32)]
    rgb += rng.standard_normal(field.shape, dtype=np.float32)[:, :, None] * rng.uniform(1, 7)
    return np.clip(rgb + 0.5, 0, 255).astype(np.uint8)


def _noise(rng: Generator, size: int) -> Field:
    return value_noise(rng, size, int(rng.integers(2, 17)), octaves=5, persistence=rng.uniform(0.4, 0.8))


def _grating(rng: Generator, size: int) -> Field:
    u, v = _axes(rng, size)
    phase = rng.uniform(3, 40) * u + rng.uniform(0, 1.5) * value_noise(rng, size, 3, 2)
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * phase)
    sharpness = rng.uniform(1, 8)
    return _stretch(np.tanh(sharpness * (wave - 0.5)) + rng.uniform(0, 0.4) * v)


def _checker(rng: Generator, size: int) -> Field:
    u, v = _axes(rng, size)
    across = rng.uniform(3, 20)
    parity = (np.floor(u * across) + np.floor(v * across * rng.uniform(0.5, 2))) % 2
    return _stretch(parity.astype(np.float32) + rng.uniform(0.1, 0.8) * value_noise(rng, size, 6, 3))


def _cells(rng: Generator, size: int) -> Field:
    """Voronoi cells of a jittered grid: nearest and second nearest of the 9 points around."""
    grid = int(rng.integers(4, 16))
    points = rng.random((grid + 2, grid + 2, 2), dtype=np.float32)
    shade = rng.random((grid + 2, grid + 2), dtype=np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * (grid / size)
    row, column = y.astype(np.int32) + 1, x.astype(np.int32) + 1
    nearest = np.full((size, size), 9.0, dtype=np.float32)
    second = nearest.copy()
    colour = np.zeros_like(nearest)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            point = points[row + dy, column + dx]
            distance = np.hypot(row + dy - 1 + point[..., 1] - y, column + dx - 1 + point[..., 0] - x)
            closer = distance < nearest
            second = np.where(closer, nearest, np.minimum(second, distance))
            colour = np.where(closer, shade[row + dy, column + dx], colour)
            nearest = np.where(closer, distance, nearest)
    if rng.random() < 0.5:
        return _stretch(np.minimum(second - nearest, 0.25) * (1 + colour))
    return _stretch(colour - rng.uniform(0, 0.8) * nearest)


def _dots(rng: Generator, size: int) -> Field:
    u, v = _axes(rng, size)
    across = rng.uniform(5, 25)
    row = np.floor(v * across)
    shifted = u * across + 0.5 * (row % 2)
    distance = np.hypot(shifted % 1 - 0.5, v * across % 1 - 0.5)
    edge = rng.uniform(0.15, 0.45)
    return _stretch(
        np.tanh((edge - distance) * rng.uniform(5, 30)) + rng.uniform(0, 0.5) * value_noise(rng, size, 5, 3)
    )


def _fabric(rng: Generator, size: int) -> Field:
    u, v = _axes(rng, size)
    across = rng.uniform(10, 40)
    warp, weft = np.sin(2 * np.pi * across * u), np.sin(2 * np.pi * across * v)
    over = np.sin(np.pi * across * u) * np.sin(np.pi * across * v) > 0
    return _stretch(
        np.where(over, np.abs(warp), 0.7 * np.abs(weft)) + rng.uniform(0.1, 0.7) * value_noise(rng, size, 8, 4)
    )


def _marble(rng: Generator, size: int) -> Field:
    u, _ = _axes(rng, size)
    warped = rng.uniform(2, 8) * u + rng.uniform(1, 5) * value_noise(rng, size, int(rng.integers(2, 6)), 5)
    return _stretch(np.abs(np.sin(np.pi * warped)) ** np.float32(rng.uniform(0.4, 1.5)))


def _speckle(rng: Generator, size: int) -> Field:
    grain = value_noise(rng, size, size // 4, 2)
    return _stretch(0.3 * value_noise(rng, size, 2, 2) + np.clip(grain - rng.uniform(0.4, 0.7), 0, 1))


KINDS: tuple[Callable[[Generator, int], Field], ...] = (
    _noise,
    _grating,
    _checker,
    _cells,
    _dots,
    _fabric,
    _marble,
    _speckle,
)
