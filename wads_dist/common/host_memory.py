"""How this process's memory is kept on a host.

glibc returns the end of its heap to the kernel as it becomes free. Training on a CPU frees and allocates the same activations
and gradients at every step, and the kernel then has to map and clear each page of them anew: 7 % of a step's processor time
(benchmarks/README.md). Other C libraries and allocators are left as they are.
"""

import ctypes

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 << 20
"""Bytes; what glibc's own moving threshold ends at. Larger blocks are the kernel's as soon as they are free: kept, one with a
small block behind it would not fit the next tensor of its size (``posix_memalign`` asks for more), and memory would grow."""


def keep_freed_memory() -> None:
    """From now on, blocks of up to LARGEST_KEPT bytes that the main thread frees stay with this process, for its next
    allocations, until ``give_back_freed_memory`` is called."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, -1)  # as a size, the largest there is


def give_back_freed_memory() -> None:
    """Returns what is free to the kernel, once; the counterpart of ``torch.cuda.empty_cache``."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
