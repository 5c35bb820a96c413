"""Images/s of anomaly synthesis against the numpy/cv2 path that DRAEM uses, in one run on one machine.

    python benchmarks/data_path.py [--seconds 1] [--rounds 5] [--json FILE]

Both make, from decoded uint8 images at 256², training samples at 128²: crop and scale, rotation, a rotated Perlin mask, and the
blend with a transformed texture. The peer is DRAEM's recipe with its generator from PyPI (perlin-numpy) and cv2/numpy for the
rest, one sample at a time as in a data loader's worker of one thread. Two mixtures: half of the samples stay clean (DRAEM's and
ours; neither makes noise for those), and every sample is anomalous. Machines are noisy: the implementations take turns, each
round gives every ratio, and the median over the rounds is reported.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from functools import cache
from multiprocessing.pool import Pool
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from wads_dist.kernels import library
from wads_dist.kernels.synthesis import SynthesisSettings, synthesise
from wads_dist.profiling.peers import draem_sample
from wads_dist.shards.arguments import Parser, local
from wads_dist.shards.textures import procedural_textures

SIZE, STORE, BATCH = 128, 256, 32
Array = NDArray[np.generic]


@cache
def stores() -> tuple[Array, Array]:
    """60 images and 64 textures, uint8 [*, STORE, STORE, 3]."""
    rng = np.random.default_rng(0)
    smooth = [cv2.resize(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), (STORE, STORE)) for _ in range(60)]
    return np.stack(smooth), procedural_textures(size=STORE).transpose(0, 2, 3, 1).copy()


@cache
def resident() -> tuple[torch.Tensor, torch.Tensor]:
    images, textures = (torch.from_numpy(store.transpose(0, 3, 1, 2).copy()) for store in stores())
    return images, textures


def measure(who: str, threads: int, clean_fraction: float, seconds: float) -> tuple[float, float]:
    """Images per second of this process, and per second of its processor time."""
    cv2.setNumThreads(1)
    torch.set_num_threads(threads)
    settings = SynthesisSettings(image_size=SIZE, clean_fraction=clean_fraction)
    rng = np.random.default_rng(os.getpid())

    def batch(start: int) -> None:
        if who == "peer":
            for _ in range(BATCH):
                draem_sample(rng, *stores(), settings)
        else:
            synthesise(*resident(), torch.arange(start, start + BATCH), 0, settings)

    batch(0)
    made, start, start_cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        batch(made)
        made += BATCH
    return made / (time.perf_counter() - start), made / (time.process_time() - start_cpu)


def one_round(pool: Pool, clean_fraction: float, seconds: float) -> dict[str, float]:
    """Every implementation once, and their ratios."""
    rates: dict[str, float] = {}
    for who, threads in (("peer", 1), ("ours", 1), ("ours", 2)):
        rates[f"{who}_{threads}"], per_cpu = pool.apply(measure, (who, threads, clean_fraction, seconds))
        if threads == 1:
            rates[f"{who}_per_cpu_second"] = per_cpu
    both = pool.starmap(measure, [("peer", 1, clean_fraction, seconds)] * 2, chunksize=1)
    rates["peer_2"] = sum(wall for wall, _ in both)
    return rates | {
        "two_threads_over_one_peer_process": rates["ours_2"] / rates["peer_1"],
        "one_thread_over_one_peer_process": rates["ours_1"] / rates["peer_1"],
        "two_threads_over_two_peer_processes": rates["ours_2"] / rates["peer_2"],
        "per_cpu_second": rates["ours_per_cpu_second"] / rates["peer_per_cpu_second"],
    }


def peak_memory_mb(images: int) -> float:
    """Peak resident memory in MB above the start while synthesising from ``images`` resident images."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = torch.full((images, 3, STORE, STORE), 7, dtype=torch.uint8)
    textures = torch.from_numpy(procedural_textures(count=8, size=STORE))
    for i in range(8):
        synthesise(store, textures, torch.arange(i * BATCH, (i + 1) * BATCH), 0, SynthesisSettings(image_size=SIZE))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=local, help="also write the numbers to this file")
    arguments = parser.parse_args()
    library.load()  # compiled before anything is timed; refuses to time the fallback
    context = multiprocessing.get_context("spawn")
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}"
    }
    with context.Pool(2) as pool:
        for mixture, clean_fraction in (("half_clean", 0.5), ("all_anomalous", 0.0)):
            rounds = [one_round(pool, clean_fraction, arguments.seconds) for _ in range(arguments.rounds)]
            result[mixture] = {name: round(statistics.median(r[name] for r in rounds), 2) for name in rounds[0]}
    memory = {}
    for count in (400, 1600):
        with context.Pool(1) as pool:
            memory[count] = pool.apply(peak_memory_mb, (count,))
    result["resident_bytes_per_uint8_byte"] = (memory[1600] - memory[400]) / (1200 * 3 * STORE**2 / 2**20)
    result["batch_memory_mb"] = memory[400] - 400 * 3 * STORE**2 / 2**20
    print(json.dumps(result, indent=1))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
