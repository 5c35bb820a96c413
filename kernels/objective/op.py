"""The objective as one operation: PyTorch's form, or a fused one that computes values and gradient together.

``objective`` runs ``reference.py``, ``triton.py`` on a GPU, or ``cpp.py`` on a CPU. The fused ones are registered with
``torch.library``, and called past it in eager mode.
"""

from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, resolve
from .reference import (
    DEFAULT,
    KLDirection,
    KLForm,
    ObjectiveTerms,
    ObjectiveWeights,
    check_window,
    computed_in,
    dense_format,
    terms_of_each_image,
    weighted,
)


def objective(
    x: Tensor,
    reconstruction: Tensor,
    logits: Tensor,
    mask: Tensor,
    weights: ObjectiveWeights = DEFAULT,
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
    check_window(height, width)
    if not 0 < weights.rho < 1:
        raise ValueError(f"rho must lie between 0 and 1, got {weights.rho}")
    if backend == "auto" and x.device.type == "cpu" and torch.float64 in (reconstruction.dtype, logits.dtype):
        backend = "torch"
    implementation = resolve(backend, x.device)
    if implementation == "torch":
        terms = terms_of_each_image(x.detach(), reconstruction, logits, mask.detach(), weights)
        means = terms.mean(1)
        return _terms(weighted(means, weights), means, terms)

    needed = torch.is_grad_enabled() and (reconstruction.requires_grad or logits.requires_grad)
    arguments = (x, reconstruction, logits, mask, *_flat(weights), implementation, needed)
    if torch.compiler.is_compiling():
        total, means, per_image, *_ = torch.ops.wads.objective(*arguments)
    elif needed:
        total, means, per_image = _Objective.apply(*arguments)
    else:
        total, means, per_image, *_ = _forward(*arguments)
    return _terms(total, means, per_image)


def _terms(total: Tensor, means: Tensor, per_image: Tensor) -> ObjectiveTerms:
    dissimilarity, mse, focal, kl = means.detach().unbind()
    return ObjectiveTerms(total, dissimilarity, mse, focal, kl, per_image.detach())


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
        from . import triton

        return triton.forward(x, reconstruction, logits, mask, w, gradients)
    from . import cpp

    per_image, d_reconstruction, d_logits = cpp.objective(x, reconstruction, logits, mask, w, gradients)
    means = per_image.mean(1)
    total, none = weighted(means, w), per_image.new_empty(0)
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
        from . import triton

        w = _unflat(weights, pixel_kl, reverse_kl)
        return triton.backward(upstream, d_reconstruction, saved, logits, mask, w, dtype)
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
