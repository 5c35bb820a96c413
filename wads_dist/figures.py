"""Pictures of results: input, reconstruction, truth and prediction side by side, as in the paper's Figure 7."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.figure import Figure

from wads_dist.evaluate import Evaluation

COLUMNS = ("input", "reconstruction", "ground truth", "prediction")


def chosen_rows(defects: list[str], count: int) -> list[int]:
    """Indices of up to ``count`` test images: one normal image, then the defect kinds in turn."""
    normal = [i for i, d in enumerate(defects) if d == "good"][:1]
    kinds: dict[str, list[int]] = {}
    for i, defect in enumerate(defects):
        if defect != "good":
            kinds.setdefault(defect, []).append(i)
    rounds = max((len(v) for v in kinds.values()), default=0)
    mixed = [v[r] for r in range(rounds) for v in kinds.values() if r < len(v)]
    return (normal + mixed)[:count]


def save_samples(path: Path, category: str, evaluation: Evaluation, count: int = 6) -> None:
    """Writes a PNG of up to ``count`` test images, a row each; the prediction is a heat map from 0 to 1."""
    test, predictions = evaluation.test, evaluation.predictions
    top = predictions.probability.flatten(1).amax(1).tolist()
    rows = chosen_rows(test.defects, count)
    figure = Figure(figsize=(2 * len(COLUMNS), 2.1 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), len(COLUMNS), squeeze=False)
    for axis_row, i in zip(axes, rows, strict=True):
        image = test.images[i].permute(1, 2, 0).numpy()
        reconstruction = predictions.reconstruction[i].permute(1, 2, 0).numpy()
        truth, probability = test.masks[i].numpy(), predictions.probability[i].numpy()
        pictures = (image, np.clip(reconstruction, 0, 1), truth, probability)
        for axis, picture in zip(axis_row, pictures, strict=True):
            axis.imshow(picture, cmap="gray" if picture is truth else "inferno", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        axis_row[0].set_ylabel(test.defects[i], fontsize=8)
        axis_row[3].set_xlabel(f"max {top[i]:.2f}", fontsize=7)
    for axis, name in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(name, fontsize=9)
    auroc = evaluation.metrics["pixel_auroc"]
    figure.suptitle(f"{category}: pixel AUROC {auroc:.3f}" if auroc is not None else category, fontsize=10)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png")
    temporary.replace(path)
