"""The Triton kernels of the synthesis against the PyTorch form, which defines them.

Both compute coordinates of up to S pixels in float32, so that images agree to a few S·2⁻²⁴ of a pixel times the steepest slope
(1 a pixel in these random images): 2e-5 at S = 64, 1e-4 at S = 256.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wads_dist.kernels.synthesis import Batch, SynthesisSettings, draw, synthesise
from wads_dist.kernels.synthesis import triton as synthesis_triton
from wads_dist.kernels.synthesis.reference import lattice_gradients, lattice_window

SETTINGS = SynthesisSettings(image_size=32)
FAR = 2**33 + 2**31  # sample ids and seeds that need their high words


def pictures(count: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The interpreter's cost is per operation, not per pixel: one tile an image."""
    if request.node.get_closest_marker("interpreter"):
        monkeypatch.setattr(synthesis_triton, "TILE", (64, 64))


def check(ours: Batch, reference: Batch, tolerance: float) -> None:
    """Images agree where the masks do, and those differ in so few pixels as noise within rounding of the threshold explains:
    fewer than 1 in 100,000."""
    differ = ours.mask != reference.mask
    assert differ.sum() < 1e-5 * differ.numel()
    assert ours.mask.dtype == torch.uint8 and ours.mask.max() <= 1
    same = ~differ.expand_as(ours.clean)
    torch.testing.assert_close(ours.clean, reference.clean, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.anomalous[same], reference.anomalous[same], rtol=0, atol=tolerance)
    for image in (ours.clean, ours.anomalous):
        assert image.is_contiguous(memory_format=torch.channels_last)


def assert_equal(a: Batch, b: Batch) -> None:
    for name in ("clean", "anomalous", "mask"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def to_pixels(maps: Tensor, side: int, size: int) -> Tensor:
    """[B, 2, 3] maps between [−1, 1] as (cos, sin, x, y) from output pixels to source pixels."""
    turn, shift = maps[:, :, 0] * side / size, maps[:, :, 2] * side / 2 + (side - 1) / 2
    return torch.cat([turn, shift], 1)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("count", "seed", "first", "images", "settings"),
    [
        (130, 0, 0, 9, replace(SETTINGS, clean_fraction=0.99)),  # more samples than one program draws
        (12, 0, -20, 9, SETTINGS),  # a negative id belongs to an earlier cycle, as floor division says
        (12, 2**64 - 7, FAR, 1, replace(SETTINGS, scale=(0.2, 0.3), grey=True)),
        (12, FAR, 2**40, 257, replace(SETTINGS, lattice_max=7, rotation=180.0, texture_jitter=1.0, blend_max=0.5)),
    ],
)
def test_draws_are_the_references(count: int, seed: int, first: int, images: int, settings: SynthesisSettings) -> None:
    """Every choice to the bit, every length to a rounding."""
    side, texture_side, size = 50, 40, settings.image_size
    sample = torch.arange(first, first + count)
    store, textures = torch.empty(images, 3, side, side), torch.empty(7, 3, texture_side, texture_side)
    rows, table, _ = synthesis_triton._prepare(store, textures, sample, seed, settings, None, images)

    draws = draw(seed, sample, images, 7, settings)
    assert torch.equal(rows[:, 0].long(), draws.image_index)
    assert torch.equal(rows[:, 1].long(), torch.where(draws.anomalous, draws.texture_index, -1))
    assert torch.equal(table[:, 16:18], 2.0**draws.lattice / size)
    maps = [to_pixels(draws.image_map, side, size), to_pixels(draws.texture_map, texture_side, size)]
    turn = torch.stack([torch.cos(draws.angle), torch.sin(draws.angle)], -1)
    expected = torch.cat([*maps, draws.gain, draws.bias, turn], 1)
    torch.testing.assert_close(table[:, :14], expected[:, :14], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(table[:, 14:16], turn, rtol=0, atol=3e-7)
    torch.testing.assert_close(table[:, 18], draws.beta, rtol=1e-6, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize("lattice_max", [0, 3, 5])
def test_every_lattice_point_that_a_window_touches_has_its_gradient(lattice_max: int) -> None:
    settings = replace(SETTINGS, clean_fraction=0.0, lattice_max=lattice_max)
    sample, size = torch.arange(FAR, FAR + 8), settings.image_size
    store = torch.empty(1, 3, size, size)
    _, _, packed = synthesis_triton._prepare(store, store, sample, 3, settings, None, 1)
    gradients = packed.view(torch.float32).unflatten(-1, (-1, 2)).movedim(-1, 1)

    margin, points = lattice_window(lattice_max)
    draws = draw(3, sample, 1, 1, settings)
    # The window's corners are as far as it reaches, and all lines between the extremes are needed.
    corner = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]) / 2
    cos, sin = torch.cos(draws.angle)[:, None], torch.sin(draws.angle)[:, None]
    turned = torch.stack([cos * corner[:, 0] - sin * corner[:, 1], sin * corner[:, 0] + cos * corner[:, 1]], -1)
    reach = (turned + 0.5) * 2.0 ** draws.lattice[:, None]
    first, last = reach.amin(1).floor().int() + margin, reach.amax(1).floor().int() + 1 + margin
    expected = lattice_gradients(3, sample, margin, points)
    for b in range(len(sample)):
        window = (b, slice(None), slice(first[b, 1], last[b, 1] + 1), slice(first[b, 0], last[b, 0] + 1))
        torch.testing.assert_close(gradients[window], expected[window], rtol=0, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("seed", "image_side", "texture_side", "settings"),
    [
        (FAR, 64, 48, SETTINGS),
        (0, 33, 70, replace(SETTINGS, image_size=33, clean_fraction=0.0, rotation=180.0, lattice_max=3)),
        (
            1,
            20,
            16,
            replace(SETTINGS, image_size=17, clean_fraction=0.0, lattice_max=1, texture_jitter=1.0, scale=(0.3, 1)),
        ),
        (
            FAR,
            40,
            2,
            replace(SETTINGS, image_size=48, clean_fraction=0.1, lattice_max=0, threshold=-0.2, blend_max=1.0),
        ),
        (0, 64, 64, replace(SETTINGS, clean_fraction=1.0)),
    ],
)
def test_batches_are_the_references(seed: int, image_side: int, texture_side: int, settings: SynthesisSettings) -> None:
    images, textures = pictures(9, image_side), pictures(5, texture_side)
    sample = torch.arange(seed, seed + 10)
    ours = synthesise(images, textures, sample, seed, settings, backend="triton")
    check(ours, synthesise(images, textures, sample, seed, settings, backend="torch"), 2e-5)
    assert bool(ours.mask.any()) == (settings.clean_fraction < 1)


@pytest.mark.interpreter
@pytest.mark.slow
def test_masks_agree_in_all_but_one_of_a_hundred_thousand_pixels() -> None:
    settings = replace(SETTINGS, image_size=63, clean_fraction=0.0)
    images, sample = pictures(2, 64), torch.arange(64)  # 254,016 pixels: at most two may differ
    ours = synthesise(images, images, sample, 0, settings, backend="triton")
    check(ours, synthesise(images, images, sample, 0, settings, backend="torch"), 2e-5)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("size", [32, 37])
def test_tiles_make_no_difference(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    settings, images = replace(SETTINGS, image_size=size, clean_fraction=0.2), pictures(3, 64)
    whole = synthesise(images, images, torch.arange(4), 1, settings, backend="triton")
    monkeypatch.setattr(synthesis_triton, "TILE", (4, 32))
    assert_equal(synthesise(images, images, torch.arange(4), 1, settings, backend="triton"), whole)


@pytest.mark.slow
@pytest.mark.interpreter
def test_half_precision_is_the_rounded_image() -> None:
    images, sample = pictures(3, 64), torch.arange(4)
    full = synthesise(images, images, sample, 0, SETTINGS, backend="triton")
    # The interpreter cuts bfloat16 off where a GPU rounds, so that it may be a whole unit of 2⁻⁸ away.
    for dtype, tolerance in ((torch.bfloat16, 2**-8), (torch.float16, 2**-12)):
        half = synthesise(images, images, sample, 0, SETTINGS, backend="triton", dtype=dtype)
        assert half.clean.dtype == half.anomalous.dtype == dtype
        check(Batch(half.clean.float(), half.anomalous.float(), half.mask), full, tolerance)


@pytest.mark.slow
@pytest.mark.interpreter
def test_a_sample_does_not_depend_on_its_batch_and_may_be_streamed() -> None:
    images, textures, sample = pictures(9, 40), pictures(4, 40), torch.arange(11)
    whole = synthesise(images, textures, sample, 5, SETTINGS, backend="triton")
    pieces = [synthesise(images, textures, ids, 5, SETTINGS, backend="triton") for ids in sample.split(4)]
    assert_equal(whole, Batch(*(torch.cat([getattr(p, n) for p in pieces]) for n in ("clean", "anomalous", "mask"))))

    rows = draw(5, sample, 9, 4, SETTINGS).image_index.flip(0)
    backwards = torch.arange(11).flip(0)
    streamed = synthesise(images[rows], textures, sample, 5, SETTINGS, backwards, 9, backend="triton")
    assert_equal(streamed, whole)
    assert len(synthesise(images, textures, sample[:0], 5, SETTINGS, backend="triton").mask) == 0


@pytest.mark.interpreter
def test_rows_that_are_not_there_are_not_read() -> None:
    store, index = pictures(3, 32), torch.tensor([-(2**40), -1, 0, 2, 3, 2**32])
    rows, _, _ = synthesis_triton._prepare(store, store, torch.arange(6), 0, SETTINGS, index, 50)
    assert rows[:, 0].tolist() == [0, 0, 0, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.interpreter
def test_seed_and_position_are_read_from_their_tensors() -> None:
    images = pictures(9, 40)
    for number in (3, 2**64 - 3):
        seed, sample = torch.tensor(0), torch.arange(4)
        synthesise(images, images, sample, seed, SETTINGS, backend="triton")
        seed += number if number < 2**63 else number - 2**64
        sample += FAR
        moved = synthesise(images, images, sample, seed, SETTINGS, backend="triton")
        expected = synthesise(images, images, torch.arange(FAR, FAR + 4), number, SETTINGS, backend="triton")
        assert_equal(moved, expected)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("seed", [2**63, torch.tensor(4)], ids=["number", "tensor"])
def test_the_operator_is_sound_and_compiles_without_a_break(seed: int | Tensor) -> None:
    images, sample, settings = pictures(3, 20), torch.arange(2), replace(SETTINGS, image_size=16)

    def step(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = synthesise(images, images, ids, seed, settings, backend="triton", dtype=torch.float16)
        return batch.clean, batch.anomalous, batch.mask

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ids in (sample, sample + 10):
        assert_equal(Batch(*compiled(ids)), Batch(*step(ids)))

    number, tensor = (0, seed) if isinstance(seed, Tensor) else (seed - 2**64, None)
    scalars = (16, [0.8, 1.0], 10.0, 0.5, 0.8, 5, 0.5, 0.4, False)
    arguments = (images, images, sample, number, tensor, None, 3, torch.float32, "triton", *scalars)
    torch.library.opcheck(torch.ops.wads.synthesise.default, arguments)


CUDA = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, FAR])
def test_gpu_batches_are_the_cpu_references(dtype: torch.dtype, seed: int) -> None:
    images, textures, settings = pictures(60, 256), pictures(20, 256), SynthesisSettings()
    sample = torch.arange(seed, seed + 128)
    ours = synthesise(images.to(CUDA), textures.to(CUDA), sample.to(CUDA), seed, settings, dtype=dtype)
    ours = Batch(ours.clean.cpu(), ours.anomalous.cpu(), ours.mask.cpu())
    reference = synthesise(images, textures, sample, seed, settings, backend="torch", dtype=dtype)
    # Below 1 neighbours in bfloat16 are 2⁻⁸ apart, in float16 2⁻¹¹: a value on the edge may round to the other one.
    check(ours, reference, {torch.float32: 1e-4, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 1e-4}[dtype])


@pytest.mark.gpu
def test_gpu_batches_do_not_depend_on_their_size_and_repeat() -> None:
    images, sample, settings = pictures(60, 256).to(CUDA), torch.arange(96, device=CUDA), SynthesisSettings()
    whole = synthesise(images, images, sample, 0, settings)
    assert_equal(synthesise(images, images, sample, 0, settings), whole)
    pieces = [synthesise(images, images, ids, 0, settings) for ids in sample.split(40)]
    assert_equal(whole, Batch(*(torch.cat([getattr(p, n) for p in pieces]) for n in ("clean", "anomalous", "mask"))))


@pytest.mark.gpu
def test_gpu_graph_replays_follow_their_seed_and_sample_ids() -> None:
    images, settings = pictures(60, 256).to(CUDA), SynthesisSettings()
    sample, seed = torch.arange(16, device=CUDA), torch.zeros((), dtype=torch.int64, device=CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels, which a capture cannot
        synthesise(images, images, sample, seed, settings)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = synthesise(images, images, sample, seed, settings)
    for step in range(3):
        graph.replay()
        ids = torch.arange(16 * step, 16 * step + 16, device=CUDA)
        assert_equal(captured, synthesise(images, images, ids, 5 * step, settings))
        sample += 16
        seed += 5


@pytest.mark.gpu
def test_gpu_synthesis_never_waits_for_the_device() -> None:
    images, sample, settings = pictures(9, 64).to(CUDA), torch.arange(8, device=CUDA), SETTINGS
    seed = torch.zeros((), dtype=torch.int64, device=CUDA)
    rows = sample % 9
    synthesise(images, images, sample, seed, settings)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        synthesise(images, images, sample, seed, settings)
        synthesise(images, images, sample, 2**63, settings, rows, 9, dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_compiled_whole() -> None:
    images, sample = pictures(9, 64).to(CUDA), torch.arange(8, device=CUDA)

    def step(ids: Tensor) -> tuple[Tensor, Tensor]:
        batch = synthesise(images, images, ids, 0, SETTINGS)
        return batch.clean - batch.anomalous, batch.mask

    for mine, theirs in zip(torch.compile(step, fullgraph=True)(sample), step(sample), strict=True):
        assert torch.equal(mine, theirs)
