"""The fast CPU path of both kernels: C++ compiled on this machine, called through ctypes."""

from torch import Tensor

from kernels.objective import ObjectiveWeights
from kernels.synthesis import Batch, SynthesisSettings


class NativeUnavailable(RuntimeError):
    """There is no compiled library here; the message says why."""


def available() -> bool:
    """Whether a C++ compiler works here and the library loads."""
    return False


def synthesise(
    images: Tensor,
    textures: Tensor,
    sample: Tensor,
    seed: int,
    settings: SynthesisSettings,
    rows: Tensor | None,
    count: int,
) -> Batch:
    """``kernels.synthesis.synthesise`` in C++."""
    raise NativeUnavailable("not built yet")


def objective(
    x: Tensor,
    reconstruction: Tensor,
    logits: Tensor,
    mask: Tensor,
    weights: ObjectiveWeights,
    gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per-image terms [4, N] float32 (1 − SSIM, MSE, focal, KL) and the gradients of the weighted total."""
    raise NativeUnavailable("not built yet")
