"""Images of a category out of its shards: decoded, resident on the device, or streamed."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from wads_dist.config.schema import DataConfig
from wads_dist.kernels.philox import shuffled
from wads_dist.kernels.synthesis import whole_images
from wads_dist.shards.errors import DataError
from wads_dist.shards.images import decode_image, fitted_image, fitted_mask, load_image, size_difference, turned_alone
from wads_dist.shards.manifest import SampleEntry, ShardEntry
from wads_dist.shards.masks import MaskRule, ResizedMask
from wads_dist.shards.source import Dataset

Entry = tuple[ShardEntry, SampleEntry]


T = TypeVar("T")


READ_AT_ONCE = 64  # encoded images in memory while they are decoded


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


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` of them, from all over."""
    return [items[i * len(items) // count] for i in range(count)]


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
