"""Scores of a trained model on the test split, and what says whether the reconstructor works."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from kernels.objective import ssim
from shards.errors import DataError
from shards.source import Dataset
from wads_dist.config import Config
from wads_dist.data import TestImages, mean_image
from wads_dist.distributed import Ranks
from wads_dist.errors import WadsError
from wads_dist.metrics import binary_metrics, image_score
from wads_dist.models import Wads
from wads_dist.trivial import trivial_maps

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Predictions:
    """Of M test images: probability maps [M, H, H] float32, X̂ [M, 3, H, H] float32, codes [M, latent] float32."""

    probability: Tensor
    reconstruction: Tensor
    code: Tensor


def save_weights(state: dict[str, Tensor], folder: Path, config: Config, category: str) -> None:
    """Generator and segmenter as safetensors, with the configuration they need in the header."""
    temporary = folder / f".{WEIGHTS}"
    # Not save_file, whose files only their owner may read.
    temporary.write_bytes(save(state, metadata={"category": category, "config": config.to_toml()}))
    temporary.replace(folder / WEIGHTS)


def load_model(folder: Path, config: Config, device: torch.device) -> Wads:
    """The trained network of a category's folder, in evaluation mode.

    Raises:
        WadsError: the folder holds no weights, or weights of another architecture.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise WadsError(f"{path}: no such file; the category has not finished training (run launch/train.py again)")
    # The weights are about to be replaced: building with random ones needs no download.
    architecture = config.model.model_copy(update={"weights": "random", "freeze_batchnorm": False})
    model = Wads(architecture, config.data.image_size)
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:
        raise WadsError(f"{path} does not fit the model of {folder.parent / 'config.toml'}: {error}") from error
    return model.to(device).eval()


@torch.inference_mode()
def predict(model: Wads, images: Tensor, batch_size: int, device: torch.device) -> Predictions:
    """Runs the network in fp32: half precision would tie scores, and ties move every ranking metric."""
    torch.backends.cudnn.allow_tf32 = False  # TF32 is no fp32
    maps, reconstructions, codes = [], [], []
    for batch in images.split(batch_size):
        batch = batch.to(device, memory_format=torch.channels_last)
        reconstruction, probability, code = model.predict(batch)
        maps.append(probability.cpu())
        reconstructions.append(reconstruction.float().cpu().contiguous())
        codes.append(code.float().cpu())
    return Predictions(torch.cat(maps), torch.cat(reconstructions), torch.cat(codes))


def score(probability: Tensor, test: TestImages, window: int) -> dict[str, float | None]:
    """Pixel and image metrics of M maps. A defect image without a mask counts for the image metrics only."""
    keep = torch.tensor(test.has_mask)
    pixel = binary_metrics(probability[keep], test.masks[keep])
    image = binary_metrics(image_score(probability, window), torch.tensor([d != "good" for d in test.defects]))
    return {
        "pixel_auroc": pixel.auroc,
        "pixel_ap": pixel.average_precision,
        "image_auroc": image.auroc,
        "image_ap": image.average_precision,
        "image_f1_max": image.f1_max,
    }


def trivial_scores(mean: Tensor, test: TestImages) -> dict[str, Any]:
    """Each trivial detector's pixel metrics, and the better of them under its name: what a model must beat."""
    keep = torch.tensor(test.has_mask)
    each = {}
    for name, maps in trivial_maps(mean, test.images).items():
        pixel = binary_metrics(maps[keep], test.masks[keep])
        each[name] = {"pixel_auroc": pixel.auroc, "pixel_ap": pixel.average_precision}
    best = max(each, key=lambda name: each[name]["pixel_auroc"] or 0.0)
    return {**each[best], "name": best, "each": each}


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
    own = ssim(x, x_hat)
    wins, pairs = 0, 0
    for shift in range(1, min(len(normal), 17)):
        wins += int((own > ssim(x.roll(shift, 0), x_hat)).sum())
        pairs += len(normal)
    return {
        "ssim": own.mean().item(),
        "mean_image_ssim": ssim(x, mean.expand_as(x)).mean().item(),
        "follows_input": wins / pairs,
        "code_spread": code.std(0).mean().item(),
    }


@dataclass(frozen=True)
class Evaluation:
    """A category's numbers and what the pictures are drawn from (first rank only)."""

    metrics: dict[str, Any]
    test: TestImages
    predictions: Predictions


def evaluate(model: Wads, config: Config, dataset: Dataset, category: str, ranks: Ranks) -> Evaluation:
    """Every rank scores its part of the test split; all ranks return the same numbers, whatever the world size.

    Raises:
        DataError: the category has no test images.
    """
    total = len(dataset.manifest(category).samples("test"))
    if total == 0:
        raise DataError(
            f"category {category!r} has no test images: nothing to evaluate; add test/good and test/<defect>"
        )
    share = -(-total // ranks.world_size)
    sizes = config.data.store_size, config.data.image_size
    part = TestImages.load(dataset, category, *sizes, slice(ranks.rank * share, (ranks.rank + 1) * share))
    parts = ranks.gather((part, predict(model, part.images, config.evaluation.batch_size, ranks.device)))
    test = TestImages(
        images=torch.cat([p.images for p, _ in parts]),
        masks=torch.cat([p.masks for p, _ in parts]),
        has_mask=[m for p, _ in parts for m in p.has_mask],
        keys=[k for p, _ in parts for k in p.keys],
        defects=[d for p, _ in parts for d in p.defects],
    )
    predictions = Predictions(*(torch.cat([getattr(q, f) for _, q in parts]) for f in Predictions.__dataclass_fields__))
    mean = mean_image(dataset, category, *sizes)
    metrics: dict[str, Any] = score(predictions.probability, test, config.evaluation.score_window)
    metrics["trivial"] = trivial_scores(mean, test)
    metrics["reconstruction"] = reconstruction_report(predictions, test, mean)
    metrics["test_images"] = total
    return Evaluation(metrics, test, predictions)
