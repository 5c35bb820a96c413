"""A contact sheet of what the training of a configuration is fed, to be looked at before a day of GPU time is spent on it.

The samples are the run's own, from sample 0 on: the same ``TrainingData`` draws them here and there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from wads_dist.common.errors import ConfigError
from wads_dist.common.ranks import Ranks
from wads_dist.config.schema import Config
from wads_dist.data.locate import chosen_categories, locate_shards
from wads_dist.data.training import TrainingData, TrainingSplit, open_texture_bank
from wads_dist.kernels.synthesis import Draws, draw
from wads_dist.shards.source import Dataset

COUNTED = 2_000  # samples behind the numbers of the caption
CHUNK = 32
# Inches. An anomalous sample is three tiles side by side, a clean one is one tile; each has a line of text below.
TILE, GAP, TEXT, HEADER, HEADING, MARGIN, DPI = 1.5, 0.03, 0.26, 1.55, 0.3, 0.12, 120
ACROSS = 12  # tiles
WIDTH = ACROSS * (TILE + GAP) + 3 * 2 * GAP + 2 * MARGIN
LABEL = {1: 26, 3: 80}  # characters below so many tiles
OUTLINE = "#00ff40"


@dataclass(frozen=True)
class Synthesised:
    """The first samples of a category's training: K of them as pictures, N >= K of them as numbers, on the CPU.

    ``clean`` and ``anomalous`` [K, H, H, 3] float32 in [0, 1], ``mask`` [K, H, H] bool, ``draws`` of K samples; ``area`` [N]
    the fraction of anomalous pixels, ``change`` [N] the mean absolute difference that the anomaly makes within its mask, of
    1. ``names`` says which photograph each of K samples is of.
    """

    clean: Tensor
    anomalous: Tensor
    mask: Tensor
    draws: Draws
    area: Tensor
    change: Tensor
    names: list[str]
    images: int
    textures: int

    @classmethod
    def first(cls, data: TrainingData, count: int, counted: int) -> "Synthesised":
        """The first ``count`` samples, and numbers of the first ``counted`` (or of all that are shown)."""
        pictures: list[tuple[Tensor, ...]] = []
        numbers: list[tuple[Tensor, Tensor]] = []
        for ids in torch.arange(max(count, counted)).split(CHUNK):
            batch = data.batch(ids.to(data.device))
            mask = batch.mask.bool()
            pixels = mask.flatten(1).sum(1)
            difference = ((batch.anomalous - batch.clean).abs().mean(1, keepdim=True) * mask).flatten(1).sum(1)
            numbers.append((pixels / mask[0].numel(), difference / pixels.clamp_min(1)))
            if ids[0] < count:
                shown = (batch.clean.movedim(1, -1), batch.anomalous.movedim(1, -1), mask.squeeze(1))
                pictures.append(tuple(x[: count - int(ids[0])].cpu() for x in shown))
        clean, anomalous, masks = (torch.cat(x) for x in zip(*pictures, strict=True))
        area, change = (torch.cat(x).cpu() for x in zip(*numbers, strict=True))
        draws = draw(data.seed, torch.arange(count), data.images.count, len(data.textures), data.settings)
        names = [data.entries[i][1].key for i in draws.image_index]
        return cls(clean, anomalous, masks, draws, area, change, names, data.images.count, len(data.textures))

    @property
    def anomalous_ones(self) -> list[int]:
        return [i for i in range(len(self.names)) if self.area[i]]

    @property
    def clean_ones(self) -> list[int]:
        return [i for i in range(len(self.names)) if not self.area[i]]

    def label(self, i: int) -> str:
        """What was drawn for sample ``i``."""
        draws, name = self.draws, f"{i}: {self.names[i].removeprefix('train/')}"
        if not self.area[i]:
            return f"{name} (empty mask)" if draws.anomalous[i] else name
        cells = " × ".join(str(2**k) for k in draws.lattice[i].tolist())
        return f"{name} · area {self.area[i]:.1%} · β {draws.beta[i]:.2f} · {cells} cells"


def caption(config: Config, category: str, samples: Synthesised, held_out: int) -> list[str]:
    """What the samples are drawn from, and what the first of them amount to; a line each, the first is the title."""
    s, data, kl, area = config.synthesis, config.data, config.objective.kl, samples.area
    low, high = s.scale
    bank = "procedural" if data.textures is None else f"of {data.textures}"
    lines = [
        f"{category}: the first {len(samples.names)} training samples, seed {config.trainer.seed}",
        f"images: {samples.images} at {data.store_size}² ({held_out} more are held out), "
        f"crops of {low:g} to {high:g} of the side, turned by up to {s.rotation:g}°, at {data.image_size}²",
        f"anomalies: Perlin noise of up to {2**s.lattice_max} cells a side above {s.threshold:g}; within it the normal image "
        f"with opacity β ~ U(0, {s.blend_max:g}) over a texture; {samples.textures} textures, {bank}, jitter "
        f"{s.texture_jitter:g}",
    ]
    has = area > 0
    if not has.any():
        return [*lines, f"none of the first {len(area):,} samples is anomalous: the segmenter would learn nothing"]
    five, half, most = torch.quantile(area[has], torch.tensor([0.05, 0.5, 0.95])).tolist()
    faint, typical = torch.quantile(255 * samples.change[has], torch.tensor([0.05, 0.5])).tolist()
    return [
        *lines,
        f"of the first {len(area):,} samples {(~has).float().mean():.1%} are clean (synthesis.clean_fraction "
        f"{s.clean_fraction:.0%}, and masks that come out empty); an anomaly changes its pixels by {typical:.0f} of 255 "
        f"(median; one in twenty by less than {faint:.0f})",
        f"anomalous area: {area.mean():.1%} of all samples' pixels, {area[has].mean():.1%} of the anomalous ones' (median "
        f"{half:.1%}, 5 to 95%: {five:.1%} to {most:.1%}); ρ of the sparsity KL: {kl.rho:.1%} (weight {kl.weight:g})",
    ]


def sheet(samples: Synthesised, text: list[str], rho: float) -> Figure:
    """The picture: under a caption and a histogram of the areas, the anomalous samples (clean crop, anomalous image, and that
    with the mask's outline), then the crops of those that stay clean."""
    anomalous, clean = samples.anomalous_ones, samples.clean_ones
    rows = -(-len(anomalous) // (ACROSS // 3)) + -(-len(clean) // ACROSS)
    height = HEADER + rows * (TILE + TEXT) + (bool(anomalous) + bool(clean)) * HEADING
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)

    def write(top: float, words: str, **how: Any) -> None:
        figure.text(MARGIN / WIDTH, 1 - top / height, words, va="top", parse_math=False, **how)

    def tile(left: float, top: float, picture: Tensor) -> Axes:
        axis = figure.add_axes((left / WIDTH, 1 - (top + TILE) / height, TILE / WIDTH, TILE / height), frameon=False)
        axis.set(xticks=[], yticks=[])
        axis.imshow(picture.numpy(), vmin=0, vmax=1)
        return axis

    write(MARGIN, text[0], fontsize=13, weight="bold")
    write(0.45, "\n".join(text[1:]), fontsize=8, linespacing=1.4)
    histogram(figure.add_axes(((WIDTH - 3.3) / WIDTH, 1 - 1.15 / height, 3.1 / WIDTH, 1 / height)), samples.area, rho)
    top = HEADER
    for indices, tiles, heading in (
        (anomalous, 3, "anomalous: the clean crop, the anomalous image, the outline of the mask"),
        (clean, 1, "clean: fed as they are"),
    ):
        if not indices:
            continue
        write(top, f"{len(indices)} {heading}", fontsize=9, weight="bold")
        top += HEADING
        for position, i in enumerate(indices):
            row, column = divmod(position, ACROSS // tiles)
            left, upper = MARGIN + column * (tiles * (TILE + GAP) + (tiles > 1) * 2 * GAP), top + row * (TILE + TEXT)
            pictures = (samples.clean[i], samples.anomalous[i], samples.anomalous[i])[:tiles]
            axes = [tile(left + place * (TILE + GAP), upper, picture) for place, picture in enumerate(pictures)]
            axes[0].set_xlabel(samples.label(i)[: LABEL[tiles]], fontsize=7, loc="left", labelpad=2, parse_math=False)
            if tiles == 3:
                outline(axes[2], samples.mask[i])
        top += -(-len(indices) // (ACROSS // tiles)) * (TILE + TEXT)
    return figure


def outline(axis: Axes, mask: Tensor) -> None:
    """Draws the edge of ``mask`` [H, H]; a part that meets the image's border is closed there."""
    size = len(mask)
    position = np.arange(-1, size + 1)
    axis.contour(position, position, np.pad(mask.numpy(), 1), [0.5], colors=OUTLINE, linewidths=0.9)
    axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))


def histogram(axis: Axes, area: Tensor, rho: float) -> None:
    """How large the anomalies of the anomalous samples are, and what the sparsity KL compares: the mean area, and ρ."""
    percent = 100 * area[area > 0].numpy()
    end = 1.2 * max(100 * rho, float(np.quantile(percent, 0.99)) if len(percent) else 0.0)
    axis.hist(percent.clip(max=end), bins=40, range=(0, end), color="0.6")
    axis.axvline(100 * area.mean().item(), color="tab:blue", label="mean of all samples")
    axis.axvline(100 * rho, color="tab:red", label="ρ")
    axis.set_xlabel("anomalous area, %", fontsize=7, labelpad=1)
    axis.set_yticks([])
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["left", "top", "right"]].set_visible(False)


def show_samples(config: Config, count: int, out: Path) -> int:
    """Writes a sheet of ``count`` samples for each category of the configuration, and says where; returns the exit code.

    Raises:
        ConfigError, DataError: what the training would be refused for, or ``out`` cannot be written.
    """
    config.require_data()
    open_texture_bank(config.data.textures, config.data.cache)  # before shards are built, which may take hours
    dataset = Dataset.open(locate_shards(config.data), cache=config.data.cache)
    categories = chosen_categories(config.data, dataset)
    device, console = Ranks.from_environment().device, Console()
    for category in categories:
        path = out if len(categories) == 1 else out.with_suffix("") / f"{category}{out.suffix}"
        data = TrainingData(config, dataset, category, device)
        samples = Synthesised.first(data, count, COUNTED)
        text = caption(config, category, samples, len(TrainingSplit.of(dataset, category, config).held_out))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet(samples, text, config.objective.kl.rho).savefig(path)
        except OSError as error:
            raise ConfigError([f"--out: cannot write {path} ({error.strerror or error}); give another file"]) from error
        console.print("\n".join([*text, f"→ {path}"]), highlight=False, markup=False, soft_wrap=True)
    return 0
