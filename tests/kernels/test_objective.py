import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr
from torchvision.ops import sigmoid_focal_loss

from wads_dist.kernels.backend import Backend, resolve
from wads_dist.kernels.objective import KLDirection, KLForm, ObjectiveWeights, focal_loss, objective, sparsity_kl, ssim

FORMS: tuple[KLForm, ...] = ("area", "pixel")
DIRECTIONS: tuple[KLDirection, ...] = ("printed", "reverse")


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    y = (x + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("shape", [(2, 3, 40, 33), (1, 1, 11, 11), (2, 3, 17, 131)])
def test_ssim_is_pytorch_msssims_and_skimages(shape: tuple[int, ...]) -> None:
    # Where the GPU tests of this file run, the peers may be missing.
    from pytorch_msssim import ssim as msssim_ssim
    from skimage.metrics import structural_similarity

    x, y = pair(shape)
    ours = ssim(x, y)
    # Their window is made in float32, so they agree to its rounding.
    assert torch.allclose(ours, msssim_ssim(x, y, data_range=1.0, size_average=False), atol=1e-6)
    for n in range(shape[0]):
        _, full = structural_similarity(
            x[n].numpy(), y[n].numpy(), data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            channel_axis=0, full=True, win_size=11,
        )  # fmt: skip
        assert ours[n].item() == pytest.approx(np.mean(full[:, 5:-5, 5:-5]), abs=1e-6)


def test_ssim_in_fp32_does_not_cancel_on_a_bright_smooth_image() -> None:
    ramp = torch.linspace(0.95, 0.951, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    other = ramp + 1e-4 * torch.randn(ramp.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = ssim(ramp, other)
    assert torch.allclose(ssim(ramp.float(), other.float()).double(), exact, atol=2e-5)


def test_ssim_of_an_image_with_itself_is_one_and_small_images_are_refused() -> None:
    x, _ = pair((2, 3, 32, 32))
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(x[..., :10, :], x[..., :10, :])


def test_ssim_is_computed_in_fp32_under_autocast() -> None:
    x, y = pair((1, 3, 32, 32), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssim(x, y), ssim(x.clone(), y.clone()))
        inside = ssim(x, y)
    assert torch.allclose(inside, ssim(x, y), atol=1e-6)


@pytest.mark.parametrize("gamma", [0.1, 1.0, 2.0])
def test_focal_is_torchvisions(gamma: float) -> None:
    logits = 4 * torch.randn(3, 1, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = (logits.roll(3, -1) > 2).double()
    expected = sigmoid_focal_loss(logits, mask, alpha=-1, gamma=gamma, reduction="none").flatten(1).mean(1)
    assert torch.allclose(focal_loss(logits, mask, gamma), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_extreme_logits_stay_finite(form: KLForm, direction: KLDirection, backend: Backend, dtype: torch.dtype) -> None:
    x, y = pair((1, 1, 16, 16), torch.float64 if dtype == torch.float64 else torch.float32)
    for values in ((-60.0, 60.0), (-60.0, -60.0), (60.0, 60.0)):
        for truth, gamma in itertools.product((0.0, 1.0), (0.0, 0.1, 2.0)):
            logits = torch.tensor(values, dtype=dtype).repeat_interleave(128).view(1, 1, 16, 16).requires_grad_()
            weights = ObjectiveWeights(gamma=gamma, kl=1.0, kl_form=form, kl_direction=direction)
            terms = objective(x, y, logits, torch.full_like(logits, truth), weights, backend)
            terms.total.backward()
            assert (
                logits.grad is not None and torch.isfinite(terms.per_image).all() and torch.isfinite(logits.grad).all()
            )


def test_kl_is_eq_3_6_as_printed() -> None:
    """M·log(M/ρ) + (1 − M)·log((1 − M)/(1 − ρ)), spelt out with scipy: rel_entr(a, b) = a·log(a/b)."""
    logits = 4 * torch.randn(3, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_pixels = torch.sigmoid(logits).numpy()
    for rho in (0.03, 0.1, 0.6):
        for form, m in (("area", of_pixels.mean((1, 2, 3), keepdims=True)), ("pixel", of_pixels)):
            expected = (rel_entr(m, rho) + rel_entr(1 - m, 1 - rho)).mean((1, 2, 3))
            assert np.allclose(sparsity_kl(logits, rho, form), expected, rtol=1e-12)  # type: ignore[arg-type]
            other_way = (rel_entr(rho, m) + rel_entr(1 - rho, 1 - m)).mean((1, 2, 3))
            assert np.allclose(sparsity_kl(logits, rho, form, "reverse"), other_way, rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("rho", [0.03, 0.1, 0.6])
def test_the_slopes_of_eq_3_6(rho: float) -> None:
    """By hand. Of a pixel: σ(z)·σ(−z)·(z − logit ρ); of the area, P pixels: σ'(z)/P · (logit p̄ − logit ρ)."""
    z = torch.linspace(-30, 30, 64, dtype=torch.float64).view(1, -1).requires_grad_()
    slope, prior = torch.sigmoid(z) * torch.sigmoid(-z), math.log(rho / (1 - rho))
    (pixel,) = torch.autograd.grad(sparsity_kl(z, rho, "pixel").sum() * 64, z)
    assert torch.allclose(pixel, slope * (z - prior), rtol=1e-9)
    (area,) = torch.autograd.grad(sparsity_kl(z, rho, "area").sum() * 64, z)
    assert torch.allclose(area, slope * (torch.logit(torch.sigmoid(z).mean()) - prior), rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_kl_as_printed_is_bounded_and_zero_at_the_prior(form: KLForm) -> None:
    rho = 0.1
    values = torch.tensor([-1e4, math.log(rho / (1 - rho)), 1e4], dtype=torch.float64)
    none, prior, everything = sparsity_kl(values.view(3, 1).expand(3, 16), rho, form).tolist()
    assert none == pytest.approx(-math.log(1 - rho)) and everything == pytest.approx(-math.log(rho))
    assert prior == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_area_kl_looks_at_the_mean_and_pixel_kl_at_every_pixel(direction: KLDirection) -> None:
    half = torch.tensor([-20.0, math.log(0.2 / 0.8)], dtype=torch.float64).repeat(8).view(1, 1, 4, 4)  # mean p = 0.1
    assert sparsity_kl(half, 0.1, "area", direction).item() == pytest.approx(0.0, abs=1e-6)
    assert sparsity_kl(half, 0.1, "pixel", direction).item() > 0.05


def test_total_is_the_weighted_sum_and_differentiable() -> None:
    x, y = pair((2, 3, 24, 24))
    y.requires_grad_()
    logits = torch.randn(
        2, 1, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    mask = (logits.detach() > 1).double()
    weights = ObjectiveWeights(reconstruction=3.0, ssim=0.5, l2=2.0, focal=4.0, kl=0.7)
    terms = objective(x, y, logits, mask, weights)
    expected = 3 * (0.5 * terms.dissimilarity + 2 * terms.mse) + 4 * terms.focal + 0.7 * terms.kl
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert terms.mse.item() == pytest.approx(F.mse_loss(x, y).item()) and not terms.mse.requires_grad
    for form, direction in itertools.product(FORMS, DIRECTIONS):
        reading = replace(weights, kl_form=form, kl_direction=direction)
        assert torch.autograd.gradcheck(
            lambda y, z, reading=reading: objective(x[:1, :, :12, :12], y, z, mask[:1, :, :12, :12], reading).total,
            (y[:1, :, :12, :12].detach().requires_grad_(), logits[:1, :, :12, :12].detach().requires_grad_()),
            fast_mode=True,
        )


def test_nan_in_nan_out() -> None:
    x, y = pair((1, 3, 16, 16), torch.float32)
    y[0, 0, 3, 3] = math.nan
    logits = torch.zeros(1, 1, 16, 16)
    terms = objective(x, y, logits, logits, ObjectiveWeights())
    assert terms.total.isnan() and terms.dissimilarity.isnan() and terms.mse.isnan()


def segmented(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, X̂, logits, mask in float32, of which X̂ and logits want a gradient."""
    x, y = pair(shape, torch.float32)
    n, _, height, width = shape
    logits = torch.randn(n, 1, height, width, generator=torch.Generator().manual_seed(1))
    return x, y.requires_grad_(), logits.requires_grad_(), (logits.detach() > 1).to(torch.uint8)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_terms_per_image_are_those_of_each_image_alone(backend: Backend) -> None:
    x, y, logits, mask = segmented((3, 3, 16, 20))
    terms = objective(x, y, logits, mask, ObjectiveWeights(), backend)
    means = torch.stack([terms.dissimilarity, terms.mse, terms.focal, terms.kl])
    assert torch.allclose(terms.per_image.mean(1), means) and not terms.per_image.requires_grad
    for n in range(3):
        one = slice(n, n + 1)
        alone = objective(x[one], y[one], logits[one], mask[one], ObjectiveWeights(), backend)
        assert torch.allclose(alone.per_image[:, 0], terms.per_image[:, n], rtol=1e-6, atol=1e-7)


def test_on_a_cpu_auto_is_native_and_float64_the_reference() -> None:
    x, y, logits, mask = segmented((2, 3, 16, 16))
    ours, native = objective(x, y, logits, mask), objective(x, y, logits, mask, backend="native")
    assert torch.equal(ours.per_image, native.per_image)
    doubles = (x.double(), y.double(), logits.double(), mask)
    assert objective(*doubles).total.dtype == torch.float64
    assert torch.equal(objective(*doubles).total, objective(*doubles, backend="torch").total)


def test_the_native_gradient_scales_and_backward_may_come_twice() -> None:
    x, y, logits, mask = segmented((2, 3, 16, 16))
    once = torch.autograd.grad(objective(x, y, logits, mask).total, (y, logits))
    total = objective(x, y, logits, mask).total
    for scale in (1.0, 4096.0, 0.25):  # powers of two: exact
        again = torch.autograd.grad(total, (y, logits), torch.tensor(scale), retain_graph=True)
        assert torch.equal(again[0], scale * once[0]) and torch.equal(again[1], scale * once[1])


@pytest.mark.parametrize("fixed", ["reconstruction", "logits", "both"])
def test_only_what_wants_a_gradient_gets_one(fixed: str) -> None:
    x, y, logits, mask = segmented((1, 3, 16, 16))
    y.requires_grad_(fixed == "logits")
    logits.requires_grad_(fixed == "reconstruction")
    total = objective(x, y, logits, mask).total
    assert total.requires_grad == (fixed != "both")
    if fixed != "both":
        total.backward()
        assert (y.grad is None) == (fixed == "reconstruction") and (logits.grad is None) == (fixed == "logits")


def test_a_second_derivative_is_refused() -> None:
    x, y, logits, mask = segmented((1, 3, 12, 12))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(objective(x, y, logits, mask, backend="native").total, y, create_graph=True)
    (first,) = torch.autograd.grad(objective(x, y, logits, mask, backend="torch").total, y, create_graph=True)
    assert first.requires_grad


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_x_and_mask_are_data(backend: Backend) -> None:
    x, y, logits, mask = segmented((1, 3, 12, 12))
    data = x.requires_grad_(), mask.float().requires_grad_()
    total = objective(data[0], y, logits, data[1], backend=backend).total
    assert torch.autograd.grad(total, data, allow_unused=True, retain_graph=True) == (None, None)
    assert all(gradient is not None for gradient in torch.autograd.grad(total, (y, logits)))


def test_native_keeps_nothing_for_backward_but_its_gradients() -> None:
    x, y, logits, mask = segmented((2, 3, 12, 12))
    kept: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(x, y, logits, mask, backend="native")
    assert kept == [y.shape, logits.shape]


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_training_goes_on_after_inference(backend: Backend) -> None:
    x, y, logits, mask = segmented((1, 3, 13, 47))  # a size that no other test has
    with torch.inference_mode():
        objective(x, y, logits, mask, backend=backend)
    objective(x, y, logits, mask, backend=backend).total.backward()
    assert y.grad is not None


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("rho", [0.0, 1.0, math.nan])
def test_rho_is_between_zero_and_one(backend: Backend, rho: float) -> None:
    x, y, logits, mask = segmented((1, 3, 12, 12))
    with pytest.raises(ValueError, match="rho must lie between 0 and 1"):
        objective(x, y, logits, mask, ObjectiveWeights(rho=rho), backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "part of channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_operator_keeps_pytorchs_rules(layout: str, dtype: torch.dtype) -> None:
    x, y, logits, mask = segmented((2, 3, 12, 16))
    y = y.detach().to(dtype)
    if layout == "channels_last":
        y = y.to(memory_format=torch.channels_last)
    elif layout == "permuted":
        y = y.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "part of channels_last":
        y = torch.cat([y, y], 1).to(memory_format=torch.channels_last)[:, :3]
    y.requires_grad_()
    numbers = [20.0, 1.0, 1.0, 1.0, 2.0, 0.01, 0.1]
    torch.library.opcheck(torch.ops.wads.objective.default, (x, y, logits, mask, numbers, False, False, "native", True))


def test_it_compiles_into_one_graph() -> None:
    x, y, logits, mask = segmented((2, 3, 16, 16))
    eager = objective(x, y, logits, mask)
    expected = torch.autograd.grad(eager.total, (y, logits))
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    terms = compiled(x, y, logits, mask)
    terms.total.backward()
    assert torch.equal(terms.total, eager.total) and torch.equal(terms.per_image, eager.per_image)
    assert torch.equal(y.grad, expected[0]) and torch.equal(logits.grad, expected[1])  # type: ignore[arg-type]


def graphs_of(backend: Backend, batches: list[int], size: int = 16) -> list[int]:
    """How many nodes each graph has that ``torch.compile`` makes for batches of these sizes."""
    nodes: list[int] = []

    def count(module: torch.fx.GraphModule, _: object) -> object:
        nodes.append(len(module.graph.nodes))
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda *tensors: objective(*tensors, backend=backend), fullgraph=True, backend=count)
    for n in batches:
        compiled(*segmented((n, 3, size, size)))
    return nodes


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_another_batch_size_is_not_another_compilation(backend: Backend) -> None:
    assert len(graphs_of(backend, [2, 3, 4, 5])) == 2  # the first of fixed size, the second of any


def test_larger_images_are_no_larger_graph() -> None:
    assert graphs_of("torch", [2], 16) == graphs_of("torch", [2], 48)


def test_shapes_that_do_not_fit_are_named() -> None:
    x, y, logits, mask = segmented((1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"logits and mask \[N, 1, H, W\]; got .*\[1, 1, 16, 15\]"):
        objective(x, y, logits[..., 1:], mask)
    with pytest.raises(ValueError, match="at least 11x11"):
        objective(x[..., :10], y[..., :10], logits[..., :10], mask[..., :10])


def test_the_choice_of_a_backend_is_a_constant_to_a_compiler() -> None:
    """Marked as torch marks it, without its import of all of torch._dynamo."""
    assert vars(resolve) == vars(torch.compiler.assume_constant_result(lambda: None))
