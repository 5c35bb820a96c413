"""Score maps of the paper's ablation "traditional LBP" (Table 4): the reconstruction is compared with its image by local binary
patterns instead of by the segmenter.

A pixel's pattern is 8 bits: which of its neighbours (3×3 pixels, as in Ojala et al. 1996) are brighter than it by at least a
tenth of the range. Around each pixel, the patterns within 16×16 pixels make a histogram h of the image and g of the
reconstruction; the score is their chi-squared distance

    ½ Σ (h − g)² / (h + g)        0: the same patterns as often; 1: no pattern in common.

The threshold keeps noise in flat parts from deciding, as in Heikkilä & Pietikäinen 2006 and Tan & Triggs 2010. Without it
every grain of a photograph, which no reconstruction has, counts as much as the edge of a defect, and scores are near chance
or below. The paper says no more than the name: all of this is our reading, and docs/recipe.md has what else was tried.
Windows slide by one pixel and are mirrored at the borders, so that every pixel has a score.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD, WINDOW = 0.1, 16
NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""Rows down and columns to the right."""
# ITU-R BT.601, as Pillow's conversion to grey.
GREY = (0.299, 0.587, 0.114)


def lbp_maps(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Score maps of M images, higher meaning anomalous.

    Args:
        images: [M, 3, H, W] float32 in [0, 1]; H and W above 8.
        reconstructions: X̂, of the same shape, on the same device.

    Returns:
        [M, H, W] float32 in [0, 1].

    Raises:
        ValueError: shapes that differ.
    """
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and reconstructions {tuple(reconstructions.shape)}; give one of each"
        )
    maps = [_distance(patterns(x), patterns(x_hat)) for x, x_hat in zip(images, reconstructions, strict=True)]
    return torch.stack(maps) if maps else images.new_zeros(0, *images.shape[2:])


def patterns(image: Tensor) -> Tensor:
    """[3, H, W] → int64 [H, W], 0 to 255: bit i is set where neighbour i is brighter. Beyond its edge the image goes on as it
    ends."""
    height, width = image.shape[1:]
    grey = (image.new_tensor(GREY)[:, None, None] * image).sum(0)
    padded = F.pad(grey[None], (1, 1, 1, 1), mode="replicate")[0]
    code = torch.zeros_like(grey, dtype=torch.int64)
    for i, (y, x) in enumerate(NEIGHBOURS):
        neighbour = padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        code += (neighbour - grey >= THRESHOLD) * 2**i
    return code


def _distance(x: Tensor, x_hat: Tensor) -> Tensor:
    """Patterns [H, W] of an image and its reconstruction → distance [H, W] of the histograms around each pixel."""
    # Of the 256 bins, those that are not empty.
    present, rank = torch.unique(torch.stack([x, x_hat]), return_inverse=True)
    each = F.one_hot(rank, len(present)).movedim(-1, 1).float()
    before = WINDOW // 2
    padded = F.pad(each, (before, WINDOW - 1 - before) * 2, mode="reflect")
    # Rows, then columns: an eighth of the additions.
    h, g = F.avg_pool2d(F.avg_pool2d(padded, (WINDOW, 1), stride=1), (1, WINDOW), stride=1)
    total = h + g
    return 0.5 * ((h - g) ** 2 / total.where(total > 0, 1.0)).sum(0)
