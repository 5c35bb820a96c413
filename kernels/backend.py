"""Which implementation of a kernel runs: Triton on a GPU, compiled C++ on a CPU, or the PyTorch reference anywhere."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the configuration names backends, and must be readable at once
    import torch

Backend = Literal["auto", "triton", "native", "torch"]


def resolve(backend: Backend, device: "torch.device") -> Literal["triton", "native", "torch"]:
    """The implementation that ``backend`` means on ``device``. ``triton`` on CPU tensors needs TRITON_INTERPRET=1.

    ``auto`` is ``triton`` on a GPU; on a CPU it is ``native``, or ``torch`` when there is no C++ compiler.

    Raises:
        ValueError: ``native`` was asked for tensors that are not on the CPU.
    """
    if backend == "auto":
        if device.type != "cpu":
            return "triton"
        from . import library

        return "native" if library.available() else "torch"
    if backend == "native" and device.type != "cpu":
        raise ValueError(f"the native kernels run on CPU tensors, these are on {device}")
    return backend


# Which compiler there is does not change while a graph is traced. This is what torch.compiler.assume_constant_result marks a
# function with (a test compares them); calling that would import all of torch._dynamo, which takes longer than torch.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
