"""A figure to look at while a model trains: what it makes of images that it is not trained on, at every checkpoint.

The images are normal ones held out of training, with anomalies of sample ids that training does not draw: always the same, so
that a slider over the steps shows the network change. Nothing is decided by it, and the test set is not in it.

The network drawn is the one that ``evaluate`` and an export would have (moving average, BatchNorm's buffers averaged over
ranks), in a copy of its own: the engines' module stays in training mode, and no random number is drawn, so that a run with the
figure is bitwise the run without.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import make_grid

from wads_dist.config.schema import Config
from wads_dist.data.images import decode_entries
from wads_dist.data.training import TrainingData, TrainingSplit
from wads_dist.kernels.synthesis import Batch, synthesise
from wads_dist.model.weights import separate_model
from wads_dist.reporting.colours import heat_colours
from wads_dist.shards.source import Dataset
from wads_dist.training.trainer import Trainer

COUNT = 6
COLUMNS = ("input", "reconstruction", "ground truth", "prediction", "without the anomaly")
TILE, HEADER, DPI = 128, 44, 100  # pixels; a smaller image is enlarged by a whole factor, as far as TILE


def wanted(trainer: Trainer) -> bool:
    """TensorBoard is enabled; the same on every rank (the monitor itself is the first rank's only)."""
    return bool(trainer.generator_engine.monitor.monitor_config.tensorboard.enabled)


@dataclass(frozen=True)
class ValidationSamples:
    """X, X_a and M of N images, on the training's device; ``source`` says whose images they are."""

    batch: Batch
    source: str

    @classmethod
    def of(cls, config: Config, dataset: Dataset, category: str, data: TrainingData) -> "ValidationSamples":
        """Of the category's held-out images, or of those trained on where none are held out.

        Raises:
            DataError: an image cannot be decoded; names it.
        """
        held_out = TrainingSplit.of(dataset, category, config).held_out
        entries = (held_out or data.entries)[:COUNT]
        images = decode_entries(dataset, category, entries, config.data.store_size).to(data.device)
        return cls.synthesised(data, images, "normal images held out" if held_out else "images of the training")

    @classmethod
    def synthesised(cls, data: TrainingData, images: Tensor, source: str) -> "ValidationSamples":
        """``COUNT`` samples of uint8 ``images`` [N, 3, S, S], by turns, with anomalies.

        Their ids are negative, and training counts from 0. Some masks come out empty: of four times as many samples, those
        are the last to be taken.
        """
        ids = torch.arange(-1, -1 - 4 * COUNT, -1, device=images.device)
        rows = torch.arange(len(ids), device=images.device) % len(images)
        settings = replace(data.settings, clean_fraction=0.0)
        batch = synthesise(images, data.textures, ids, data.seed, settings, rows, len(images), data.backend)
        kept = (~batch.mask.flatten(1).any(1)).byte().argsort(stable=True)[:COUNT]
        return cls(Batch(batch.clean[kept], batch.anomalous[kept], batch.mask[kept]), source)


def validation_figure(trainer: Trainer, samples: ValidationSamples) -> NDArray[np.uint8] | None:
    """The figure as uint8 [H, W, 3] on the first rank, None on the others. Collective: every rank must call it."""
    state = trainer.inference_state()
    if not trainer.ranks.is_first:
        return None
    model = separate_model(trainer.config, state).to(trainer.ranks.device)
    with torch.inference_mode():
        reconstruction, probability, *_ = model.predict(samples.batch.anomalous)
        without = model.predict(samples.batch.clean).probability
    truth = samples.batch.mask.squeeze(1)
    title = f"{samples.source}, synthetic anomalies; after {trainer.progress.next_sample:,} samples"
    return draw([samples.batch.anomalous, reconstruction, truth, probability, without], title)


def draw(columns: list[Tensor], title: str) -> NDArray[np.uint8]:
    """Under a title and their names, ``columns`` of pictures: [N, 3, H, H] in [0, 1], or [N, H, H] of numbers in [0, 1]."""
    columns = [column.float().cpu().clamp(0, 1) for column in columns]
    pictures = [
        column if column.ndim == 4 else torch.from_numpy(heat_colours(column.numpy())).movedim(-1, 1) / 255
        for column in columns
    ]
    tiles = torch.stack(pictures, 1).flatten(0, 1)
    grid = make_grid(tiles, nrow=len(columns), padding=2, pad_value=1.0)
    zoom = max(1, TILE // tiles.shape[-1])
    height, width = (zoom * side for side in grid.shape[1:])
    whole = height + HEADER
    figure = Figure(figsize=(width / DPI, whole / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, height / whole))
    axis.imshow(grid.movedim(0, -1).numpy(), interpolation="nearest")
    axis.set_axis_off()
    figure.text(0.5, 1 - 4 / whole, title, fontsize=9, ha="center", va="top")
    for i, name in enumerate(COLUMNS):
        figure.text((i + 0.5) / len(COLUMNS), (height + 3) / whole, name, fontsize=8, ha="center", va="bottom")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def show(trainer: Trainer, samples: ValidationSamples) -> None:
    """Writes the figure to TensorBoard. Collective: every rank must call it, where ``wanted``."""
    figure = validation_figure(trainer, samples)
    if figure is not None:
        writer = trainer.generator_engine.monitor.tb_monitor.summary_writer
        writer.add_image("validation", figure, trainer.progress.next_sample, dataformats="HWC")
        writer.flush()
