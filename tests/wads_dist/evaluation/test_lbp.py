import numpy as np
import pytest
import torch
from torch import Tensor

from wads_dist.evaluation.lbp import NEIGHBOURS, THRESHOLD, lbp_maps, patterns


def stripes(period: int, vertical: bool) -> Tensor:
    """[1, 3, 64, 64]"""
    lines = (torch.arange(64) // period % 2).float().expand(64, 64)
    return (lines if vertical else lines.T).expand(1, 3, 64, 64).clone()


def noise(count: int = 1) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_equal_images_are_no_distance_apart() -> None:
    assert lbp_maps(noise(), noise()).abs().max() == 0


def test_the_distance_is_that_of_the_histograms() -> None:
    """One pixel by another way: the patterns counted in the 16×16 pixels around it."""
    x, y = noise(), stripes(3, vertical=True)

    def histogram(image: Tensor) -> np.ndarray:
        return np.bincount(patterns(image[0])[30 - 8 : 30 + 8, 40 - 8 : 40 + 8].flatten(), minlength=256) / 256

    h, g = histogram(x), histogram(y)
    expected = 0.5 * sum((a - b) ** 2 / (a + b) for a, b in zip(h, g, strict=True) if a + b)
    assert lbp_maps(x, y)[0, 30, 40].item() == pytest.approx(expected, abs=1e-6)


def test_each_neighbour_has_its_bit() -> None:
    codes = set()
    for y, x in NEIGHBOURS:
        grey = torch.full((3, 3), 0.3)
        grey[1 + y, 1 + x] += THRESHOLD + 0.01
        codes.add(patterns(grey.expand(3, 3, 3))[1, 1].item())
    assert codes == {2**i for i in range(8)}


def test_grain_below_the_threshold_is_no_pattern() -> None:
    """A photograph has it and its reconstruction has not."""
    assert lbp_maps(0.5 + 0.9 * THRESHOLD * noise(), torch.full((1, 3, 64, 64), 0.5)).max() == 0


def test_a_texture_that_was_changed_stands_out_where_it_was() -> None:
    x = noise()
    x[..., 20:44, 20:44] = 0.5
    scores = lbp_maps(x, noise())[0]
    assert scores[32, 32] > 0.5 > 0.01 > scores[4, 4]


def test_scores_lie_between_0_and_1() -> None:
    scores = lbp_maps(torch.cat([noise(), stripes(1, True)]), torch.cat([torch.zeros(1, 3, 64, 64), stripes(4, False)]))
    assert scores.shape == (2, 64, 64) and scores.dtype == torch.float32
    assert scores.min() >= 0 and 0.3 < scores.max() <= 1


def test_an_image_is_scored_as_if_it_were_alone() -> None:
    x, y = noise(3), noise(3).flip(0)
    assert torch.equal(lbp_maps(x, y)[2:], lbp_maps(x[2:], y[2:]))


def test_no_images_have_no_scores() -> None:
    assert lbp_maps(torch.zeros(0, 3, 32, 32), torch.zeros(0, 3, 32, 32)).shape == (0, 32, 32)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="give one of each"):
        lbp_maps(noise(2), noise(1))
