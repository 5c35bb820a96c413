"""What is found in a folder, and how every kind of bad input is named."""

import os
from pathlib import Path

import pytest

from tests.shards.conftest import make_category, picture, save, square_mask
from wads_dist.shards.__main__ import main
from wads_dist.shards.build import build, build_textures
from wads_dist.shards.errors import DataError, DataProblems
from wads_dist.shards.source import Dataset


def built(root: Path, out: Path) -> Dataset:
    build(root, out, workers=1, progress=False)
    return Dataset.open(out)


def problems_of(root: Path, out: Path) -> list[str]:
    with pytest.raises(DataProblems) as caught:
        build(root, out, workers=1, progress=False)
    return caught.value.problems


def test_masks_with_and_without_suffix(root: Path, tmp_path: Path) -> None:
    dataset = built(root, tmp_path / "out")
    assert dataset.categories == ["bolt", "nut"]
    for category in dataset.categories:
        manifest = dataset.manifest(category)
        assert manifest.counts == {"train/good": 4, "test/good": 2, "test/scratch": 2}
        assert manifest.mean_size == (24, 20)
        assert all((sample.mask is not None) != sample.is_normal for _, sample in manifest.samples())
        assert [sample.key for _, sample in manifest.samples("test")] == [
            "test/good/000",
            "test/good/001",
            "test/scratch/000",
            "test/scratch/001",
        ]


def test_root_may_be_one_category(root: Path, tmp_path: Path) -> None:
    assert built(root / "nut", tmp_path / "out").categories == ["nut"]


def test_builds_into_one_folder_add_up(root: Path, tmp_path: Path) -> None:
    build(root, tmp_path / "out", ["nut"], workers=1, progress=False)
    assert Dataset.open(tmp_path / "out").categories == ["nut"]
    build(root, tmp_path / "out", ["bolt"], workers=1, progress=False)
    assert Dataset.open(tmp_path / "out").categories == ["bolt", "nut"]


@pytest.mark.parametrize("with_masks", [False, True])
def test_plain_folder(tmp_path: Path, with_masks: bool) -> None:
    folder = tmp_path / "product"
    for index in range(10):
        save(picture(index), folder / "good" / f"{index}.png")
    save(picture(20), folder / "bad" / "a.png")
    if with_masks:
        save(square_mask(), folder / "masks" / "a.png")
    manifest = built(folder, tmp_path / "out").manifest("product")
    assert manifest.counts == {"train/good": 8, "test/good": 2, "test/bad": 1}
    assert [sample.key for _, sample in manifest.samples("test") if sample.is_normal] == ["test/good/4", "test/good/9"]
    assert [sample.mask is not None for _, sample in manifest.samples() if not sample.is_normal] == [with_masks]


def test_textures_are_found_recursively_and_are_no_category(tmp_path: Path) -> None:
    for name in ("banded/one.jpg", "banded/two.jpg", "dotted/one.png", "top.bmp"):
        save(picture(len(name)), tmp_path / "dtd" / name)
    build_textures(tmp_path / "dtd", tmp_path / "out", workers=1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.categories == [] and dataset.texture_banks == ["textures"]
    manifest = dataset.manifest("textures")
    assert manifest.kind == "textures"
    assert [sample.key for _, sample in manifest.samples()] == [
        "train/good/banded/one",
        "train/good/banded/two",
        "train/good/dotted/one",
        "train/good/top",
    ]


def test_keys_hold_no_dots(tmp_path: Path) -> None:
    folder = make_category(tmp_path / "data/nut")
    save(picture(9), folder / "train/good" / "cam.1 left.jpg")
    manifest = built(folder, tmp_path / "out").manifest("nut")
    assert "train/good/cam_1_left" in [sample.key for _, sample in manifest.samples()]


def test_unknown_category_and_empty_root(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataProblems, match=r"category 'screw': not in .*bolt, nut"):
        build(root, tmp_path / "out", ["screw"], workers=1, progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no category found; expected"):
        build(tmp_path / "empty", tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="no such folder"):
        build(tmp_path / "nowhere", tmp_path / "out", progress=False)


def spoil_unreadable(nut: Path) -> None:
    path = nut / "train/good/001.jpg"
    path.write_bytes(path.read_bytes()[:300])


def spoil_mask_size(nut: Path) -> None:
    save(square_mask((30, 20)), nut / "ground_truth/scratch/000_mask.png")


def spoil_missing_mask(nut: Path) -> None:
    (nut / "ground_truth/scratch/001_mask.png").unlink()


def spoil_orphan_mask(nut: Path) -> None:
    save(square_mask(), nut / "ground_truth/scratch/777_mask.png")


def spoil_orphan_folder(nut: Path) -> None:
    save(square_mask(), nut / "ground_truth/dent/000_mask.png")


def spoil_empty(nut: Path) -> None:
    for path in (nut / "train/good").iterdir():
        path.unlink()


def spoil_clash(nut: Path) -> None:
    save(picture(3), nut / "train/good/000.png")


def spoil_two_masks(nut: Path) -> None:
    save(square_mask(), nut / "ground_truth/scratch/000.png")


def spoil_sanitised_clash(nut: Path) -> None:
    save(picture(3), nut / "train/good/a.b.png")
    save(picture(3), nut / "train/good/a b.png")


def spoil_empty_mask(nut: Path) -> None:
    save(square_mask().point(lambda _: 0), nut / "ground_truth/scratch/000_mask.png")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_unreadable, "nut/train/good/001.jpg: is truncated or unreadable"),
        (spoil_mask_size, "nut/ground_truth/scratch/000_mask.png: mask is 30×20 but its image"),
        (spoil_missing_mask, "nut/test/scratch/001.png: defect without mask"),
        (spoil_orphan_mask, "nut/ground_truth/scratch/777_mask.png: mask with no image"),
        (spoil_orphan_folder, "nut/ground_truth/dent/000_mask.png: mask with no image"),
        (spoil_empty, "nut: empty category"),
        (spoil_clash, "nut/train/good/000.png: name clash with 000.jpg"),
        (spoil_two_masks, "nut/test/scratch/000.png: name clash, two masks"),
        (spoil_sanitised_clash, "nut/train/good/a.b.png: name clash with nut/train/good/a b.png"),
        (spoil_empty_mask, "nut/ground_truth/scratch/000_mask.png: mask is empty"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(root: Path, tmp_path: Path, spoil, named: str) -> None:
    spoil(root / "nut")
    problems = problems_of(root, tmp_path / "out")
    assert len([problem for problem in problems if problem.startswith(named)]) == 1, problems
    # The good category is published all the same; of the bad one nothing is left.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bolt", "manifest.json"]


def test_all_problems_are_named_in_one_pass(root: Path, tmp_path: Path) -> None:
    for spoil in (spoil_unreadable, spoil_mask_size, spoil_missing_mask, spoil_orphan_mask, spoil_clash):
        spoil(root / "nut")
    assert len(problems_of(root, tmp_path / "out")) == 5


def test_category_name_must_be_a_file_name(root: Path, tmp_path: Path) -> None:
    (root / "nut").rename(root / "my nut?")
    assert "not usable as a file name" in problems_of(root, tmp_path / "out")[0]


@pytest.mark.parametrize("name", ["queue", "LOG", "all", "manifest.json"])
def test_category_name_must_not_be_taken(root: Path, tmp_path: Path, name: str) -> None:
    (root / "nut").rename(root / name)
    assert problems_of(root, tmp_path / "out")[0].startswith(
        f"category '{name}': not usable as a file name, stands for"
    )


def test_categories_must_differ_where_case_does_not_count(root: Path, tmp_path: Path) -> None:
    (root / "nut").rename(root / "Bolt")
    assert problems_of(root, tmp_path / "out") == [
        "category bolt: only large and small letters tell it from Bolt; rename one"
    ]
    assert Dataset.open(tmp_path / "out").categories == ["Bolt"]


@pytest.mark.parametrize(
    "path",
    ["nut/train/good/Pr\udcfcf.jpg", "nut/test/Pr\udcfcf", "nut/ground_truth/scratch/Pr\udcfcf_mask.png", "Pr\udcfcf"],
    ids=["image", "defect", "mask", "category"],
)
def test_a_name_that_is_not_utf8_is_named(root: Path, tmp_path: Path, path: str, capsys) -> None:
    """R8: zip archives from Windows."""
    there = {"nut/train/good": "000.jpg", "nut/test": "scratch", "nut/ground_truth/scratch": "000_mask.png", ".": "nut"}
    old = root / Path(path).parent / there[str(Path(path).parent)]
    os.rename(old, root / path)
    assert main(["build", "--root", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]) == 3
    said = capsys.readouterr().err
    assert "Pr\\udcfcf" in said and "not UTF-8" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bolt", "manifest.json"]


def test_a_kind_of_defect_must_not_steer_a_terminal(root: Path, tmp_path: Path) -> None:
    save(picture(9), root / "nut/test/a\x1b[2Jb/000.png")
    problems = problems_of(root, tmp_path / "out")
    assert len(problems) == 1 and problems[0].startswith("nut/test/a\\x1b[2Jb: the name of this kind of defect holds")
