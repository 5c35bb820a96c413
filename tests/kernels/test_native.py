"""The compiled CPU kernels against the PyTorch reference, and how they come to be compiled."""

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wads_dist.kernels import library
from wads_dist.kernels.objective import KLDirection, KLForm, ObjectiveTerms, ObjectiveWeights, objective
from wads_dist.kernels.objective import cpp as objective_cpp
from wads_dist.kernels.synthesis import Batch, SynthesisSettings, draw, synthesise
from wads_dist.kernels.synthesis import cpp as synthesis_cpp

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES = [(2, 3, 11, 11), (1, 1, 11, 11), (2, 3, 17, 131), (2, 1, 90, 75), (2, 3, 128, 128)]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Not a skip: wherever these tests run there is a compiler, and then the kernels must compile."""
    library.load()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- synthesis ---------------------------------------------------------------------------------------------------------------


def stored(count: int, side: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def by_reference(images: Tensor, textures: Tensor, sample: Tensor, seed: int, settings: SynthesisSettings) -> Batch:
    return synthesise(images, textures, sample, seed, settings, backend="torch")


@pytest.mark.parametrize(
    "settings",
    [
        SynthesisSettings(),
        SynthesisSettings(image_size=37, scale=(0.3, 2.0), rotation=180.0, clean_fraction=0.0, lattice_max=3),
        SynthesisSettings(clean_fraction=0.2, blend_max=1.0, lattice_max=7, threshold=0.1, texture_jitter=1.0),
        SynthesisSettings(clean_fraction=0.0, grey=True),
    ],
)
def test_synthesis_is_the_references(settings: SynthesisSettings) -> None:
    """Every draw shows in the outputs, so equal outputs mean equal draws; samples and seed have high words here."""
    images, textures = stored(9), stored(5, 100, seed=1)
    differing = pixels = 0
    for start in (0, 2**33 + 5):
        sample, seed = torch.arange(start, start + 60), 2**63 + 12345 + start
        ours, theirs = (
            synthesis_cpp.synthesise(images, textures, sample, seed, settings, None, 9),
            by_reference(images, textures, sample, seed, settings),
        )
        differs = ours.mask != theirs.mask
        differing, pixels = differing + int(differs.sum()), pixels + differs.numel()
        assert 0 < ours.mask.float().mean() < 1
        # fp32 coordinates up to 128 have a spacing of 1.5e-5, and neighbouring pixels differ by up to 1 here.
        assert (ours.clean - theirs.clean).abs().max() < 5e-5
        assert (ours.anomalous - theirs.anomalous).abs().masked_fill_(differs, 0).max() < 1e-4
    assert differing < 1e-5 * pixels


def test_on_smooth_images_the_difference_is_a_rounding() -> None:
    ramp = torch.linspace(0, 255, 128).to(torch.uint8).expand(2, 3, 128, 128).contiguous()
    ours = synthesis_cpp.synthesise(ramp, ramp, torch.arange(64), 0, SynthesisSettings(), None, 2)
    theirs = by_reference(ramp, ramp, torch.arange(64), 0, SynthesisSettings())
    assert torch.equal(ours.mask, theirs.mask)
    assert (ours.anomalous - theirs.anomalous).abs().max() < 1e-6


def test_outputs_are_channels_last_and_a_byte_per_mask_pixel() -> None:
    batch = synthesis_cpp.synthesise(
        stored(2), stored(2), torch.arange(3), 0, SynthesisSettings(image_size=64), None, 2
    )
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (batch.clean, batch.anomalous))
    assert batch.mask.dtype == torch.uint8 and batch.mask.is_contiguous() and batch.mask.shape == (3, 1, 64, 64)
    assert set(batch.mask.unique().tolist()) == {0, 1}


def test_a_sample_depends_on_neither_batch_nor_threads(threads: Callable[[int], None]) -> None:
    images, settings = stored(9), SynthesisSettings(image_size=64)
    threads(1)
    whole = synthesis_cpp.synthesise(images, images, torch.arange(23), 5, settings, None, 9)
    for count in (1, 2, 5):
        threads(count)
        for size in (1, 4, 23):
            parts = [
                synthesis_cpp.synthesise(images, images, s, 5, settings, None, 9) for s in torch.arange(23).split(size)
            ]
            for name in ("clean", "anomalous", "mask"):
                assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name


def test_given_rows_give_the_resident_sample_and_foreign_rows_are_refused() -> None:
    images, settings, sample = stored(9), SynthesisSettings(image_size=64), torch.arange(100, 112)
    rows = draw(0, sample, 9, 9, settings).image_index
    resident = synthesis_cpp.synthesise(images, images, sample, 0, settings, None, 9)
    streamed = synthesis_cpp.synthesise(images[rows], images, sample, 0, settings, torch.arange(12), 9)
    assert torch.equal(resident.anomalous, streamed.anomalous)
    for wrong in (-1, 9):
        with pytest.raises(IndexError, match="rows"):
            synthesis_cpp.synthesise(images, images, sample, 0, settings, torch.full((12,), wrong), 9)


def test_every_position_shows_the_image_that_the_shuffle_says() -> None:
    images = torch.arange(251, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    sample = torch.cat([torch.arange(1004), torch.arange(2**40, 2**40 + 251)])
    settings = SynthesisSettings(image_size=2)
    shown = synthesis_cpp.synthesise(images, images, sample, 11, settings, None, 251).clean[:, 0, 0, 0] * 255
    assert torch.equal(shown.round().long(), draw(11, sample, 251, 251, settings).image_index)


# --- objective ---------------------------------------------------------------------------------------------------------------


def inputs(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    y = (x + 0.2 * torch.randn(shape, generator=generator)).clamp(0, 1)
    z = 4 * torch.randn(shape[0], 1, *shape[2:], generator=generator)
    return x, y, z, (z + torch.randn(z.shape, generator=generator) > 3).to(torch.uint8)


def exact(
    x: Tensor, y: Tensor, z: Tensor, mask: Tensor, weights: ObjectiveWeights
) -> tuple[ObjectiveTerms, Tensor, Tensor]:
    """The reference in fp64, and autograd's gradients of it."""
    y, z = y.double().requires_grad_(), z.double().requires_grad_()
    terms = objective(x.double(), y, z, mask, weights, backend="torch")
    dy, dz = torch.autograd.grad(terms.total, (y, z))
    return terms, dy, dz


def check(x: Tensor, y: Tensor, z: Tensor, mask: Tensor, weights: ObjectiveWeights, tolerance: float = 2e-5) -> None:
    """Terms to ``tolerance``; gradients to 2e-5 of their largest entry, as fp32 sums of a hundred terms allow."""
    terms, dy, dz = exact(x, y, z, mask, weights)
    ours, our_dy, our_dz = objective_cpp.objective(x, y, z, mask, weights, True)
    assert our_dy is not None and our_dz is not None
    assert torch.allclose(ours.double(), terms.per_image, rtol=1e-5, atol=tolerance)
    assert (our_dy - dy).abs().max() < 2e-5 * dy.abs().max()
    assert (our_dz - dz).abs().max() < 2e-5 * dz.abs().max()
    without, *none = objective_cpp.objective(x, y, z, mask, weights, False)
    assert torch.equal(without, ours) and none == [None, None]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_objective_is_the_references(shape: tuple[int, ...], channels_last: bool) -> None:
    x, y, z, mask = inputs(shape)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = y.to(memory_format=layout)
    check(x, y, z, mask, ObjectiveWeights(kl=1.0))
    _, dy, _ = objective_cpp.objective(x, y, z, mask, ObjectiveWeights(), True)
    assert dy is not None and dy.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("direction", ["printed", "reverse"])
@pytest.mark.parametrize("form", ["area", "pixel"])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0, 2.0])
def test_every_reading_of_focal_and_kl(gamma: float, form: KLForm, direction: KLDirection) -> None:
    weights = ObjectiveWeights(3.0, 0.5, 2.0, 4.0, gamma, 0.7, 0.2, form, direction)
    x, y, z, mask = inputs((2, 3, 40, 33))
    check(x, y, z, mask, weights)
    for truth in (0, 1):
        check(x, y, z, torch.full_like(mask, truth), weights)


def test_a_soft_mask_means_what_it_means_to_the_reference() -> None:
    x, y, z, mask = inputs((2, 3, 20, 20))
    for gamma in (0.1, 2.0):
        for scale in (1, 10):  # at 10 some pixels pass the clamp of (1 − p_t)^γ
            check(x, y, scale * z, 0.8 * mask.float() + 0.1, ObjectiveWeights(gamma=gamma))


@pytest.mark.parametrize("base", [0.95, 0.5, 0.0])
def test_smooth_images_do_not_cancel(base: float) -> None:
    """Variances near 1e-8 beside squares near 4: the usual five-map form loses four digits here."""
    ramp = torch.linspace(base, base + 0.05, 128).expand(2, 3, 128, 128)
    noise = torch.randn(ramp.shape, generator=torch.Generator().manual_seed(0))
    _, _, z, mask = inputs((2, 3, 128, 128))
    for level in (1e-4, 1e-2):
        check(ramp, ramp + level * noise, z, mask, ObjectiveWeights())


def test_a_gradient_image_from_black_to_white_does_not_cancel() -> None:
    x = torch.linspace(0, 1, 128).expand(1, 3, 128, 128)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    _, _, z, mask = inputs((1, 3, 128, 128))
    check(x, x + 1e-3 * noise, z, mask, ObjectiveWeights())


def test_the_dissimilarity_of_equal_images_is_zero_and_flat_there() -> None:
    x, _, z, mask = inputs((2, 3, 64, 64))
    terms, dy, _ = objective_cpp.objective(x, x.clone(), z, mask, ObjectiveWeights(), True)
    assert dy is not None and terms[:2].abs().max() == 0 and dy.abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_storage_is_widened(dtype: torch.dtype) -> None:
    x, y, z, mask = inputs((2, 3, 24, 24))
    x, y, z = x.to(dtype), y.to(dtype, memory_format=torch.channels_last), z.to(dtype)
    check(x, y, z, mask, ObjectiveWeights())


@pytest.mark.parametrize("gamma", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("direction", ["printed", "reverse"])
@pytest.mark.parametrize("form", ["area", "pixel"])
@pytest.mark.parametrize("truth", [0, 1])
@pytest.mark.parametrize("extremes", [(-60.0, 60.0), (-60.0, -60.0), (60.0, 60.0), (-1e4, -9e3), (9e3, 1e4)])
def test_extreme_logits_are_the_references(
    gamma: float, form: KLForm, direction: KLDirection, truth: int, extremes: tuple[float, float]
) -> None:
    x, y, _, mask = inputs((1, 3, 16, 16))
    z = torch.linspace(*extremes, 256).view(1, 1, 16, 16)
    mask, weights = torch.full_like(mask, truth), ObjectiveWeights(gamma=gamma, kl_form=form, kl_direction=direction)
    terms, dy, dz = objective_cpp.objective(x, y, z, mask, weights, True)
    assert dy is not None and dz is not None
    assert torch.isfinite(terms).all() and torch.isfinite(dy).all() and torch.isfinite(dz).all()
    expected, _, expected_dz = exact(x, y, z, mask, weights)
    assert torch.allclose(terms.double(), expected.per_image, rtol=1e-5, atol=1e-6)
    # Near saturation fp32 knows 1 − σ to 6e-8 of one pixel's share.
    assert (dz - expected_dz).abs().max() < 2e-5 * expected_dz.abs().max() + 1e-7 / 256


def test_nan_in_nan_out() -> None:
    x, y, z, mask = inputs((2, 3, 40, 40))
    for position in (0, 777, -1):
        bad_y, bad_z = y.clone(), z.clone()
        bad_y[1].view(-1)[position] = math.nan
        bad_z[1].view(-1)[position] = math.nan
        for weights in (ObjectiveWeights(), ObjectiveWeights(gamma=0.1, kl_form="pixel")):
            terms, dy, dz = objective_cpp.objective(x, bad_y, bad_z, mask, weights, True)
            assert dy is not None and dz is not None
            assert terms[:, 1].isnan().all() and torch.isfinite(terms[:, 0]).all()
            assert dy[1].isnan().any() and dz[1].isnan().any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, 3e38, -3e38])
def test_a_segmenter_that_has_diverged_does_not_look_healthy(value: float) -> None:
    """An infinite logit makes the KL of its image NaN, as the reference's; the largest finite one does not."""
    x, y, z, mask = inputs((2, 3, 16, 16))
    z[1].view(-1)[7] = value
    weights = ObjectiveWeights(focal=0.0, kl_form="pixel")
    terms, _, dz = objective_cpp.objective(x, y, z, mask, weights, True)
    expected = objective(x, y, z, mask, weights, backend="torch").per_image
    assert dz is not None and terms[3].isfinite().tolist() == expected[3].isfinite().tolist() == [
        True,
        abs(value) < 1e39,
    ]
    assert dz[1].isfinite().all() == (abs(value) < 1e39)


def test_objective_is_the_same_to_the_bit_for_any_number_of_threads(threads: Callable[[int], None]) -> None:
    x, y, z, mask = inputs((5, 3, 70, 90))
    for weights in (ObjectiveWeights(), ObjectiveWeights(gamma=0.1, kl_form="pixel")):
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            results.append(objective_cpp.objective(x, y, z, mask, weights, True))
        for result in results[1:]:
            for ours, first in zip(result, results[0], strict=True):
                assert ours is not None and first is not None and torch.equal(ours, first)


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, y, z, mask = inputs((5, 3, 40, 40))
    whole, *_ = objective_cpp.objective(x, y, z, mask, ObjectiveWeights(), True)
    for n in range(5):
        alone, *_ = objective_cpp.objective(*(t[n : n + 1] for t in (x, y, z, mask)), ObjectiveWeights(), False)
        assert torch.equal(alone[:, 0], whole[:, n])


def test_arguments_are_left_as_they_are() -> None:
    tensors = inputs((2, 3, 20, 20))
    copies = [t.clone() for t in tensors]
    objective_cpp.objective(*tensors, replace(ObjectiveWeights(), kl=1.0), True)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


# --- compilation -------------------------------------------------------------------------------------------------------------

PROGRAM = """
import warnings
import torch
from wads_dist.kernels import library
from wads_dist.kernels.synthesis import SynthesisSettings
from wads_dist.kernels.synthesis.cpp import synthesise
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(library.available(), library.available(), len(caught))
try:
    synthesise(*[torch.zeros(1, 3, 8, 8, dtype=torch.uint8)] * 2, torch.arange(1), 0,
               SynthesisSettings(image_size=8), None, 1)
    print("made a sample")
except library.NativeUnavailable as reason:
    print(reason)
"""


def start(folder: Path, **extra: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "TORCH_EXTENSIONS_DIR": str(folder)} | extra
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, text=True)


def test_defaults_of_dtype_and_device_do_not_reach_the_kernels() -> None:
    batch, images, settings = inputs((2, 3, 16, 16)), stored(2, 32), SynthesisSettings(image_size=16)

    def results() -> list[Tensor | None]:
        made = synthesis_cpp.synthesise(images, images, torch.arange(2, device="cpu"), 0, settings, None, 2)
        return [made.clean, made.anomalous, made.mask, *objective_cpp.objective(*batch, ObjectiveWeights(), True)]

    expected = results()
    try:
        for dtype, device in ((torch.float64, "cpu"), (torch.float32, "meta")):
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            got = results()
            torch.set_default_device(None)
            for ours, theirs in zip(got, expected, strict=True):
                assert ours is not None and theirs is not None
                assert ours.dtype == theirs.dtype and ours.device == theirs.device and torch.equal(ours, theirs)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_no_home_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(library.Path, "home", home)
    with pytest.raises(library.NativeUnavailable, match=r"home directory.*set TORCH_EXTENSIONS_DIR"):
        library._compile()


@pytest.mark.parametrize("mended", [True, False])
@pytest.mark.parametrize("damage", [b"", b"not a library"])
def test_a_damaged_library_is_built_again_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: bytes, mended: bool
) -> None:
    contents, builds, run = library._compile().read_bytes() if mended else damage, [], subprocess.run

    def compiler(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "-o" not in command:
            return run(command, **options)
        builds.append(Path(command[-1]).write_bytes(contents))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(library.subprocess, "run", compiler)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library._compile().write_bytes(damage)
    loaded = library._load.__wrapped__()
    assert isinstance(loaded, ctypes.CDLL if mended else library.NativeUnavailable) and len(builds) == 2


@pytest.mark.slow
def test_first_builds_at_the_same_time_end_in_one_library(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(3)]
    for process in processes:
        out, _ = process.communicate()
        assert process.returncode == 0 and out.splitlines() == ["True True 0", "made a sample"]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]  # and nothing temporary is left


@pytest.mark.slow
def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    out, _ = start(tmp_path, CXX="no-such-compiler").communicate()
    assert out.splitlines()[0] == "False False 1" and "no-such-compiler" in out and "install g++" in out


@pytest.mark.slow
def test_a_compiler_that_fails_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho cannot find the moon >&2\nexit 1\n")
    broken.chmod(0o755)
    for compiler, why in ((str(broken), "cannot find the moon"), ("/bin/false", "/bin/false -std=c++17")):
        out, _ = start(tmp_path / "cache", CXX=compiler).communicate()
        assert out.splitlines()[0] == "False False 1" and why in out and "made a sample" not in out
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_library_is_named_after_what_it_was_made_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another compiler or processor, or changed flags, is another file; nothing else is."""
    calls: list[list[str]] = []

    def compiler(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "-o" in command:
            calls.append(command)
            Path(command[-1]).touch()
        return subprocess.CompletedProcess(command, 0, f"{command[0]} 1.0", "")

    monkeypatch.setattr(library.subprocess, "run", compiler)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "one")
    first = library._compile()
    assert library._compile() == first and len(calls) == 1
    monkeypatch.setenv("CXX", "ccache two -g0")
    second = library._compile()
    assert calls[1][:3] == ["ccache", "two", "-g0"]
    monkeypatch.setattr(library, "_processor", lambda: "flags: fma avx9")
    third = library._compile()
    monkeypatch.setattr(library, "FLAGS", [*library.FLAGS, "-g"])
    assert len({first, second, third, library._compile()}) == 4 == len(calls)
