"""Fault row 11: every way a shard goes bad is named, never silently accepted or read in part."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from tests.shards.conftest import make_category, picture, square_mask
from wads_dist.shards.__main__ import main
from wads_dist.shards.build import build
from wads_dist.shards.errors import DataError, DataProblems
from wads_dist.shards.files import sha256_file
from wads_dist.shards.manifest import CategoryManifest, ShardEntry, write_dataset_manifest
from wads_dist.shards.source import Dataset
from wads_dist.shards.verify import Findings, examine, open_category, verify

SHARD = "nut/test-000000.tar"


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Path:
    build(root, tmp_path / "out", ["nut"], workers=1, progress=False)
    return tmp_path / "out"


def test_sizes_of_before_the_orientation_was_obeyed_are_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests of earlier builds have the size of the picture as it is stored, which a tag of 6 turns by a quarter."""
    folder = make_category(tmp_path / "nut")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(5, (33, 17)).save(folder / "train/good/zz.jpg", exif=exif)
    for out, size in (("before", (33, 17)), ("now", (17, 33))):
        with monkeypatch.context() as then:
            if out == "before":
                then.setattr("wads_dist.shards.images.upright", lambda image: image)
            build(folder, tmp_path / out, workers=1, progress=False)
        sample = Dataset.open(tmp_path / out).manifest("nut").samples("train")[-1][1]
        assert (sample.width, sample.height) == size and verify(tmp_path / out) == []


def test_images_turned_without_their_masks_are_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of image and mask with a tag, an earlier build stored the mask without it: it no longer lies on the defect."""
    folder = make_category(tmp_path / "nut")
    exif = Image.Exif()
    for name, orientation in (("a", 1), ("b", 3), ("c", 2)):
        exif[ExifTags.Base.Orientation] = orientation
        picture(5).save(folder / f"test/scratch/{name}.jpg", exif=exif)
        square_mask().save(folder / f"ground_truth/scratch/{name}_mask.png", exif=exif)
    with monkeypatch.context() as then:
        then.setattr("wads_dist.shards.images.upright", lambda image: image)
        build(folder, tmp_path / "out", workers=1, progress=False)
    found = examine(tmp_path / "out")
    assert found.problems == [] and len(found.notes) == 1
    assert found.notes[0].startswith("nut: 2 images (the first: test/scratch/b) are turned by their EXIF orientation")
    assert main(["verify", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"note: {found.notes[0]}\n" and shown.out.endswith("all well\n")
    assert main(["verify", "--json", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out) == [f"note: {found.notes[0]}"]


def test_a_mask_whose_size_tells_that_it_fits_is_no_note(tmp_path: Path) -> None:
    folder = make_category(tmp_path / "nut")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(5, (33, 17)).save(folder / "test/scratch/zz.jpg", exif=exif)
    square_mask((17, 33)).save(folder / "ground_truth/scratch/zz_mask.png")
    build(folder, tmp_path / "out", workers=1, progress=False)
    assert examine(tmp_path / "out") == Findings([], [])


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Write a tar again with some members changed, or left out where `change` gives None."""
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            if (new := change(name, data)) is not None:
                info = tarfile.TarInfo(name)
                info.size = len(new)
                tar.addfile(info, io.BytesIO(new))


def refused(out: Path) -> bool:
    """Whether the reader refuses the shard whole."""
    dataset = Dataset.open(out)
    shard = next(shard for shard in dataset.manifest("nut").shards if shard.name == Path(SHARD).name)
    try:
        dataset.read("nut", shard, shard.samples[0].image)
    except DataError:
        return True
    return False


def test_a_good_data_set_has_no_problems(out: Path) -> None:
    assert verify(out) == []


def test_cut_at_a_member_boundary(out: Path) -> None:
    with tarfile.open(out / SHARD) as tar:
        boundary = tar.getmember("test/scratch/001.mask.png").offset
    with open(out / SHARD, "r+b") as stream:
        stream.truncate(boundary)  # after the image, before its mask
    problems = verify(out)
    assert any(f"{SHARD}: {boundary} bytes, the manifest says" in problem for problem in problems)
    assert any(f"{SHARD}: tar is cut after" in problem for problem in problems)
    assert f"{SHARD}: test/scratch/001 is incomplete, test/scratch/001.mask.png is missing" in problems
    assert refused(out)


def test_cut_in_a_header(out: Path) -> None:
    with tarfile.open(out / SHARD) as tar:
        offset = tar.getmember("test/scratch/001.png").offset
    with open(out / SHARD, "r+b") as stream:
        stream.truncate(offset + 100)
    problems = verify(out)
    assert f"{SHARD}: tar is cut after 7 members (its end mark is missing)" in problems
    assert f"{SHARD}: test/scratch/001 is incomplete, test/scratch/001.png is missing" in problems
    assert refused(out)


def test_one_flipped_bit_of_a_payload(out: Path) -> None:
    with tarfile.open(out / SHARD) as tar:
        offset = tar.getmember("test/scratch/001.json").offset_data + 3  # no decoder would notice this one
    data = bytearray((out / SHARD).read_bytes())
    data[offset] ^= 1
    (out / SHARD).write_bytes(data)
    problems = verify(out)
    assert len(problems) == 1 and f"{SHARD}: SHA-256 is" in problems[0]
    assert refused(out)


def test_a_missing_mask(out: Path) -> None:
    rewrite(out / SHARD, lambda name, data: None if name == "test/scratch/000.mask.png" else data)
    problems = verify(out)
    assert any("the manifest says" in problem for problem in problems)
    assert f"{SHARD}: test/scratch/000 is incomplete, test/scratch/000.mask.png is missing" in problems
    assert refused(out)


def test_a_missing_shard(out: Path) -> None:
    (out / SHARD).unlink()
    assert [problem.split(": ", 1)[1].split(";")[0] for problem in verify(out)] == ["missing"]


def reseal(out: Path, category: str = "nut") -> None:
    """Make the manifests agree with the changed shards again, as a foreign tool that rewrites both might."""
    path = out / category / "manifest.json"
    manifest = CategoryManifest.model_validate_json(path.read_text())
    shards: list[ShardEntry] = []
    for shard in manifest.shards:
        tar = out / category / shard.name
        shards.append(shard.model_copy(update={"sha256": sha256_file(tar), "bytes": tar.stat().st_size}))
    path.write_text(CategoryManifest.of(category, "images", shards, manifest.plan).to_json())
    write_dataset_manifest(out)


def test_a_truncated_jpeg_under_a_right_hash(out: Path) -> None:
    shard = "nut/train-000000.tar"
    # Of equal length, so that every offset still holds: only a decoder can tell.
    rewrite(out / shard, lambda name, data: data[:300] + bytes(len(data) - 300) if name.endswith("002.jpg") else data)
    reseal(out)
    problems = verify(out)
    assert len(problems) == 1
    assert problems[0].startswith(f"{shard}: train/good/002.jpg is truncated or unreadable")


def test_a_missing_mask_under_a_right_hash(out: Path) -> None:
    rewrite(out / SHARD, lambda name, data: None if name == "test/scratch/001.mask.png" else data)
    reseal(out)
    assert f"{SHARD}: test/scratch/001 is incomplete, test/scratch/001.mask.png is missing" in verify(out)


def test_a_broken_manifest(out: Path) -> None:
    path = out / "nut/manifest.json"
    path.write_text(path.read_text()[:200])
    assert len(verify(out)) == 1 and "nut/manifest.json: not a usable manifest" in verify(out)[0]
    (out / "manifest.json").write_text("{}")
    assert "manifest.json: not a usable manifest" in verify(out)[0]


def test_a_category_is_opened_only_if_all_its_shards_are_good(out: Path, tmp_path: Path) -> None:
    assert open_category(str(out), "nut", tmp_path, decode_test=True).categories == ["nut"]
    rewrite(out / SHARD, lambda name, data: None if name == "test/scratch/000.mask.png" else data)
    with pytest.raises(DataProblems, match=r"test/scratch/000 is incomplete, test/scratch/000\.mask\.png is missing"):
        open_category(str(out), "nut", tmp_path)


def test_a_damaged_test_image_is_found_before_the_training(out: Path, tmp_path: Path) -> None:
    rewrite(
        out / SHARD,
        lambda name, data: data[:200] + b"\xff" * (len(data) - 200) if name.endswith("good/001.png") else data,
    )
    reseal(out)
    open_category(str(out), "nut", tmp_path)  # its hash is right
    with pytest.raises(DataProblems, match=r"test/good/001\.png is truncated or unreadable"):
        open_category(str(out), "nut", tmp_path, decode_test=True)


def test_a_defect_without_mask_among_others_with_one_is_refused(out: Path, tmp_path: Path) -> None:
    path = out / "nut/manifest.json"
    manifest = CategoryManifest.model_validate_json(path.read_text())
    shards = [
        shard.model_copy(
            update={
                "samples": [
                    s.model_copy(update={"mask": None}) if s.key.endswith("scratch/000") else s for s in shard.samples
                ]
            }
        )
        for shard in manifest.shards
    ]
    path.write_text(CategoryManifest.of("nut", "images", shards, manifest.plan).to_json())
    write_dataset_manifest(out)
    with pytest.raises(DataProblems, match="test/scratch/000 is a defect without mask"):
        open_category(str(out), "nut", tmp_path)
