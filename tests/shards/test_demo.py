"""The demo data set and the texture bank: deterministic, and masks that tell the truth."""

from pathlib import Path

import numpy as np
import pytest

from wads_dist.shards.demo import AREA, VISIBLE, DemoSample, demo
from wads_dist.shards.demo_catalogue import CATALOGUE, DEMO_CATEGORIES
from wads_dist.shards.errors import DataError
from wads_dist.shards.images import decode_image, decode_mask, load_image, mask_pixels
from wads_dist.shards.masks import fit_mask
from wads_dist.shards.samples import USUAL_SIZE
from wads_dist.shards.source import Dataset
from wads_dist.shards.textures import procedural_textures
from wads_dist.shards.verify import verify

TINY = {"size": 64, "train": 3, "good": 2, "per_defect": 1, "progress": False}


def test_demo_is_deterministic_and_verifies(tmp_path: Path) -> None:
    one = demo(tmp_path / "a", 2, workers=1, **TINY)
    two = demo(tmp_path / "b", 2, workers=2, **TINY)
    assert one.fingerprint == two.fingerprint
    assert demo(tmp_path / "c", 2, workers=1, seed=1, **TINY).fingerprint != one.fingerprint
    assert verify(tmp_path / "a") == []
    dataset = Dataset.open(tmp_path / "a")
    assert dataset.categories == sorted(DEMO_CATEGORIES[:2])
    manifest = dataset.manifest(DEMO_CATEGORIES[0])
    assert sum(manifest.counts.values()) == 3 + 2 + 4 and manifest.counts["train/good"] == 3
    for shard, sample in manifest.samples("test"):
        assert (sample.mask is None) == sample.is_normal
        assert decode_image(dataset.read(manifest.category, shard, sample.image), 64).shape == (3, 64, 64)
        if sample.mask is not None:
            assert decode_mask(dataset.read(manifest.category, shard, sample.mask), 64).any()


def test_fifteen_categories_with_four_defects_each() -> None:
    assert len(DEMO_CATEGORIES) == 15 and all(name.startswith("demo_") for name in DEMO_CATEGORIES)
    assert all(len(CATALOGUE[name].defects) == 4 for name in DEMO_CATEGORIES)
    with pytest.raises(DataError, match="1 to 15"):
        demo(Path("unused"), 16)


@pytest.mark.parametrize("name", DEMO_CATEGORIES)
def test_masks_are_the_visible_change(name: str) -> None:
    for defect in CATALOGUE[name].defects:
        sample = DemoSample(name, "test", defect, 0, 128, 0)
        image, mask = sample.draw()
        assert mask is not None and AREA[0] <= mask.mean() <= AREA[1]
        change = np.abs(image.astype(int) - sample.clean()).max(axis=2)
        assert (change[mask] > VISIBLE).all() and (change[~mask] <= VISIBLE).all()


def test_components_that_cover_no_pixel_by_half_are_counted_as_in_a_build() -> None:
    sample = DemoSample("demo_mosaic", "test", "slipped", 0, 256, 0).read()
    assert sample.mask is not None
    assert sample.small == fit_mask(mask_pixels(load_image(sample.mask)), USUAL_SIZE).small > 0


@pytest.mark.parametrize("name", DEMO_CATEGORIES)
def test_normal_images_differ_from_their_mean(name: str) -> None:
    images = np.stack([DemoSample(name, "train", "good", index, 64, 0).draw()[0] for index in range(6)]).astype(float)
    distance = np.abs(images - images.mean(axis=0)).mean(axis=(1, 2, 3))
    assert distance.min() > 6  # grey levels; identical poses under one light would give the sensor noise, about 1


def test_textures_are_deterministic_and_varied() -> None:
    bank = procedural_textures(16, 32, seed=3)
    assert bank.dtype == np.uint8 and bank.shape == (16, 3, 32, 32)
    assert np.array_equal(bank, procedural_textures(16, 32, seed=3))
    assert np.array_equal(bank[:5], procedural_textures(5, 32, seed=3))
    assert not np.array_equal(bank, procedural_textures(16, 32, seed=4))
    assert len({texture.tobytes() for texture in bank}) == 16
    assert bank.std(axis=(1, 2, 3)).min() > 1
