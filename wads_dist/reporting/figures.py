"""Pictures of results: input, reconstruction, truth and prediction side by side, as in the paper's Figure 7.

``save_samples`` draws one picture for a person who looks into the folder; ``save_examples`` writes the single tiles of the
best, median and worst images, from which the report is made.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

matplotlib.use("Agg")
from matplotlib.figure import Figure

from wads_dist.common.files import write_text
from wads_dist.evaluation.evaluate import Evaluation
from wads_dist.evaluation.metrics import binary_metrics, image_score
from wads_dist.reporting.colours import heat_colours
from wads_dist.runs.folder import EXAMPLES, EXAMPLES_FILE

COLUMNS = ("input", "reconstruction", "ground truth", "prediction")
# A larger picture says no more in a report, and 15 categories of them must fit into a mail.
TILE, JPEG_QUALITY = 128, 85


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
        axis_row[0].set_ylabel(test.defects[i], fontsize=8, parse_math=False)  # a name may hold $
        axis_row[3].set_xlabel(f"max {top[i]:.2f}", fontsize=7)
    for axis, name in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(name, fontsize=9)
    auroc = evaluation.metrics["pixel_auroc"]
    figure.suptitle(f"{category}: pixel AUROC {auroc:.3f}" if auroc is not None else category, fontsize=10)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png")
    temporary.replace(path)


# --- single tiles ------------------------------------------------------------------------------------------------


def save_examples(folder: Path, category: str, evaluation: Evaluation, window: int = 15, each: int = 2) -> None:
    """Writes ``folder``/examples/: tiles of the best, median and worst test images, and last ``examples.json``.

    Images with a defect and a mask are ranked by their own average precision; where no defect has a mask, those with a defect
    by their image score, and normal ones always (the lowest is the best). An example has ``key``, ``defect``, ``rank``,
    ``place`` of ``of``, ``score`` (of the image), ``ap`` and ``iou`` of its pixels (None without a mask), and ``tiles``: the
    names of the files of input, reconstruction, truth (if it is known), heat (the probability from 0 to 1) and mask (the
    probability at the model's threshold; at 0.5 if it has none).

    Args:
        folder: the category's.
        window: that of the image score (``evaluation.score_window``).
        each: defective images of each rank; of normal ones there is one median and one worst.
    """
    test, probability = evaluation.test, evaluation.predictions.probability
    threshold = evaluation.threshold.pixel if evaluation.threshold else 0.5
    scores = image_score(probability, window).tolist()
    normal = [i for i, defect in enumerate(test.defects) if defect == "good"]
    defects = [i for i, defect in enumerate(test.defects) if defect != "good"]
    marked = [i for i in defects if test.has_mask[i] and test.masks[i].any()]
    ap = {i: binary_metrics(probability[i], test.masks[i]).average_precision or 0.0 for i in marked}
    by_success = sorted(marked or defects, key=lambda i: -ap.get(i, scores[i]))
    by_score = sorted(normal, key=lambda i: scores[i])
    chosen = [(i, rank, by_success) for rank, of in ranked(by_success, each).items() for i in of]
    chosen += [(i, rank, by_score) for rank, of in ranked(by_score, 1).items() if rank != "best" for i in of]

    out = folder / EXAMPLES
    out.mkdir(exist_ok=True)
    (out / EXAMPLES_FILE).unlink(missing_ok=True)
    entries: list[dict[str, Any]] = []
    for number, (i, rank, order) in enumerate(chosen):
        predicted = probability[i] >= threshold
        union = (predicted | test.masks[i]).sum().item()
        entries.append(
            {
                "key": test.keys[i],
                "defect": test.defects[i],
                "rank": rank,
                "place": order.index(i) + 1,
                "of": len(order),
                "score": scores[i],
                "ap": ap.get(i),
                "iou": (predicted & test.masks[i]).sum().item() / union if i in ap else None,
                "tiles": _save_tiles(out, f"{number:02d}", _pictures(evaluation, i, predicted)),
            }
        )
    content = {"category": category, "threshold": threshold, "examples": entries}
    write_text(out / EXAMPLES_FILE, json.dumps(content, indent=1))


def ranked(order: Sequence[int], each: int) -> dict[str, list[int]]:
    """Up to ``each`` of the best, median and worst of ``order``, best first; nothing twice, the extremes before the median."""
    best = list(order[:each])
    worst = [i for i in order[-each:] if i not in best]
    start = max(0, (len(order) - each) // 2)
    median = [i for i in order[start : start + each] if i not in (*best, *worst)]
    return {"best": best, "median": median, "worst": worst}


def _pictures(evaluation: Evaluation, i: int, predicted: Tensor) -> dict[str, Image.Image]:
    test = evaluation.test
    truth = {"truth": Image.fromarray(test.masks[i].numpy())} if test.has_mask[i] else {}
    return {
        "input": _photo(test.images[i]),
        "reconstruction": _photo(evaluation.predictions.reconstruction[i]),
        **truth,
        "heat": Image.fromarray(heat_colours(evaluation.predictions.probability[i].numpy())),
        "mask": Image.fromarray(predicted.numpy()),
    }


def _photo(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1]."""
    pixels: NDArray[np.uint8] = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def _save_tiles(folder: Path, prefix: str, pictures: Mapping[str, Image.Image]) -> dict[str, str]:
    """Names of the files: masks, which have two colours, as PNG; all others as JPEG."""
    names = {}
    for name, picture in pictures.items():
        picture.thumbnail((TILE, TILE), Image.Resampling.NEAREST if picture.mode == "1" else Image.Resampling.LANCZOS)
        names[name] = f"{prefix}-{name}.{'png' if picture.mode == '1' else 'jpg'}"
        picture.save(folder / names[name], optimize=True, quality=JPEG_QUALITY)
    return names
