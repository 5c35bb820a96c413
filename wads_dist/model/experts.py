"""Several experts look at a pixel, and what each says is made comparable.

The segmenter knows the anomalies that were synthesised, the error |X − X̂| what the generator could not make, and the bank
(`bank.py`), of a model that has one, what a frozen network never saw in normal images. Their scores have nothing in common, so
each is first read as a **surprise**, −log₁₀ of how often a pixel of a normal image scores as high (`Surprise`); the weighted
sum z of surprises, as z / (z + c), is the anomaly probability. All of it is made from normal images after training
(`calibration.py`) and kept beside the model's weights.
"""

import math

import torch
from torch import Tensor, nn

from wads_dist.config.schema import ExpertsConfig
from wads_dist.model.bank import PatchBank

EXPERTS = ("segmenter", "error", "bank")
"""In the order of every tensor of theirs; a model without a frozen network has the first two."""
PREFIX = "experts."
"""Of their buffers among a trained model's weights."""
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


class Experts(nn.Module):
    """The scales of a trained model's experts, their weights and, perhaps, a bank."""

    weight: Tensor  # [E], of EXPERTS

    def __init__(self, config: ExpertsConfig, bank: PatchBank | None = None) -> None:
        super().__init__()
        self.bank = bank
        weights = [1.0, config.error, config.bank][: 2 if bank is None else 3]
        # Called ``scales`` while the error was a mean over RGB: a model with such scales is refused, for lack of these.
        self.surprises = nn.ModuleList(Surprise() for _ in weights)
        self.register_buffer("weight", torch.tensor(weights))

    @property
    def names(self) -> tuple[str, ...]:
        return EXPERTS[: len(self.surprises)]

    def fit(self, scores: Tensor) -> None:
        """The scales, from the experts' scores of normal images, float32 [N, E, H, H].

        Raises:
            ValueError: one is not finite.
        """
        for i, scale in enumerate(self.surprises):
            assert isinstance(scale, Surprise)
            scale.fit(scores[:, i])

    def weigh_error(self, follows: float) -> None:
        """Takes from the error's weight what the reconstructions do not deserve: ``follows`` is the fraction of pairs of normal
        images in which a reconstruction is more like its own input than like the other. Where that is chance (0.5), as on
        textures that the generator has given up, it has no say; where it is one, all of it."""
        self.weight[1] *= min(1.0, max(0.0, 2 * follows - 1))

    def surprised(self, scores: Tensor) -> Tensor:
        """Each expert's scores [N, E, H, H] as its surprise."""
        return torch.stack([scale(scores[:, i]) for i, scale in enumerate(self.surprises)], 1)

    def probability(self, surprises: Tensor) -> Tensor:
        """[N, E, H, H] → [N, H, H] in [0, 1): z / (z + c), which keeps the order of large sums apart where 1 − 10⁻ᶻ would
        not."""
        z = (self.weight[:, None, None] * surprises).sum(1)
        return z / (z + ONE_IN_A_THOUSAND * self.weight.sum())
