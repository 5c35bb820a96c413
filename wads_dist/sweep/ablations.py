"""The ablations of the paper's Table 4: without SSIM in the reconstruction loss, without the sparsity KL, and with local binary
patterns in the place of the segmenter; and noGAN, which the paper has not: without adversary, latent loss and KL there are only
an autoencoder and a segmenter, and it says what the rest is worth.

All but LBP are runs of a sweep, beside the method itself. LBP needs none: it compares the images with the reconstructions of
the method's own runs, in everything else is scored as they are, and so says what the segmenter is worth.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wads_dist.common.files import write_text
from wads_dist.common.ranks import Ranks
from wads_dist.evaluation.evaluate import MODEL, Part, score_report
from wads_dist.evaluation.lbp import lbp_maps
from wads_dist.evaluation.metrics import binary_metrics
from wads_dist.model.networks import Scored, Wads
from wads_dist.model.weights import load_model
from wads_dist.reporting import paper
from wads_dist.reporting.report_data import show
from wads_dist.shards.source import Dataset
from wads_dist.sweep.plan import Sweep, load
from wads_dist.sweep.run import sweep
from wads_dist.sweep.summary import SCORES, STOPPED, cell, spread, summarise

METHOD, LBP = "wads", "LBP"
VARIANTS = {
    METHOD: {},
    "noSSIM": {"objective.reconstruction.ssim": "0"},
    "noKL": {"objective.kl.weight": "0"},
    "noGAN": {"objective.adversarial.weight": "0", "objective.latent.weight": "0", "objective.kl.weight": "0"},
}
COLUMNS = (*VARIANTS, LBP)
TABLE_4 = {METHOD: paper.METHOD, "noSSIM": paper.NO_SSIM, "noKL": paper.NO_KL, LBP: paper.LBP}
"""Column here → column of the paper's table, which has no noGAN."""
PAPER, PRINTED = "paper", "paper, as printed"
TABLE, RECORD = "ablations.md", "ablations.json"

Scores = dict[str, dict[str, dict[str, Any]]]
"""Variant → category → score → ``spread`` over the seeds."""


class LbpModel(Wads):
    """The generator of a trained model; local binary patterns tell its reconstructions from the images."""

    def __init__(self, model: Wads) -> None:
        torch.nn.Module.__init__(self)
        self.generator, self.experts = model.generator, None

    @torch.no_grad()
    def predict(self, image: Tensor, stored: Tensor | None = None) -> Scored:
        reconstruction, code = self.generator.reconstruct(image)
        return Scored(reconstruction, lbp_maps(image, reconstruction.float()), code)


def ablations(given: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Trains what is missing, scores LBP, prints and writes the table; returns the exit code.

    Args:
        given: what ``launch/ablations.py`` parsed: the options of a sweep.
        arguments: the rest of its command line, which are settings.

    Raises:
        ConfigError, DataError, ResumeError: as ``sweep``.
    """
    # With --json there is one object on the standard output: the table.
    with contextlib.redirect_stdout(sys.stderr) if given.json and not given.dry_run else contextlib.nullcontext():
        code = sweep(given, arguments, VARIANTS)
    if given.dry_run and not given.json:
        print(f"{LBP}: scored on the runs of {METHOD} once they are done; nothing to train")
    if given.dry_run or (given.slurm and given.no_watch) or code in STOPPED:
        return code
    out, console = given.out.absolute(), Console(stderr=given.json)
    plan = load(out)
    points = summarise(plan)["points"]
    scores: Scores = {variant: points[variant]["categories"] for variant in VARIANTS}
    scores[LBP] = lbp_scores(plan, console)
    write_text(out / RECORD, json.dumps(scores, indent=1))
    masks = about_masks(sorted({run.config.evaluation.mask_rule for run in plan.runs}))
    write_text(out / TABLE, "\n".join(markdown(scores, masks)) + "\n")
    for score in SCORES:
        console.print(table(scores, score), "")
    console.print(masks, highlight=False, soft_wrap=True)
    console.print(f"Tables: {out / TABLE}, {out / RECORD}", highlight=False, markup=False, soft_wrap=True)
    if given.json:
        print(json.dumps(scores, indent=1))
    return code


def lbp_scores(plan: Sweep, console: Console) -> dict[str, dict[str, Any]]:
    """Category → score → ``spread`` over the seeds of the method's own runs, as far as they are done."""
    ranks = Ranks(0, 1, 0, 1, Ranks.from_environment().device)
    found: dict[str, list[dict[str, Any]]] = {}
    for run in (run for run in plan.runs if run.point == METHOD):
        assert run.config.data.shards is not None  # the plan has replaced data.root
        dataset = Dataset.open(run.config.data.shards, cache=run.config.data.cache)
        for category in run.categories:
            metrics = found.setdefault(category, [])
            if category not in run.missing:
                console.print(f"{run.name}/{category}: scoring LBP", highlight=False, markup=False)
                model = LbpModel(load_model(run.folder / category, run.config, ranks.device))
                part = Part.of(model, run.config, dataset, category, ranks)
                metrics.append(score_report(part.pixels[MODEL].result(ranks), binary_metrics(*part.images(ranks))))
    return {
        category: {score: spread([m[score] for m in metrics if m[score] is not None]) for score in SCORES}
        for category, metrics in found.items()
    }


# --- for people --------------------------------------------------------------------------------------------------


def rows(scores: Scores, score: str) -> Iterator[tuple[str, list[str]]]:
    """A row for each category, then the means over those categories for which every column has the score; of pixel AUROC, the
    paper's numbers below each."""
    categories = list(scores[METHOD])
    for category in categories:
        yield category, [cell(scores[variant][category][score]) for variant in COLUMNS]
        yield from paper_rows([category], score)
    whole = [c for c in categories if all(scores[variant][c][score]["n"] for variant in COLUMNS)]
    groups = {"textures": paper.TEXTURES, "objects": paper.OBJECTS, "all": categories}
    for group, members in groups.items():
        mine = [c for c in whole if c in members]
        if len(mine) > 1:
            means = [fmean(scores[variant][c][score]["mean"] for c in mine) for variant in COLUMNS]
            yield f"mean, {group} ({len(mine)})", [f"{mean:.3f}" for mean in means]
            yield from paper_rows(mine, score)


def paper_rows(categories: Sequence[str], score: str) -> Iterator[tuple[str, list[str]]]:
    """Table 4's numbers of a category, or their means over several; nothing for another score, or a category that it lacks."""
    if score != "pixel_auroc" or not set(categories) <= set(paper.MVTEC):
        return
    means = [paper.mean(categories, TABLE_4[variant]) if variant in TABLE_4 else None for variant in COLUMNS]
    digits = 3 if len(categories) == 1 else 4
    yield PAPER, [show(mean, digits) for mean in means]
    if set(categories) == set(paper.MVTEC):
        printed = [paper.ABLATION_MEANS[TABLE_4[variant]] if variant in TABLE_4 else None for variant in COLUMNS]
        yield PRINTED, [show(mean) for mean in printed]


def table(scores: Scores, score: str) -> Table:
    """Fits 80 columns, for which deviations lose a space and a nought."""
    result = Table(title=SCORES[score], title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    result.add_column("category")
    for variant in COLUMNS:
        result.add_column(variant, justify="right", no_wrap=True)
    for name, cells in rows(scores, score):
        style = "bold" if name.startswith("mean, ") else "dim" if name in (PAPER, PRINTED) else ""
        result.add_row(name, *(text.replace(" ± 0.", " ±.") for text in cells), style=style)
    return result


def about_masks(rules: Sequence[str]) -> str:
    return (
        f"Our masks are brought to the network's resolution by {' and '.join(rules)}, the paper's, as far as can be told, by "
        "nearest."
    )


def markdown(scores: Scores, masks: str) -> Iterator[str]:
    """The same tables as a file; lines."""
    yield "# Ablations\n"
    yield f"As in Table 4 of {paper.CITATION}, doi:{paper.DOI}. Ours, on the test split; ± deviation over seeds. Rows of the"
    yield "paper: the category's in that table, pixel AUROC at 128²; below a mean, that of the same categories' numbers."
    yield f"{masks}\n"
    for variant, settings in VARIANTS.items():
        yield f"- {variant}: " + (
            ", ".join(f"`{path} = {value}`" for path, value in settings.items()) or "as configured"
        )
    yield f"- {LBP}: local binary patterns in the place of the segmenter, on the reconstructions of {METHOD}"
    for score, label in SCORES.items():
        yield f"\n| {label} | " + " | ".join(COLUMNS) + " |"
        yield "| --- |" + " --: |" * len(COLUMNS)
        yield from (f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows(scores, score))
