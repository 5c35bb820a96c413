"""What ``launch/profile_kernels.py`` measures: both kernels' own implementations, and what others would use in their place.

A peer of the objective computes some of its terms, with the weights of ``ObjectiveWeights()``, so that its value can be checked
against the reference (a test does). A peer of synthesis makes samples of the same size with the same share of anomalies; it
draws from its own generator. Peers are imported when they are called: none is a dependency.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wads_dist.kernels.objective import SIGMA, WINDOW, ObjectiveWeights, objective, sparsity_kl
from wads_dist.kernels.objective import triton as objective_triton
from wads_dist.kernels.synthesis import SynthesisSettings, synthesise
from wads_dist.profiling import names
from wads_dist.profiling.names import Kernel, Layout

Array = NDArray[Any]

DTYPES = dict(zip(names.DTYPES, (torch.float32, torch.bfloat16, torch.float16), strict=True))
TERMS = ("ssim", "mse", "focal", "kl")
OURS = ("triton", "native", "torch")
TEXTURES = 32
WEIGHTS = ObjectiveWeights()

PACKAGES = {
    "fussim": "fussim",
    "pytorch-msssim": "pytorch_msssim",
    "torchvision": "torchvision",
    "perlin-numpy": "perlin_numpy",
    "opencv": "cv2",
}
"""Each peer's name and the module that it is imported as."""


@dataclass(frozen=True)
class Case:
    """One measurement's circumstances: ``batch`` samples of 3 × ``size`` × ``size`` in a storage type."""

    kernel: Kernel
    batch: int
    size: int
    dtype: str
    backward: bool
    device: torch.device
    layout: Layout = "contiguous"

    def __str__(self) -> str:
        layout = " channels_last" * (self.layout == "channels_last")
        return f"{self.kernel} {'x'.join(map(str, self.shape))}{layout} {self.dtype} {self.passes}"

    @property
    def passes(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def shape(self) -> list[int]:
        return [self.batch, 3, self.size, self.size]

    @property
    def store_size(self) -> int:
        """Images are stored at twice the training size (``data.store_size``)."""
        return 2 * self.size

    @property
    def settings(self) -> SynthesisSettings:
        """The defaults; small pictures get the finest lattice that has a pixel per cell."""
        return SynthesisSettings(image_size=self.size, lattice_max=min(5, self.size.bit_length() - 1))

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        """Objective: x, reconstruction, logits, mask. Synthesis: images (each is drawn once), textures, sample indices."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def stored(count: int) -> Tensor:
            shape = (count, 3, self.store_size, self.store_size)
            return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=generator)

        def normal(channels: int) -> Tensor:
            return torch.randn(self.batch, channels, self.size, self.size, device=self.device, generator=generator)

        if self.kernel == "synthesis":
            return stored(self.batch), stored(TEXTURES), torch.arange(self.batch, device=self.device)
        layout = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        x = torch.sigmoid(normal(3))
        y = (x + 0.1 * normal(3)).clamp(0, 1)
        x, y = (t.to(DTYPES[self.dtype], memory_format=layout) for t in (x, y))
        return x, y, normal(1).to(DTYPES[self.dtype]), (normal(1) > 1.6).to(torch.uint8)


@dataclass(frozen=True)
class Implementation:
    """``prepare(case, inputs)`` returns what is timed. ``terms`` are those of the objective that it computes."""

    name: str
    kernel: Kernel
    prepare: Callable[[Case, tuple[Tensor, ...]], Callable[[], Any]]
    packages: tuple[str, ...] = ()
    terms: tuple[str, ...] = TERMS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    devices: tuple[str, ...] = ("cpu", "cuda")
    waits: bool = False
    """Whether the host takes part in its midst (a copy, a size that depends on data), so that no CUDA graph can hold it."""

    def missing(self) -> list[str]:
        return [name for name in self.packages if version(name) is None]


@functools.cache
def version(package: str) -> str | None:
    """The installed version of a peer, None where there is none."""
    module = PACKAGES[package]
    if importlib.util.find_spec(module) is None:
        return None
    found = importlib.metadata.packages_distributions().get(module)
    return importlib.metadata.version(found[0]) if found else "unknown version"


# --- the objective ------------------------------------------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _step(loss: Loss, terms: tuple[str, ...]) -> Callable[..., Callable[[], Any]]:
    """Prepares the value of ``loss`` or, with a backward pass, its gradients for the reconstruction and the logits."""

    def prepare(case: Case, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
        x, y, logits, mask = inputs
        if not case.backward:
            return torch.no_grad()(lambda: loss(x, y, logits, mask))
        y, logits = y.detach().requires_grad_(), logits.detach().requires_grad_()
        wanted = [t for t, of in ((y, {"ssim", "mse"}), (logits, {"focal", "kl"})) if of & set(terms)]
        return lambda: torch.autograd.grad(loss(x, y, logits, mask), wanted)

    return prepare


def _ours(backend: Any) -> Loss:
    return lambda x, y, logits, mask: objective(x, y, logits, mask, WEIGHTS, backend=backend).total


def _scheduled(schedule: objective_triton.Schedule) -> Loss:
    """Ours with another schedule of launch 1: candidates, of which a measurement chooses."""

    def loss(x: Tensor, y: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
        usual, objective_triton.SCHEDULE = objective_triton.SCHEDULE, schedule
        try:
            return _ours("triton")(x, y, logits, mask)
        finally:
            objective_triton.SCHEDULE = usual

    return loss


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _compiled_objective(x: Tensor, y: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    total: Tensor = _compiled(objective)(x, y, logits, mask, WEIGHTS, backend="torch").total
    return total


def _dissimilarity(similarity: Tensor) -> Tensor:
    return WEIGHTS.reconstruction * WEIGHTS.ssim * (1 - similarity)


def _squared_error(x: Tensor, y: Tensor) -> Tensor:
    return WEIGHTS.reconstruction * WEIGHTS.l2 * F.mse_loss(y, x)


def _dense(loss: Loss) -> Loss:
    """For extensions that read memory as if it were NCHW."""
    return lambda x, y, logits, mask: loss(x.contiguous(), y.contiguous(), logits, mask)


def _fussim(x: Tensor, y: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    from fussim import fused_ssim

    # The fp16 kernels are what it offers under autocast; the gradient is that of the first image.
    with torch.autocast("cuda", dtype=torch.float16, enabled=y.dtype == torch.float16):
        return _dissimilarity(fused_ssim(y, x, padding="valid"))


def _pytorch_msssim(x: Tensor, y: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    from pytorch_msssim import ssim

    return _dissimilarity(ssim(y, x, data_range=1.0, win=_window(x.shape[1], x.dtype, x.device)))


@functools.cache
def _window(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """pytorch-msssim's own window, which it would otherwise make on the host and copy at every call."""
    from pytorch_msssim.ssim import _fspecial_gauss_1d

    return _fspecial_gauss_1d(WINDOW, SIGMA).repeat(channels, 1, 1, 1).to(device, dtype)


def _torchvision(x: Tensor, y: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    from torchvision.ops import sigmoid_focal_loss

    mask = mask.to(logits.dtype)
    return WEIGHTS.focal * sigmoid_focal_loss(logits, mask, alpha=-1, gamma=WEIGHTS.gamma, reduction="mean")


def _from_parts(x: Tensor, y: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """The whole objective as it would be put together from what is on PyPI."""
    reconstruction = _pytorch_msssim(x, y, logits, mask) + _squared_error(x, y)
    kl = sparsity_kl(logits, WEIGHTS.rho, WEIGHTS.kl_form).mean()
    return reconstruction + _torchvision(x, y, logits, mask) + WEIGHTS.kl * kl


# --- synthesis ----------------------------------------------------------------------------------------------------------------


def _synthesis(backend: Any, compiled: bool = False) -> Callable[..., Callable[[], Any]]:
    def prepare(case: Case, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
        images, textures, sample = inputs
        run, dtype = _compiled(synthesise) if compiled else synthesise, DTYPES[case.dtype]
        return lambda: run(images, textures, sample, 0, case.settings, backend=backend, dtype=dtype)

    return prepare


def _draem(case: Case, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    images, textures = (t.permute(0, 2, 3, 1).contiguous().cpu().numpy() for t in inputs[:2])
    rng = np.random.default_rng(0)
    return lambda: [draem_sample(rng, images, textures, case.settings) for _ in range(case.batch)]


def draem_sample(
    rng: np.random.Generator, images: Array, textures: Array, settings: SynthesisSettings
) -> tuple[Array, Array, Array]:
    """One sample by DRAEM's recipe, as a data loader's worker would make it: perlin-numpy's noise, cv2 and numpy for the rest.

    Returns (clean, anomalous, mask), float32 [H, H, 3] and [H, H, 1], from uint8 images and textures [N, S, S, 3].
    """
    import cv2
    from perlin_numpy import generate_perlin_noise_2d

    size, store = settings.image_size, images.shape[1]

    def warped(picture: Array, matrix: Array, border: int) -> Array:
        return cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=border)

    def cropped(picture: Array, angle: float, scale: float) -> Array:
        matrix = cv2.getRotationMatrix2D((store / 2, store / 2), angle, size / store / scale)
        matrix[:, 2] += size / 2 - store / 2
        return warped(picture, matrix, cv2.BORDER_REFLECT).astype(np.float32) / 255

    turn = settings.rotation
    clean = cropped(images[rng.integers(len(images))], rng.uniform(-turn, turn), rng.uniform(*settings.scale))
    if rng.random() < settings.clean_fraction:
        return clean, clean, np.zeros((size, size, 1), np.float32)
    np.random.seed(rng.integers(2**31))
    noise = generate_perlin_noise_2d((size, size), tuple(2 ** rng.integers(0, settings.lattice_max + 1, 2)))
    rotation = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(-90, 90), 1.0)
    noise = warped(noise.astype(np.float32), rotation, cv2.BORDER_CONSTANT)
    mask = (noise > settings.threshold).astype(np.float32)[:, :, None]
    jitter = settings.texture_jitter
    texture = cropped(textures[rng.integers(len(textures))], rng.uniform(-180, 180), rng.uniform(1 - jitter, 1))
    texture = np.clip(texture * rng.uniform(1 - jitter, 1 + jitter) + rng.uniform(-jitter / 2, jitter / 2), 0, 1)
    beta = rng.uniform(0, settings.blend_max)
    return clean, clean * (1 - mask) + mask * (beta * clean + (1 - beta) * texture), mask


def _objective(name: str, loss: Loss, terms: tuple[str, ...] = TERMS, **more: Any) -> Implementation:
    return Implementation(name, "objective", _step(loss, terms), terms=terms, **more)


_FP32: dict[str, Any] = {"dtypes": ("fp32",)}  # they compute in the storage type, or take no other
_GPU: dict[str, Any] = {"devices": ("cuda",)}

IMPLEMENTATIONS = (
    _objective("triton", _ours("triton"), **_GPU),
    _objective("triton, two rows", _scheduled(objective_triton.Schedule(turn=2)), **_GPU),
    _objective("triton, bands of 64", _scheduled(objective_triton.Schedule(rows=64)), **_GPU),
    _objective("triton, two rows, bands of 64", _scheduled(objective_triton.Schedule(turn=2, rows=64)), **_GPU),
    _objective("native", _ours("native"), devices=("cpu",)),
    _objective("torch", _ours("torch")),
    _objective("torch.compile", _compiled_objective),
    _objective("pytorch-msssim + torchvision", _from_parts, packages=("pytorch-msssim", "torchvision"), **_FP32),
    _objective("fussim", _dense(_fussim), ("ssim",), packages=("fussim",), dtypes=("fp32", "fp16"), **_GPU),
    _objective("pytorch-msssim", _pytorch_msssim, ("ssim",), packages=("pytorch-msssim",), **_FP32),
    _objective("torchvision", _torchvision, ("focal",), packages=("torchvision",), **_FP32),
    Implementation("triton", "synthesis", _synthesis("triton"), **_GPU),
    Implementation("native", "synthesis", _synthesis("native"), devices=("cpu",)),
    Implementation("torch", "synthesis", _synthesis("torch"), waits=True),
    Implementation("torch.compile", "synthesis", _synthesis("torch", compiled=True), waits=True),
    Implementation("DRAEM", "synthesis", _draem, packages=("perlin-numpy", "opencv"), waits=True, **_FP32),
)
