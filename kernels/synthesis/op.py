"""Anomaly synthesis as one operation: two Triton launches on a GPU (``triton.py``, which counts the bytes), compiled C++ on a
CPU (``cpp.py``), or PyTorch's form (``reference.py``).

The fused ones are registered with ``torch.library``, and called past it in eager mode.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import Backend, resolve
from .reference import Batch, SynthesisSettings, empty_outputs, reference


def synthesise(
    images: Tensor,
    textures: Tensor,
    sample: Tensor,
    seed: int | Tensor,
    settings: SynthesisSettings,
    image_index: Tensor | None = None,
    image_count: int | None = None,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """The training samples with global indices ``sample``.

    Args:
        images: uint8 [N, 3, S, S], the category's normal images; with ``image_index`` given, only those this batch needs.
        textures: uint8 [T, 3, S', S'].
        sample: int64 [B] global sample indices, on the images' device. Negative ones continue the sequence backwards.
        seed: the run's seed, 0 <= seed < 2**64, or an int64 tensor of no dimensions on the images' device that holds it (its
            64 bits). On a GPU the kernel reads it, so that a CUDA graph that captured this call follows ``seed`` and
            ``sample``.
        image_index: int64 [B] rows of ``images`` (streaming), 0 <= row < len(images); by default the rows the samples draw
            (resident images). Triton could not refuse others without waiting for the GPU: it takes the nearest row.
        image_count: number of images of the category, when ``images`` is not all of them.
        backend: which implementation (``backend.py``); all agree but for rounding.
        dtype: float32, bfloat16 or float16, of the images returned.

    Raises:
        ValueError: an argument has the wrong type, shape or device; names it.
        IndexError: ``image_index`` holds what is no row of ``images`` (not from Triton).
    """
    for name, store in (("images", images), ("textures", textures)):
        if store.dtype != torch.uint8 or store.ndim != 4 or store.shape[1] != 3 or store.shape[2] != store.shape[3]:
            raise ValueError(f"{name} must be uint8 [N, 3, S, S], got {store.dtype} {list(store.shape)}")
        if len(store) == 0 or store.shape[-1] < 2 or not store.is_contiguous():
            raise ValueError(f"{name} must be contiguous and hold an image of at least 2x2, got {list(store.shape)}")
    if sample.dtype != torch.int64 or sample.ndim != 1:
        raise ValueError(f"sample must be int64 [B], got {sample.dtype} {list(sample.shape)}")
    if isinstance(seed, Tensor) and (seed.dtype, seed.ndim, seed.device) != (torch.int64, 0, images.device):
        raise ValueError(
            f"seed must be an int64 tensor of no dimensions on {images.device}, got {seed.dtype} {list(seed.shape)} on "
            f"{seed.device}"
        )
    count = len(images) if image_count is None else image_count
    if count < 1:
        raise ValueError(f"image_count must be at least 1, got {count}")
    if image_index is None and count > len(images):
        raise ValueError(
            f"image_count {count} but {len(images)} images: give image_index, the rows of this batch's images"
        )
    if image_index is not None and (image_index.dtype != torch.int64 or image_index.shape != sample.shape):
        raise ValueError(
            f"image_index must be int64 {list(sample.shape)}, got {image_index.dtype} {list(image_index.shape)}"
        )
    implementation = resolve(backend, images.device)
    if implementation == "torch":
        number = int(seed) & 0xFFFFFFFFFFFFFFFF
        batch = reference(images, textures, sample, number, settings, image_index, count)
        return Batch(*_stored(batch, dtype))
    # An eager call through torch.library costs the host more than the GPU's launches do: only a compiler needs it.
    if not torch.compiler.is_compiling():
        return Batch(*_run(images, textures, sample, seed, settings, image_index, count, dtype, implementation))
    s = settings
    number, tensor = (0, seed) if isinstance(seed, Tensor) else (seed - 2**64 if seed >> 63 else seed, None)
    outputs = torch.ops.wads.synthesise(
        images, textures, sample, number, tensor, image_index, count, dtype, implementation,
        s.image_size, s.scale, s.rotation, s.clean_fraction, s.blend_max, s.lattice_max, s.threshold, s.texture_jitter, s.grey,
    )  # fmt: skip
    return Batch(*outputs)


def _stored(batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    clean, anomalous = (x.to(dtype, memory_format=torch.channels_last) for x in (batch.clean, batch.anomalous))
    return clean, anomalous, batch.mask.to(torch.uint8)


def _run(
    images: Tensor, textures: Tensor, sample: Tensor, seed: int | Tensor, settings: SynthesisSettings,
    image_index: Tensor | None, image_count: int, dtype: torch.dtype, implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Clean and anomalous images of type ``dtype``, and masks."""
    if implementation == "triton":
        from . import triton

        return triton.synthesise(images, textures, sample, seed, settings, image_index, image_count, dtype)
    from . import cpp

    number = int(seed) & 0xFFFFFFFFFFFFFFFF
    return _stored(cpp.synthesise(images, textures, sample, number, settings, image_index, image_count), dtype)


@torch.library.custom_op("wads::synthesise", mutates_args=())
def _operator(
    images: Tensor, textures: Tensor, sample: Tensor, seed: int, seed_tensor: Tensor | None, image_index: Tensor | None,
    image_count: int, dtype: torch.dtype, implementation: str, image_size: int, scale: Sequence[float], rotation: float,
    clean_fraction: float, blend_max: float, lattice_max: int, threshold: float, texture_jitter: float, grey: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``_run`` with an argument for each type that a schema has: two for the seed, the settings one by one."""
    settings = SynthesisSettings(
        image_size,
        (scale[0], scale[1]),
        rotation,
        clean_fraction,
        blend_max,
        lattice_max,
        threshold,
        texture_jitter,
        grey,
    )
    chosen = seed if seed_tensor is None else seed_tensor
    clean, anomalous, mask = _run(
        images, textures, sample, chosen, settings, image_index, image_count, dtype, implementation
    )
    # An operator's outputs may not share memory, as those of the native kernel do.
    shared = clean.untyped_storage().data_ptr() == anomalous.untyped_storage().data_ptr()
    return clean, anomalous.clone() if shared else anomalous, mask


@_operator.register_fake
def _(
    images, textures, sample, seed, seed_tensor, image_index, image_count, dtype, implementation, image_size, *settings
):
    return empty_outputs(images, len(sample), image_size, dtype)
