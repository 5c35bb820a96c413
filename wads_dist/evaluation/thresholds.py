"""The threshold of a trained model, chosen without the test set: from normal images that training never saw.

A threshold fitted on the test set knows the defects it will be judged by, and what it achieves there says nothing about the
next defect. Here it is the lowest that keeps to two false-positive rates on the images held out. What it achieves on the test
set is then a result like any other. docs/metrics.md has more.
"""

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from wads_dist.common.ranks import Ranks
from wads_dist.config.schema import Config
from wads_dist.data.images import Entry, decode_entries
from wads_dist.data.training import HELD_OUT_OF_AT_LEAST, TrainingSplit
from wads_dist.evaluation.metrics import image_score
from wads_dist.evaluation.scoring import predict, rank_batches
from wads_dist.kernels.synthesis import whole_images
from wads_dist.model.networks import Wads
from wads_dist.shards.source import Dataset


@dataclass(frozen=True)
class Threshold:
    """A pixel whose probability, an image whose score is at least this is anomalous.

    ``images`` is how many were held out; the two rates are what was aimed at (None in a file of an earlier version, whose
    threshold came from synthetic anomalies), and ``achieved`` what it does on the images it was chosen with, never on the test
    set. ``warning``: why it cannot do what was aimed at, for people.
    """

    pixel: float
    image: float
    source: str
    images: int
    pixel_false_positive_rate: float | None
    image_false_positive_rate: float | None
    achieved: dict[str, float]
    warning: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Threshold":
        return cls(**json.loads(text))


def fit_threshold(
    model: Wads, config: Config, dataset: Dataset, category: str, ranks: Ranks
) -> tuple[Threshold | None, str | None]:
    """The threshold that ``config.evaluation`` asks for, or why there is none; the same on every rank. Collective."""
    entries = TrainingSplit.of(dataset, category, config).held_out
    if not entries:
        total = len(dataset.manifest(category).samples("train"))
        few = f"the {total} training images are too few to hold some out (at least {HELD_OUT_OF_AT_LEAST})"
        return None, few if config.evaluation.holdout else "evaluation.holdout is 0: no image was held out"
    return from_normal(model, config, dataset, category, entries, ranks), None


def from_normal(
    model: Wads, config: Config, dataset: Dataset, category: str, entries: list[Entry], ranks: Ranks
) -> Threshold:
    """The lowest threshold that keeps to the false-positive rates of ``config.evaluation``.

    Every rank keeps only its highest pixels, as many as may be marked, with the image they are of.
    """
    evaluation, area = config.evaluation, config.data.image_size**2
    wanted = marked_at_most(evaluation.pixel_false_positive_rate, len(entries) * area) + 1
    scores, highest, origin = [], torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for batch in rank_batches(len(entries), evaluation.batch_size, ranks):
        stored = decode_entries(dataset, category, entries[batch.start : batch.stop], config.data.store_size)
        images = whole_images(stored, config.data.image_size)
        probability = predict(model, images, evaluation.batch_size, ranks.device, stored).probability
        scores += image_score(probability, evaluation.score_window).tolist()
        pixels = torch.cat([highest, probability.flatten()])
        origin = torch.cat([origin, torch.arange(batch.start, batch.stop).repeat_interleave(area)])
        highest, index = pixels.topk(min(wanted, len(pixels)))
        origin = origin[index]
    parts = ranks.gather((scores, highest, origin))
    highest, index = torch.cat([part[1] for part in parts]).sort(descending=True)
    origin = torch.cat([part[2] for part in parts])[index]
    pixel = pixel_threshold(highest, wanted - 1)
    image, chance = image_threshold([s for part in parts for s in part[0]], evaluation.image_false_positive_rate)
    marked = torch.bincount(origin[highest >= pixel], minlength=len(entries)) / area
    return Threshold(
        pixel,
        image,
        "normal images held out of training" + ", which early stopping has seen" * bool(config.stopping.every),
        len(entries),
        evaluation.pixel_false_positive_rate,
        evaluation.image_false_positive_rate,
        {
            "pixel_false_positive_rate": marked.double().mean().item(),
            # Pixels of an image are no independent trials, images are.
            "pixel_false_positive_rate_standard_error": marked.double().std().item() / math.sqrt(len(entries)),
            **chance,
        },
        shortfall(
            pixel,
            image,
            len(entries),
            evaluation.image_false_positive_rate,
            chance["image_false_positive_rate_expected"],
        ),
    )


def shortfall(pixel: float, image: float, images: int, rate: float, expected: float) -> str | None:
    """Where the thresholds cannot do what was aimed at, sentences; None if they can."""
    reasons = []
    if expected > rate:
        needed = math.ceil(1 / rate - 1e-9) - 1
        reasons.append(
            f"With {images} images held out, {expected:.2g} of normal images must be expected to be called anomalous, not "
            f"{rate:g}, for which {needed:,} are needed (evaluation.holdout)."
        )
    for what, threshold in (("pixel", pixel), ("image", image)):
        if threshold > 1:
            reasons.append(
                f"The {what} threshold is above 1, so no {what} is ever anomalous: the network gives normal images held out "
                "of training the highest score there is."
            )
    return " ".join(reasons) or None


def marked_at_most(rate: float, count: int) -> int:
    """How many of ``count`` are at most the fraction ``rate``."""
    return math.floor(rate * count + 1e-9)


def pixel_threshold(highest: Tensor, marked: int) -> float:
    """The lowest threshold that at most ``marked`` pixels reach; ``highest`` holds that many and one more, descending."""
    return _just_above(highest[marked].item())


def image_threshold(scores: list[float], rate: float) -> tuple[float, dict[str, float]]:
    """Threshold of normal images' ``scores`` (n ≥ 1) for a false-positive rate, and what to expect of it.

    It lies just above the k-th highest score, k = ⌊rate·(n + 1)⌋, at least 1. The score of another normal image exceeds that
    with probability k/(n + 1) (split conformal prediction; it needs only that the images are exchangeable). Given these n
    images, the rate is a Beta(k, n + 1 − k) variable, whose 95 % quantile says how bad it may be.
    """
    n = len(scores)
    k = max(1, marked_at_most(rate, n + 1))
    threshold = _just_above(sorted(scores, reverse=True)[k - 1])
    return threshold, {
        "image_false_positive_rate": sum(score >= threshold for score in scores) / n,
        "image_false_positive_rate_expected": k / (n + 1),
        "image_false_positive_rate_95_percent_below": float(betaincinv(k, n + 1 - k, 0.95)),
    }


def _just_above(score: float) -> float:
    return float(np.nextafter(np.float32(score), np.float32(np.inf)))


# --- what it does on the test set --------------------------------------------------------------------------------


class Decisions:
    """Counts of decisions at a threshold, added up."""

    def __init__(self) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64)

    def add(self, anomalous: Tensor, truth: Tensor) -> None:
        """Decisions and truth, bool, of one shape."""
        rows = (anomalous & truth, anomalous & ~truth, truth, ~truth)
        self.counts += torch.tensor([int(row.sum()) for row in rows])

    def rates(self, prefix: str) -> dict[str, float | None]:
        """F1, IoU, precision, recall and false-positive rate under ``prefix``; None where not defined."""
        hits, false_alarms, anomalous, normal = self.counts.tolist()

        def ratio(part: float, whole: int) -> float | None:
            return part / whole if whole else None

        return {
            f"{prefix}_f1": ratio(2 * hits, hits + false_alarms + anomalous) if anomalous else None,
            f"{prefix}_iou": ratio(hits, false_alarms + anomalous) if anomalous else None,
            f"{prefix}_precision": ratio(hits, hits + false_alarms),
            f"{prefix}_recall": ratio(hits, anomalous),
            f"{prefix}_false_positive_rate": ratio(false_alarms, normal),
        }
