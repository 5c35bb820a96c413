"""The objective in C++ (``objective.cpp``), on a CPU."""

import ctypes
from ctypes import c_double, c_int64

import torch
from torch import Tensor

from ..library import FLOATS, load, require_cpu
from .reference import ObjectiveWeights, dense_format


class _ObjectiveSettings(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("images", "channels", "height", "width")),
        *((name, c_int64) for name in ("x_plane", "x_pixel", "y_plane", "y_pixel")),
        *((name, c_double) for name in ("reconstruction", "ssim", "l2", "focal", "gamma", "kl", "rho")),
        *((name, c_int64) for name in ("pixel_kl", "reverse_kl")),
    ]


def _strided(image: Tensor) -> tuple[Tensor, int, int]:
    """``image`` [N, C, H, W] in float32, dense, and the strides of its planes and of its pixels."""
    layout = dense_format(image)
    image = image.detach().float().contiguous(memory_format=layout)
    return (image, 1, image.shape[1]) if layout == torch.channels_last else (image, image.shape[2] * image.shape[3], 1)


def objective(
    x: Tensor,
    reconstruction: Tensor,
    logits: Tensor,
    mask: Tensor,
    weights: ObjectiveWeights,
    gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The terms of ``kernels.objective.objective``, which checks shapes, and their gradient, in one call.

    Args:
        x, reconstruction: [N, C, H, W], float32 or narrower, contiguous or channels_last (others are copied).
        logits, mask: [N, 1, H, W].
        gradients: whether to compute the gradients as well.

    Returns:
        the terms [4, N] float32 (1 − SSIM, MSE, focal, KL) of each image, and the gradients of the weighted total of their
        batch means: for the reconstruction (float32, channels_last if it is that, else contiguous) and for the logits
        (float32, contiguous). They stay float32 because a gradient times a loss scale may fit half precision where the
        gradient alone does not.

    Raises:
        NativeUnavailable: the kernels cannot be compiled here.
        ValueError: a tensor is not on the CPU.
    """
    library = load()
    require_cpu(x, reconstruction, logits, mask)
    n, c, height, width = x.shape
    x, x_plane, x_pixel = _strided(x)
    y, y_plane, y_pixel = _strided(reconstruction)
    z, m = logits.detach().float().contiguous(), mask.detach().float().contiguous()
    per_image = torch.empty(4, n, **FLOATS)
    dy = torch.empty_like(y, memory_format=dense_format(reconstruction)) if gradients else None
    dz = torch.empty_like(z) if gradients else None
    threads = torch.get_num_threads()
    partial = torch.empty(2, n * c, dtype=torch.float64, device="cpu")
    scratch = torch.empty(threads, library.wads_scratch_floats(height, width), **FLOATS)
    w = weights
    c_settings = _ObjectiveSettings(
        n, c, height, width, x_plane, x_pixel, y_plane, y_pixel,
        w.reconstruction, w.ssim, w.l2, w.focal, w.gamma, w.kl, w.rho,
        w.kl_form == "pixel", w.kl_direction == "reverse",
    )  # fmt: skip
    library.wads_objective(
        x.data_ptr(), y.data_ptr(), z.data_ptr(), m.data_ptr(), ctypes.addressof(c_settings), per_image.data_ptr(),
        None if dy is None else dy.data_ptr(), None if dz is None else dz.data_ptr(),
        partial.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    return per_image, dy, dz
