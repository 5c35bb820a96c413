"""Masks at another size: the area rule against an integration pixel by pixel, and no defect that is lost."""

from fractions import Fraction

import numpy as np
import pytest
from scipy.ndimage import label

from shards.masks import Bools, fit_mask, resize_mask

SHAPES = [(1, 1), (1, 7), (2, 3), (5, 5), (6, 9), (8, 8), (13, 4), (16, 5), (20, 31)]
SIZES = [1, 2, 3, 4, 7, 8, 12]


def coverage(mask: Bools, size: int) -> list[list[Fraction]]:
    """Fraction of each target pixel that is marked, by going through all pairs of pixels."""
    height, width = mask.shape
    covered = [[Fraction(0)] * size for _ in range(size)]
    for y, x in zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True):
        for row in range(y * size // height, -(-(y + 1) * size // height)):
            for column in range(x * size // width, -(-(x + 1) * size // width)):
                covered[row][column] += _overlap(y, row, height, size) * _overlap(x, column, width, size)
    return covered


def _overlap(stored: int, target: int, length: int, size: int) -> Fraction:
    """Of a target pixel, along one axis."""
    scale = Fraction(size, length)
    return min(target + 1, (stored + 1) * scale) - max(target, stored * scale)


def expected(mask: Bools, size: int) -> tuple[Bools, int]:
    """The rule as it is stated, and the number of components that it had to keep."""
    result = np.array([[c >= Fraction(1, 2) for c in row] for row in coverage(mask, size)])
    labels, count = label(mask, np.ones((3, 3)))
    kept = []
    for component in range(1, count + 1):
        covered = coverage(labels == component, size)
        pixels = [(-covered[row][column], row, column) for row in range(size) for column in range(size)]
        if not any(result[row, column] for area, row, column in pixels if area):
            kept.append(min(pixels)[1:])
    for row, column in kept:
        result[row, column] = True
    return result, len(kept)


@pytest.mark.parametrize("density", [0.03, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_area_rule_is_that_of_a_brute_force_integration(shape: tuple[int, int], density: float) -> None:
    rng = np.random.default_rng([*shape, int(100 * density)])
    for size in SIZES:
        mask = rng.random(shape) < density
        fitted, (pixels, small) = fit_mask(mask, size), expected(mask, size)
        assert fitted.pixels.dtype == np.bool_ and np.array_equal(fitted.pixels, pixels), (size, mask)
        assert fitted.small == small, (size, mask)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("thickness", range(1, 8))
def test_thin_defects_survive_wherever_they_are(size: int, thickness: int) -> None:
    for position in range(100, 100 + 1024 // size):
        for across in (False, True):
            mask = np.zeros((1024, 1024), bool)
            mask[position : position + thickness, 100:900] = True
            resized = resize_mask(mask.T if across else mask, size)
            assert resized.any(), (position, across)


def test_every_component_keeps_a_pixel_of_its_own() -> None:
    mask = np.zeros((1024, 1024), bool)
    mask[4::128, 4::128] = True  # 64 specks of one pixel
    mask[530:600, 530:600] = True
    fitted = fit_mask(mask, 128)
    count = label(fitted.pixels, np.ones((3, 3)))[1]
    assert (count, fitted.small) == (65, 64)


def test_a_speck_beside_a_large_defect_is_kept_too() -> None:
    """The large one has marked pixels that the speck's nearest pixels touch, but not those that it lies in."""
    mask = np.zeros((64, 64), bool)
    mask[:32, :32] = True
    mask[44, 44] = True
    assert fit_mask(mask, 8).small == 1 and resize_mask(mask, 8)[5, 5]


def test_of_equally_covered_pixels_the_first_in_reading_order_is_kept() -> None:
    mask = np.zeros((32, 32), bool)
    mask[15:17, 15:17] = True  # one stored pixel in each of four target pixels
    assert np.argwhere(resize_mask(mask, 2)).tolist() == [[0, 0]]


def test_a_component_is_found_across_corners() -> None:
    """A diagonal line is one defect, not as many as it has pixels: one pixel of it is enough."""
    mask = np.eye(9, dtype=bool)
    assert fit_mask(mask, 1).small == 1 and fit_mask(np.eye(64, dtype=bool), 8).small == 1


@pytest.mark.parametrize(("rows", "defective"), [(4, True), (3, False)])
def test_exactly_half_of_a_pixel_is_defective(rows: int, defective: bool) -> None:
    mask = np.ones((32, 32), bool)
    mask[8 + rows : 16, 8:16] = False
    assert resize_mask(mask, 4)[1, 1] == defective


@pytest.mark.parametrize("length", [3, 7, 11, 13])
def test_a_half_is_told_exactly_where_a_stored_pixel_is_shared(length: int) -> None:
    """Of two rows and `length` / 2 columns that are one pixel, the first row is marked: half, with half of a column in it."""
    mask = np.zeros((4, length), bool)
    mask[0, : length // 2 + 1] = True
    assert resize_mask(mask, 2).tolist() == [[True, False], [False, False]]
    mask[0, 0] = False
    mask[1, 0] = mask[3, -1] = True  # as much again, and what does not matter
    assert resize_mask(mask, 2)[0].tolist() == [True, False]


@pytest.mark.parametrize("rule", ["area", "nearest"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("full", [False, True])
def test_nothing_marked_stays_nothing_and_all_stays_all(rule: str, shape: tuple[int, int], full: bool) -> None:
    for size in SIZES:
        fitted = fit_mask(np.full(shape, full), size, rule)  # type: ignore[arg-type]
        assert (fitted.pixels == full).all() and fitted.small == 0, size


@pytest.mark.parametrize("rule", ["area", "nearest"])
@pytest.mark.parametrize("factor", [2, 3, 5])
def test_a_mask_made_larger_is_the_same_in_larger_pixels(rule: str, factor: int) -> None:
    mask = np.random.default_rng(0).random((8, 8)) < 0.4
    fitted = fit_mask(mask, 8 * factor, rule)  # type: ignore[arg-type]
    assert np.array_equal(fitted.pixels, mask.repeat(factor, 0).repeat(factor, 1)) and fitted.small == 0


@pytest.mark.parametrize("rule", ["area", "nearest"])
def test_a_mask_of_the_size_is_left_as_it_is(rule: str) -> None:
    mask = np.random.default_rng(0).random((8, 8)) < 0.4
    assert np.array_equal(resize_mask(mask, 8, rule), mask)  # type: ignore[arg-type]


def test_nearest_is_the_pixel_under_the_centre_and_says_what_it_loses() -> None:
    mask = np.zeros((6, 6), bool)
    mask[3:] = True
    mask[0, 0] = True
    fitted = fit_mask(mask, 3, "nearest")
    # Centres of the target pixels lie on source rows 1, 3 (0.5 * 2 = 1, 1.5 * 2 = 3) and 5.
    assert fitted.pixels[:, 0].tolist() == [False, True, True] and fitted.small == 1
