"""Checking a built data set, byte by byte and sample by sample, and naming whatever is wrong."""

import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from shards.errors import DataError, DataProblems
from shards.images import load_image, mask_pixels, size_difference, stored_size
from shards.manifest import CategoryManifest, Member, SampleEntry, ShardEntry
from shards.names import quoted
from shards.source import Dataset


def verify(location: str | Path, categories: Sequence[str] | None = None) -> list[str]:
    """Check manifests, size and SHA-256 of every shard, its members, and that every image and mask decodes.

    Args:
        location: as for `Dataset.open`.
        categories: names to check; by default all, texture banks included.

    Returns:
        The problems, each naming its shard and sample; empty if all is well. Nothing is raised for bad data.
    """
    try:
        dataset = Dataset.open(location)
    except DataError as error:
        return [str(error)]
    problems: list[str] = []
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
        for found in pool.map(lambda job: _verify_shard(dataset, *job), jobs):
            problems += found
    return problems


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
            problems += [str(error)] if dataset.is_remote else _verify_shard(dataset, category, shard)
            continue
        if decode_test and any(sample.split == "test" for sample in shard.samples):
            problems += _verify_shard(dataset, category, shard)
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


def _verify_shard(dataset: Dataset, category: str, shard: ShardEntry) -> list[str]:
    try:
        path = dataset.shard(category, shard)
        problems = []
    except DataError as error:
        problems = [str(error)]
        path = Path(dataset.location) / category / shard.name
        if dataset.is_remote or not path.exists():
            return problems
    where = f"{category}/{shard.name}"
    members, broken = _members(path)
    if broken:
        problems.append(f"{where}: {broken}")
    for sample in shard.samples:
        problems += _verify_sample(path, where, sample, members)
    known = {name for sample in shard.samples for name in _names(sample)}
    problems += [f"{where}: {quoted(name)} is not in the manifest" for name in members if name not in known]
    return problems


def _members(path: Path) -> tuple[dict[str, Member], str | None]:
    """Members of a tar as far as it can be read, and why no further."""
    members: dict[str, Member] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                members[info.name] = Member(name=info.name, offset=info.offset_data, size=info.size)
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        return members, f"tar cannot be read after {len(members)} members ({error})"
    with open(path, "rb") as stream:  # tarfile takes a cut between members, or in a header, for the end
        stream.seek(min(end, 2**62))  # a header may say any size
        if stream.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            return members, f"tar is cut after {len(members)} members (its end mark is missing)"
    return members, None


def _names(sample: SampleEntry) -> list[str]:
    return [sample.image.name, f"{sample.key}.json", *([sample.mask.name] if sample.mask else [])]


def _verify_sample(path: Path, where: str, sample: SampleEntry, members: dict[str, Member]) -> list[str]:
    missing = [name for name in _names(sample) if name not in members]
    if missing:
        return [f"{where}: {sample.key} is incomplete, {name} is missing" for name in missing]
    problems = []
    decoded: dict[str, Image.Image] = {}
    for member in filter(None, (sample.image, sample.mask)):
        if members[member.name] != member:
            problems.append(f"{where}: {member.name} is not where the manifest says")
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
        differs = size_difference(decoded[sample.mask.name], decoded[sample.image.name], sample.image.name)
        if differs and not problems:
            problems.append(f"{where}: {sample.mask.name}: {differs}")
    return problems
