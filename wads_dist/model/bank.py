"""The bank: what a frozen network (`features.py`) sees in a category's normal images. A patch far from all of them is strange
(PatchCore, Roth et al. 2022)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from wads_dist.kernels.philox import Purpose, philox
from wads_dist.model.features import FrozenNetwork

PART = 1024
"""Rows of the bank that an exported graph compares a batch with at a time."""
SIGMA = 1 / 56
"""Of the Gaussian over the distances, as a fraction of the side: four pixels of 224, as in PatchCore."""


class PatchBank(nn.Module):
    """A frozen network, which reads images at ``size``, and patches of normal images, ``rows`` [K, D]."""

    rows: Tensor

    def __init__(self, network: FrozenNetwork, size: int, rows: Tensor) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("rows", rows)

    def forward(self, stored: Tensor, side: int, left_out: Tensor | None = None) -> Tensor:
        """Of images [N, 3, S, S] in [0, 1] → [N, side, side]: the distance of each patch to the nearest in the bank, smoothed;
        ``left_out`` bool [N, K]: rows that do not count for an image."""
        patches = embed(*self.network(resized(stored, self.size)))
        distance = nearest(patches, self.rows, left_out)[:, None]
        enlarged = F.interpolate(distance, size=(side, side), mode="bilinear", align_corners=False)
        sigma = side * SIGMA
        return gaussian_blur(enlarged, 2 * math.ceil(3 * sigma) + 1, sigma).squeeze(1)


def resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def embed(fine: Tensor, coarse: Tensor) -> Tensor:
    """Maps at strides 8 and 16 → patches [N, D, h, w] at stride 8, each with its surroundings (3×3 means).

    Beyond the edge there are zeros, which make all patches at the edge alike: without them, the border of a normal image is
    its strangest part (on one set AP falls from 0.43 to 0.23).
    """
    fine, coarse = (F.avg_pool2d(maps, 3, 1, 1) for maps in (fine, coarse))
    enlarged = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([fine, enlarged], 1)


def nearest(patches: Tensor, bank: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Euclidean distance [N, h, w] of patches [N, D, h, w] to the nearest row of ``bank`` [K, D]; ``left_out`` bool [N, K]:
    rows that do not count for an image."""
    rows = patches.flatten(2).transpose(1, 2)
    if torch.compiler.is_exporting():  # a graph has no loop over a batch whose size is free
        parts = [_squares(rows, part).amin(-1) for part in bank.split(PART)]
        least = torch.stack(parts).amin(0)
    else:  # h·w·K distances at a time
        each = (_squares(image, bank) for image in rows)
        if left_out is not None:
            each = (squares.masked_fill(left, math.inf) for squares, left in zip(each, left_out, strict=True))
        least = torch.stack([squares.amin(-1) for squares in each])
    return least.clamp_min(0).sqrt().unflatten(1, tuple(patches.shape[2:]))


def _squares(patches: Tensor, bank: Tensor) -> Tensor:
    """[..., n, D] and [K, D] → [..., n, K]."""
    return patches.square().sum(-1, keepdim=True) + bank.square().sum(1) - 2 * patches @ bank.T


class Chosen(NamedTuple):
    """Patches of the bank: which image, and which place in its map."""

    image: Tensor
    place: Tensor


def choose_patches(seed: int, images: Sequence[int], places: int, count: int) -> Chosen:
    """``count`` of the ``places`` patches of each of ``images``, drawn without replacement; a function of the seed alone, so
    that any number of ranks makes the same bank."""
    image, place = torch.tensor(images).repeat_interleave(places), torch.arange(places).repeat(len(images))
    drawn = philox(seed, Purpose.BANK, image, place)[0].argsort(stable=True)[:count].sort().values
    return Chosen(image[drawn], place[drawn])
