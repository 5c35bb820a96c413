"""Checking a built data set, byte by byte and sample by sample, and naming whatever is wrong."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .errors import DataError, DataProblems
from .images import load_image, mask_pixels, size_difference, stored_size, turned_alone
from .manifest import CategoryManifest, Member, SampleEntry, ShardEntry
from .source import Dataset
from .tars import differences, members


@dataclass(frozen=True)
class Findings:
    """`problems` each name their shard and sample; `notes`, one a category at most, say what only its maker can judge."""

    problems: list[str]
    notes: list[str]


def verify(location: str | Path, categories: Sequence[str] | None = None) -> list[str]:
    """The problems of `examine`; empty if all is well."""
    return examine(location, categories).problems


def examine(location: str | Path, categories: Sequence[str] | None = None) -> Findings:
    """Check manifests, size and SHA-256 of every shard, its members, and that every image and mask decodes.

    Args:
        location: as for `Dataset.open`.
        categories: names to check; by default all, texture banks included.

    Returns:
        What was found. Nothing is raised for bad data.
    """
    try:
        dataset = Dataset.open(location)
    except DataError as error:
        return Findings([str(error)], [])
    problems: list[str] = []
    turned: dict[str, list[str]] = {}
    jobs: list[tuple[str, ShardEntry]] = []
    for category in categories if categories is not None else dataset.index.categories:
        try:
            manifest = dataset.manifest(category)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += _missing_masks(manifest)
        jobs += [(category, shard) for shard in manifest.shards]
    # Threads are enough: hashing and decoding release the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (category, _), (found, alone) in zip(
            jobs, pool.map(lambda job: _verify_shard(dataset, *job), jobs), strict=True
        ):
            problems += found
            turned.setdefault(category, []).extend(alone)
    return Findings(problems, [_turned_note(category, keys) for category, keys in turned.items() if keys])


def _turned_note(category: str, keys: list[str]) -> str:
    """A shard does not say whether it was built before or since the orientation is obeyed: this is right for both."""
    return (
        f"{category}: {len(keys)} images (the first: {keys[0]}) are turned by their EXIF orientation and their stored masks "
        "are not. Wrong if the mask files carried the tag, too, and the shards are of before it was obeyed (build again from "
        "the pictures, with --overwrite), or if the masks were drawn on the pictures as they are stored (take the tag out, "
        "build again); else right"
    )


def open_category(location: str, category: str, cache: Path, *, decode_test: bool = False) -> Dataset:
    """Open a data set to train on one of its categories, with every shard of that fetched and verified.

    Args:
        decode_test: decode the test images and masks too. A damaged one would otherwise be found after the training, whose
            result could not be scored then; training images are decoded as they are read.

    Raises:
        DataProblems: names every damaged shard and, where that can be told, the samples.
        DataError: there is no such data set or category.
    """
    dataset = Dataset.open(location, cache=cache)
    manifest = dataset.manifest(category)
    problems = _missing_masks(manifest)
    for shard in manifest.shards:
        try:
            dataset.shard(category, shard)
        except DataError as error:
            # A damaged shard that was downloaded is not kept, so there is nothing to look into.
            problems += [str(error)] if dataset.is_remote else _verify_shard(dataset, category, shard)[0]
            continue
        if decode_test and any(sample.split == "test" for sample in shard.samples):
            problems += _verify_shard(dataset, category, shard)[0]
    if problems:
        raise DataProblems(problems)
    return dataset


def _missing_masks(manifest: CategoryManifest) -> list[str]:
    """Defects without a mask, in a category in which others have one."""
    defects = [(shard, sample) for shard, sample in manifest.samples() if not sample.is_normal]
    if all(sample.mask is None for _, sample in defects):
        return []
    return [
        f"{manifest.category}/{shard.name}: {sample.key} is a defect without mask; build the category again"
        for shard, sample in defects
        if sample.mask is None
    ]


def _verify_shard(dataset: Dataset, category: str, shard: ShardEntry) -> tuple[list[str], list[str]]:
    """Its problems, and the keys of its samples that are `turned_alone`."""
    try:
        path = dataset.shard(category, shard)
        problems = []
    except DataError as error:
        problems = [str(error)]
        path = Path(dataset.location) / category / shard.name
        if dataset.is_remote or not path.exists():
            return problems, []
    where = f"{category}/{shard.name}"
    found, broken = members(path)
    problems += [f"{where}: {problem}" for problem in ([broken] if broken else [])]
    problems += [f"{where}: {problem}" for problem in differences(shard, found)]
    turned: list[str] = []
    for sample in shard.samples:
        bad, alone = _verify_sample(path, where, sample, found)
        problems += bad
        turned += [sample.key] * alone
    return problems, turned


def _verify_sample(path: Path, where: str, sample: SampleEntry, found: dict[str, Member]) -> tuple[list[str], bool]:
    """Problems of the image and mask that are where the manifest says, and whether they are `turned_alone`."""
    problems, alone = [], False
    decoded: dict[str, Image.Image] = {}
    for member in filter(None, (sample.image, sample.mask)):
        if found.get(member.name) != member:
            continue
        with open(path, "rb") as stream:
            stream.seek(member.offset)
            data = stream.read(member.size)
        try:
            image = decoded[member.name] = load_image(data)
        except DataError as error:
            problems.append(f"{where}: {member.name} {error}")
            continue
        # Manifests of before the orientation was applied have the sizes before turning.
        if (sample.width, sample.height) not in (image.size, stored_size(image)):
            problems.append(
                f"{where}: {member.name} is {image.width}×{image.height}, "
                f"the manifest says {sample.width}×{sample.height}"
            )
        elif member is sample.mask and not mask_pixels(image).any():
            problems.append(f"{where}: {member.name} is empty")
    if sample.mask and len(decoded) == 2:
        image, mask = decoded[sample.image.name], decoded[sample.mask.name]
        alone = turned_alone(image, mask)
        differs = size_difference(mask, image, sample.image.name)
        if differs and not problems:
            problems.append(f"{where}: {sample.mask.name}: {differs}")
    return problems, alone
