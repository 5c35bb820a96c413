"""GroupNorm with its activation in Triton against torch's own in float64: interpreted here, and compiled on a GPU."""

import pytest
import torch
from torch import Tensor

from wads_dist.kernels.group_norm import triton as group_norm_triton
from wads_dist.kernels.group_norm.op import group_norm_act, reference

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
SHAPES = [
    ((2, 8, 5, 7), 2),
    ((1, 24, 4, 4), 2),
    ((2, 12, 9, 3), 3),
    ((2, 64, 6, 6), 16),
    ((2, 32, 33, 40), 8),
    ((3, 4, 1, 1), 1),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0, device: str = "cpu") -> Inputs:
    """x, weight, bias and dL/dy; weights in float32 beside half precision, as autocast has them."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    wide = dtype if dtype == torch.float64 else torch.float32
    x, weight, bias, dy = normal(*shape) * 2 + mean, normal(shape[1]), normal(shape[1]), normal(*shape)
    return x.to(device, dtype), weight.to(device, wide), bias.to(device, wide), dy.to(device, dtype)


def run(batch: Inputs, groups: int, slope: float | None, backend: str = "triton") -> list[Tensor]:
    """y, and the gradients of x, weight and bias."""
    *leaves, dy = batch
    leaves = [leaf.detach().clone() for leaf in leaves]
    leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = group_norm_act(*leaves, groups, 1e-5, slope, backend)  # type: ignore[arg-type]
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(batch: Inputs, groups: int, slope: float | None, tolerance: float) -> None:
    ours, exact = run(batch, groups, slope), run(tuple(t.double() for t in batch), groups, slope, "torch")  # type: ignore[arg-type]
    for name, a, b in zip(("y", "dx", "dweight", "dbias"), ours, exact, strict=True):
        # At a value next to zero the activation may fall to either side: its slope there is either's.
        wrong = (a.double() - b).abs() > tolerance * b.abs().max()
        assert wrong.double().mean() <= (1e-4 if slope is not None else 0), (name, (a.double() - b).abs().max())
    assert ours[0].dtype == ours[1].dtype == batch[0].dtype
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in ours[:2])


@pytest.mark.parametrize("slope", [None, 0.0, 0.25])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_it_is_the_reference_in_float64(shape: tuple[int, ...], groups: int, slope: float | None) -> None:
    compare(inputs(shape, torch.float64, mean=3.0), groups, slope, 1e-10)


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_float32_keeps_the_variance_of_values_far_from_zero(mean: float) -> None:
    """x has 2 ulp of 3e-5 there, of which the normal value keeps a few."""
    compare(inputs((2, 32, 33, 40), torch.float32, mean), 8, 0.25, 2e-6 if not mean else 1e-4)


@pytest.mark.parametrize("slope", [None, 0.0, 0.25])
def test_bfloat16_is_right_to_its_last_digits(slope: float | None) -> None:
    compare(inputs((2, 64, 8, 8), torch.bfloat16, mean=1.0), 16, slope, 8e-3)


def test_a_constant_image_is_the_bias() -> None:
    x, weight, bias = torch.full((1, 8, 4, 4), 7.0), torch.ones(8), torch.arange(8.0)
    assert torch.equal(group_norm_act(x, weight, bias, 2, 1e-5, None, "triton")[0, :, 2, 2], bias)


def test_a_nan_stays_in_its_group() -> None:
    """The step must be found not finite: a NaN may not be lost in a maximum or a comparison."""
    x, weight, bias, _ = inputs((1, 8, 4, 4), torch.float32)
    x[0, 1, 2, 3] = torch.nan
    bad = group_norm_act(x, weight, bias, 2, 1e-5, 0.0, "triton").isnan().all((2, 3))[0]
    assert bad.tolist() == [True] * 4 + [False] * 4


def test_images_do_not_depend_on_their_batch() -> None:
    x, weight, bias, dy = inputs((4, 32, 9, 9), torch.float32)
    whole, part = run((x, weight, bias, dy), 8, 0.25), run((x[1:2], weight, bias, dy[1:2]), 8, 0.25)
    assert torch.equal(whole[0][1:2], part[0]) and torch.equal(whole[1][1:2], part[1])


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="10 channels cannot be put into 4 groups"):
        group_norm_act(torch.ones(1, 10, 2, 2), torch.ones(10), torch.ones(10), 4, 1e-5, None)


def test_a_cpu_uses_torchs_own() -> None:
    x, weight, bias, _ = inputs((2, 8, 5, 7), torch.float32)
    y = group_norm_act(x, weight, bias, 2, 1e-5, 0.0)
    assert torch.equal(y, torch.relu(torch.nn.functional.group_norm(x, 2, weight, bias, 1e-5)))
    assert torch.equal(y, reference(x, weight, bias, 2, 1e-5, 0.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups"), [((64, 64, 64, 64), 16), ((64, 512, 4, 4), 32), ((16, 48, 33, 31), 4)])
def test_on_a_gpu_it_is_the_reference(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    batch = inputs(shape, dtype, device="cuda")
    compare(batch, groups, 0.25, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype])
    first = run(batch, groups, 0.25)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(batch, groups, 0.25), strict=True))


def test_every_kernel_is_reported() -> None:
    names = {spec.name for spec in group_norm_triton.compile_specs()}
    assert len(names) == 6 and "group_norm_backward bf16" in names
