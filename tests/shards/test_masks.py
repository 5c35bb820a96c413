"""Masks at another size: the area rule against an integration pixel by pixel, and no defect that is lost."""

from fractions import Fraction

import numpy as np
import pytest
from scipy.ndimage import label
from sklearn.metrics import average_precision_score

from wads_dist.shards.masks import Bools, fit_mask

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
    """The rule as it is stated, and the number of components that by themselves cover no pixel by half."""
    half, small = Fraction(1, 2), 0
    result = np.array([[c >= half for c in row] for row in coverage(mask, size)])
    labels, count = label(mask, np.ones((3, 3)))
    for component in range(1, count + 1):
        covered = coverage(labels == component, size)
        most = max(max(row) for row in covered)
        if most < half:
            small += 1
            result |= np.array([[c >= most / 2 for c in row] for row in covered])
    return result, small


@pytest.mark.parametrize("density", [0.03, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_area_rule_is_that_of_a_brute_force_integration(shape: tuple[int, int], density: float) -> None:
    rng = np.random.default_rng([*shape, int(100 * density)])
    for size in SIZES:
        mask = rng.random(shape) < density
        fitted, (pixels, small) = fit_mask(mask, size), expected(mask, size)
        assert fitted.pixels.dtype == np.bool_ and np.array_equal(fitted.pixels, pixels), (size, mask)
        assert fitted.small == small, (size, mask)


def line(thickness: int, offset: int, slope: float) -> Bools:
    """Of so many pixels across, in 256², and so far from where a target pixel begins."""
    along = np.arange(20, 236)
    top = 16 + offset + (slope * (along - 20)).astype(int)
    rows = np.arange(256)[:, None]
    mask = np.zeros((256, 256), bool)
    mask[:, 20:236] = (rows >= top) & (rows < top + thickness)
    return mask


@pytest.mark.parametrize("side", [8, 16], ids=["1024 to 128", "1024 to 64"])
@pytest.mark.parametrize("thickness", range(1, 8))
def test_brightness_finds_thin_defects_wherever_they_are(side: int, thickness: int) -> None:
    """The mean brightness of each pixel, as it is scored, over lines at all offsets, along both axes."""
    size = 256 // side
    for slope in (0, 0.01, 0.1, 0.37, 0.8):
        masks = [line(thickness, offset, slope) for offset in range(side)]
        masks += [mask.T for mask in masks]
        brightness = [mask.reshape(size, side, size, side).mean((1, 3)) for mask in masks]
        truth = [fit_mask(mask, size).pixels for mask in masks]
        found = average_precision_score(np.concatenate(truth).ravel(), np.concatenate(brightness).ravel())
        assert found > 0.93, slope


@pytest.mark.parametrize("thickness", range(1, 8))
def test_a_thin_line_stays_a_line_also_where_it_lies_across_the_edge_of_two_rows(thickness: int) -> None:
    """Every column that it fills by half is marked, at each of the eight offsets."""
    for offset in range(8):
        assert fit_mask(line(thickness, offset, 0), 32).pixels.any(0)[3:29].all(), offset


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
    assert fit_mask(mask, 8).small == 1 and fit_mask(mask, 8).pixels[5, 5]


def test_a_scratch_in_a_pixel_that_a_large_defect_marks_has_pixels_of_its_own() -> None:
    """That it overlaps a marked one is not enough: here it would be lost, with the pixels of the column after."""
    mask = np.zeros((128, 128), bool)
    mask[:, :13] = True  # five columns of eight, of the second pixel
    mask[:, 14:17] = True  # two of the second, one of the third
    fitted = fit_mask(mask, 16)
    assert fitted.small == 1 and fitted.pixels[0].tolist() == [True, True, True, *[False] * 13]


def test_components_that_are_half_of_a_pixel_together_mark_it_and_are_small_each() -> None:
    mask = np.zeros((16, 16), bool)
    mask[:2, :8] = mask[6:8, :8] = True
    fitted = fit_mask(mask, 2)
    assert fitted.small == 2 and fitted.pixels.tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(("rows", "small"), [(4, 0), (3, 1)])
def test_a_component_of_exactly_half_a_pixel_is_not_small(rows: int, small: int) -> None:
    mask = np.zeros((16, 16), bool)
    mask[:rows, :8] = True
    assert fit_mask(mask, 2).small == small


def test_a_speck_across_an_edge_keeps_the_pixels_that_it_covers_half_as_much_as_the_one_it_covers_most() -> None:
    mask = np.zeros((32, 32), bool)
    mask[15:17, 15:17] = True  # one stored pixel in each of four target pixels
    assert np.argwhere(fit_mask(mask, 2).pixels).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    mask[14, 15:17] = True  # two and one: exactly half as much
    assert fit_mask(mask, 2).pixels.all()
    mask[13, 15:17] = True
    assert np.argwhere(fit_mask(mask, 2).pixels).tolist() == [[0, 0], [0, 1]]


def test_a_component_is_found_across_corners() -> None:
    """A diagonal line is one defect, not as many as it has pixels."""
    mask = np.eye(9, dtype=bool)
    assert fit_mask(mask, 1).small == 1 and fit_mask(np.eye(64, dtype=bool), 8).small == 1


@pytest.mark.parametrize(("rows", "defective"), [(4, True), (3, False)])
def test_exactly_half_of_a_pixel_is_defective(rows: int, defective: bool) -> None:
    mask = np.ones((32, 32), bool)
    mask[8 + rows : 16, 8:16] = False
    assert fit_mask(mask, 4).pixels[1, 1] == defective


@pytest.mark.parametrize("length", [3, 7, 11, 13])
def test_a_half_is_told_exactly_where_a_stored_pixel_is_shared(length: int) -> None:
    """Of two rows and `length` / 2 columns that are one pixel, the first row is marked: half, with half of a column in it."""
    mask = np.zeros((4, length), bool)
    mask[0, : length // 2 + 1] = True
    assert fit_mask(mask, 2).pixels.tolist() == [[True, False], [False, False]]
    mask[0, 0] = False
    mask[1, 0] = mask[3, -1] = True  # as much again, and what does not matter
    assert fit_mask(mask, 2).pixels[0].tolist() == [True, False]


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
    assert np.array_equal(fit_mask(mask, 8, rule).pixels, mask)  # type: ignore[arg-type]


def test_nearest_is_the_pixel_under_the_centre_and_says_what_it_loses() -> None:
    mask = np.zeros((6, 6), bool)
    mask[3:] = True
    mask[0, 0] = True
    fitted = fit_mask(mask, 3, "nearest")
    # Centres of the target pixels lie on source rows 1, 3 (0.5 * 2 = 1, 1.5 * 2 = 3) and 5.
    assert fitted.pixels[:, 0].tolist() == [False, True, True] and fitted.small == 1
