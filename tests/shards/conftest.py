"""Small data sets for the tests of shards."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """A smooth random picture; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def square_mask(size: tuple[int, int] = (24, 20)) -> Image.Image:
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[4:10, 6:15] = 255
    return Image.fromarray(mask)


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()


def make_category(folder: Path, train: int = 4, suffix: str = "_mask") -> Path:
    """A category in the MVTec AD layout: `train` normal, 2 normal test and 2 defective images."""
    for index in range(train):
        save(picture(index), folder / "train/good" / f"{index:03d}.jpg")
    for index in range(2):
        save(picture(100 + index), folder / "test/good" / f"{index:03d}.png")
        save(picture(200 + index), folder / "test/scratch" / f"{index:03d}.png")
        save(square_mask(), folder / "ground_truth/scratch" / f"{index:03d}{suffix}.png")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set with two categories, their masks named with and without `_mask`."""
    make_category(tmp_path / "data/nut")
    make_category(tmp_path / "data/bolt", suffix="")
    return tmp_path / "data"
