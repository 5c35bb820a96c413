"""Whole shards through WebDataset's pipeline, and shards that do not hold what their manifest lists."""

import gzip
import io
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from wads_dist.shards.build import build
from wads_dist.shards.errors import DataError
from wads_dist.shards.manifest import ShardEntry
from wads_dist.shards.source import Dataset
from wads_dist.shards.verify import verify

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
    "the first is missing": ("train", lambda m: m[2:], "train/good/000 is incomplete, train/good/000.jpg is missing"),
    "the last is missing": ("train", lambda m: m[:-2], "train/good/003 is incomplete, train/good/003.jpg is missing"),
    "all are missing": ("train", lambda m: [], "train/good/000 is incomplete"),
    "one more": ("train", lambda m: [*m, ("x.png", b"1")], "'x.png' is not in the manifest"),
    "one more of a sample": ("train", lambda m: [*m, ("train/good/003.bin", b"1")], "'train/good/003.bin' is not in the"),
    "one twice": ("train", lambda m: [*m, *m[-2:]], "tar holds 'train/good/003.jpg' twice"),
    "one twice, apart": ("train", lambda m: [*m, *m[:2]], "tar holds 'train/good/000.jpg' twice"),
    "another order": ("train", swapped, "train/good/000.jpg is not where the manifest says"),
    "a description apart": ("train", lambda m: [m[0], *m[2:], m[1]], "train/good/001.jpg is not where the manifest says"),
    "no image": ("train", lambda m: m[1:], "train/good/000.jpg is missing"),
    "a shorter image": ("train", lambda m: [(m[0][0], m[0][1][:-1]), *m[1:]], "train/good/000.jpg is not where the manifest"),
    "no mask": ("test", lambda m: [x for x in m if not x[0].endswith("1.mask.png")], "test/scratch/001.mask.png is missing"),
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


def sparse(size: int) -> bytes:
    """A header that claims `size` bytes of zeros, and is followed by none."""
    header = tarfile.TarInfo("train/good/003.bin")
    header.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


def of_kind(kind: bytes, size: int = 0, **pax: str) -> bytes:
    header = tarfile.TarInfo("train/good/003.bin")
    header.type, header.linkname, header.size, header.pax_headers = kind, "x", size, pax
    return header.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


NEVER_BUILT = {
    "sparse": sparse(600 << 20),
    "sparse of ten terabytes": sparse(10 << 40),
    "sparse as PAX has it": of_kind(
        tarfile.REGTYPE, **{"GNU.sparse.map": "0,0", "GNU.sparse.size": str(600 << 20), "GNU.sparse.numblocks": "1"}
    ),
    "a link": of_kind(tarfile.SYMTYPE),
    "a hard link": of_kind(tarfile.LNKTYPE),
    "a folder": of_kind(tarfile.DIRTYPE),
    "a device": of_kind(tarfile.CHRTYPE),
    "a name of ten gigabytes": of_kind(tarfile.GNUTYPE_LONGNAME, size=10 << 30),
    "names of names": (of_kind(tarfile.GNUTYPE_LONGNAME, size=2) + b"x\0" + bytes(510)) * 2000,
    "a file of ten gigabytes": of_kind(tarfile.REGTYPE, size=10 << 30),
    "a PAX header of ten gigabytes": of_kind(tarfile.XHDTYPE, size=10 << 30),
}


@pytest.mark.parametrize("kind", [*NEVER_BUILT, "compressed"])
def test_a_tar_as_the_builder_writes_none_is_refused_by_its_headers(
    dataset: Dataset, tmp_path: Path, kind: str
) -> None:
    """A few bytes that claim to be gigabytes are refused before there is room made for any."""
    shard, other = shard_of(dataset, "train"), tmp_path / "other.tar"
    good = dataset.shard("nut", shard).read_bytes()
    with tarfile.open(dataset.shard("nut", shard)) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + 512
    assert last.size <= 512
    changed = gzip.compress(good) if kind == "compressed" else good[:end] + NEVER_BUILT[kind] + good[end:]
    other.write_bytes(changed)
    dataset._verified["nut", shard.name] = other
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"other\.tar: (tar|'train/good/003\.bin' is not in the manifest)"):
            list(dataset.stream("nut", shard))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    path = Path(dataset.location) / "nut" / shard.name
    path.write_bytes(changed)
    assert [p for p in verify(dataset.location, ["nut"]) if "tar " in p or "not in the manifest" in p]


def test_samples_in_another_order_than_the_manifests_are_refused(dataset: Dataset) -> None:
    shard = shard_of(dataset, "train")
    other = shard.model_copy(update={"samples": shard.samples[::-1]})
    with pytest.raises(DataError, match="holds train/good/000 where the manifest lists train/good/003"):
        list(dataset.stream("nut", other))


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
