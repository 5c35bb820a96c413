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
    from scipy.ndimage import label  # here: who only decodes images need not wait for it

    labels, count = label(mask, np.ones((3, 3)))
    sampled = np.asarray(Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST))
    return ResizedMask(sampled > 0, count - int(np.count_nonzero(np.unique(sampled))))


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
    (height, width), size = mask.shape, len(pixels)
    start, end, component = _runs(mask)
    unknown = np.ones(component.max(initial=-1) + 1, bool)
    # What is marked within a pixel that is marked throughout is of one component, which is not small: most are told so.
    row, column = np.nonzero(covered == mask.size)
    within = row * height // size * (width + 1) + column * width // size
    unknown[component[np.searchsorted(start, within, "right") - 1]] = False
    if not unknown.any():
        return 0

    start, end, component = (of[unknown[component]] for of in (start, end, component))
    y, left = np.divmod(start, width + 1)
    run, column, across = _overlaps(left * size, (left + end - start) * size, width)
    part, row, down = _overlaps(y[run] * size, (y[run] + 1) * size, height)
    # One number for component and target pixel, so that the areas of a component's runs can be added up by it.
    pair = (component[run[part]] * size + row) * size + column[part]
    pairs, index = np.unique(pair, return_inverse=True)
    by_itself = np.bincount(index, weights=across[part] * down).astype(np.int64)  # whole numbers below 2**53
    of, target = np.divmod(pairs, size * size)
    most = np.zeros(len(unknown), np.int64)
    np.maximum.at(most, of, by_itself)
    small = unknown & (2 * most < mask.size)
    pixels.flat[target[small[of] & (2 * by_itself >= most[of])]] = True
    return int(np.count_nonzero(small))


def _runs(mask: Bools) -> tuple[Integers, Integers, Integers]:
    """Where runs of marked pixels begin and end in reading order, with one empty pixel behind each row, and which component
    each is of: int64 [N] each. There are far fewer runs than pixels: scipy's `label` takes four times as long for a
    blob in 1024²."""
    from scipy.sparse import coo_array  # here: who only decodes images need not wait for it
    from scipy.sparse.csgraph import connected_components

    row = mask.shape[1] + 1
    edges = np.flatnonzero(np.diff(np.pad(mask, ((0, 0), (0, 1))).ravel(), prepend=False))
    start, end = edges[::2], edges[1::2]
    # Runs of the next row that touch a run, at a corner at least, follow one another.
    first = np.searchsorted(end, start + row, "left")
    run, number = _each(np.searchsorted(start, end + row, "right") - first)
    touching = coo_array((np.ones(len(run), bool), (run, first[run] + number)), (len(start), len(start)))
    return start, end, connected_components(touching, directed=False)[1].astype(np.int64)


def _overlaps(begin: Integers, end: Integers, length: int) -> tuple[Integers, Integers, Integers]:
    """Which of the intervals [N] overlaps which box, of so many units, by how many: int64 [M] each."""
    first = begin // length
    interval, number = _each(-(-end // length) - first)
    box = first[interval] + number
    return interval, box, np.minimum(end[interval], (box + 1) * length) - np.maximum(begin[interval], box * length)


def _each(counts: Integers) -> tuple[Integers, Integers]:
    """For each of `counts` things, which of them it is of, and its number among those: int64 [sum] each."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - (np.cumsum(counts) - counts)[of]
