"""Metrics of score maps: ours against torchmetrics, scikit-learn and the usual ways to AUPRO, on the same maps in one run.

    python benchmarks/metrics.py [--maps 1725] [--size 128] [--rounds 1] [--only NAME ...] [--json FILE]

MVTec AD has 1,725 test images. The maps are made here: smooth noise through a sigmoid, with defects of a few sizes that are
found more or less. Every implementation runs in a process of its own, which starts with the maps in memory; the time is the
best of the rounds, the memory what the process grew by at its peak.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.measure import label, regionprops
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_precision_recall_curve,
)

from wads_dist.common.ranks import Ranks
from wads_dist.evaluation.histogram import ScoreHistogram
from wads_dist.evaluation.metrics import PRO_LIMIT, Truth, binary_metrics, map_metrics
from wads_dist.evaluation.scoring import ExactScores
from wads_dist.shards.arguments import Parser, local_path

Maps = NDArray[np.float32]
Masks = NDArray[np.bool_]
Values = dict[str, float]


def make_maps(count: int, size: int) -> tuple[Maps, Masks]:
    """Score maps [count, size, size] in (0, 1), and masks: three defects in two of three images."""
    rng = np.random.default_rng(0)
    masks = np.zeros((count, size, size), bool)
    for i in np.flatnonzero(np.arange(count) % 3):
        for y, x, height, width in zip(
            *rng.integers(0, size, (2, 3)), *rng.integers(2, size // 5, (2, 3)), strict=True
        ):
            masks[i, y : y + height, x : x + width] = True
    logits = rng.standard_normal(masks.shape, dtype=np.float32)
    for i, mask in enumerate(masks):
        logits[i] = 12 * gaussian_filter(logits[i], 2) + 4 * gaussian_filter(mask.astype(np.float32), 2) - 6
    return 1 / (1 + np.exp(-logits)), masks


# --- AUROC, AP and the best F1 ---


def ours(scores: Maps, masks: Masks) -> Values:
    found = binary_metrics(torch.from_numpy(scores), torch.from_numpy(masks))
    return {"auroc": found.auroc or 0, "ap": found.average_precision or 0, "f1_max": found.f1_max or 0}


def best_f1(precision: NDArray[Any], recall: NDArray[Any]) -> float:
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


def with_torchmetrics(scores: Maps, masks: Masks) -> Values:
    given, truth = torch.from_numpy(scores).flatten(), torch.from_numpy(masks).flatten().int()
    precision, recall, _ = binary_precision_recall_curve(given, truth)
    return {
        "auroc": float(binary_auroc(given, truth)),
        "ap": float(binary_average_precision(given, truth)),
        "f1_max": best_f1(precision.numpy(), recall.numpy()),
    }


def with_scikit_learn(scores: Maps, masks: Masks) -> Values:
    given, truth = scores.ravel(), masks.ravel()
    precision, recall, _ = precision_recall_curve(truth, given)
    return {
        "auroc": float(roc_auc_score(truth, given)),
        "ap": float(average_precision_score(truth, given)),
        "f1_max": best_f1(precision, recall),
    }


# --- AUPRO ---


def ours_and_aupro(scores: Maps, masks: Masks) -> Values:
    """All of the above as well: they share the sort."""
    found = map_metrics(torch.from_numpy(scores), torch.from_numpy(masks))
    return {
        "auroc": found.auroc or 0,
        "ap": found.average_precision or 0,
        "f1_max": found.f1_max or 0,
        "aupro": found.aupro or 0,
    }


def ours_by_batches(scores: Maps, masks: Masks) -> Values:
    """The same as an evaluation does it: batches of 32 maps, of which the scores are kept until all are there."""
    alone = Ranks(0, 1, 0, 1, torch.device("cpu"))
    kept = ExactScores(alone.device)
    for part, truth in zip(torch.from_numpy(scores).split(32), torch.from_numpy(masks).split(32), strict=True):
        kept.add(part, Truth.of(truth))
    found = kept.result(alone).metrics
    return {
        "auroc": found.auroc or 0,
        "ap": found.average_precision or 0,
        "f1_max": found.f1_max or 0,
        "aupro": found.aupro or 0,
    }


def ours_in_bins(scores: Maps, masks: Masks) -> Values:
    """The middles of the bounds from 65,536 bins."""
    histogram = ScoreHistogram(65_536)
    for part, truth in zip(torch.from_numpy(scores).split(32), torch.from_numpy(masks).split(32), strict=True):
        histogram.add(part, Truth.of(truth))
    bounds = histogram.bounds()
    names = {"auroc": bounds.auroc, "ap": bounds.average_precision, "f1_max": bounds.f1_max, "aupro": bounds.aupro}
    return {name: sum(value) / 2 for name, value in names.items() if value}


def aupro_by_argsort(scores: Maps, masks: Masks) -> Values:
    """All pixels sorted by score, each worth 1/(size of its component), summed up: as in MVTec's own evaluation."""
    worth = np.zeros(scores.shape)
    count = 0
    for i, mask in enumerate(masks):
        for region in regionprops(label(mask, connectivity=2)):
            worth[i][tuple(region.coords.T)] = 1 / region.area
            count += 1
    order = np.argsort(scores.ravel())[::-1]
    rate = np.cumsum(~masks.ravel()[order]) / (~masks).sum()
    overlap = np.cumsum(worth.ravel()[order]) / count
    inside = rate <= PRO_LIMIT
    area = np.trapezoid(np.append(overlap[inside], overlap[inside][-1]), np.append(rate[inside], PRO_LIMIT))
    return {"aupro": float(area / PRO_LIMIT)}


def aupro_by_thresholds(scores: Maps, masks: Masks) -> Values:
    """At 200 thresholds, the overlap of every region one by one: what many repositories copy. Not exact."""
    regions = [
        (i, region.coords.T) for i, mask in enumerate(masks) for region in regionprops(label(mask, connectivity=2))
    ]
    normal = scores[~masks]
    rates, overlaps = [], []
    for threshold in np.linspace(scores.min(), scores.max(), 200)[::-1]:
        found = scores >= threshold
        overlaps.append(np.mean([found[i][tuple(where)].mean() for i, where in regions]))
        rates.append((normal >= threshold).mean())
    rate, overlap = np.array(rates), np.array(overlaps)
    inside = rate <= PRO_LIMIT
    end = np.interp(PRO_LIMIT, rate, overlap)
    return {
        "aupro": float(np.trapezoid(np.append(overlap[inside], end), np.append(rate[inside], PRO_LIMIT)) / PRO_LIMIT)
    }


IMPLEMENTATIONS: dict[str, Callable[[Maps, Masks], Values]] = {
    "ours": ours,
    "torchmetrics": with_torchmetrics,
    "scikit-learn": with_scikit_learn,
    "ours, with AUPRO": ours_and_aupro,
    "ours, by batches": ours_by_batches,
    "ours, histogram": ours_in_bins,
    "AUPRO by argsort": aupro_by_argsort,
    "AUPRO at 200 thresholds": aupro_by_thresholds,
}


# --- measuring ---


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def measure(name: str, scores: Maps, masks: Masks, rounds: int, answer: Any) -> None:
    """Sends seconds, bytes and values of an implementation into the pipe ``answer``."""
    run = IMPLEMENTATIONS[name]
    run(scores[:8], masks[:8])  # imports and first calls
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, seconds = memory("VmRSS"), []
    for _ in range(rounds):
        started = time.perf_counter()
        values = run(scores, masks)
        seconds.append(time.perf_counter() - started)
    answer.send(
        {"seconds": round(min(seconds), 3), "megabytes": round((memory("VmHWM") - before) / 1e6), "values": values}
    )


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=1725)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--json", type=local_path, help="also write the numbers to this file")
    given = parser.parse_args()
    # Pools that are started before the fork do not work after it.
    context = multiprocessing.get_context("spawn")
    scores, masks = make_maps(given.maps, given.size)
    results: dict[str, Any] = {}
    for name in given.only:
        receiver, sender = context.Pipe(False)
        process = context.Process(target=measure, args=(name, scores, masks, given.rounds, sender))
        process.start()
        sender.close()
        results[name] = receiver.recv()
        process.join()
    for result in results.values():
        of = results.get("ours, with AUPRO" if "aupro" in result["values"] else "ours", result)
        result["times_ours"] = round(result["seconds"] / of["seconds"], 2)
    text = json.dumps(
        {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}",
            "pixels": scores.size,
            "anomalous": round(float(masks.mean()), 4),
            "results": results,
        },
        indent=1,
    )
    print(text)
    if given.json:
        given.json.write_text(text)


if __name__ == "__main__":
    main()
