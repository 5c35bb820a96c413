import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from wads_dist.kernels import synthesis
from wads_dist.kernels.backend import Backend
from wads_dist.kernels.synthesis import SynthesisSettings, draw, whole_images
from wads_dist.kernels.synthesis.reference import lattice_gradients, lattice_window, perlin_noise, sample_affine

SETTINGS = SynthesisSettings(image_size=64)
# This file is about the PyTorch form; the other backends have their own.
synthesise = partial(synthesis.synthesise, backend="torch")


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


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_grey_anomalies_stay_grey_and_are_otherwise_drawn_the_same(images: Tensor, backend: Backend) -> None:
    grey, sample = images[:, :1].expand_as(images).contiguous(), torch.arange(64)
    coloured, plain = (
        synthesis.synthesise(grey, grey, sample, 0, replace(SETTINGS, grey=on), backend=backend) for on in (False, True)
    )
    assert (plain.anomalous - plain.anomalous[:, :1]).abs().max() == 0
    assert (coloured.anomalous - coloured.anomalous[:, :1]).abs().max() > 0.1
    assert torch.equal(plain.mask, coloured.mask) and torch.equal(plain.clean, coloured.clean)
    assert torch.equal(plain.anomalous[:, 0], coloured.anomalous[:, 0])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_have_the_trainers_layout(images: Tensor, dtype: torch.dtype) -> None:
    batch = synthesise(images, images, torch.arange(3), 0, SETTINGS, dtype=dtype)
    exact = synthesise(images, images, torch.arange(3), 0, SETTINGS)
    for image, full in ((batch.clean, exact.clean), (batch.anomalous, exact.anomalous)):
        assert image.shape == (3, 3, 64, 64) and image.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(image, full.to(dtype))
    assert batch.mask.shape == (3, 1, 64, 64) and batch.mask.dtype == torch.uint8 and batch.mask.is_contiguous()


def test_a_seed_may_be_a_tensor_and_has_64_bits(images: Tensor) -> None:
    for seed in (3, 2**40 + 3, 2**64 - 3):
        tensor = torch.tensor(seed if seed < 2**63 else seed - 2**64)
        batches = [synthesise(images, images, torch.arange(5), s, SETTINGS) for s in (seed, tensor)]
        assert torch.equal(batches[0].anomalous, batches[1].anomalous)


def test_arguments_that_do_not_fit_are_named(images: Tensor) -> None:
    sample = torch.arange(2)
    wrong: list[tuple[str, tuple[Tensor, ...], dict[str, object]]] = [
        ("images must be uint8", (images.float(), images, sample), {}),
        ("textures must be contiguous", (images, images[:, :, ::2, ::2], sample), {}),
        ("images must be contiguous and hold an image", (images[:0], images, sample), {}),
        ("sample must be int64", (images, images, sample.int()), {}),
        ("image_count 10 but 9 images", (images, images, sample), {"image_count": 10}),
        ("image_index must be int64", (images, images, sample), {"image_index": torch.arange(3)}),
        ("image_count must be at least 1, got 0", (images, images, sample), {"image_count": 0}),
        ("image_count must be at least 1", (images, images, sample), {"image_index": sample, "image_count": -1}),
        ("seed must be an int64 tensor", (images, images, sample), {"seed": torch.tensor(0.0)}),
        ("seed must be an int64 tensor", (images, images, sample), {"seed": torch.tensor([0])}),
        ("seed must .* on cpu, got .* on meta", (images, images, sample), {"seed": torch.tensor(0, device="meta")}),
    ]
    for message, tensors, more in wrong:
        with pytest.raises(ValueError, match=message):
            synthesise(*tensors, **{"seed": 0, "settings": SETTINGS} | more)
    for lattice_max in (-1, 8):
        with pytest.raises(ValueError, match=f"lattice_max must be 0 to 7, got {lattice_max}"):
            SynthesisSettings(lattice_max=lattice_max)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_rows_that_are_not_there_are_refused(images: Tensor, backend: Backend) -> None:
    for row in (-1, -9, 9):
        with pytest.raises(IndexError):
            synthesise(images, images, torch.arange(1), 0, SETTINGS, torch.tensor([row]), 50, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_negative_ids_belong_to_earlier_cycles(backend: Backend) -> None:
    images = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    batch = synthesise(images, images, torch.arange(-9, 0), 0, replace(SETTINGS, image_size=4), backend=backend)
    shown = (batch.clean[:, 0, 0, 0] * 255).round()
    assert shown.sort().values.tolist() == list(range(9))
    assert torch.equal(shown.long(), draw(0, torch.arange(-9, 0), 9, 9, SETTINGS).image_index)


@pytest.mark.parametrize("seed", [2**63, torch.tensor(4)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_on_a_cpu_compiles_without_a_break(images: Tensor, seed: int | Tensor, dtype: torch.dtype) -> None:
    settings = replace(SETTINGS, image_size=16)

    def step(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = synthesise(images, images, ids, seed, settings, backend="auto", dtype=dtype)
        return batch.clean, batch.anomalous, batch.mask

    torch.compiler.reset()
    sample = torch.arange(2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ids in (sample, sample + 10):
        for ours, eager in zip(compiled(ids), step(ids), strict=True):
            assert torch.equal(ours, eager) and ours.stride() == eager.stride()

    number, tensor = (0, seed) if isinstance(seed, Tensor) else (seed - 2**64, None)
    scalars = (16, [0.8, 1.0], 10.0, 0.5, 0.8, 5, 0.5, 0.4, False)
    arguments = (images, images, sample, number, tensor, None, 9, dtype, "native", *scalars)
    torch.library.opcheck(torch.ops.wads.synthesise.default, arguments)


def test_gradients_belong_to_lattice_points_whatever_the_window() -> None:
    """A larger lattice_max looks at more of the same infinite lattice."""
    sample = torch.tensor([7])
    margin, points = lattice_window(5)
    whole = lattice_gradients(0, sample, margin, points)
    k, angle = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0.7])
    for lattice_max in range(5):
        inner, count = lattice_window(lattice_max)
        part = lattice_gradients(0, sample, inner, count)
        assert torch.equal(part, whole[..., margin - inner :, margin - inner :][..., :count, :count]), lattice_max
        noise = perlin_noise(0, sample, k, angle, 32, lattice_max)
        assert torch.equal(noise, perlin_noise(0, sample, k, angle, 32, 5)), lattice_max


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


@pytest.mark.slow
def test_masks_cover_what_draems_do() -> None:
    """DRAEM at 128²: mean cover 5.8 %, about 5 % empty before rotation (KERNEL_NOTES, measured)."""
    sample = torch.arange(2000)
    draws = draw(0, sample, 1, 1, SynthesisSettings())
    noise = perlin_noise(0, sample, draws.lattice, draws.angle * 0, 128, 5)
    cover = (noise > 0.5).flatten(1).float().mean(1)
    assert cover.mean().item() == pytest.approx(0.058, abs=0.006)
    assert (cover == 0).float().mean().item() == pytest.approx(0.05, abs=0.02)


@pytest.mark.slow
def test_unrotated_noise_and_masks_are_distributed_as_draems() -> None:
    """Kolmogorov-Smirnov distance below 0.05 between our noise and DRAEM's generator (perlin-numpy: unit gradients, times √2).

    At 64² both evaluate the same lattices at the same fractions, so nothing in the comparison depends on the size. With 4000
    draws each, two samples of one distribution are below 0.03 in 95 of 100 cases and below 0.044 in 999 of 1000.
    """
    from perlin_numpy import generate_perlin_noise_2d
    from scipy import ndimage
    from scipy.stats import ks_2samp

    draws, size = 4000, 64
    sample = torch.arange(draws)
    lattice = draw(0, sample, 1, 1, SynthesisSettings(clean_fraction=0.0)).lattice
    parts = zip(sample.split(500), lattice.split(500), strict=True)
    ours = torch.cat([perlin_noise(0, ids, k, torch.zeros(len(ids)), size, 5) for ids, k in parts]).numpy()
    rng = np.random.default_rng(0)
    shapes = 2 ** rng.integers(0, 6, (draws, 2))
    theirs = np.stack([generate_perlin_noise_2d((size, size), tuple(res), rng=rng) for res in shapes])

    # One pixel a draw: pixels of one image are not independent.
    y, x = rng.integers(0, size, (2, draws))
    everyone = np.arange(draws)
    masks = [noise > 0.5 for noise in (ours, theirs)]
    cover = [mask.mean((1, 2)) for mask in masks]
    regions = [[ndimage.label(one)[1] for one in mask] for mask in masks]
    for name, a, b in [
        ("noise", ours[everyone, y, x], theirs[everyone, y, x]),
        ("cover", *cover),
        ("regions", *regions),
    ]:
        assert ks_2samp(a, b).statistic < 0.05, name
    empty = [(c == 0).mean() for c in cover]
    assert 0.02 < empty[0] < 0.1 and abs(empty[0] - empty[1]) < 0.015


def test_whole_image_is_the_mean_of_blocks(images: Tensor) -> None:
    expected = torch.nn.functional.avg_pool2d(images.float() / 255, 2)
    assert torch.allclose(whole_images(images, 64), expected, atol=1e-5)


def test_sampling_reflects_at_the_border() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64).contiguous()
    shifted = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])  # half a picture to the right
    row = sample_affine(ramp, shifted, 64)[0, 0, 0] * 255
    assert row[:32].round().tolist() == list(range(32, 64)) and row[32:].round().tolist() == list(range(63, 31, -1))
