"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on torch tensors.

A counter-based generator: a draw is a pure function of (key, counter). Keyed by (seed, purpose) and counted by the global
sample index, it makes sample i the same on any rank, any world size, CPU or GPU, and after any restart.
"""

from enum import IntEnum

import torch
from torch import Tensor

ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Purpose(IntEnum):
    """The second key word: draws for different purposes never share a stream. Values are part of the data's identity."""

    ORDER = 1
    GEOMETRY = 2
    MASK = 3
    LATTICE = 4
    TEXTURE = 5
    BANK = 6


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of four counter words (int64 tensors of one shape, values in [0, 2**32)) under two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64, so the masked arithmetic shift is exactly the high word of the unsigned product.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def philox(seed: int, purpose: Purpose, sample: Tensor, index: Tensor | int = 0) -> Words:
    """Four independent 32-bit words for each (sample, index).

    The counter is (sample low word, sample high word, index, seed high word); the key is (seed low word, purpose).

    Args:
        seed: the run's seed, 0 <= seed < 2**64.
        purpose: what the draw is for.
        sample: int64 tensor of global sample indices, any shape.
        index: int64 tensor broadcastable with ``sample`` (a lattice point, say), or one number.

    Returns:
        four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    points = torch.as_tensor(index, dtype=torch.int64, device=sample.device)
    sample, points = torch.broadcast_tensors(sample, points)
    low = sample & _MASK
    counter = (low, (sample >> 32) & _MASK, points & _MASK, torch.full_like(low, (seed >> 32) & _MASK))
    return philox4x32(counter, (seed & _MASK, int(purpose)))


def uniform(word: Tensor) -> Tensor:
    """A 32-bit word as a float32 in [0, 1): its upper 24 bits, so that the value is exact on every device."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def shuffled(seed: int, position: Tensor, length: int, rounds: int = 40) -> Tensor:
    """The image shown at each position of an endless sequence that is a fresh permutation of ``length`` images per cycle.

    The permutation is a swap-or-not shuffle (Hoang, Morris, Rogaway, CRYPTO 2012): each round pairs x with K - x (mod length)
    and swaps the pair on one pseudo-random bit. It is a bijection by construction for every length, needs no table and no
    data-dependent loop. Round keys are Philox words of (cycle, round); the bit comes from a 32-bit mixer (Murmur3's).

    Args:
        position: int64 tensor [B] of global sample indices.
        length: number of images.

    Returns:
        int64 tensor [B] with values in [0, length).
    """
    cycle = position.div(length, rounding_mode="floor")
    x = position - cycle * length
    steps = torch.arange(rounds, device=position.device)
    pair, salt, _, _ = philox(seed, Purpose.ORDER, cycle[:, None], steps)
    pair = pair % length
    for r in range(rounds):
        partner = (pair[:, r] - x) % length
        bits = torch.maximum(x, partner) ^ salt[:, r]
        bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _MASK
        bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _MASK
        x = torch.where((bits >> 16) & 1 == 1, partner, x)
    return x
