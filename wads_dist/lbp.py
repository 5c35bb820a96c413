"""Score maps of the paper's ablation "traditional LBP" (Table 4): the reconstruction is compared with its image by local binary
patterns instead of by the segmenter.

Every pixel's pattern (uniform, 8 neighbours at radius 1: Ojala et al. 2002) is one of ten classes. Around each pixel, the
classes within 16×16 pixels make a histogram h of the image and g of the reconstruction; the score is their chi-squared distance

    ½ Σ (h − g)² / (h + g)        0: the same classes as often; 1: no class in common.

The paper says no more than the name, so all of this is our reading; windows slide by one pixel and are mirrored at the borders,
so that every pixel has a score.
"""

import numpy as np
import torch
import torch.nn.functional as F
from skimage.feature import local_binary_pattern
from torch import Tensor

NEIGHBOURS, RADIUS, WINDOW = 8, 1, 16
CLASSES = NEIGHBOURS + 2
# ITU-R BT.601, as Pillow's conversion to grey.
GREY = (0.299, 0.587, 0.114)


def lbp_maps(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Score maps of M images, higher meaning anomalous.

    Args:
        images: [M, 3, H, W] float32 in [0, 1], on the CPU; H and W above 8.
        reconstructions: X̂, of the same shape.

    Returns:
        [M, H, W] float32 in [0, 1].

    Raises:
        ValueError: shapes that differ.
    """
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and reconstructions {tuple(reconstructions.shape)}; give one of each"
        )
    maps = [_distance(_histograms(x), _histograms(x_hat)) for x, x_hat in zip(images, reconstructions, strict=True)]
    return torch.stack(maps) if maps else images.new_zeros(0, *images.shape[2:])


def _histograms(image: Tensor) -> Tensor:
    """[3, H, W] → [10, H, W]: how often each class occurs around each pixel; sums to 1."""
    grey = (torch.tensor(GREY)[:, None, None] * image.clamp(0, 1)).sum(0)
    # 8 bits, because patterns compare neighbours for equality too.
    levels = (grey * 255).round().byte().numpy()
    classes = torch.from_numpy(local_binary_pattern(levels, NEIGHBOURS, RADIUS, "uniform").astype(np.int64))
    each = F.one_hot(classes, CLASSES).permute(2, 0, 1)[None].float()
    before = WINDOW // 2
    padded = F.pad(each, (before, WINDOW - 1 - before) * 2, mode="reflect")
    # Rows, then columns: an eighth of the additions.
    return F.avg_pool2d(F.avg_pool2d(padded, (WINDOW, 1), stride=1), (1, WINDOW), stride=1)[0]


def _distance(h: Tensor, g: Tensor) -> Tensor:
    total = h + g
    return 0.5 * ((h - g) ** 2 / total.where(total > 0, 1.0)).sum(0)
