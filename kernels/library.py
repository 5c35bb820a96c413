"""The C++ of the kernels (``*/*.cpp``), compiled on the machine it runs on and loaded through ctypes.

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
from ctypes import c_int, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = sorted(Path(__file__).parent.glob("*/*.cpp"))
# What is written is what is computed: no reassociation, and fused multiply-adds only where the source asks for them.
FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -shared -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
)


class NativeUnavailable(RuntimeError):
    """There is no compiled library on this machine; the message says why."""


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


def load() -> ctypes.CDLL:
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


# Never torch's defaults, which may be another type or device than C++ writes to.
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def require_cpu(*tensors: Tensor) -> None:
    """C++ would follow a GPU's address into a crash."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"the native kernels run on CPU tensors, one of these is on {tensor.device}")
