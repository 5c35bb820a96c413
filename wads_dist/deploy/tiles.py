"""Scoring an image larger than the network's input in overlapping tiles, blended without seams.

Each tile counts with a raised cosine that falls to nearly nothing at its edges, where a network sees least of what is around
a pixel; the weights of all tiles over a pixel are divided by their sum. Both are products of one factor an axis, because the
tiles form a grid.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the fewest tiles that cover ``length`` ≥ ``tile`` pixels, evenly spread; neighbours share at least
    ``overlap`` < ``tile`` pixels."""
    gaps = math.ceil((length - tile) / (tile - overlap))
    return [round(i * (length - tile) / gaps) for i in range(gaps + 1)] if gaps else [0]


def axis_weights(starts: list[int], length: int, tile: int) -> NDArray[np.float64]:
    """[tiles, tile]: the weight of every tile's pixels along one axis; over each of the ``length`` pixels they add up to 1."""
    bell = np.sin(np.pi * (np.arange(tile) + 0.5) / tile) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + tile] += bell
    return np.stack([bell / total[start : start + tile] for start in starts])


def score_in_tiles(
    image: NDArray[np.uint8],
    tile: int,
    overlap: float,
    score: Callable[[NDArray[np.uint8]], Floats],
    batch_size: int = 32,
) -> Floats:
    """The blended map [height, width] of an image [height, width, 3].

    Args:
        tile: side of a tile in pixels; a shorter side of the image is continued by its mirror image.
        overlap: fraction of a tile, 0 ≤ overlap < 1, that neighbours share at least.
        score: maps [N, tile, tile] of tiles [N, tile, tile, 3], N at most ``batch_size``.
    """
    height, width = image.shape[:2]
    image = np.pad(image, ((0, max(tile - height, 0)), (0, max(tile - width, 0)), (0, 0)), "symmetric")
    shared = min(int(overlap * tile), tile - 1)
    rows, columns = (tile_starts(side, tile, shared) for side in image.shape[:2])
    row_weights = axis_weights(rows, image.shape[0], tile)
    column_weights = axis_weights(columns, image.shape[1], tile)
    blended = np.zeros(image.shape[:2], np.float32)
    grid = itertools.product(enumerate(rows), enumerate(columns))
    while places := list(itertools.islice(grid, batch_size)):
        tiles = np.stack([image[y : y + tile, x : x + tile] for (_, y), (_, x) in places])
        for ((i, y), (j, x)), map_ in zip(places, score(tiles), strict=True):
            weight = np.outer(row_weights[i], column_weights[j])
            blended[y : y + tile, x : x + tile] += (map_ * weight).astype(np.float32)
    return blended[:height, :width]
