"""Anomaly synthesis in C++ (``synthesis.cpp``), on a CPU."""

import ctypes
from ctypes import c_double, c_int64

import torch
from torch import Tensor

from ..library import FLOATS, load, require_cpu
from .reference import Batch, SynthesisSettings


class _SynthesisSettings(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("image_size", "lattice_max")),
        *((name, c_double) for name in ("scale_low", "scale_high", "rotation", "clean_fraction")),
        *((name, c_double) for name in ("blend_max", "threshold", "texture_jitter")),
        ("grey", c_int64),
    ]


def synthesise(
    images: Tensor,
    textures: Tensor,
    sample: Tensor,
    seed: int,
    settings: SynthesisSettings,
    rows: Tensor | None,
    count: int,
) -> Batch:
    """``kernels.synthesis.synthesise`` in C++, which checks shapes and types: the same draws, images to a rounding.

    Args:
        images: uint8 [N, 3, S, S].
        textures: uint8 [T, 3, S', S'].
        sample: int64 [B] global sample indices.
        seed: the run's seed, 0 <= seed < 2**64.
        rows: int64 [B] rows of ``images``, or None for those that the shuffle of ``count`` images shows.
        count: number of images of the category.

    Returns:
        images float32 [B, 3, H, H], channels_last; mask uint8 [B, 1, H, H].

    Raises:
        NativeUnavailable: the kernels cannot be compiled here.
        ValueError: a tensor is not on the CPU.
        IndexError: ``rows`` are not rows of ``images``.
    """
    library = load()
    require_cpu(images, textures, sample)
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(images):
        raise IndexError(f"rows of {len(images)} images are wanted, got {rows.tolist()}")
    images, textures, sample = images.contiguous(), textures.contiguous(), sample.contiguous()
    rows = None if rows is None else rows.cpu().contiguous()
    batch, size = len(sample), settings.image_size
    # One allocation: the allocator gives the pages of two back to the system at every batch, and asks for them again.
    clean, anomalous = torch.empty(2, batch, size, size, 3, **FLOATS).movedim(-1, 2)
    mask = torch.empty(batch, 1, size, size, dtype=torch.uint8, device="cpu")
    ranges = (*settings.scale, settings.rotation, settings.clean_fraction)
    c_settings = _SynthesisSettings(
        size,
        settings.lattice_max,
        *ranges,
        settings.blend_max,
        settings.threshold,
        settings.texture_jitter,
        settings.grey,
    )
    library.wads_synthesise(
        images.data_ptr(), *images.shape[2:],
        textures.data_ptr(), len(textures), *textures.shape[2:],
        sample.data_ptr(), None if rows is None else rows.data_ptr(), batch, count, seed, ctypes.addressof(c_settings),
        clean.data_ptr(), anomalous.data_ptr(), mask.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return Batch(clean, anomalous, mask)
