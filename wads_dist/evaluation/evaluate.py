"""Scores of a trained model on the test split, its threshold, and what says whether the reconstructor works."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from wads_dist.common.files import write_text
from wads_dist.common.ranks import Ranks
from wads_dist.config.schema import Config, EvaluationConfig
from wads_dist.data.images import TestImages, evenly
from wads_dist.data.training import mean_image
from wads_dist.evaluation.calibration import follows_input
from wads_dist.evaluation.metrics import BinaryMetrics, Truth, binary_metrics, image_score
from wads_dist.evaluation.scoring import (
    Curves,
    PixelResult,
    Predictions,
    gather_first,
    pixel_scores,
    predict,
    rank_batches,
    summed,
)
from wads_dist.evaluation.thresholds import Decisions, Threshold, fit_threshold
from wads_dist.evaluation.trivial import DESCRIPTION, trivial_maps
from wads_dist.kernels.objective import ssim
from wads_dist.model.experts import EXPERTS, ONE_IN_A_THOUSAND
from wads_dist.model.networks import Wads
from wads_dist.model.weights import trained_config, write_weights
from wads_dist.runs.folder import THRESHOLD, WEIGHTS
from wads_dist.shards.errors import DataError
from wads_dist.shards.source import Dataset

MODEL = "model"
KEPT = 256  # more than any category of MVTec AD has; 118 MB at 128 pixels
PIXEL_METRICS = {
    "auroc": "auroc",
    "ap": "average_precision",
    "f1_max": "f1_max",
    "iou_max": "iou_max",
    "aupro": "aupro",
}
IMAGE_METRICS = {"auroc": "auroc", "ap": "average_precision", "f1_max": "f1_max"}


def save_threshold(folder: Path, threshold: Threshold | None, settings: EvaluationConfig | None = None) -> None:
    """Puts the threshold of a category's model beside its weights (``threshold.json``) and into their header; None takes an
    earlier one away. ``settings``: those it was chosen with, if they are others than in the header."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as weights:
        metadata = weights.metadata()
    metadata.pop("threshold", None)
    if settings:
        metadata["config"] = trained_config(folder).model_copy(update={"evaluation": settings}).to_toml()
    write_weights(folder, load_file(path), metadata | ({"threshold": threshold.to_json()} if threshold else {}))
    if threshold:
        write_text(folder / THRESHOLD, threshold.to_json())
    else:
        (folder / THRESHOLD).unlink(missing_ok=True)


def reconstruction_report(predictions: Predictions, test: TestImages, mean: Tensor) -> dict[str, float | None]:
    """Does the reconstructor work? On the normal test images:

    ``ssim`` of X̂ with its input, ``mean_image_ssim`` of the mean training image with the same inputs, ``follows_input``: the
    fraction of pairs (i, j ≠ i; at most 16 partners an image) in which X̂_i is more similar to X_i than to X_j, and
    ``code_spread``: the standard deviation of the code over images, averaged over its elements (0: the encoder has collapsed).
    """
    normal = [i for i, defect in enumerate(test.defects) if defect == "good"]
    if len(normal) < 2:
        return {"ssim": None, "mean_image_ssim": None, "follows_input": None, "code_spread": None}
    x, x_hat, code = test.images[normal], predictions.reconstruction[normal], predictions.code[normal]
    won, pairs = follows_input(x, x_hat)
    return {
        "ssim": ssim(x, x_hat).mean().item(),
        "mean_image_ssim": ssim(x, mean.expand_as(x)).mean().item(),
        "follows_input": won / pairs,
        "code_spread": code.std(0).mean().item(),
    }


@dataclass(frozen=True)
class Evaluation:
    """A category's numbers and what the pictures are drawn from.

    ``test`` and ``predictions`` hold all test images if there are at most ``KEPT``, else ``KEPT`` of them at even distances; on
    other ranks than the first, none. ``curves`` is what ``metrics.curves`` returns, empty where no curve is defined.
    """

    metrics: dict[str, Any]
    test: TestImages
    predictions: Predictions
    curves: Curves = field(default_factory=dict)
    threshold: Threshold | None = None


def kept(total: int) -> list[int]:
    """Indices of the test images that pictures are drawn from."""
    return evenly(range(total), min(total, KEPT))


def evaluate(model: Wads, config: Config, dataset: Dataset, category: str, ranks: Ranks) -> Evaluation:
    """Chooses the threshold, then scores the test split: every rank its batches. All ranks return the same numbers and
    curves, which do not depend on how many ranks there are.

    A rank holds one batch of images and its part of what is kept, besides what ``scoring`` keeps of the pixels (exact
    metrics: of three sets of maps, the model's and two trivial ones, 12 bytes a pixel; of up to six with experts).

    Raises:
        DataError: the category has no test images.
    """
    total = len(dataset.manifest(category).samples("test"))
    if total == 0:
        raise DataError(
            f"category {category!r} has no test images: nothing to evaluate; add test/good and test/<defect>"
        )
    threshold, none = fit_threshold(model, config, dataset, category, ranks)
    mean = mean_image(dataset, category, config)
    part = Part.of(model, config, dataset, category, ranks, threshold, mean)
    scores, anomalous = part.images(ranks)
    pixels = {name: values.result(ranks) for name, values in part.pixels.items()}
    why = unmarked(config.data.image_size, config.evaluation.mask_rule, dataset, category)
    metrics = score_report(pixels[MODEL], binary_metrics(scores, anomalous), why)
    metrics |= {"mask_rule": config.evaluation.mask_rule, "small_components": sum(ranks.gather(part.small))}
    metrics["turned_images"] = sum(ranks.gather(part.turned))
    metrics["trivial"] = trivial_report({name: pixels[name].metrics for name in DESCRIPTION})
    if model.experts is not None:
        weights = zip(model.experts.names, model.experts.weight.tolist(), strict=True)
        metrics["experts"] = {name: pixel_report(pixels[name].metrics) | {"weight": weight} for name, weight in weights}
    test, predictions = _joined(gather_first(part.kept, ranks), config.data.image_size, config.model.latent, ranks)
    health = reconstruction_report(predictions, test, mean) if ranks.is_first else {}
    metrics |= {"reconstruction": ranks.gather(health)[0], "test_images": total, "at_threshold": None}
    metrics["threshold_warning"] = threshold.warning if threshold else None
    if threshold:
        of_images = Decisions()
        of_images.add(scores >= threshold.image, anomalous)
        metrics["at_threshold"] = part.rates_of_pixels(ranks) | of_images.rates("image")
    else:
        metrics["no_threshold"] = none
    return Evaluation(metrics, test, predictions, pixels[MODEL].curves, threshold)


class Part:
    """What a rank keeps of the test images that it has scored."""

    def __init__(self, config: Config, ranks: Ranks, threshold: Threshold | None) -> None:
        self.config, self.device, self.threshold = config.evaluation, ranks.device, threshold
        experts = (EXPERTS if config.model.features != "none" else EXPERTS[:2]) if config.has_experts else ()
        self.pixels = {name: pixel_scores(config.evaluation, ranks.device) for name in (MODEL, *experts, *DESCRIPTION)}
        self.decisions, self.of_normal_images = Decisions(), Decisions()
        self.scores: list[float] = []
        self.anomalous: list[bool] = []
        self.small = 0  # components of the masks that are too small for the rule
        self.turned = 0  # images that were turned while their masks were not (`TestImages.turned`)
        self.kept: list[tuple[TestImages, Predictions]] = []

    @classmethod
    def of(
        cls,
        model: Wads,
        config: Config,
        dataset: Dataset,
        category: str,
        ranks: Ranks,
        threshold: Threshold | None = None,
        mean: Tensor | None = None,
    ) -> "Part":
        """Scores this rank's batches of the test split; ``mean`` as in ``add``."""
        part, total = cls(config, ranks, threshold), len(dataset.manifest(category).samples("test"))
        chosen = set(kept(total))
        for batch in rank_batches(total, config.evaluation.batch_size, ranks):
            rule = config.evaluation.mask_rule
            test = TestImages.load(dataset, category, config.data, slice(batch.start, batch.stop), rule)
            part.add(model, test, mean, [i - batch.start for i in batch if i in chosen])
        return part

    def add(self, model: Wads, test: TestImages, mean: Tensor | None, keep: list[int]) -> None:
        """Scores a batch; ``keep`` are those of its images that pictures are drawn from, ``mean`` the mean training image,
        without which there are no trivial scores."""
        predictions = predict(model, test.images, self.config.batch_size, self.device, test.stored)
        masked = torch.tensor(test.has_mask)  # a defect without a mask counts for the image metrics only
        truth = Truth.of(test.masks[masked])
        maps = {MODEL: predictions.probability.to(self.device)}
        if predictions.surprises is not None:
            bounded = predictions.surprises / (
                predictions.surprises + ONE_IN_A_THOUSAND
            )  # for histograms; the order stays
            maps |= dict(zip(EXPERTS, bounded.to(self.device).unbind(1), strict=False))
        if mean is not None:
            maps |= trivial_maps(mean.to(self.device), test.images.to(self.device))
        for name, values in maps.items():
            self.pixels[name].add(values[masked.to(self.device)], truth)
        if self.threshold:
            marked, normal = predictions.probability >= self.threshold.pixel, [d == "good" for d in test.defects]
            self.decisions.add(marked[masked], truth.masks)
            self.of_normal_images.add(marked[normal], test.masks[normal])
        self.scores += image_score(predictions.probability, self.config.score_window).tolist()
        self.anomalous += [defect != "good" for defect in test.defects]
        self.small += sum(test.small)
        self.turned += len(test.turned)
        self.kept.append((test.rows(keep), predictions.rows(keep)))

    def images(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Scores of all ranks' images, and whether each is anomalous. Collective."""
        everywhere = ranks.gather((self.scores, self.anomalous))
        scores = torch.tensor([score for scores, _ in everywhere for score in scores])
        return scores, torch.tensor([label for _, labels in everywhere for label in labels])

    def rates_of_pixels(self, ranks: Ranks) -> dict[str, float | None]:
        """What the threshold achieves on the pixels of all ranks. Collective.

        The false-positive rate is also that of normal images alone, which is what the threshold was chosen for: beside a
        defect there are always some pixels that the mask leaves out.
        """
        for decisions in (self.decisions, self.of_normal_images):
            decisions.counts = summed(decisions.counts.to(ranks.device), ranks).cpu()
        rate = self.of_normal_images.rates("pixel")["pixel_false_positive_rate"]
        return self.decisions.rates("pixel") | {"pixel_false_positive_rate_of_normal_images": rate}


def _joined(
    everywhere: list[list[tuple[TestImages, Predictions]]], size: int, latent: int, ranks: Ranks
) -> tuple[TestImages, Predictions]:
    """What is kept, on the first rank (which has scored at least the first image)."""
    if not ranks.is_first:
        shapes = ((0, size, size), (0, 3, size, size), (0, latent))
        maps, images, codes = (torch.zeros(shape) for shape in shapes)
        return TestImages(images, maps.bool(), [], [], [], []), Predictions(maps, images, codes)
    parts = [part for of_rank in everywhere for part in of_rank]
    return TestImages.join([test for test, _ in parts]), Predictions.join([predictions for _, predictions in parts])


def unmarked(size: int, rule: str, dataset: Dataset, category: str) -> str:
    """Why no pixel of a test split with defects is marked, if none is."""
    if all(sample.mask is None for _, sample in dataset.manifest(category).samples("test")):
        return "no defect has a mask"
    return f"no marked pixel is left at {size}×{size} by evaluation.mask_rule = {rule}"


def score_report(
    pixel: PixelResult, image: BinaryMetrics, unmarked: str = "no pixel of a defect is marked"
) -> dict[str, Any]:
    """The model's entries of ``metrics.json``: each metric (None where not defined, and why, under ``undefined``), and where
    pixels were counted in a histogram, the bounds of theirs. ``unmarked``: why no pixel is, if there are defects."""
    report: dict[str, Any] = {f"pixel_{key}": getattr(pixel.metrics, name) for key, name in PIXEL_METRICS.items()}
    report |= {f"image_{key}": getattr(image, name) for key, name in IMAGE_METRICS.items()}
    if pixel.bounds and not pixel.bounds.undefined:
        report["bounds"] = {f"pixel_{key}": getattr(pixel.bounds, name) for key, name in PIXEL_METRICS.items()}
    undefined = {"pixel": pixel.metrics.undefined, "image": image.undefined}
    if undefined["pixel"] and image.undefined not in ("all are normal", "no scores"):
        undefined["pixel"] = unmarked
    if any(undefined.values()):
        report["undefined"] = {kind: reason for kind, reason in undefined.items() if reason}
    return report


def pixel_report(metrics: BinaryMetrics) -> dict[str, Any]:
    """The pixel metrics of a score that stands beside the model's."""
    return {f"pixel_{key}": getattr(metrics, PIXEL_METRICS[key]) for key in ("auroc", "ap", "aupro")}


def trivial_report(each: dict[str, BinaryMetrics]) -> dict[str, Any]:
    """The pixel metrics of each trivial detector, and the better one of each metric, which a model must beat; ``name`` is that
    with the better AUROC."""
    reports = {name: pixel_report(of) for name, of in each.items()}
    best = max(reports, key=lambda name: reports[name]["pixel_auroc"] or 0.0)
    highest = {
        key: max((of[key] for of in reports.values() if of[key] is not None), default=None) for key in reports[best]
    }
    return {**highest, "name": best, "each": reports}
