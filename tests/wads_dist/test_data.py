import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shards.errors import DataError
from shards.source import Dataset
from wads_dist.config import Config, load_config
from wads_dist.data import TestImages, TrainingData, mean_image, rank_samples, texture_bank
from wads_dist.distributed import Ranks

CPU = torch.device("cpu")


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


def test_mean_image_is_the_mean_over_all_training_images(demo_shards: Path) -> None:
    dataset = Dataset.open(demo_shards)
    data = TrainingData(config(), dataset, "demo_biscuit", CPU)
    expected = data.images.images.float().mean(0) / 255  # type: ignore[attr-defined]
    assert torch.allclose(mean_image(dataset, "demo_biscuit", config(), chunk=3), expected, atol=1e-5)


def test_texture_bank_of_a_folder_and_its_misuse(demo_shards: Path, tmp_path: Path) -> None:
    from shards.build import build_textures

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
