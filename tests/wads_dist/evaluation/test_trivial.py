"""The trivial baselines do what their descriptions say."""

import pytest
import torch
from scipy.ndimage import gaussian_filter

from wads_dist.evaluation.trivial import BLUR_REACH, DESCRIPTION, gaussian_blur, trivial_maps


def test_every_map_is_described_and_has_the_images_shape() -> None:
    maps = trivial_maps(torch.rand(3, 64, 96), torch.rand(2, 3, 64, 96))
    assert maps.keys() == DESCRIPTION.keys()
    assert all(map_.shape == (2, 64, 96) and map_.dtype == torch.float32 for map_ in maps.values())


def test_mean_image_map_is_the_mean_absolute_difference() -> None:
    mean, test = torch.rand(3, 64, 64), torch.rand(2, 3, 64, 64)
    expected = ((test[1, 0] - mean[0]).abs() + (test[1, 1] - mean[1]).abs() + (test[1, 2] - mean[2]).abs()) / 3
    torch.testing.assert_close(trivial_maps(mean, test)["mean_image"][1], expected)


def test_blur_is_scipys() -> None:
    image = torch.rand(1, 3, 40, 48, dtype=torch.float64)
    expected = gaussian_filter(image.numpy(), (0, 0, 4, 4), mode="mirror", truncate=BLUR_REACH)
    torch.testing.assert_close(gaussian_blur(image, 4.0), torch.from_numpy(expected))


@pytest.mark.parametrize("key", DESCRIPTION)
def test_a_spot_of_another_colour_stands_out(key: str) -> None:
    mean = torch.full((3, 64, 64), 0.5)
    test = mean.repeat(1, 1, 1, 1).clone()
    test[0, 0, 30:34, 20:24] = 1.0
    map_ = trivial_maps(mean, test)[key][0]
    spot = torch.zeros(64, 64, dtype=torch.bool)
    spot[30:34, 20:24] = True
    assert map_[spot].min() > 2 * map_[~spot].max()


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[M, 3, H, W\]"):
        trivial_maps(torch.zeros(3, 64, 64), torch.zeros(1, 3, 128, 128))
