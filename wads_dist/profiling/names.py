"""What can be profiled, by name: for command lines that are read before torch is imported."""

from typing import Literal

Kernel = Literal["objective", "synthesis"]
Layout = Literal["contiguous", "channels_last"]

KERNELS: tuple[Kernel, ...] = ("objective", "synthesis")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
DTYPES = ("fp32", "bf16", "fp16")
