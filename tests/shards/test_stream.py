"""Whole shards through WebDataset's pipeline, and shards that do not hold what their manifest lists."""

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shards import DataError, Dataset, build
from shards.manifest import ShardEntry

Members = list[tuple[str, bytes]]


@pytest.fixture
def dataset(root: Path, tmp_path: Path) -> Dataset:
    build(root, tmp_path / "out", workers=1, progress=False)
    return Dataset.open(tmp_path / "out")


def shard_of(dataset: Dataset, split: str) -> ShardEntry:
    return dataset.manifest("nut").samples(split)[0][0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_it_reads_what_random_access_reads(dataset: Dataset, split: str) -> None:
    shard = shard_of(dataset, split)
    expected = [(sample, dataset.read("nut", shard, sample.image)) for sample in shard.samples]
    assert list(dataset.stream("nut", shard)) == expected


def test_it_draws_nothing_and_obeys_no_variable(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """As WebDataset's own class does; ranks, workers and seeds must not decide what is resident."""
    shard = shard_of(dataset, "train")
    for name, value in (
        ("GOPEN_REWRITE", "/=/nowhere/"),
        ("WDS_CACHE", "/nowhere"),
        ("WORLD_SIZE", "2"),
        ("RANK", "1"),
    ):
        monkeypatch.setenv(name, value)
    before = random.getstate()
    assert len(list(dataset.stream("nut", shard))) == len(shard.samples) and random.getstate() == before


def swapped(members: Members) -> Members:
    return [*members[2:4], *members[:2], *members[4:]]


CHANGES: dict[str, tuple[str, Callable[[Members], Members], str]] = {
    "the first is missing": ("train", lambda m: m[2:], "holds train/good/001 where the manifest lists train/good/000"),
    "the last is missing": ("train", lambda m: m[:-2], "holds nothing where the manifest lists train/good/003"),
    "all are missing": ("train", lambda m: [], "holds nothing where the manifest lists train/good/000"),
    "one more": ("train", lambda m: [*m, ("x.png", b"1")], "holds x where the manifest lists nothing more"),
    "one twice": ("train", lambda m: [*m, *m[-2:]], "duplicate file name"),
    "one twice, apart": ("train", lambda m: [*m, *m[:2]], "holds train/good/000 where the manifest lists nothing more"),
    "another order": ("train", swapped, "holds train/good/001 where the manifest lists train/good/000"),
    "no image": ("train", lambda m: m[1:], "holds 0 bytes of train/good/000.jpg"),
    "a shorter image": ("train", lambda m: [(m[0][0], m[0][1][:-1]), *m[1:]], "bytes of train/good/000.jpg"),
    "no mask": ("test", lambda m: [x for x in m if not x[0].endswith("1.mask.png")], "0 bytes of test/scratch/001.mask.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_manifest_does_not_list_is_refused(dataset: Dataset, tmp_path: Path, name: str) -> None:
    split, change, said = CHANGES[name]
    shard, other = shard_of(dataset, split), tmp_path / "other.tar"
    with tarfile.open(dataset.shard("nut", shard)) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(other, "w") as tar:
        for path, data in change(members):
            header = tarfile.TarInfo(path)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    dataset._verified["nut", shard.name] = other  # as if its hash were the manifest's
    with pytest.raises(DataError) as caught:
        list(dataset.stream("nut", shard))
    assert said in str(caught.value) and str(other) in str(caught.value)


def test_what_is_no_tar_is_refused_by_name(dataset: Dataset, tmp_path: Path) -> None:
    shard, other = shard_of(dataset, "train"), tmp_path / "other.tar"
    other.write_bytes(b"no tar" * 1000)
    dataset._verified["nut", shard.name] = other
    with pytest.raises(DataError, match=r"other\.tar"):
        list(dataset.stream("nut", shard))


def test_a_shard_that_has_vanished_is_said_to_have(dataset: Dataset, tmp_path: Path) -> None:
    shard = shard_of(dataset, "train")
    dataset._verified["nut", shard.name] = tmp_path / "gone.tar"
    with pytest.raises(DataError, match=r"gone\.tar: cannot be read \(No such file"):
        list(dataset.stream("nut", shard))
