"""The objective, forward and backward on a CPU: C++ against what one would put together from PyPI, in one run.

    python benchmarks/objective_cpu.py [--batch 32] [--size 128] [--rounds 15] [--json FILE]

The peer is pytorch-msssim's SSIM, torchvision's focal loss, and MSE and KL in PyTorch, with autograd; ``torch`` is the form
of kernels/objective.py. Gradients reach the reconstruction and the logits. The implementations take turns, each round gives
every ratio, and the medians over the rounds are reported.
"""

import argparse
import json
import os
import platform
import statistics
import time
from typing import Any

import torch

from kernels import native
from wads_dist.kernel_peers import IMPLEMENTATIONS, Case

PEER = "pytorch-msssim + torchvision"
NAMES = ("native", "torch", PEER)


def compare(batch: int, size: int, rounds: int, threads: int, channels_last: bool) -> dict[str, Any]:
    """Median milliseconds of each implementation, and how many times faster than the peer it is."""
    torch.set_num_threads(threads)
    case = Case("objective", batch, size, "fp32", True, torch.device("cpu"), channels_last)
    inputs = case.inputs(0)
    steps = {i.name: i.prepare(case, inputs) for i in IMPLEMENTATIONS if i.kernel == "objective" and i.name in NAMES}
    assert set(steps) == set(NAMES)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    kept = {name: values[1:] for name, values in times.items()}  # the first warms up
    return {
        "threads": threads,
        "layout": "channels_last" if channels_last else "contiguous",
        "milliseconds": {name: round(statistics.median(values), 2) for name, values in kept.items()},
        "times_the_peer": {
            name: round(statistics.median(p / t for p, t in zip(kept[PEER], values, strict=True)), 2)
            for name, values in kept.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write the numbers to this file")
    arguments = parser.parse_args()
    native._library()  # compiled before anything is timed; refuses to time a fallback
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "shape": [arguments.batch, 3, arguments.size, arguments.size],
        "results": [
            compare(arguments.batch, arguments.size, arguments.rounds, threads, channels_last)
            for threads in (1, 2)
            for channels_last in (False, True)
        ],
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
