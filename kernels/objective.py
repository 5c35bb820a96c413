"""The objective over one batch: reconstruction (SSIM + L2, Eq 3.3), focal loss (Eq 3.7) and sparsity KL (Eq 3.6).

    L = w_con · [w_ssim · (1 − SSIM(X, X̂)) + w_l2 · MSE(X, X̂)] + w_focal · focal(logits, truth) + w_kl · KL(M ‖ ρ)

M is the predicted mask, σ(logits): each pixel's (``pixel``) or its mean over the image (``area``).

The functions on tensors are the PyTorch form, which defines the meaning. ``objective`` runs it or, fused, one of the two that
compute values and gradient together: ``objective_triton.py`` on a GPU, ``native.py`` on a CPU. Everything is computed in fp32
(fp64 for fp64 inputs) whatever the storage type.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, resolve

WINDOW = 11
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
TAPS_SUM = math.fsum(math.exp(-((k - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for k in range(WINDOW))

KLForm = Literal["area", "pixel"]
KLDirection = Literal["printed", "reverse"]


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights and readings of the terms; the defaults are the ``wads`` preset's."""

    reconstruction: float = 20.0
    ssim: float = 1.0
    l2: float = 1.0
    focal: float = 1.0
    gamma: float = 2.0
    kl: float = 0.01
    rho: float = 0.1
    kl_form: KLForm = "area"
    kl_direction: KLDirection = "printed"


@dataclass(frozen=True)
class ObjectiveTerms:
    """The differentiable ``total``; the four terms, detached, as batch means (0-d) and ``per_image`` [4, N] in their order."""

    total: Tensor
    dissimilarity: Tensor
    mse: Tensor
    focal: Tensor
    kl: Tensor
    per_image: Tensor


def _gaussian_band(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[length − 10, length] matrix whose product with a column is its valid 11-tap Gaussian blur.

    Made anew each time, on the device: a cached one may be an inference tensor, with which nothing can be trained, and
    ``torch.compile`` does not see caches.
    """
    k = torch.arange(length, device=device) - torch.arange(length - WINDOW + 1, device=device)[:, None]
    taps = torch.exp(-((k - WINDOW // 2).double() ** 2) / (2 * SIGMA**2)) / TAPS_SUM
    return torch.where((k >= 0) & (k < WINDOW), taps, 0).to(dtype)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean SSIM of each image (Wang et al. 2004): window 11, σ 1.5, valid windows, data range 1.

    With s = x + y and d = x − y, E[s²] and E[d²] give both E[x² + y²] and E[xy], so four blurs do the work of five; and since
    variances do not change when a plane's mean is subtracted, centring first keeps fp32 from cancelling on bright images.

    Args:
        x, y: [N, C, H, W] in [0, 1], H and W at least 11.

    Returns:
        [N] float32 (float64 for float64 inputs).

    Raises:
        ValueError: the images are smaller than the window.
    """
    height, width = x.shape[-2:]
    _check_window(height, width)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, columns = _gaussian_band(height, dtype, x.device), _gaussian_band(width, dtype, x.device).T

    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(dtype), y.to(dtype)
        centre_x, centre_y = x.mean((-2, -1), keepdim=True), y.mean((-2, -1), keepdim=True)
        s, d = (x - centre_x) + (y - centre_y), (x - centre_x) - (y - centre_y)
        mean_s, mean_d, square_s, square_d = (rows @ torch.stack([s, d, s * s, d * d]) @ columns).unbind(0)
        var_s, var_d = square_s - mean_s * mean_s, square_d - mean_d * mean_d
        variances, covariance = (var_s + var_d) / 2, (var_s - var_d) / 4
        mu_x, mu_y = (mean_s + mean_d) / 2 + centre_x, (mean_s - mean_d) / 2 + centre_y
        luminance = (2 * mu_x * mu_y + C1) / (mu_x * mu_x + mu_y * mu_y + C1)
        return (luminance * (2 * covariance + C2) / (variances + C2)).mean((-3, -2, -1))


def focal_loss(logits: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Eq 3.7, mean over each image's pixels: −(1 − p_t)^γ · log p_t, p_t the probability of the true class. Returns [N]."""
    logits, mask = _full(logits), mask.to(_full(logits).dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    # 1 − p_t = σ(−logit of the true class), which stays exact where 1 − exp(−CE) would cancel; the clamp keeps the
    # derivative of (1 − p_t)^γ finite at γ < 1.
    miss = torch.sigmoid(logits * (1 - 2 * mask)).clamp_min(1e-12)
    return (miss**gamma * cross_entropy).flatten(1).mean(1)


def sparsity_kl(logits: Tensor, rho: float, form: KLForm, direction: KLDirection = "printed") -> Tensor:
    """Eq 3.6 of each image, as a divergence of Bernoulli distributions. Returns [N]; finite for every finite logit.

    Args:
        logits: [N, ...]; M = σ(logits).
        form: ``area``: of the image's mean of M; ``pixel``: of every pixel's M, averaged.
        direction: ``printed``: KL(M ‖ ρ) = M·log(M/ρ) + (1 − M)·log((1 − M)/(1 − ρ)), which lies between 0 and
            −log ρ or −log(1 − ρ), whichever is larger; ``reverse``: KL(ρ ‖ M), which has no bound.
    """
    logits = _full(logits).flatten(1)
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    if form == "area":
        log_p, log_q = _log_mean_exp(log_p), _log_mean_exp(log_q)
    if direction == "printed":
        kl = log_p.exp() * (log_p - math.log(rho)) + log_q.exp() * (log_q - math.log(1 - rho))
    else:
        kl = rho * (math.log(rho) - log_p) + (1 - rho) * (math.log(1 - rho) - log_q)
    return kl if form == "area" else kl.mean(1)


def objective(
    x: Tensor,
    reconstruction: Tensor,
    logits: Tensor,
    mask: Tensor,
    weights: ObjectiveWeights = ObjectiveWeights(),
    backend: Backend = "auto",
) -> ObjectiveTerms:
    """The weighted sum and its four terms. Gradients reach ``reconstruction`` and ``logits``, once.

    x and mask are data: neither gets a gradient, even if it asks for one. The fused implementations have no second derivative.

    Args:
        x: target of the reconstruction, [N, C, H, W] in [0, 1], H and W at least 11.
        reconstruction: X̂, like ``x``; types and memory formats may differ.
        logits: [N, 1, H, W].
        mask: synthetic truth, zeros and ones of any type, [N, 1, H, W].
        backend: what computes it; ``auto`` is Triton on a GPU, C++ on a CPU, and PyTorch for float64 on a CPU.

    Raises:
        ValueError: the shapes do not fit together, the images are smaller than SSIM's window, or rho is not in (0, 1).
        RuntimeError: in backward, a second derivative of a fused implementation is asked for.
    """
    n, _, height, width = x.shape
    plane = (n, 1, height, width)  # one comparison each: a set would hash sizes, which fixes them in a compiled graph
    if reconstruction.shape != x.shape or logits.shape != plane or mask.shape != plane:
        shapes = ", ".join(str(list(t.shape)) for t in (x, reconstruction, logits, mask))
        raise ValueError(f"x and reconstruction must be [N, C, H, W], logits and mask [N, 1, H, W]; got {shapes}")
    _check_window(height, width)
    if not 0 < weights.rho < 1:
        raise ValueError(f"rho must lie between 0 and 1, got {weights.rho}")
    if backend == "auto" and x.device.type == "cpu" and torch.float64 in (reconstruction.dtype, logits.dtype):
        backend = "torch"
    implementation = _resolve(backend, x.device)
    if implementation == "torch":
        terms = _reference(x.detach(), reconstruction, logits, mask.detach(), weights)
        means = terms.mean(1)
        return _terms(_weighted(means, weights), means, terms)

    needed = torch.is_grad_enabled() and (reconstruction.requires_grad or logits.requires_grad)
    arguments = (x, reconstruction, logits, mask, *_flat(weights), implementation, needed)
    if torch.compiler.is_compiling():
        total, means, per_image, *_ = torch.ops.wads.objective(*arguments)
    elif needed:
        total, means, per_image = _Objective.apply(*arguments)
    else:
        total, means, per_image, *_ = _forward(*arguments)
    return _terms(total, means, per_image)


def _reference(x: Tensor, reconstruction: Tensor, logits: Tensor, mask: Tensor, weights: ObjectiveWeights) -> Tensor:
    """The four terms of each image, [4, N], differentiable."""
    mse = (_full(reconstruction) - _full(x)).square().mean((1, 2, 3))
    focal = focal_loss(logits, mask, weights.gamma)
    kl = sparsity_kl(logits, weights.rho, weights.kl_form, weights.kl_direction)
    return torch.stack([1 - ssim(x, reconstruction), mse, focal, kl])


def _weighted(means: Tensor, weights: ObjectiveWeights) -> Tensor:
    dissimilarity, mse, focal, kl = means.unbind()
    reconstruction = weights.ssim * dissimilarity + weights.l2 * mse
    return weights.reconstruction * reconstruction + weights.focal * focal + weights.kl * kl


def _terms(total: Tensor, means: Tensor, per_image: Tensor) -> ObjectiveTerms:
    dissimilarity, mse, focal, kl = means.detach().unbind()
    return ObjectiveTerms(total, dissimilarity, mse, focal, kl, per_image.detach())


def _check_window(height: int, width: int) -> None:
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, got {height}x{width}")


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def computed_in(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def dense_format(image: Tensor) -> torch.memory_format:
    """The memory format of the native kernels' copy of ``image`` [N, C, H, W], if they need one, and of its gradient."""
    by_pixel = not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if by_pixel else torch.contiguous_format


def _log_mean_exp(values: Tensor) -> Tensor:
    """log of the mean of exp over the last dimension, without underflow however negative the values are."""
    return torch.logsumexp(values, -1) - math.log(values.shape[-1])


# --- the fused implementations, registered with torch.library and called past it in eager mode ------------------------------

# Which compiler there is does not change while a graph is traced.
_resolve = torch.compiler.assume_constant_result(resolve)

Fused = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _flat(weights: ObjectiveWeights) -> tuple[list[float], bool, bool]:
    """As an operator's schema can say it: the numbers, and whether the KL is per pixel and whether it is the reverse."""
    w = weights
    numbers = [w.reconstruction, w.ssim, w.l2, w.focal, w.gamma, w.kl, w.rho]
    return numbers, w.kl_form == "pixel", w.kl_direction == "reverse"


def _unflat(numbers: list[float], pixel_kl: bool, reverse_kl: bool) -> ObjectiveWeights:
    reconstruction, ssim, l2, focal, gamma, kl, rho = numbers
    form: KLForm = "pixel" if pixel_kl else "area"
    direction: KLDirection = "reverse" if reverse_kl else "printed"
    return ObjectiveWeights(reconstruction, ssim, l2, focal, gamma, kl, rho, form, direction)


def _forward(
    x: Tensor, reconstruction: Tensor, logits: Tensor, mask: Tensor, weights: list[float], pixel_kl: bool,
    reverse_kl: bool, implementation: str, gradients: bool,
) -> Fused:  # fmt: skip
    """total [], means [4], per_image [4, N], and what backward needs: dtotal/dX̂, and of the logits either their gradient
    (native) or two numbers per image from which it is made again (triton)."""
    w = _unflat(weights, pixel_kl, reverse_kl)
    if implementation == "triton":
        from kernels import objective_triton

        return objective_triton.forward(x, reconstruction, logits, mask, w, gradients)
    from kernels import native

    per_image, d_reconstruction, d_logits = native.objective(x, reconstruction, logits, mask, w, gradients)
    means = per_image.mean(1)
    total, none = _weighted(means, w), per_image.new_empty(0)
    if d_reconstruction is None or d_logits is None:
        return total, means, per_image, none, none.clone()
    return total, means, per_image, d_reconstruction, d_logits


def _backward(
    upstream: Tensor, d_reconstruction: Tensor, saved: Tensor, logits: Tensor | None, mask: Tensor | None,
    weights: list[float], pixel_kl: bool, reverse_kl: bool, implementation: str, dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of reconstruction and logits, of these types, given dL/dtotal. What was saved stays as it is.

    logits, mask: None for ``native``, which has saved their gradient.
    """
    if logits is not None and mask is not None:
        from kernels import objective_triton

        w = _unflat(weights, pixel_kl, reverse_kl)
        return objective_triton.backward(upstream, d_reconstruction, saved, logits, mask, w, dtype)
    return (upstream * d_reconstruction).to(dtype), (upstream * saved).to(logits_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Fused) -> None:
    _, reconstruction, logits, mask, *ctx.options, _ = inputs
    ctx.dtypes = reconstruction.dtype, logits.dtype
    made_again = (logits, mask) if ctx.options[-1] == "triton" else (None, None)
    ctx.save_for_backward(*output[3:], *made_again)
    ctx.set_materialize_grads(False)


def _gradients(backward: Any, ctx: Any, upstream: Tensor | None) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 9
    return None, *backward(upstream, *ctx.saved_tensors, *ctx.options, *ctx.dtypes), *(None,) * 6


class _Objective(torch.autograd.Function):
    """Eager mode, past the dispatcher: ``torch.ops.wads`` adds 57 µs to a call, 30 µs to its backward (one CPU core)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:3])
        return output[:3]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the saved gradients would be constants to what comes after
            raise RuntimeError("the fused objective has no second derivative; backend='torch' has")
        return _gradients(_backward, ctx, upstream)


_operator = torch.library.custom_op("wads::objective", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("wads::objective_backward", _backward, mutates_args=())


@_operator.register_fake
def _(x, reconstruction, logits, mask, weights, pixel_kl, reverse_kl, implementation, gradients) -> Fused:
    triton, images = implementation == "triton", x.shape[0]
    real = computed_in(reconstruction, logits) if triton else torch.float32
    total, means, per_image = (x.new_empty(shape, dtype=real) for shape in ((), (4,), (4, images)))
    kept = reconstruction.dtype if triton and reconstruction.dtype != torch.float16 else torch.float32
    saved_shape = (2, images) if triton else logits.shape if gradients else (0,)
    saved = x.new_empty(saved_shape, dtype=real)
    layout = torch.preserve_format if triton else dense_format(reconstruction)
    if gradients:
        d_reconstruction = torch.empty_like(reconstruction, dtype=kept, memory_format=layout)
    else:
        d_reconstruction = x.new_empty(0, dtype=kept)
    return total, means, per_image, d_reconstruction, saved


@_backward_operator.register_fake
def _(
    upstream, d_reconstruction, saved, logits, mask, weights, pixel_kl, reverse_kl, implementation, dtype, logits_dtype
):
    shape = saved.shape if logits is None else logits.shape
    return torch.empty_like(d_reconstruction, dtype=dtype), saved.new_empty(shape, dtype=logits_dtype)


_operator.register_autograd(
    lambda ctx, upstream, *_: _gradients(torch.ops.wads.objective_backward, ctx, upstream),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
)
