"""The Triton objective against the PyTorch form in float64, which defines it: interpreted here, and compiled on a GPU.

In float32 the terms are sums of a few thousand numbers below 4, each right to a few roundings: 2e-6 of the value, and nothing
may reach 2e-5. A gradient is compared relative to the largest one, 1e-5 being a few hundred roundings of the terms that cancel
in it where X̂ is close to x.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from wads_dist.kernels.objective import ObjectiveTerms, ObjectiveWeights, objective
from wads_dist.kernels.objective import triton as objective_triton

# All exact in float32, as a launch takes them.
WEIGHTS = ObjectiveWeights(reconstruction=2.0, ssim=1.5, l2=0.5, focal=1.0, gamma=2.0, kl=0.25, rho=0.125)
AREA = {"kl_form": "area", "kl_direction": "printed"}
PIXEL = {"kl_form": "pixel", "kl_direction": "printed"}
REVERSE_AREA, REVERSE_PIXEL = ({**reading, "kl_direction": "reverse"} for reading in (AREA, PIXEL))
READINGS = (AREA, PIXEL, REVERSE_AREA, REVERSE_PIXEL)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, device: str = "cpu", spread: float = 3.0
) -> Inputs:
    """x, X̂, logits and mask; the first four images' masks are mixed, all zeros, all ones and mixed."""
    generator = torch.Generator().manual_seed(sum(shape))
    n, _, height, width = shape
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    reconstruction = (x + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    logits = spread * torch.randn(n, 1, height, width, generator=generator, dtype=torch.float64)
    mask = (logits.roll(1, -1) > spread).to(torch.uint8)
    mask[1:2], mask[2:3] = 0, 1
    return x.to(device, dtype), reconstruction.to(device, dtype), logits.to(device, dtype), mask.to(device)


def run(
    batch: Inputs, weights: ObjectiveWeights = WEIGHTS, backend: str = "triton", scale: float = 1.0
) -> tuple[ObjectiveTerms, Tensor, Tensor]:
    """The terms, and the gradients of ``scale`` · total for X̂ and logits."""
    x, reconstruction, logits, mask = batch
    reconstruction, logits = reconstruction.detach().requires_grad_(), logits.detach().requires_grad_()
    terms = objective(x, reconstruction, logits, mask, weights, backend)  # type: ignore[arg-type]
    (terms.total * scale).backward()
    assert reconstruction.grad is not None and logits.grad is not None
    assert reconstruction.grad.dtype == reconstruction.dtype and logits.grad.dtype == logits.dtype
    return terms, reconstruction.grad, logits.grad


def exact(batch: Inputs, weights: ObjectiveWeights = WEIGHTS) -> tuple[ObjectiveTerms, Tensor, Tensor]:
    x, reconstruction, logits, mask = batch
    return run((x.double(), reconstruction.double(), logits.double(), mask), weights, "torch")


def check(batch: Inputs, weights: ObjectiveWeights, value: float, gradient: float) -> None:
    """Terms within ``value`` and gradients within ``gradient`` of the largest, both relative; float64 is the measure."""
    ours, exactly = run(batch, weights), exact(batch, weights)
    for name in ("total", "dissimilarity", "mse", "focal", "kl", "per_image"):
        mine, theirs = getattr(ours[0], name), getattr(exactly[0], name)
        torch.testing.assert_close(mine.double(), theirs, rtol=value, atol=value, msg=lambda m, n=name: f"{n}: {m}")
        assert mine.requires_grad == (name == "total")
    for mine, theirs in zip(ours[1:], exactly[1:], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=gradient * theirs.abs().max().item())


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "reading", "gamma"),
    [
        ((3, 1, 11, 11), AREA, 2.0),  # one window; masks mixed, all zeros and all ones
        ((3, 1, 11, 11), PIXEL, 2.0),
        ((1, 3, 11, 13), REVERSE_PIXEL, 0.1),  # channels
        ((1, 1, 34, 12), REVERSE_AREA, 0.0),  # two bands
        pytest.param((1, 1, 17, 131), AREA, 1.0, marks=pytest.mark.slow),  # three strips
    ],
)
def test_in_fp64_it_is_the_reference(shape: tuple[int, int, int, int], reading: dict[str, Any], gamma: float) -> None:
    # Taps, exponentials and sums are all in double: nothing but their rounding may differ.
    weights = replace(WEIGHTS, gamma=gamma, **reading)
    if gamma == 0.1:
        weights = replace(weights, gamma=float(torch.tensor(gamma)))  # a launch takes float32
    check(inputs(shape, torch.float64), weights, 1e-13, 1e-12)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "schedule"), [((1, 1, 11, 70), {"turn": 2}), ((1, 1, 40, 13), {"turn": 2, "rows": 17})], ids=str
)
def test_every_schedule_computes_the_same(
    shape: tuple[int, int, int, int], schedule: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = inputs(shape, torch.float64)
    terms, *gradients = run(batch)
    monkeypatch.setattr(objective_triton, "SCHEDULE", objective_triton.Schedule(**schedule))
    again, *others = run(batch)
    assert torch.allclose(again.total, terms.total, rtol=1e-13, atol=0)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-15) for a, b in zip(others, gradients, strict=True))


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_gradcheck(reading: dict[str, Any]) -> None:
    x, reconstruction, logits, mask = inputs((1, 1, 11, 12), torch.float64)
    weights = replace(WEIGHTS, **reading)
    assert torch.autograd.gradcheck(
        lambda y, z: objective(x, y, z, mask, weights, "triton").total,
        (reconstruction.requires_grad_(), logits.requires_grad_()),
        fast_mode=True,  # in random directions: an evaluation costs a second
    )


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_fp32_at_training_size(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter's cost is per operation, not per lane: one strip and two bands a plane.
    monkeypatch.setattr(objective_triton, "LANES", 64)
    monkeypatch.setattr(objective_triton, "tiling", lambda *_: (1, 2, 64))
    check(inputs((1, channels, 128, 128)), WEIGHTS, 2e-6, 1e-5)


@pytest.mark.slow
@pytest.mark.interpreter
def test_fp32_does_not_cancel_on_a_bright_smooth_image() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0.95, 0.951, 24, dtype=torch.float64).expand(1, 1, 16, 24)
    reconstruction = x + 1e-4 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    batch = (x.float(), reconstruction.float(), *inputs((1, 1, 16, 24))[2:])
    check(batch, WEIGHTS, 2e-6, 2e-5)
    # And better than the required 2e-5 of SSIM = 1: the dissimilarity, 1.5e-5 here, keeps its own digits.
    ours, theirs = run(batch)[0].dissimilarity.item(), exact(batch)[0].dissimilarity.item()
    assert theirs < 1e-4 and ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_storage_alone(dtype: torch.dtype, rounding: float) -> None:
    x, reconstruction, logits, mask = inputs((1, 2, 12, 14), dtype)
    # As a step under autocast meets them: the clean image in float32, what the networks made in half precision.
    batch = (x.float(), reconstruction.to(memory_format=torch.channels_last), logits, mask)
    ours, exactly = run(batch, scale=256.0), exact(batch)
    torch.testing.assert_close(ours[0].per_image.double(), exactly[0].per_image, rtol=2e-6, atol=2e-6)
    # Saved and scaled, a gradient is rounded at most twice; below float16's normal range a rounding is 2⁻²⁵.
    for mine, theirs in zip(ours[1:], exactly[1:], strict=True):
        torch.testing.assert_close(
            mine.double(), 256 * theirs, rtol=2 * rounding, atol=2**-25 + 1e-5 * theirs.max().item()
        )


@pytest.mark.interpreter
@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_extreme_logits_are_finite_and_right(reading: dict[str, Any], gamma: float) -> None:
    x, reconstruction, logits, mask = inputs((1, 1, 11, 11))
    logits = 60.0 * logits.sign()
    assert len({(z, m) for z, m in zip(logits.flatten().tolist(), mask.flatten().tolist(), strict=True)}) == 4
    check((x, reconstruction, logits, mask), replace(WEIGHTS, gamma=gamma, **reading), 2e-6, 1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_extreme_logits_of_other_types_are_finite(dtype: torch.dtype, reading: dict[str, Any]) -> None:
    x, reconstruction, logits, mask = inputs((1, 1, 11, 11), dtype)
    for sign in (logits.sign(), torch.ones_like(logits), -torch.ones_like(logits)):
        terms, *gradients = run((x, reconstruction, 60.0 * sign, mask), replace(WEIGHTS, **reading))
        assert all(torch.isfinite(values).all() for values in (terms.per_image, terms.total, *gradients))


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [-200.0, 200.0])  # where σ and 1 − σ are zero in float32
def test_area_kl_at_mean_zero_and_one(value: float) -> None:
    x, reconstruction, logits, mask = inputs((1, 1, 11, 11))
    check((x, reconstruction, torch.full_like(logits, value), mask), WEIGHTS, 2e-6, 1e-5)


@pytest.mark.slow
@pytest.mark.interpreter
def test_nan_reaches_the_terms_it_belongs_to_and_no_others() -> None:
    for which, spoilt in ((0, [0, 1]), (1, [0, 1]), (2, [2, 3]), (3, [2, 3])):
        batch = list(inputs((2, 1, 11, 11)))
        batch[which] = batch[which].float()
        batch[which][1, 0, 10, 10] = math.nan
        terms, d_reconstruction, d_logits = run(tuple(batch))  # type: ignore[arg-type]
        expected = torch.zeros(4, 2, dtype=torch.bool)
        expected[spoilt, 1] = True
        assert torch.equal(terms.per_image.isnan(), expected), which
        means = torch.stack([terms.dissimilarity, terms.mse, terms.focal, terms.kl])
        assert terms.total.isnan() and torch.equal(means.isnan(), expected[:, 1]), which
        hit, spared = (d_reconstruction, d_logits) if which < 2 else (d_logits, d_reconstruction)
        assert hit[1, 0, 10, 10].isnan() and hit[0].isfinite().all() and spared.isfinite().all(), which


@pytest.mark.interpreter
def test_the_upstream_gradient_scales_and_backward_may_come_twice() -> None:
    x, reconstruction, logits, mask = inputs((1, 1, 11, 13))
    once = run((x, reconstruction, logits, mask))[1:]
    reconstruction.requires_grad_(), logits.requires_grad_()
    total = objective(x, reconstruction, logits, mask, WEIGHTS, "triton").total
    for scale in (1.0, 4096.0, 0.25):  # powers of two: exact
        upstream = torch.tensor(scale)
        twice = torch.autograd.grad(total, (reconstruction, logits), upstream, retain_graph=True)
        for mine, unscaled in zip(twice, once, strict=True):
            assert torch.equal(mine, scale * unscaled)


@pytest.mark.slow
@pytest.mark.interpreter
def test_memory_formats_and_mask_types_give_the_same_bits() -> None:
    x, reconstruction, logits, mask = inputs((1, 2, 11, 11))
    terms, *gradients = run((x, reconstruction, logits, mask))
    view = torch.zeros(1, 4, 30, 22)[:, 1:3, 5:16, ::2]
    view.copy_(reconstruction)
    channels_last = reconstruction.to(memory_format=torch.channels_last)
    for other_x, other, truth in (
        (x, view, mask.bool()),
        (x.to(memory_format=torch.channels_last), channels_last, mask.float()),
    ):
        again, *others = run((other_x, other, logits, truth))
        assert torch.equal(again.per_image, terms.per_image)
        assert torch.equal(others[0], gradients[0]) and torch.equal(others[1], gradients[1])
    assert others[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.interpreter
def test_nothing_is_read_before_it_is_written() -> None:
    batch = inputs((1, 1, 11, 12))
    terms, *gradients = run(batch)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        again, *others = run(batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again.per_image, terms.per_image)
    assert torch.equal(others[0], gradients[0]) and torch.equal(others[1], gradients[1])


@pytest.mark.interpreter
def test_without_gradients_the_terms_are_the_same() -> None:
    batch = inputs((1, 1, 11, 12))
    with torch.no_grad():
        terms = objective(*batch, WEIGHTS, "triton")
    assert not terms.total.requires_grad and torch.equal(terms.per_image, run(batch)[0].per_image)


@pytest.mark.interpreter
def test_float64_logits_stay_that_beside_a_narrower_reconstruction() -> None:
    x, reconstruction, logits, mask = inputs((1, 1, 11, 12), torch.float64)
    batch = (x.float(), reconstruction.float(), logits, mask)
    ours, exactly = run(batch), exact(batch)
    assert ours[0].total.dtype == torch.float64
    torch.testing.assert_close(ours[0].per_image, exactly[0].per_image, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours[2], exactly[2], rtol=0, atol=1e-12 * exactly[2].abs().max().item())
    numbers = [2.0, 1.5, 0.5, 1.0, 2.0, 0.25, 0.125]
    torch.library.opcheck(
        torch.ops.wads.objective.default, (*batch, numbers, False, False, "triton", True), test_utils="test_faketensor"
    )


@pytest.mark.interpreter
def test_no_images_have_empty_gradients() -> None:
    terms, d_reconstruction, d_logits = run(tuple(t[:0] for t in inputs((1, 3, 11, 12))))  # type: ignore[arg-type]
    assert terms.per_image.shape == (4, 0) and terms.total.isnan()
    assert d_reconstruction.shape == (0, 3, 11, 12) and d_logits.shape == (0, 1, 11, 12)


@pytest.mark.interpreter
def test_forward_and_backward_are_three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def counted(kernel: object) -> object:
        class Counted:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                launched.append(grid)
                return kernel[grid]  # type: ignore[index]

        return Counted()

    kernels = [name for name in vars(objective_triton) if name.endswith("_kernel")]
    for name in kernels:
        monkeypatch.setattr(objective_triton, name, counted(getattr(objective_triton, name)))
    run(inputs((1, 1, 11, 11)))
    assert len(kernels) == len(launched) == 3


@pytest.mark.interpreter
@pytest.mark.slow
def test_opcheck_and_a_full_graph() -> None:
    x, reconstruction, logits, mask = inputs((1, 1, 11, 11))
    reconstruction.requires_grad_(), logits.requires_grad_()
    numbers = [2.0, 1.5, 0.5, 1.0, 2.0, 0.25, 0.125]
    torch.library.opcheck(
        torch.ops.wads.objective.default, (x, reconstruction, logits, mask, numbers, False, False, "triton", True)
    )
    compiled = torch.compile(lambda *a: objective(*a, WEIGHTS, "triton"), fullgraph=True, backend="aot_eager")
    terms = compiled(x, reconstruction, logits, mask)
    terms.total.backward()
    plain, *gradients = run((x, reconstruction, logits, mask))
    assert torch.equal(terms.total, plain.total) and torch.equal(terms.per_image, plain.per_image)
    assert torch.equal(reconstruction.grad, gradients[0]) and torch.equal(logits.grad, gradients[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [*range(11, 40), *range(60, 80), *range(120, 140), 181, 182, 183, 256, 1000])
def test_strips_share_out_every_column_once(width: int) -> None:
    """By the rule in ``_reconstruction_tile``: what a strip owns, its lanes reach, and every window they need it has."""
    span, owners = 2 * objective_triton.LANES, []
    strips, _, _ = objective_triton.tiling(1, 1, 32, width)
    for strip in range(strips):
        start, shift = strip * (span - 10), 10 * min(strip, 1)
        end = width if strip == strips - 1 else start + span
        for pixel in range(start + shift, end):
            owners.append(pixel)
            assert pixel < start + shift + span
            assert all(start <= w < start + span for w in range(max(0, pixel - 10), pixel + 1) if w < width - 10)
    assert owners == list(range(width))


# --- on a GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),  # as a step under autocast meets them
    ],
)
@pytest.mark.parametrize(
    "shape", [(64, 3, 128, 128), (256, 3, 128, 128), (5, 1, 17, 131), (3, 3, 256, 200), (2, 1, 11, 11)]
)
def test_gpu_is_the_reference(
    shape: tuple[int, int, int, int], x_dtype: torch.dtype, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x, reconstruction, logits, mask = inputs(shape, dtype, "cuda")
    batch = (x.to(x_dtype, memory_format=layout), reconstruction.to(memory_format=layout), logits, mask)
    for reading in READINGS:
        weights = replace(WEIGHTS, **reading)
        ours, exactly = run(batch, weights), exact(batch, weights)
        # exp and log of a GPU are right to about 2⁻²², in float32 sums of 16,384 of them.
        torch.testing.assert_close(ours[0].per_image.double(), exactly[0].per_image, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(ours[0].total.double(), exactly[0].total, rtol=2e-5, atol=2e-5)
        rounding = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        for mine, theirs in zip(ours[1:], exactly[1:], strict=True):
            smallest = (
                2**-24 if dtype == torch.float16 else 0.0
            )  # unscaled, such a gradient may lie below float16's range
            largest = theirs.abs().max().item()
            torch.testing.assert_close(mine.double(), theirs, rtol=rounding, atol=2e-5 * largest + smallest)
        assert ours[1].is_contiguous(memory_format=layout)


@pytest.mark.gpu
def test_gpu_fp32_on_a_bright_smooth_image() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0.95, 0.951, 128, dtype=torch.float64).expand(4, 3, 128, 128)
    reconstruction = x + 1e-4 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    batch = (x.float().cuda(), reconstruction.float().cuda(), *inputs((4, 1, 128, 128), device="cuda")[2:])
    ours, theirs = run(batch)[0].dissimilarity.item(), exact(batch)[0].dissimilarity.item()
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-8)


@pytest.mark.gpu
def test_gpu_nan_and_extreme_logits() -> None:
    for which, spoilt in ((0, [0, 1]), (1, [0, 1]), (2, [2, 3]), (3, [2, 3])):
        batch = list(inputs((3, 3, 128, 128), device="cuda"))
        batch[which] = batch[which].float()
        batch[which][1, 0, 77, 127] = math.nan
        expected = torch.zeros(4, 3, dtype=torch.bool, device="cuda")
        expected[spoilt, 1] = True
        assert torch.equal(run(tuple(batch))[0].per_image.isnan(), expected), which  # type: ignore[arg-type]
    x, reconstruction, logits, mask = inputs((3, 3, 128, 128), device="cuda")
    for value in (60.0, 200.0):
        check((x, reconstruction, value * logits.sign(), mask), WEIGHTS, 2e-5, 2e-5)
        for constant in (-value, value):
            check((x, reconstruction, torch.full_like(logits, constant), mask), WEIGHTS, 2e-5, 2e-5)


@pytest.mark.gpu
def test_gpu_repeats_to_the_bit_without_synchronisation() -> None:
    batch = inputs((64, 3, 128, 128), torch.bfloat16, "cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        first, *others = [run(batch) for _ in range(6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for terms, d_reconstruction, d_logits in others:
        assert torch.equal(terms.total, first[0].total) and torch.equal(terms.per_image, first[0].per_image)
        assert torch.equal(d_reconstruction, first[1]) and torch.equal(d_logits, first[2])


@pytest.mark.gpu
def test_gpu_forward_and_backward_are_three_kernels() -> None:
    x, reconstruction, logits, mask = inputs((8, 3, 128, 128), device="cuda")
    reconstruction.requires_grad_(), logits.requires_grad_()
    upstream = torch.ones((), device="cuda")

    def step() -> None:
        total = objective(x, reconstruction, logits, mask, WEIGHTS).total
        torch.autograd.grad(total, (reconstruction, logits), upstream)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 3, kernels


@pytest.mark.gpu
def test_gpu_graph_replays_on_new_data() -> None:
    static = [t.clone() for t in inputs((16, 3, 128, 128), device="cuda")]
    x, reconstruction, logits, mask = static
    reconstruction.requires_grad_(), logits.requires_grad_()
    scale = torch.ones((), device="cuda")

    def step() -> tuple[Tensor, ...]:
        terms = objective(x, reconstruction, logits, mask, WEIGHTS)
        return terms.total, *torch.autograd.grad(terms.total, (reconstruction, logits), scale)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    with torch.no_grad():
        for tensor, fresh in zip(static, inputs((16, 3, 128, 128), device="cuda", spread=1.0), strict=True):
            tensor.copy_(fresh)
        scale.fill_(512.0)
    graph.replay()
    for mine, eager in zip(outputs, step(), strict=True):
        assert torch.equal(mine, eager)


@pytest.mark.gpu
def test_gpu_compiles_into_a_full_graph() -> None:
    x, reconstruction, logits, mask = inputs((8, 3, 64, 64), device="cuda")
    plain, *gradients = run((x, reconstruction, logits, mask))
    reconstruction.requires_grad_(), logits.requires_grad_()
    terms = torch.compile(lambda *a: objective(*a, WEIGHTS), fullgraph=True)(x, reconstruction, logits, mask)
    terms.total.backward()
    assert torch.equal(terms.per_image, plain.per_image)
    assert torch.equal(reconstruction.grad, gradients[0]) and torch.equal(logits.grad, gradients[1])  # type: ignore[arg-type]
