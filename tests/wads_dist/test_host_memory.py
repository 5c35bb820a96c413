import ctypes
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")

MEBIBYTES = 256
PROGRAM = f"""
import resource, sys
import psutil
import torch
from wads_dist.host_memory import give_back_freed_memory, keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if "keep" in sys.argv:
    keep_freed_memory()
torch.ones({MEBIBYTES} << 20, dtype=torch.uint8)
before = faults()
torch.ones({MEBIBYTES} << 20, dtype=torch.uint8)
again = faults() - before
kept = psutil.Process().memory_info().rss
give_back_freed_memory()
print(again, kept - psutil.Process().memory_info().rss)
"""


def run(*arguments: str) -> tuple[int, int]:
    """Page faults of a second allocation as large as one that was freed; bytes that could be given back afterwards."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    again, given_back = map(int, printed.split())
    return again, given_back


def test_freed_memory_is_used_again_and_can_be_given_back() -> None:
    pages = (MEBIBYTES << 20) // 4096
    again, given_back = run("keep")
    assert again < pages / 100
    assert given_back > (MEBIBYTES << 20) * 0.9


def test_without_it_every_allocation_is_mapped_anew() -> None:
    """Otherwise there would be nothing to keep; if glibc changes its ways, this module can go."""
    again, given_back = run()
    # With huge pages a fault maps 512 of them.
    assert again >= (MEBIBYTES << 20) // 4096 // 512
    assert given_back < (MEBIBYTES << 20) / 10
