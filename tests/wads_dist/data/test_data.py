import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from wads_dist.common.ranks import Ranks
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config, DataConfig
from wads_dist.data.images import TestImages, decode_entries, decode_shards
from wads_dist.data.training import TrainingData, is_grey, mean_image, rank_samples, texture_bank
from wads_dist.evaluation.evaluate import evaluate
from wads_dist.evaluation.metrics import map_metrics
from wads_dist.model.networks import Scored
from wads_dist.shards.build import build
from wads_dist.shards.errors import DataError
from wads_dist.shards.source import Dataset
from wads_dist.shards.verify import examine, verify

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)


def config(*overrides: str) -> Config:
    return load_config(["--data.shards", "none", "--data.image_size", "64", "--data.store_size", "64", *overrides])


def batches(shards: Path, world_size: int, mode: str, steps: int = 4, batch: int = 12) -> tuple[list[int], Tensor]:
    """The ids and the anomalous images that ``world_size`` ranks together see, put in global order."""
    data = [
        TrainingData(config("--data.mode", mode), Dataset.open(shards), "demo_biscuit", CPU) for _ in range(world_size)
    ]
    ids: list[int] = []
    pixels = []
    for step in range(steps):
        for rank in range(world_size):
            mine = rank_samples(step * batch, batch, rank, world_size)
            following = rank_samples((step + 1) * batch, batch, rank, world_size)
            out = data[rank].batch(torch.tensor(mine), torch.tensor(following))
            ids += mine
            pixels.append(torch.cat([out.clean, out.anomalous, out.mask.expand_as(out.clean)], 1))
    return ids, torch.cat(pixels)


def test_samples_are_identical_for_one_and_two_ranks_resident_and_streaming(demo_shards: Path) -> None:
    ids, pixels = batches(demo_shards, 1, "resident")
    assert ids == list(range(48))
    for world_size, mode in [(2, "resident"), (1, "streaming"), (2, "streaming")]:
        other_ids, other = batches(demo_shards, world_size, mode)
        assert other_ids == ids, (world_size, mode)
        assert torch.equal(other, pixels), (world_size, mode)


@pytest.mark.parametrize("mode", ["resident", "streaming"])
@pytest.mark.parametrize(
    ("own", "textures", "images"), [(0.0, 64, 0), (0.5, 8, 8), (0.1, 63, 7), (0.95, 0, 8), (1.0, 0, 8)]
)
def test_normal_images_among_the_textures(demo_shards: Path, mode: str, own: float, textures: int, images: int) -> None:
    """Of 64 procedural textures and 8 images, each at most once."""
    data = TrainingData(
        config("--data.mode", mode, "--data.own_textures", str(own)), Dataset.open(demo_shards), "demo_biscuit", CPU
    )
    normal = TrainingData(config(), Dataset.open(demo_shards), "demo_biscuit", CPU).images.rows(torch.arange(1), None)[
        0
    ]
    from_bank = [any(t.equal(image) for image in normal) for t in data.textures].count(False)
    assert (from_bank, len(data.textures) - from_bank) == (textures, images)
    assert len(data.textures.flatten(1).unique(dim=0)) == len(data.textures)
    assert data.batch(torch.arange(4)).mask.shape == (4, 1, 64, 64)


def test_images_are_grey_if_their_channels_differ_by_a_level_at_most() -> None:
    grey = torch.randint(0, 254, (3, 1, 8, 8), dtype=torch.uint8).expand(3, 3, 8, 8).clone()
    assert is_grey(grey)
    grey[:, 0] += 1  # what a lossy format makes of it
    assert is_grey(grey)
    grey[1, 0, :4] += 2  # one of them has a patch of colour
    assert not is_grey(grey)


@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_a_category_without_colour_gets_grey_textures_where_that_is_asked(
    demo_shards: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("--data.mode", mode, "--synthesis.grey", "auto")
    coloured = TrainingData(settings, Dataset.open(demo_shards), "demo_biscuit", CPU)  # as its images are
    monkeypatch.setattr("wads_dist.data.training.is_grey", lambda images: True)
    grey = TrainingData(settings, Dataset.open(demo_shards), "demo_biscuit", CPU)
    never = TrainingData(config("--data.mode", mode), Dataset.open(demo_shards), "demo_biscuit", CPU)
    assert not coloured.settings.grey and torch.equal(coloured.textures, never.textures) and not never.settings.grey
    assert grey.settings.grey and torch.equal(grey.textures, grey.textures[:, :1].expand_as(grey.textures))
    assert not torch.equal(grey.batch(torch.arange(8)).anomalous, never.batch(torch.arange(8)).anomalous)


def test_streaming_keeps_a_bounded_number_of_images(demo_shards: Path) -> None:
    data = TrainingData(config("--data.mode", "streaming"), Dataset.open(demo_shards), "demo_biscuit", CPU)
    data.images.cached = 3  # type: ignore[attr-defined]
    for start in range(0, 20, 2):
        data.batch(torch.arange(start, start + 2), torch.arange(start + 2, start + 4))
        assert len(data.images.decoded) <= 4  # type: ignore[attr-defined]


def test_ranks_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ranks = Ranks.from_environment()
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size) == (5, 1, 8, 4)


def test_resident_images_are_those_of_random_access(demo_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a part of them, of several shards, and in batches."""
    monkeypatch.setattr("wads_dist.data.images.READ_AT_ONCE", 7)
    dataset = Dataset.open(demo_shards)
    entries = dataset.manifest("demo_biscuit").samples()[1::3]
    whole = decode_shards(dataset, "demo_biscuit", entries, 48)
    assert torch.equal(whole, decode_entries(dataset, "demo_biscuit", entries, 48))
    assert {shard.name for shard, _ in entries} == {"train-000000.tar", "test-000000.tar"}


def test_an_image_that_cannot_be_decoded_is_named(demo_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes, size: int) -> None:
        raise DataError("is truncated")

    monkeypatch.setattr("wads_dist.data.images.decode_image", broken)
    with pytest.raises(DataError, match=r"demo_biscuit/train-000000\.tar: sample train/good/\S+ is truncated"):
        TrainingData(config(), Dataset.open(demo_shards), "demo_biscuit", CPU)


@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_a_damaged_shard_is_named_before_training(demo_shards: Path, tmp_path: Path, mode: str) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(demo_shards, copy)
    shard = copy / "demo_biscuit" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        TrainingData(config("--data.mode", mode), Dataset.open(copy), "demo_biscuit", CPU)


def test_test_images_in_parts_are_the_whole(demo_shards: Path) -> None:
    dataset = Dataset.open(demo_shards)
    whole = TestImages.load(dataset, "demo_biscuit", config().data, slice(0, 100))
    parts = [TestImages.load(dataset, "demo_biscuit", config().data, slice(i, i + 3)) for i in range(0, 9, 3)]
    together, rows = TestImages.join(parts), TestImages.join([whole.rows([0, 1]), whole.rows(range(2, 7))])
    for other in (together, rows):
        assert torch.equal(whole.images, other.images) and torch.equal(whole.masks, other.masks)
        assert (whole.keys, whole.defects, whole.has_mask) == (other.keys, other.defects, other.has_mask)
    assert whole.masks.flatten(1).any(1).tolist() == [d != "good" for d in whole.defects]


# --- truth --------------------------------------------------------------------------------------------------------


def defects(folder: Path, pictures: list[Image.Image], masks: list[Image.Image], orientation: int = 1) -> Dataset:
    """Shards of a category ``cat`` whose defects are these JPEGs, with the tag, and their masks, without one."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    category = folder / "data/cat"
    for part in ("train/good", "test/good", "test/bad", "ground_truth/bad"):
        (category / part).mkdir(parents=True)
    for part in ("train/good", "test/good"):
        Image.new("RGB", pictures[0].size, (60, 60, 60)).save(category / part / "0.png")
    for i, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        picture.save(category / f"test/bad/{i}.jpg", exif=exif, quality=95)
        mask.save(category / f"ground_truth/bad/{i}_mask.png")
    build(folder / "data", folder / "out", progress=False, workers=1)
    return Dataset.open(folder / "out")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_truth_lies_where_a_viewer_shows_the_defect(tmp_path: Path, orientation: int) -> None:
    """The mask is drawn on the picture as annotation tools show it; brightness is then a perfect detector."""
    picture = Image.new("RGB", (128, 96), (100, 100, 100))
    picture.paste((255, 255, 255), (4, 4, 28, 24))
    method = ImageOps.exif_transpose(tagged(picture, orientation))
    mask = method.convert("L").point(lambda v: 255 * (v > 180))
    dataset = defects(tmp_path, [picture], [mask], orientation)
    assert verify(tmp_path / "out") == []
    test = TestImages.load(dataset, "cat", DataConfig(image_size=64), slice(None))
    assert map_metrics(test.images.mean(1), test.masks).auroc == pytest.approx(1, abs=1e-3)


def tagged(picture: Image.Image, orientation: int) -> Image.Image:
    picture = picture.copy()
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    return picture


def test_thin_defects_are_in_the_truth(tmp_path: Path) -> None:
    pictures, masks = [], []
    for top, thickness in ((448, 4), (510, 4), (574, 4), (643, 1), (700, 40)):  # two lie across the edge of two rows
        pixels = np.full((1024, 1024), 60, np.uint8)
        pixels[top : top + thickness, 100:900] = 255
        pictures.append(Image.fromarray(pixels))
        masks.append(Image.fromarray(np.where(pixels > 60, 255, 0).astype(np.uint8)))
    dataset = defects(tmp_path, pictures, masks)
    test = TestImages.load(dataset, "cat", DataConfig(image_size=128), slice(None))
    assert test.masks[:5].flatten(1).any(1).all() and test.small == [0, 1, 1, 1, 0, 0]
    assert map_metrics(test.images.mean(1), test.masks).average_precision > 0.9
    nearest = TestImages.load(dataset, "cat", DataConfig(image_size=128), slice(None), "nearest")
    assert nearest.masks.flatten(1).any(1).tolist() == [False] * 4 + [True, False]
    assert nearest.small == [1, 1, 1, 1, 0, 0]


class Brightness:
    """Stands in for the network: the probability is the image's red."""

    experts, reads_stored = None, False

    def predict(self, x: Tensor, stored: Tensor | None = None) -> Scored:
        return Scored(x, x[:, 0].contiguous(), torch.zeros(len(x), 4))


@pytest.mark.parametrize("orientation", [3, 6])
def test_shards_of_before_the_orientation_was_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int
) -> None:
    """They are read upright, too. A mask that then does not fit its image is named, however the data set is opened; where no
    size tells, it is counted: had its file the tag as well, it was stored without."""
    with monkeypatch.context() as before:
        before.setattr("wads_dist.shards.images.upright", lambda image: image)
        dataset = defects(tmp_path, [Image.new("RGB", (60, 40))], [Image.new("L", (60, 40), 255)], orientation)
    sizes = [(sample.width, sample.height) for _, sample in dataset.manifest("cat").samples()]
    assert sizes == [(60, 40)] * 3
    if orientation == 3:
        assert verify(tmp_path / "out") == []
        test = TestImages.load(dataset, "cat", DataConfig(image_size=64), slice(None))
        assert test.masks[0].all() and test.turned == {"test/bad/0"}
        assert test.rows([0]).turned == {"test/bad/0"} and not test.rows([1]).turned
        assert TestImages.join([test.rows([1]), test.rows([0])]).turned == {"test/bad/0"}
        assert evaluate(Brightness(), config(), dataset, "cat", ALONE).metrics["turned_images"] == 1  # type: ignore[arg-type]
        (note,) = examine(tmp_path / "out").notes
        assert note.startswith("cat: 1 images (the first: test/bad/0) are turned")
        return
    named = (
        r"mask is 60×40 but its image test/bad/0\.jpg is 40×60, turned as their EXIF orientation says \(image by 6\)"
    )
    with pytest.raises(DataError, match=rf"sample test/bad/0 does not fit its mask: {named}"):
        TestImages.load(dataset, "cat", DataConfig(image_size=64), slice(None))
    (problem,) = verify(tmp_path / "out")
    assert re.search(rf"cat/test-000000\.tar: test/bad/0\.mask\.png: {named}", problem)


def test_mean_image_is_the_mean_over_all_training_images(demo_shards: Path) -> None:
    dataset = Dataset.open(demo_shards)
    data = TrainingData(config(), dataset, "demo_biscuit", CPU)
    expected = data.images.images.float().mean(0) / 255  # type: ignore[attr-defined]
    assert torch.allclose(mean_image(dataset, "demo_biscuit", config(), chunk=3), expected, atol=1e-5)


def test_texture_bank_of_a_folder_and_its_misuse(demo_shards: Path, tmp_path: Path) -> None:
    from wads_dist.shards.build import build_textures

    images = tmp_path / "images"
    images.mkdir()
    with tarfile.open(demo_shards / "demo_leafplate" / "train-000000.tar") as tar:
        for member in tar.getmembers()[:12]:
            if member.name.endswith("0.png"):
                payload = tar.extractfile(member)
                assert payload is not None
                (images / Path(member.name).name).write_bytes(payload.read())
    build_textures(images, tmp_path / "out", workers=1, progress=False)
    bank = texture_bank(str(tmp_path / "out/textures"), tmp_path, 32, CPU)
    assert bank.shape[1:] == (3, 32, 32) and len(bank) >= 1
    assert texture_bank(None, tmp_path, 32, CPU).shape == (64, 3, 32, 32)
    with pytest.raises(DataError, match="not a texture bank"):
        texture_bank(str(demo_shards / "demo_leafplate"), tmp_path, 32, CPU)
