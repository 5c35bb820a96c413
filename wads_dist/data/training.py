"""Images on the device, and training samples by global index.

Sample i of a run is the same on any rank, in either mode and after any restart, so the state of the loader is one integer:
the next global sample index. A data set that fits lives on the device as uint8 (``ResidentImages``); a larger one is read
at random from shards on the local disk (``StreamedImages``).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wads_dist.config.schema import Config, SynthesisConfig
from wads_dist.data.images import (
    Entry,
    Images,
    ResidentImages,
    StreamedImages,
    decode_entries,
    decode_shards,
    evenly,
    whole_entries,
)
from wads_dist.kernels.philox import shuffled
from wads_dist.kernels.synthesis import Batch, SynthesisSettings, synthesise
from wads_dist.shards.errors import DataError
from wads_dist.shards.source import Dataset
from wads_dist.shards.textures import procedural_textures

LOOKED_AT = 64  # images from all over a category, to see whether it is grey
HELD_OUT_AT_LEAST = 4
HELD_OUT_OF_AT_LEAST = 20  # of fewer images, those few would be missed in training


@dataclass(frozen=True)
class TrainingSplit:
    """A category's normal training images: those that are trained on, and those held out; each in manifest order."""

    trained: list[Entry]
    held_out: list[Entry]

    @classmethod
    def of(cls, dataset: Dataset, category: str, config: Config) -> "TrainingSplit":
        """The same on every rank and after any restart: a function of the images' keys, the seed and the fraction."""
        entries = dataset.manifest(category).samples("train")
        total, fraction = len(entries), config.evaluation.holdout
        count = max(HELD_OUT_AT_LEAST, round(fraction * total)) if fraction and total >= HELD_OUT_OF_AT_LEAST else 0
        by_key = sorted(range(total), key=lambda i: entries[i][1].key)
        # The cycle before the first of the order of images: training, which counts from 0, never draws it.
        chosen = shuffled(config.trainer.seed, torch.arange(-total, 0), total)[:count].tolist() if count else []
        held_out = {by_key[i] for i in chosen}
        return cls(
            [entry for i, entry in enumerate(entries) if i not in held_out],
            [entry for i, entry in enumerate(entries) if i in held_out],
        )


def open_texture_bank(location: str | None, cache: Path) -> tuple[Dataset, str] | None:
    """The data set and the name of the bank at ``location`` (none: the procedural bank).

    Raises:
        DataError: there is no texture bank; says how to make one.
    """
    if location is None:
        return None
    folder, _, name = location.rstrip("/").rpartition("/")
    try:
        dataset = Dataset.open(folder or ".", cache=cache)
        kind = dataset.manifest(name).kind
    except DataError as error:
        raise DataError(f"data.textures = {location!r}: {error}") from error
    if kind != "textures":
        raise DataError(
            f"data.textures = {location!r} holds images of a category, not a texture bank; make one with "
            f"`wads shards build --textures DIR --out OUT` and give OUT/textures"
        )
    return dataset, name


def texture_bank(location: str | None, cache: Path, size: int, device: torch.device) -> Tensor:
    """uint8 [T, 3, size, size] on the device: the bank at ``location``, or the procedural one."""
    bank = open_texture_bank(location, cache)
    if bank is None:
        return torch.from_numpy(procedural_textures(size=size)).to(device)
    dataset, name = bank
    return decode_shards(dataset, name, dataset.manifest(name).samples(), size).to(device)


def shares(own: float, bank: int, images: int) -> tuple[int, int]:
    """How many of a category's ``images`` join a bank of so many textures, and how many of these stay, so that the fraction
    ``own`` of all are images and none is there twice."""
    wanted = min(images, bank if own == 1 else max(1, round(bank * own / (1 - own))))
    return wanted, min(bank, round(wanted * (1 - own) / own))


def synthesis_settings(synthesis: SynthesisConfig, image_size: int, grey: bool = False) -> SynthesisSettings:
    """The kernels' settings; ``grey``: the category's images are."""
    return SynthesisSettings(image_size=image_size, **synthesis.model_dump() | {"grey": grey})


def is_grey(images: Tensor) -> bool:
    """Whether uint8 images [N, 3, S, S] have no colour: their channels differ by a level in the mean of an image, at most (what
    a camera without colour gives after a lossy format)."""
    spread = images.amax(1).int() - images.amin(1).int()
    return bool((spread.flatten(1).float().mean(1) <= 1).all())


class TrainingData:
    """Training samples by global index; nothing in it changes from call to call but caches."""

    def __init__(self, config: Config, dataset: Dataset, category: str, device: torch.device) -> None:
        """Reads, verifies and decodes the category's normal images, but for those held out.

        Raises:
            DataError: a shard is damaged or missing, or an image cannot be decoded; names it.
        """
        size, self.seed, self.device = config.data.store_size, config.trainer.seed, device
        self.backend = config.trainer.kernels
        self.entries = TrainingSplit.of(dataset, category, config).trained
        """The images that ``images.count`` counts, in order."""
        grey = False
        if config.synthesis.grey == "auto":  # the same images in either mode, so that both give the same samples
            looked_at = evenly(self.entries, min(LOOKED_AT, len(self.entries)))
            grey = is_grey(decode_entries(dataset, category, looked_at, size))
        self.settings = synthesis_settings(config.synthesis, config.data.image_size, grey)
        self.images: Images
        if config.data.mode == "resident":
            self.images = ResidentImages(dataset, category, self.entries, size, device)
        else:
            self.images = StreamedImages(dataset, category, self.entries, size, device, self.seed)
        self.textures = texture_bank(config.data.textures, config.data.cache, size, device)
        if config.data.own_textures:
            wanted, kept = shares(config.data.own_textures, len(self.textures), len(self.entries))
            own = decode_entries(dataset, category, evenly(self.entries, wanted), size).to(device)
            self.textures = torch.cat([self.textures[evenly(range(len(self.textures)), kept)], own])
        if grey:
            means = self.textures.float().mean(1, keepdim=True).round().byte()
            self.textures = means.expand_as(self.textures).contiguous()

    def batch(self, sample: Tensor, upcoming: Tensor | None = None) -> Batch:
        """X, X_a, M of the samples with global indices ``sample`` (int64 [B] on the device)."""
        images, rows = self.images.rows(sample, upcoming)
        return synthesise(
            images, self.textures, sample, self.seed, self.settings, rows, self.images.count, self.backend
        )


def rank_samples(first: int, global_batch_size: int, rank: int, world_size: int) -> range:
    """The global sample indices of one step that ``rank`` computes: a contiguous part of [first, first + global batch)."""
    share = global_batch_size // world_size
    return range(first + rank * share, first + (rank + 1) * share)


def mean_image(dataset: Dataset, category: str, config: Config, chunk: int = 64) -> Tensor:
    """Mean image [3, H, H] float32 in [0, 1] of those trained on, at the training size, in bounded memory."""
    entries = TrainingSplit.of(dataset, category, config).trained
    total = torch.zeros(3, config.data.image_size, config.data.image_size, dtype=torch.float64)
    for start in range(0, len(entries), chunk):
        images = whole_entries(dataset, category, entries[start : start + chunk], config.data)
        total += images.double().sum(0)
    return (total / len(entries)).float()
