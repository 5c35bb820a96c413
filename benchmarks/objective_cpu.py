"""The objective, forward and backward on a CPU: C++ against what one would put together from PyPI, in one run.

    python benchmarks/objective_cpu.py [--batch 32] [--size 128] [--seconds 3] [--json FILE]

The peer is pytorch-msssim's SSIM, torchvision's focal loss, and MSE and KL in PyTorch, with autograd; ``torch`` is the form
of kernels/objective.py. Timed as ``launch/profile_kernels.py`` does, for one and two threads and both layouts.
"""

import argparse
import json
import os
import platform
from typing import Any

import torch

from wads_dist.profiling.peers import IMPLEMENTATIONS, Case
from wads_dist.profiling.timing import host_clock, take_turns
from wads_dist.shards.arguments import Parser, local_path

PEER = "pytorch-msssim + torchvision"
NAMES = ("native", "torch", PEER)


def compare(batch: int, size: int, seconds: float, threads: int, channels_last: bool) -> dict[str, Any]:
    """Median milliseconds of each implementation, and how many times faster than the peer it is."""
    torch.set_num_threads(threads)
    case = Case(
        "objective", batch, size, "fp32", True, torch.device("cpu"), "channels_last" if channels_last else "contiguous"
    )
    inputs = case.inputs(0)
    chosen = [i for i in IMPLEMENTATIONS if i.kernel == case.kernel and i.name in NAMES]
    medians = take_turns({i.name: host_clock(i.prepare(case, inputs), case.device) for i in chosen}, seconds)
    return {
        "threads": threads,
        "layout": "channels_last" if channels_last else "contiguous",
        "milliseconds": {name: round(us / 1e3, 2) for name, us in medians.items()},
        "times_the_peer": {name: round(medians[PEER] / us, 2) for name, us in medians.items()},
    }


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=local_path, help="also write the numbers to this file")
    given = parser.parse_args()
    runs = [(threads, channels_last) for threads in (1, 2) for channels_last in (False, True)]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "shape": [given.batch, 3, given.size, given.size],
        "results": [compare(given.batch, given.size, given.seconds, *run) for run in runs],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text)


if __name__ == "__main__":
    main()
