"""The frozen-feature expert, and how its opinion joins those of the segmenter and of the reconstruction's error.

Three experts look at a pixel. A frozen network (`features.py`) knows what surfaces look like: the bank holds what it sees in
the category's normal images, and a patch far from all of them is strange (PatchCore, Roth et al. 2022). The segmenter knows the
anomalies that were synthesised, the error |X − X̂| what the generator could not make. Their scores have nothing in common, so
each is first read as a **surprise**, −log₁₀ of how often a pixel of a normal image scores as high (`Surprise`); the weighted
sum z of surprises, as z / (z + c), is the anomaly probability.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from kernels.philox import Purpose, philox
from wads_dist.config import FeaturesConfig
from wads_dist.features import FrozenNetwork

BANK = "expert.bank"
"""Among a trained model's weights."""
EXPERTS = ("segmenter", "error", "bank")
BANK_PART = 1024
"""Rows of the bank that an exported graph compares a batch with at a time."""
BANK_SIGMA = 1 / 56
"""Of the Gaussian over the bank's distances, as a fraction of the side: four pixels of 224, as in PatchCore."""
ONE_IN_A_THOUSAND = 3.0
"""Pixels of normal images are as surprising as this to an expert; where all agree on it, the probability is one half."""
TAIL = (*(1 - i / 20 for i in range(19)), 0.05, 0.04, 0.03, 0.02, 0.015, 0.01)
"""Fractions of the normal pixels that are above a knot of ``Surprise``, falling. Beyond the last, the tail is exponential."""


class Surprise(nn.Module):
    """−log₁₀ P(a normal pixel's score is at least s): linear between the quantiles of ``TAIL``, and beyond the highest, where
    few pixels are left to count, that of an exponential distribution with their mean excess."""

    score: Tensor  # of the knots, rising
    surprise: Tensor
    slope: Tensor  # from each knot to the next, and of the tail

    def __init__(self) -> None:
        super().__init__()
        for name in ("score", "surprise", "slope"):
            self.register_buffer(name, torch.zeros(len(TAIL)))

    def fit(self, normal: Tensor) -> None:
        """From the scores of normal pixels, float32 of any shape.

        Raises:
            ValueError: one is not finite.
        """
        values = normal.flatten().double().sort().values
        if not values.isfinite().all():
            raise ValueError("scores of normal images are not finite")
        tail = torch.tensor(TAIL, dtype=torch.float64)
        score = values[((1 - tail) * (len(values) - 1)).round().long()]
        surprise = -tail.log10()
        # Where many pixels share a score, knots are moved apart: a step would make as much of rounding as of a defect.
        spacing = 1e-3 * (score[-1] - score[0]).clamp_min(1e-6)
        gap = (score[1:] - score[:-1]).clamp_min(spacing)
        score = torch.cat([score[:1], score[0] + gap.cumsum(0)])
        excess = (values[values >= score[-1]] - score[-1]).mean().nan_to_num().clamp_min(spacing)
        slope = torch.cat([(surprise[1:] - surprise[:-1]) / gap, 1 / (excess * math.log(10))[None]])
        for name, value in (("score", score), ("surprise", surprise), ("slope", slope)):
            getattr(self, name).copy_(value)

    def forward(self, scores: Tensor) -> Tensor:
        """Of any shape; float32 of that shape, at least 0."""
        # One comparison a knot, which exports where a binary search does not.
        knot = torch.zeros_like(scores, dtype=torch.int64)
        for i in range(1, len(TAIL)):
            knot = knot + (scores >= self.score[i])
        return (self.surprise[knot] + self.slope[knot] * (scores - self.score[knot])).clamp_min(0)


class FeatureExpert(nn.Module):
    """A frozen network, the bank of a category's normal patches, and what makes three experts comparable.

    All of it is made from normal images after training (`calibration.py`) and kept beside the model's weights.
    """

    bank: Tensor  # [K, D]
    weight: Tensor  # [3], of EXPERTS

    def __init__(self, network: FrozenNetwork, config: FeaturesConfig, bank: Tensor) -> None:
        super().__init__()
        self.network, self.size = network, config.size
        self.scales = nn.ModuleList(Surprise() for _ in EXPERTS)
        self.register_buffer("bank", bank)
        self.register_buffer("weight", torch.tensor([config.segmenter, config.error, 1.0]))

    @classmethod
    def of_state(cls, features: str, config: FeaturesConfig, state: dict[str, Tensor]) -> "FeatureExpert | None":
        """With room for what a trained model's ``state`` holds of an expert; None if it holds none.

        Raises:
            ValueError: it holds one and ``model.features`` is none, or the other way round.
        """
        bank = state.get(BANK)
        if (bank is None) != (features == "none"):
            raise ValueError(f"model.features is {features}, and the weights have {'no' if bank is None else 'a'} bank")
        return None if bank is None else cls(FrozenNetwork(features), config, torch.empty_like(bank))

    def distances(self, stored: Tensor, side: int, left_out: Tensor | None = None) -> Tensor:
        """Of images [N, 3, S, S] in [0, 1] → [N, side, side]: the distance of each patch to the nearest in the bank, smoothed;
        ``left_out`` bool [N, K]: rows that do not count for an image."""
        patches = embed(*self.network(resized(stored, self.size)))
        distance = nearest(patches, self.bank, left_out)[:, None]
        enlarged = F.interpolate(distance, size=(side, side), mode="bilinear", align_corners=False)
        sigma = side * BANK_SIGMA
        return gaussian_blur(enlarged, 2 * math.ceil(3 * sigma) + 1, sigma).squeeze(1)

    def fit(self, scores: Tensor) -> None:
        """The scales, from ``EXPERTS``'s scores of normal images, float32 [N, 3, H, H]."""
        for i, scale in enumerate(self.scales):
            assert isinstance(scale, Surprise)
            scale.fit(scores[:, i])

    def surprised(self, scores: Tensor) -> Tensor:
        """Each of ``EXPERTS``'s scores [N, 3, H, H] as its surprise."""
        return torch.stack([scale(scores[:, i]) for i, scale in enumerate(self.scales)], 1)

    def probability(self, surprises: Tensor) -> Tensor:
        """[N, 3, H, H] of ``EXPERTS`` → [N, H, H] in [0, 1): z / (z + c), which keeps the order of large sums apart where
        1 − 10⁻ᶻ would not."""
        z = (self.weight[:, None, None] * surprises).sum(1)
        return z / (z + ONE_IN_A_THOUSAND * self.weight.sum())


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
        parts = [_squares(rows, part).amin(-1) for part in bank.split(BANK_PART)]
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
