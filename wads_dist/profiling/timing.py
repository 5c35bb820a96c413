"""How kernels are timed, and what the device could do at most.

A kernel of 30 µs is shorter than its own launch, so event pairs around launches measure the host. On a GPU several calls are
captured in one CUDA graph, and the events stand around a replay behind other work; what cannot be captured because it waits for
the device is timed by the host's clock. Cold: each call in the graph has its own inputs and outputs, together several times L2.
Warm: one set of inputs, already used. Implementations take turns, and medians are compared, so that a clock that drifts or a
machine that is shared hits all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from wads_dist.training.timing import synchronise

Name = TypeVar("Name")
Call = Callable[[], Any]
Clock = Callable[[], float]
"""Times some calls and returns the microseconds that one took."""

ROUNDS = 5
GRAPH_CALLS = 20
COLD_SETS = 64


@dataclass(frozen=True)
class Device:
    """``copy_gbps``: bytes read and written per nanosecond by a large copy. ``peak_gops``: fp32 lane-operations per
    nanosecond, a fused multiply-add counting as one; ``peak`` says where that number is from."""

    name: str
    copy_gbps: float
    peak_gops: float
    peak: str


def host_clock(call: Call, device: torch.device) -> Clock:
    """Wall time; one reading spans at least 10 ms."""
    call()  # compiles, loads, fills caches
    synchronise(device)

    def read(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronise(device)
        return (time.perf_counter() - start) * 1e6 / calls

    calls = max(1, min(10_000, int(10_000 / read(1))))
    return lambda: read(calls)


def graph_clock(sets: Sequence[Call]) -> Clock:
    """Device time within a CUDA graph that goes round ``sets``, the same call with different tensors."""
    calls = max(GRAPH_CALLS, len(sets))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation and lazy initialisation cannot be captured
        for call in (*sets, sets[0]):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, kept = torch.cuda.CUDAGraph(), [None] * len(sets)
    with torch.cuda.graph(graph):
        for i in range(calls):
            kept[i % len(sets)] = sets[i % len(sets)]()  # outputs held until the set's next turn have their own memory
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def read() -> float:
        graph.replay()  # the events and the next replay are queued while this one runs
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls

    return read


def take_turns(clocks: Mapping[Name, Clock], seconds: float) -> dict[Name, float]:
    """The median reading of each clock, ``seconds`` of readings per clock on average and at least five."""
    readings: dict[Name, list[float]] = {name: [] for name in clocks}
    end, rounds = time.perf_counter() + seconds * len(clocks), 0
    while rounds < ROUNDS or time.perf_counter() < end:
        for name, clock in clocks.items():
            readings[name].append(clock())
        rounds += 1
    return {name: statistics.median(values) for name, values in readings.items()}


def cold_sets(bytes_per_call: float, device: torch.device) -> int:
    """How many sets of tensors exceed L2 four times; 1 on a CPU, and where it would take too many."""
    if device.type == "cpu":
        return 1
    count = -(-4 * torch.cuda.get_device_properties(device).L2_cache_size // int(bytes_per_call))
    return max(2, count) if count <= COLD_SETS else 1


def _best_us(call: Call, device: torch.device) -> float:
    """The least of some readings: a bound is what the device can do undisturbed."""
    clock = host_clock(call, device)
    return min(clock() for _ in range(2 * ROUNDS))


def _copy_gbps(device: torch.device) -> float:
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).zero_()  # memory that was never written is mapped at the first touch
    return 2 * size / _best_us(lambda: target.copy_(source), device) / 1e3


def _peak_gops(device: torch.device) -> tuple[float, str]:
    """Lanes × clock of an NVIDIA device, elsewhere a measured fp32 matrix product."""
    if device.type == "cuda" and torch.version.cuda:
        properties = torch.cuda.get_device_properties(device)
        lanes = 64 if (properties.major, properties.minor) == (8, 0) else 128
        multiprocessors, ghz = properties.multi_processor_count, properties.clock_rate / 1e6
        return multiprocessors * lanes * ghz, f"{multiprocessors} SMs × {lanes} lanes × {ghz:.2f} GHz"
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.ones(n, n, device=device), torch.ones(n, n, device=device)
    return n**3 / _best_us(lambda: a @ b, device) / 1e3, f"a measured fp32 product of {n}×{n} matrices"


def measure_device(device: torch.device) -> Device:
    """Takes a second or two."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU: {_cpu_model()}, {torch.get_num_threads()} threads"
    peak, source = _peak_gops(device)
    return Device(name, _copy_gbps(device), peak, source)


def _cpu_model() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
