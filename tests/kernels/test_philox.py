import numpy as np
import pytest
import torch

from wads_dist.kernels.philox import Purpose, philox, philox4x32, shuffled, uniform


# Known answers of Random123's kat_vectors for philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(word.item() for word in philox4x32((c0, c1, c2, c3), key)) == expected


def test_a_draw_depends_on_its_own_index_only() -> None:
    alone = philox(7, Purpose.MASK, torch.tensor([2**33 + 5]), 3)
    among = philox(7, Purpose.MASK, torch.arange(2**33, 2**33 + 9), 3)
    assert [w.item() for w in alone] == [w[5].item() for w in among]


def test_seed_purpose_index_and_high_words_all_matter() -> None:
    sample = torch.tensor([1])
    words = {
        tuple(w.item() for w in philox(seed, purpose, sample + offset, index))
        for seed in (0, 1, 2**32)
        for purpose in (Purpose.MASK, Purpose.TEXTURE)
        for offset in (0, 2**32)
        for index in (0, 1)
    }
    assert len(words) == 24


def test_uniform_is_in_the_unit_interval_and_even() -> None:
    words = torch.stack(philox(0, Purpose.GEOMETRY, torch.arange(50_000)))
    u = uniform(words)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    # 200,000 draws in 20 bins: 10,000 each, standard deviation 97.
    assert (counts - 10_000).abs().max() < 500


@pytest.mark.parametrize("length", [1, 2, 3, 28, 31, 60, 257, 1000])
def test_every_cycle_is_a_permutation(length: int) -> None:
    order = shuffled(3, torch.arange(3 * length), length).view(3, length)
    for cycle in order:
        assert sorted(cycle.tolist()) == list(range(length))
    if length > 20:
        assert not torch.equal(order[0], order[1])


@pytest.mark.parametrize("length", [28, 61])
def test_every_image_is_as_likely_at_every_position(length: int) -> None:
    cycles = 500
    positions = torch.arange(cycles * length)
    order = shuffled(0, positions, length)
    table = np.zeros((length, length))
    np.add.at(table, ((positions % length).numpy(), order.numpy()), 1)
    chi2 = ((table - cycles / length) ** 2 / (cycles / length)).sum()
    freedom = (length - 1) ** 2
    # chi-square of a uniform permutation: mean = degrees of freedom, deviation = √(2·freedom).
    assert abs(chi2 - freedom) < 6 * (2 * freedom) ** 0.5
