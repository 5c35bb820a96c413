"""Images/s of anomaly synthesis against the numpy/cv2 path that DRAEM uses, in one run on one machine.

    python benchmarks/data_path.py [--seconds 5] [--json FILE]

Both make, from decoded uint8 images at 256², an anomalous training sample at 128²: crop and scale, rotation, a rotated Perlin
mask, and the blend with a transformed texture. The peer is DRAEM's recipe with its generator from PyPI (perlin-numpy) and
cv2/numpy for the rest, one sample at a time as in a data loader's worker. Each is run with one process of one thread; ours also
with the two threads that a training run on two cores has, and the peer in two processes. Ratios are what to look at.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from perlin_numpy import generate_perlin_noise_2d

from kernels.synthesis import SynthesisSettings, synthesise
from shards.textures import procedural_textures

SIZE, STORE, BATCH = 128, 256, 32
Array = NDArray[np.generic]


def peer_sample(rng: np.random.Generator, images: Array, textures: Array) -> tuple[Array, Array, Array]:
    """One DRAEM sample: (clean, anomalous, mask), float32 [128, 128, 3] and [128, 128, 1]."""
    image = images[rng.integers(len(images))]
    scale, angle = rng.uniform(0.8, 1.0), rng.uniform(-10, 10)
    matrix = cv2.getRotationMatrix2D((STORE / 2, STORE / 2), angle, SIZE / STORE / scale)
    matrix[:, 2] += SIZE / 2 - STORE / 2
    clean = cv2.warpAffine(image, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    clean = clean.astype(np.float32) / 255
    if rng.random() < 0.5:
        return clean, clean, np.zeros((SIZE, SIZE, 1), np.float32)
    np.random.seed(rng.integers(2**31))
    noise = generate_perlin_noise_2d((SIZE, SIZE), (2 ** int(rng.integers(0, 6)), 2 ** int(rng.integers(0, 6))))
    rotation = cv2.getRotationMatrix2D((SIZE / 2, SIZE / 2), rng.uniform(-90, 90), 1.0)
    noise = cv2.warpAffine(noise.astype(np.float32), rotation, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
    mask = (noise > 0.5).astype(np.float32)[:, :, None]
    texture = textures[rng.integers(len(textures))]
    matrix = cv2.getRotationMatrix2D((STORE / 2, STORE / 2), rng.uniform(-180, 180), SIZE / STORE / rng.uniform(0.6, 1))
    matrix[:, 2] += SIZE / 2 - STORE / 2
    texture = cv2.warpAffine(texture, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    texture = np.clip(texture.astype(np.float32) / 255 * rng.uniform(0.6, 1.4) + rng.uniform(-0.2, 0.2), 0, 1)
    beta = rng.uniform(0, 0.8)
    return clean, clean * (1 - mask) + mask * (beta * clean + (1 - beta) * texture), mask


def rate(one: Callable[[int], int], seconds: float) -> float:
    """Samples per second of ``one(i)``, which makes and returns a number of samples."""
    one(0)
    made, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        made += one(made + 1)
    return made / spent


def stores() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    smooth = [cv2.resize(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), (STORE, STORE)) for _ in range(60)]
    return np.stack(smooth), procedural_textures(size=STORE).transpose(0, 2, 3, 1).copy()


def peer_rate(seconds: float) -> float:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    images, textures = stores()
    rng = np.random.default_rng(os.getpid())

    def one(_: int) -> int:
        peer_sample(rng, images, textures)
        return 1

    return rate(one, seconds)


def our_rate(seconds: float, threads: int) -> float:
    torch.set_num_threads(threads)
    images, textures = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in stores())
    settings = SynthesisSettings(image_size=SIZE)

    def one(i: int) -> int:
        synthesise(images, textures, torch.arange(i, i + BATCH), 0, settings)
        return BATCH

    return rate(one, seconds)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", help="also write the numbers to this file")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        peer_two = sum(pool.map(peer_rate, [arguments.seconds] * 2))
        peer_one = pool.apply(peer_rate, (arguments.seconds,))
        ours = {n: pool.apply(our_rate, (arguments.seconds, n)) for n in (1, 2)}
    memory = {}
    for count in (400, 1600):
        with context.Pool(1) as pool:
            memory[count] = pool.apply(peak_memory_mb, (count,))
    grown = (memory[1600] - memory[400]) / (1200 * 3 * STORE**2 / 2**20)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}",
        "images_per_second": {"peer_1": peer_one, "peer_2": peer_two, "ours_1": ours[1], "ours_2": ours[2]},
        "ratio_one_core": ours[1] / peer_one,
        "ratio_two_cores": ours[2] / peer_two,
        "ours_two_cores_over_one_peer_process": ours[2] / peer_one,
        "resident_bytes_per_uint8_byte": grown,
        "batch_memory_mb": memory[400] - 400 * 3 * STORE**2 / 2**20,
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)
    assert math.isfinite(grown)


if __name__ == "__main__":
    main()
