"""Images on the device, and training samples by global index.

Sample i of a run is the same on any rank, in either mode and after any restart, so the state of the loader is one integer:
the next global sample index. A data set that fits lives on the device as uint8 (``ResidentImages``); a larger one is read
at random from shards on the local disk (``StreamedImages``).
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels.philox import shuffled
from kernels.synthesis import Batch, SynthesisSettings, synthesise, whole_images
from shards.errors import DataError
from shards.images import decode_image, fitted_image, fitted_mask, load_image, size_difference, turned_alone
from shards.manifest import SampleEntry, ShardEntry
from shards.masks import MaskRule, ResizedMask
from shards.source import Dataset
from shards.textures import procedural_textures
from wads_dist.config import Config, DataConfig

Entry = tuple[ShardEntry, SampleEntry]
T = TypeVar("T")
READ_AT_ONCE = 64  # encoded images in memory while they are decoded
LOOKED_AT = 64  # images from all over a category, to see whether it is grey
HELD_OUT_AT_LEAST = 4
HELD_OUT_OF_AT_LEAST = 20  # of fewer images, those few would be missed in training


def decode_entry(dataset: Dataset, category: str, entry: Entry, size: int) -> "np.ndarray":
    """One image as uint8 [3, size, size].

    Raises:
        DataError: names the shard and the sample.
    """
    return decoded(dataset.read(category, entry[0], entry[1].image), category, entry, size)


def decoded(data: bytes, category: str, entry: Entry, size: int) -> "np.ndarray":
    """As ``decode_entry``, of the image's bytes."""
    shard, sample = entry
    try:
        return decode_image(data, size)
    except DataError as error:
        raise DataError(f"{category}/{shard.name}: sample {sample.key} {error}") from error


def decode_shards(dataset: Dataset, category: str, entries: Sequence[Entry], size: int) -> Tensor:
    """As ``decode_entries``, for most of a data set: their shards are read from the first byte to the last.

    Raises:
        DataError: a shard is damaged, or does not hold what the manifest lists; or an image cannot be decoded.
    """
    images = torch.empty(len(entries), 3, size, size, dtype=torch.uint8)
    rows = {sample.key: row for row, (_, sample) in enumerate(entries)}
    read = (
        (data, (shard, sample))
        for shard in {shard.name: shard for shard, _ in entries}.values()
        for sample, data in dataset.stream(category, shard)
        if sample.key in rows
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(islice(read, READ_AT_ONCE)):
            decoding = pool.map(lambda item: decoded(item[0], category, item[1], size), batch)
            for (_, (_, sample)), image in zip(batch, decoding, strict=True):
                images[rows[sample.key]] = torch.from_numpy(image)
    return images


def decode_entries(dataset: Dataset, category: str, entries: Sequence[Entry], size: int) -> Tensor:
    """uint8 [N, 3, size, size] on the CPU, decoded by threads (Pillow releases the GIL while it decodes)."""
    images = torch.empty(len(entries), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, image in enumerate(pool.map(lambda entry: decode_entry(dataset, category, entry, size), entries)):
            images[i] = torch.from_numpy(image)
    return images


def decode_scored(
    dataset: Dataset, category: str, entry: Entry, size: int, mask_size: int, rule: MaskRule
) -> "tuple[np.ndarray, ResizedMask | None, bool]":
    """One image as uint8 [3, size, size], its mask, if it has one, at mask_size, and whether the image is ``turned_alone``.

    Raises:
        DataError: names the shard and the sample.
    """
    shard, sample = entry
    members = [dataset.read(category, shard, member) for member in (sample.image, sample.mask) if member]
    try:
        image, *masks = (load_image(data) for data in members)
        for mask in masks:
            if differs := size_difference(mask, image, sample.image.name):
                raise DataError(f"does not fit its mask: {differs}")
        truth = fitted_mask(masks[0], mask_size, rule) if masks else None
        return fitted_image(image, size), truth, any(turned_alone(image, mask) for mask in masks)
    except DataError as error:
        raise DataError(f"{category}/{shard.name}: sample {sample.key} {error}") from error


def whole_entries(dataset: Dataset, category: str, entries: Sequence[Entry], config: DataConfig) -> Tensor:
    """Whole images float32 [N, 3, H, H] in [0, 1] at the training size, on the CPU."""
    stored = decode_entries(dataset, category, entries, config.store_size)
    return whole_images(stored, config.image_size) if entries else torch.zeros(0, 3, *[config.image_size] * 2)


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


class Images(Protocol):
    """A category's normal training images."""

    count: int

    def rows(self, sample: Tensor, upcoming: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """uint8 images on the device for ``sample`` and, unless they are all the images, which of them each sample uses.

        ``upcoming`` are the samples of the next call, to be read ahead.
        """
        ...


class ResidentImages:
    """All images on the device: N·3·S² bytes, decoded once."""

    def __init__(
        self, dataset: Dataset, category: str, entries: Sequence[Entry], size: int, device: torch.device
    ) -> None:
        self.images = decode_shards(dataset, category, entries, size).to(device)
        self.count = len(self.images)

    def rows(self, sample: Tensor, upcoming: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.images, None


class StreamedImages:
    """Images read when a sample asks for them; memory is bounded by the last ``cached`` images and one batch ahead."""

    def __init__(
        self,
        dataset: Dataset,
        category: str,
        entries: Sequence[Entry],
        size: int,
        device: torch.device,
        seed: int,
        cached: int = 256,
    ) -> None:
        self.dataset, self.category, self.size, self.device, self.seed = dataset, category, size, device, seed
        self.entries = entries
        self.count = len(self.entries)
        self.cached = cached
        self.pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="decode")
        self.decoded: OrderedDict[int, Future[np.ndarray]] = OrderedDict()
        for shard in {shard.name: shard for shard, _ in self.entries}.values():
            dataset.shard(category, shard)  # fetched and verified before the first step, not in the middle of a run

    def _request(self, index: int) -> "Future[np.ndarray]":
        if index not in self.decoded:
            self.decoded[index] = self.pool.submit(
                decode_entry, self.dataset, self.category, self.entries[index], self.size
            )
        self.decoded.move_to_end(index)
        return self.decoded[index]

    def rows(self, sample: Tensor, upcoming: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wanted = shuffled(self.seed, sample.cpu(), self.count).tolist()
        futures = [self._request(index) for index in wanted]
        if upcoming is not None:
            for index in shuffled(self.seed, upcoming.cpu(), self.count).tolist():
                self._request(index)
        images = torch.from_numpy(np.stack([future.result() for future in futures])).to(self.device)
        while len(self.decoded) > max(self.cached, 2 * len(wanted)):
            self.decoded.popitem(last=False)
        return images, torch.arange(len(wanted), device=self.device)


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
            f"`python -m shards build --textures DIR --out OUT` and give OUT/textures"
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


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` of them, from all over."""
    return [items[i * len(items) // count] for i in range(count)]


def synthesis_settings(config: Config, grey: bool = False) -> SynthesisSettings:
    """The kernels' settings; ``grey``: the category's images are."""
    fields = config.synthesis.model_dump() | {"grey": grey}
    return SynthesisSettings(image_size=config.data.image_size, **fields)


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
        self.settings = synthesis_settings(config, grey)
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


@dataclass(frozen=True)
class TestImages:
    """Part of a category's test split, in manifest order.

    ``images`` float32 [M, 3, H, H] in [0, 1]; ``masks`` bool [M, H, H], truth by ``evaluation.mask_rule`` from the stored mask;
    ``has_mask`` says which images count for pixel metrics (a defect without a mask does not); ``defects`` per image;
    ``small`` per image: how many components of its mask are too small for the rule (by area they are kept, by nearest lost);
    ``turned``: the keys of the images that their EXIF orientation turned, while their masks have none and no size tells whether
    these were drawn on the turned image; ``stored`` uint8 [M, 3, S, S]: the images as they are kept, of a batch just loaded.
    """

    __test__ = False  # not a pytest class

    images: Tensor
    masks: Tensor
    has_mask: list[bool]
    keys: list[str]
    defects: list[str]
    small: list[int]
    turned: frozenset[str] = frozenset()
    stored: Tensor | None = None

    @classmethod
    def load(
        cls, dataset: Dataset, category: str, config: DataConfig, part: slice, rule: MaskRule = "area"
    ) -> "TestImages":
        """Images and masks of ``part`` of the test split.

        Raises:
            DataError: an image or a mask is damaged, or the two differ in size; names it.
        """
        entries, size = dataset.manifest(category).samples("test")[part], config.image_size
        stored = torch.empty(len(entries), 3, config.store_size, config.store_size, dtype=torch.uint8)
        masks, small = torch.zeros(len(entries), size, size, dtype=torch.bool), [0] * len(entries)

        turned: set[str] = set()

        def decode(entry: Entry) -> "tuple[np.ndarray, ResizedMask | None, bool]":
            return decode_scored(dataset, category, entry, config.store_size, size, rule)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i, (image, mask, alone) in enumerate(pool.map(decode, entries)):
                turned |= {entries[i][1].key} if alone else set()
                stored[i] = torch.from_numpy(image)
                if mask is not None:
                    masks[i], small[i] = torch.from_numpy(mask.pixels), mask.small
        return cls(
            images=whole_images(stored, size) if entries else torch.zeros(0, 3, size, size),
            masks=masks,
            has_mask=[sample.mask is not None or sample.is_normal for _, sample in entries],
            keys=[sample.key for _, sample in entries],
            defects=[sample.defect for _, sample in entries],
            small=small,
            turned=frozenset(turned),
            stored=stored,
        )

    def rows(self, chosen: Sequence[int]) -> "TestImages":
        """These images alone, in memory of their own."""
        index = list(chosen)
        return TestImages(
            self.images[index],
            self.masks[index],
            [self.has_mask[i] for i in index],
            [self.keys[i] for i in index],
            [self.defects[i] for i in index],
            [self.small[i] for i in index],
            self.turned & {self.keys[i] for i in index},
        )

    @classmethod
    def join(cls, parts: Sequence["TestImages"]) -> "TestImages":
        """One after the other; at least one."""
        return cls(
            images=torch.cat([part.images for part in parts]),
            masks=torch.cat([part.masks for part in parts]),
            has_mask=[value for part in parts for value in part.has_mask],
            keys=[value for part in parts for value in part.keys],
            defects=[value for part in parts for value in part.defects],
            small=[value for part in parts for value in part.small],
            turned=frozenset(value for part in parts for value in part.turned),
        )
