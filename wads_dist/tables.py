"""Result tables for people."""

from typing import Any

from rich.table import Table

from wads_dist.trivial import DESCRIPTION


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def results_table(summary: dict[str, Any]) -> Table:
    """A row per category and one for the mean: scores, the trivial score they must beat, and the reconstructor's health."""
    caption = "trivial: the better of " + "; ".join(f"{name}: {text}" for name, text in DESCRIPTION.items())
    caption += ". SSIM of the reconstruction with normal test images, beside that of the mean training image; follows: "
    caption += (
        "pairs in which a reconstruction is more like its own input than like another image; spread: of the codes."
    )
    table = Table(title="Test split", caption=caption, caption_justify="left")
    table.add_column("category")
    for name in ("pixel\nAUROC", "pixel\nAP", "trivial\nAUROC", "trivial\nAP", "image\nAUROC"):
        table.add_column(name, justify="right")
    for name in ("SSIM", "SSIM\nmean", "follows", "spread", "samples", "img/s"):
        table.add_column(name, justify="right")
    rows = list(summary["categories"].items())
    if len(rows) > 1:
        rows.append(("mean", summary["mean"]))
    for name, m in rows:
        trivial, reconstruction = m["trivial"], m["reconstruction"]
        table.add_row(
            name,
            _number(m.get("pixel_auroc")),
            _number(m.get("pixel_ap")),
            _number(trivial.get("pixel_auroc")),
            _number(trivial.get("pixel_ap")),
            _number(m.get("image_auroc")),
            _number(reconstruction.get("ssim")),
            _number(reconstruction.get("mean_image_ssim")),
            _number(reconstruction.get("follows_input"), 2),
            _number(reconstruction.get("code_spread"), 2),
            f"{m['samples']:,.0f}",
            _number(m["images_per_second"], 1),
            end_section=name == rows[-2][0] if len(rows) > 2 else False,
        )
    return table
