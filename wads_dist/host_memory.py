"""How this process's memory is kept on a host.

glibc returns large blocks to the kernel as they are freed. Training on a CPU frees and allocates the same activations and
gradients at every step, and the kernel then has to map and clear each page of them anew: 7 % of a step's processor time
(benchmarks/README.md). Other C libraries and allocators are left as they are.
"""

import ctypes

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """From now on, what is freed stays with this process, for its next allocations; it has its largest size to its end."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # as a size, the largest there is


def give_back_freed_memory() -> None:
    """Returns what is free to the kernel, once; the counterpart of ``torch.cuda.empty_cache``."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
