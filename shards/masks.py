"""A marked mask at another resolution: which pixels count as defective, and what becomes of defects thinner than a pixel.

Two rules:

- `area` (the default): a pixel is defective if at least half of its area is marked. A marked component (8-connected, in
  the mask as it is stored) that by itself covers no pixel by half keeps the one that it covers most, and those that it
  covers at least half as much as that: a thin line stays a line, also where it runs along the edge of two rows.
- `nearest`: a pixel is what the mask has under its centre, so that a component may be lost. It is the rule of anomalib
  and, as far as can be told, of the paper.

Areas are integers: with a target pixel H·W units large and a stored one size² of them, every overlap is whole, and exactly
one half is told from less.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MaskRule = Literal["area", "nearest"]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ResizedMask:
    """`pixels` bool [size, size]; `small`: how many marked components are too small for the rule: by area those that by
    themselves cover no pixel by half, by nearest those under no pixel's centre, which are lost."""

    pixels: Bools
    small: int


def fit_mask(mask: Bools, size: int, rule: MaskRule = "area") -> ResizedMask:
    """`mask` bool [height, width] at `size`² by the rule; its aspect is not kept, as an image's is not."""
    if mask.shape == (size, size):
        return ResizedMask(mask, 0)
    if rule == "nearest":
        return _nearest(mask, size)
    covered = _covered(mask, size)
    pixels = 2 * covered >= mask.size
    return ResizedMask(pixels, _keep_small_components(mask, covered, pixels))


def _nearest(mask: Bools, size: int) -> ResizedMask:
    labels, count = _components(mask)
    sampled = np.asarray(Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST))
    return ResizedMask(sampled > 0, count - int(np.count_nonzero(np.unique(sampled))))


def _components(mask: Bools) -> tuple[NDArray[np.int32], int]:
    from scipy.ndimage import label  # here: who only decodes images need not wait for it

    labels, count = label(mask, np.ones((3, 3)))
    return labels, int(count)


def _covered(mask: Bools, size: int) -> Integers:
    """How much of each target pixel is marked, int64 [size, size], in units of which a target pixel has `mask.size`."""
    marked = np.flatnonzero(mask.any(1))
    across = np.zeros((len(mask), size), np.int64)
    if marked.size:  # the rows between the first and the last: most of a mask is empty
        part = slice(marked[0], marked[-1] + 1)
        across[part] = _box_sums(mask[part], size)
    return _box_sums(across.T, size).T


def _box_sums(values: Bools | Integers, size: int) -> Integers:
    """Integrals of rows [N, length] over `size` equal boxes, int64 [N, size]; a value is `size` units wide."""
    length = values.shape[1]
    # Where boxes begin: after so many whole values and so many units of the next.
    whole, rest = np.divmod(np.arange(size + 1) * length, size)
    integral = np.zeros((len(values), length + 1), np.int32 if values.dtype == bool else np.int64)
    np.cumsum(values, axis=1, dtype=integral.dtype, out=integral[:, 1:])
    until = size * integral[:, whole].astype(np.int64) + rest * values[:, np.minimum(whole, length - 1)]
    return np.diff(until, axis=1)


def _keep_small_components(mask: Bools, covered: Integers, pixels: Bools) -> int:
    """Marks in `pixels` what is kept of every component of `mask` that by itself covers no pixel by half; returns how many
    there are. `covered` is by all components."""
    size = len(pixels)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not rows.size:
        return 0
    top, left = rows[0], columns[0]
    labels, count = _components(mask[top : rows[-1] + 1, left : columns[-1] + 1])  # the rest is empty

    # What is marked within one pixel that is marked throughout is of one component. That is not small, and most are told so.
    row, column = np.nonzero(covered == mask.size)
    unknown = np.ones(count + 1, bool)
    unknown[0] = False
    unknown[labels[row * len(mask) // size - top, column * mask.shape[1] // size - left]] = False
    if not unknown.any():
        return 0

    y, x = np.nonzero(unknown[labels])
    of = labels[y, x].astype(np.int64)
    row, height = _overlaps(y + top, mask.shape[0], size)
    column, width = _overlaps(x + left, mask.shape[1], size)
    area = height[:, :, None] * width[:, None, :]
    # One number for component and target pixel, so that the areas of a component's stored pixels can be added up by it.
    pair = (of[:, None, None] * size + row[:, :, None]) * size + column[:, None, :]
    pairs, index = np.unique(pair[area > 0], return_inverse=True)
    by_itself = np.bincount(index, weights=area[area > 0]).astype(np.int64)  # whole numbers below 2**53
    component, target = np.divmod(pairs, size * size)
    most = np.zeros(count + 1, np.int64)
    np.maximum.at(most, component, by_itself)
    small = unknown & (2 * most < mask.size)
    pixels.flat[target[small[component] & (2 * by_itself >= most[component])]] = True
    return int(np.count_nonzero(small))


def _overlaps(stored: Integers, length: int, size: int) -> tuple[Integers, Integers]:
    """The target pixels that `stored` pixels [N] of an axis may overlap, and by how many units: int64 [N, K] each."""
    begin = stored[:, None] * size
    target = begin // length + np.arange(-(-size // length) + 1)
    overlap = np.minimum(begin + size, (target + 1) * length) - np.maximum(begin, target * length)
    return target, overlap.clip(0)
