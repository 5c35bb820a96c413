"""Result tables for people."""

from typing import Any

from rich.table import Table

from wads_dist.evaluation.trivial import DESCRIPTION
from wads_dist.reporting.report_data import show


def _rows(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = list(summary["categories"].items())
    return [*rows, ("mean", summary["mean"])] if len(rows) > 1 else rows


def results_table(summary: dict[str, Any]) -> Table:
    """A row per category and one for the mean: scores, beside the trivial score that they must beat. Fits 80 columns."""
    caption = "trivial: the better of " + "; ".join(f"{name}: {text}" for name, text in DESCRIPTION.items())
    table = Table(title="Test split", caption=caption, caption_justify="left")
    table.add_column("category", no_wrap=True)
    for name in ("pixel\nAUROC", "pixel\nAP", "trivial\nAUROC", "trivial\nAP", "image\nAUROC", "samples", "img/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, m in _rows(summary):
        trivial = m.get("trivial", {})
        scores = (m.get("pixel_auroc"), m.get("pixel_ap"), trivial.get("pixel_auroc"), trivial.get("pixel_ap"))
        numbers = [show(value) for value in (*scores, m.get("image_auroc"))]
        table.add_row(name, *numbers, f"{m['samples']:,.0f}", show(m["images_per_second"], 1))
    return table


def reconstruction_table(summary: dict[str, Any]) -> Table:
    """The reconstructor's health on the normal test images, a row per category."""
    caption = (
        "SSIM of the reconstruction with its input, beside that of the mean training image; follows: pairs in which a "
        "reconstruction is more like its own input than like another image; spread: deviation of the codes"
    )
    table = Table(title="Reconstructor, on normal test images", caption=caption, caption_justify="left")
    table.add_column("category", no_wrap=True)
    for name in ("SSIM", "SSIM of mean image", "follows", "spread"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, m in _rows(summary):
        health = m.get("reconstruction", {})
        values = [health.get(key) for key in ("ssim", "mean_image_ssim", "follows_input", "code_spread")]
        table.add_row(name, *(show(value) for value in values))
    return table
