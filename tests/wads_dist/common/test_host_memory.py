import ctypes
import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, environment
from wads_dist.common.processes import free_port

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"),
]

MEBIBYTES = 256
PROGRAM = f"""
import json, resource
import psutil
import torch
from wads_dist.config.load import load_config
from wads_dist.common.host_memory import give_back_freed_memory
from wads_dist.training.loop import initialise

def faults_of(blocks, size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size << 20, dtype=torch.uint8) for _ in range(blocks)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return psutil.Process().memory_info().rss

initialise(load_config([]), threads=1)
faults = [faults_of({MEBIBYTES} // 8, 8) for _ in range(9)]
kept = resident()
give_back_freed_memory()
given_back = kept - resident()
before = resident()
small = [(faults_of(1, {2 * MEBIBYTES}), bytearray(1000)) for _ in range(9)]  # more than the heap has kept
print(json.dumps([sorted(faults)[4], given_back, resident() - before]))
"""


def run() -> tuple[int, int, int]:
    """Page faults of as many blocks of 8 MiB as were freed before; bytes that could be given back afterwards; and by how much
    the process has grown after twice as much in one block was allocated and freed again and again."""
    command = [sys.executable, "-c", PROGRAM]
    alone = environment(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    done = subprocess.run(command, cwd=REPOSITORY, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    faults, given_back, growth = json.loads(done.stdout.splitlines()[-1])
    return faults, given_back, growth


def test_a_worker_uses_freed_memory_again_and_can_give_it_back() -> None:
    faults, given_back, growth = run()
    assert faults < (MEBIBYTES << 20) // 4096 / 100
    assert given_back > (MEBIBYTES << 20) * 0.9
    assert growth < (MEBIBYTES << 20) / 4
