import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.synthesis import (
    SynthesisSettings,
    draw,
    lattice_gradients,
    perlin_noise,
    sample_affine,
    synthesise,
    whole_images,
)

SETTINGS = SynthesisSettings(image_size=64)


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (9, 3, 128, 128), generator=generator, dtype=torch.uint8)


def test_a_sample_does_not_depend_on_its_batch(images: Tensor) -> None:
    whole = synthesise(images, images, torch.arange(23), 5, SETTINGS)
    for parts in (1, 4, 7):
        pieces = [synthesise(images, images, ids, 5, SETTINGS) for ids in torch.arange(23).split(parts)]
        for name in ("clean", "anomalous", "mask"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in pieces])), name


def test_a_sample_does_not_depend_on_the_number_of_threads(images: Tensor) -> None:
    threads = torch.get_num_threads()
    try:
        batches = []
        for count in (1, 2):
            torch.set_num_threads(count)
            batches.append(synthesise(images, images, torch.arange(16), 0, SETTINGS))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(batches[0].anomalous, batches[1].anomalous)


def test_streamed_rows_give_the_resident_sample(images: Tensor) -> None:
    sample = torch.arange(100, 112)
    rows = draw(0, sample, len(images), len(images), SETTINGS).image_index
    resident = synthesise(images, images, sample, 0, SETTINGS)
    streamed = synthesise(images[rows], images, sample, 0, SETTINGS, torch.arange(12), len(images))
    assert torch.equal(resident.anomalous, streamed.anomalous)


def test_equation_3_1(images: Tensor) -> None:
    """Outside the mask the normal image; inside it β·I + (1 − β)·T with β below its bound."""
    batch = synthesise(images, images, torch.arange(64), 0, SETTINGS)
    outside = (batch.mask == 0).expand_as(batch.clean)
    assert torch.equal(batch.anomalous[outside], batch.clean[outside])
    assert set(batch.mask.unique().tolist()) == {0.0, 1.0}
    assert batch.anomalous.min() >= 0 and batch.anomalous.max() <= 1
    opaque = synthesise(images, images * 0, torch.arange(64), 0, replace(SETTINGS, blend_max=0.0, texture_jitter=0.0))
    inside = (opaque.mask == 1).expand_as(opaque.clean)
    assert inside.any() and opaque.anomalous[inside].max() == 0  # black texture, β = 0: nothing of I is left


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_share_of_clean_samples(images: Tensor, fraction: float) -> None:
    draws = draw(0, torch.arange(4000), 9, 9, replace(SETTINGS, clean_fraction=fraction))
    assert abs((~draws.anomalous).float().mean().item() - fraction) < 0.03


def test_draws_stay_in_their_ranges() -> None:
    settings = replace(SETTINGS, scale=(0.5, 0.7), rotation=30.0)
    draws = draw(1, torch.arange(5000), 28, 5, settings)
    scale = draws.image_map[:, :, :2].norm(dim=1)[:, 0]
    angle = torch.rad2deg(torch.atan2(draws.image_map[:, 1, 0], draws.image_map[:, 0, 0]))
    assert 0.5 <= scale.min() < 0.51 and 0.69 < scale.max() <= 0.7
    assert -30 <= angle.min() < -29 and 29 < angle.max() <= 30
    assert draws.lattice.unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert draws.image_index.unique().tolist() == list(range(28))
    assert draws.texture_index.unique().tolist() == list(range(5))
    assert draws.beta.min() >= 0 and draws.beta.max() < settings.blend_max
    # An unrotated crop lies within the image: |centre| + side ≤ 1.
    assert (draws.image_map[:, :, 2].abs() + scale[:, None] <= 1 + 1e-6).all()


def test_unrotated_noise_is_the_textbooks() -> None:
    """Against a plain transcription of the textbook algorithm from the same gradients."""
    size, sample = 32, torch.tensor([11])
    for k_x, k_y in [(0, 0), (2, 4), (5, 1)]:
        noise = perlin_noise(0, sample, torch.tensor([[k_x, k_y]]), torch.zeros(1), size, 5)[0]
        gradient = lattice_gradients(0, sample, 8, 48)[0].numpy()
        for x, y in [(0, 0), (5, 9), (31, 31), (16, 3)]:
            u, v = x * 2**k_x / size, y * 2**k_y / size
            i, j = math.floor(u), math.floor(v)
            f, g = u - i, v - j
            dots = {
                (dx, dy): float(np.dot(gradient[:, j + dy + 8, i + dx + 8], (f - dx, g - dy)))
                for dx in (0, 1)
                for dy in (0, 1)
            }
            fade = [t**3 * (6 * t * t - 15 * t + 10) for t in (f, g)]
            top = dots[0, 0] + fade[0] * (dots[1, 0] - dots[0, 0])
            bottom = dots[0, 1] + fade[0] * (dots[1, 1] - dots[0, 1])
            assert noise[y, x].item() == pytest.approx(math.sqrt(2) * (top + fade[1] * (bottom - top)), abs=2e-6)


def test_rotation_turns_the_window_about_its_centre() -> None:
    sample, k = torch.tensor([4]), torch.tensor([[3, 3]])
    straight = perlin_noise(0, sample, k, torch.zeros(1), 64, 5)[0]
    turned = perlin_noise(0, sample, k, torch.tensor([math.pi / 2]), 64, 5)[0]
    # A quarter turn about pixel (32, 32) takes row y, column x to (32 + (x − 32), 32 − (y − 32)).
    assert torch.allclose(turned[1:, :].T.flip(1), straight[:, 1:], atol=1e-5)


def test_masks_cover_what_draems_do() -> None:
    """DRAEM at 128²: mean cover 5.8 %, about 5 % empty before rotation (KERNEL_NOTES, measured)."""
    sample = torch.arange(2000)
    draws = draw(0, sample, 1, 1, SynthesisSettings())
    noise = perlin_noise(0, sample, draws.lattice, draws.angle * 0, 128, 5)
    cover = (noise > 0.5).flatten(1).float().mean(1)
    assert cover.mean().item() == pytest.approx(0.058, abs=0.006)
    assert (cover == 0).float().mean().item() == pytest.approx(0.05, abs=0.02)


def test_whole_image_is_the_mean_of_blocks(images: Tensor) -> None:
    expected = torch.nn.functional.avg_pool2d(images.float() / 255, 2)
    assert torch.allclose(whole_images(images, 64), expected, atol=1e-5)


def test_sampling_reflects_at_the_border() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64).contiguous()
    shifted = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])  # half a picture to the right
    row = sample_affine(ramp, shifted, 64)[0, 0, 0] * 255
    assert row[:32].round().tolist() == list(range(32, 64)) and row[32:].round().tolist() == list(range(63, 31, -1))
