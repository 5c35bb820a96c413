"""Two scores that need no training, to see how far above them a model really is.

A defect of unusual colour stands out from a blurred copy of its own image, and on aligned objects from the mean of the
training images. Where such a score already reaches 0.9, a model's 0.95 says little.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_SIGMA = 1 / 8  # as a fraction of the image's shorter side
BLUR_REACH = 3  # the kernel is cut off at this many sigmas, where it has fallen to 1 %

DESCRIPTION: dict[str, str] = {
    "blur": "mean absolute difference over the RGB channels from the image itself after a Gaussian blur (sigma: an "
    "eighth of the side, cut off at 3 sigma, reflected borders)",
    "mean_image": "mean absolute difference over the RGB channels from the mean of the normal training images",
}


def trivial_maps(mean_image: Tensor, test: Tensor) -> dict[str, Tensor]:
    """Score maps of the trivial baselines, higher meaning anomalous.

    Args:
        mean_image: [3, H, W] float32 in [0, 1], mean of the training images at the size of the test images.
        test: [M, 3, H, W] float32 in [0, 1].

    Returns:
        For each key of ``DESCRIPTION`` a map [M, H, W], float32, on the device of ``test``.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if test.dim() != 4 or test.shape[1:] != mean_image.shape:
        raise ValueError(
            f"test has shape {tuple(test.shape)} and the mean image {tuple(mean_image.shape)}; "
            "give [M, 3, H, W] and [3, H, W]"
        )
    return {
        "blur": (test - gaussian_blur(test, BLUR_SIGMA * min(test.shape[2:]))).abs().mean(1),
        "mean_image": (test - mean_image).abs().mean(1),
    }


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur [N, C, H, W] by a Gaussian of ``sigma`` pixels; the borders are reflected, so that they stay unbiased.

    ``sigma`` times ``BLUR_REACH`` must be below H and W, which reflection needs.
    """
    reach = max(1, round(BLUR_REACH * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    padded = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
