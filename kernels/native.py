"""The fast CPU path of both kernels: C++ (``csrc/``) compiled on the machine it runs on, called through ctypes.

Compiled at first use into ``$TORCH_EXTENSIONS_DIR`` or ``~/.cache/wads_dist``, for the very processor (``-march=native``). A
library's name carries a hash of its sources, flags, compiler and processor, so that machines which share a home directory do
not run each other's; it appears by a rename, so that any number of ranks may compile at once, and one that does not load is
built again. ``CXX`` names the compiler.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from ctypes import c_double, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.objective import ObjectiveWeights, dense_format
from kernels.synthesis import Batch, SynthesisSettings

SOURCES = sorted((Path(__file__).parent / "csrc").glob("*.cpp"))
# What is written is what is computed: no reassociation, and fused multiply-adds only where the source asks for them.
FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -shared -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
)


class NativeUnavailable(RuntimeError):
    """There is no compiled library on this machine; the message says why."""


class _SynthesisSettings(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("image_size", "lattice_max")),
        *((name, c_double) for name in ("scale_low", "scale_high", "rotation", "clean_fraction")),
        *((name, c_double) for name in ("blend_max", "threshold", "texture_jitter")),
        ("grey", c_int64),
    ]


class _ObjectiveSettings(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("images", "channels", "height", "width")),
        *((name, c_int64) for name in ("x_plane", "x_pixel", "y_plane", "y_pixel")),
        *((name, c_double) for name in ("reconstruction", "ssim", "l2", "focal", "gamma", "kl", "rho")),
        *((name, c_int64) for name in ("pixel_kl", "reverse_kl")),
    ]


def _processor() -> str:
    """What ``-march=native`` compiles for: the instruction sets where Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(again: bool = False) -> Path:
    """The path of this machine's library, compiled if need be, or in any case (``again``)."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise NativeUnavailable(f"no C++ compiler ({error}); install g++, or set CXX") from error
    parts = [*(source.read_text() for source in SOURCES), *FLAGS, *compiler, version, platform.machine(), _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "wads_dist")
    except RuntimeError as error:  # neither HOME nor an entry in passwd, as in a container under a foreign uid
        raise NativeUnavailable(f"nowhere to keep the library ({error}); set TORCH_EXTENSIONS_DIR") from error
    library = folder / f"wads_kernels_{key}.so"
    try:
        if library.exists() and not again:
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as workspace:
            built = Path(workspace) / library.name
            command = [*compiler, *FLAGS, *map(str, SOURCES), "-o", str(built)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode != 0:
                raise NativeUnavailable(
                    f"`{shlex.join(command)}` failed with status {run.returncode}:\n{run.stderr or run.stdout}"
                )
            with built.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut could leave the name without the contents
            os.rename(built, library)
    except OSError as error:
        raise NativeUnavailable(f"cannot build in {folder} ({error}); set TORCH_EXTENSIONS_DIR") from error
    return library


@cache
def _load() -> ctypes.CDLL | NativeUnavailable:
    """The library, or why there is none; one attempt per process."""
    try:
        try:
            library = ctypes.CDLL(str(_compile()))
        except OSError:  # cut short, or linked against another machine's C library
            library = ctypes.CDLL(str(_compile(again=True)))
    except NativeUnavailable as reason:
        return reason
    except OSError as error:
        return NativeUnavailable(f"the compiled kernels do not load: {error}")
    p, n, u, i = c_void_p, c_int64, c_uint64, c_int
    library.wads_synthesise.argtypes = (p, n, n, p, n, n, n, p, p, n, n, u, p, p, p, p, i)
    library.wads_objective.argtypes = (p, p, p, p, p, p, p, p, p, p, i)
    library.wads_scratch_floats.argtypes, library.wads_scratch_floats.restype = (n, n), n
    library.wads_synthesise.restype = library.wads_objective.restype = None
    return library


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, NativeUnavailable):
        raise NativeUnavailable(str(library))
    return library


@cache
def available() -> bool:
    """Whether the compiled kernels work here. Compiles them at the first call, and warns once if they cannot be."""
    library = _load()
    if isinstance(library, NativeUnavailable):
        warnings.warn(f"the CPU kernels fall back to PyTorch: {library}", RuntimeWarning, stacklevel=2)
        return False
    return True


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
    library = _library()
    _require_cpu(images, textures, sample)
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(images):
        raise IndexError(f"rows of {len(images)} images are wanted, got {rows.tolist()}")
    images, textures, sample = images.contiguous(), textures.contiguous(), sample.contiguous()
    rows = None if rows is None else rows.cpu().contiguous()
    batch, size = len(sample), settings.image_size
    # One allocation: the allocator gives the pages of two back to the system at every batch, and asks for them again.
    clean, anomalous = torch.empty(2, batch, size, size, 3, **_FLOATS).movedim(-1, 2)
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


# Never torch's defaults, which may be another type or device than C++ writes to.
_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def _require_cpu(*tensors: Tensor) -> None:
    """C++ would follow a GPU's address into a crash."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"the native kernels run on CPU tensors, one of these is on {tensor.device}")


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
    library = _library()
    _require_cpu(x, reconstruction, logits, mask)
    n, c, height, width = x.shape
    x, x_plane, x_pixel = _strided(x)
    y, y_plane, y_pixel = _strided(reconstruction)
    z, m = logits.detach().float().contiguous(), mask.detach().float().contiguous()
    per_image = torch.empty(4, n, **_FLOATS)
    dy = torch.empty_like(y, memory_format=dense_format(reconstruction)) if gradients else None
    dz = torch.empty_like(z) if gradients else None
    threads = torch.get_num_threads()
    partial = torch.empty(2, n * c, dtype=torch.float64, device="cpu")
    scratch = torch.empty(threads, library.wads_scratch_floats(height, width), **_FLOATS)
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
