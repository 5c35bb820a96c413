"""Moments of the device's stream, or of the host's clock."""

import time
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator


class OwnTime:
    """Time a rank spends on its own part of a step: data, synthesis and the generator's and segmenter's forward passes, which
    come before it first waits for another rank (at ZeRO-3 the forward itself gathers weights, and the time tells less).

    On a GPU it is the stream's time; reading it does not wait, if the host has synchronised since.
    """

    def __init__(self, device_type: str) -> None:
        self.on_device = device_type != "cpu"
        self.pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self.start = now(self.on_device)

    def __exit__(self, *_: object) -> None:
        self.pairs.append((self.start, now(self.on_device)))

    def take(self) -> float:
        """Seconds since the last call."""
        pairs, self.pairs = self.pairs, []
        return sum(seconds_between(a, b) for a, b in pairs)


def now(on_device: bool) -> Any:
    """A moment of the device's stream, or of this host's clock."""
    if not on_device:
        return time.perf_counter()
    event = get_accelerator().Event(enable_timing=True)
    event.record()
    return event


def seconds_between(a: Any, b: Any) -> float:
    """Two moments of the same kind; those of a stream must have passed."""
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1000


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
