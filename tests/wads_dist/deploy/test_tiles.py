import numpy as np
import pytest

from wads_dist.deploy.tiles import axis_weights, score_in_tiles, tile_starts

SHAPES = [(64, 64), (65, 64), (200, 131), (300, 20), (1, 300), (7, 5)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def brightness(tiles: np.ndarray) -> np.ndarray:
    return (tiles.mean(-1) / 255).astype(np.float32)


@pytest.mark.parametrize("length", [64, 65, 100, 127, 128, 1000])
@pytest.mark.parametrize("overlap", [0, 1, 16, 63])
def test_tiles_cover_and_share_what_was_asked_for(length: int, overlap: int) -> None:
    starts = tile_starts(length, 64, overlap)
    assert starts[0] == 0 and starts[-1] + 64 == length
    steps = np.diff(starts)
    assert (steps > 0).all() and (steps <= 64 - overlap).all()


def test_no_more_tiles_than_needed() -> None:
    assert len(tile_starts(128, 64, 0)) == 2 and len(tile_starts(129, 64, 0)) == 3 and len(tile_starts(64, 64, 32)) == 1


@pytest.mark.parametrize("overlap", [0, 16, 48])
def test_weights_over_every_pixel_add_up_to_one(overlap: int) -> None:
    starts, total = tile_starts(301, 64, overlap), np.zeros(301)
    for start, weights in zip(starts, axis_weights(starts, 301, 64), strict=True):
        total[start : start + 64] += weights
    assert np.abs(total - 1).max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_a_constant_map_stays_constant(shape: tuple[int, int], overlap: float) -> None:
    blended = score_in_tiles(noise(*shape), 64, overlap, lambda t: np.full(t.shape[:3], 0.7, np.float32))
    assert blended.shape == shape and blended.dtype == np.float32
    assert np.abs(blended - 0.7).max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_what_depends_on_a_pixel_alone_is_as_without_tiles(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    blended = score_in_tiles(image, 64, 0.25, brightness)
    assert np.abs(blended - brightness(image[None])[0]).max() < 1e-6


def test_one_tile_is_the_map_itself() -> None:
    """Exactly: its weights are x / x."""
    image = noise(64, 64)
    assert np.array_equal(score_in_tiles(image, 64, 0.25, brightness), brightness(image[None])[0])


def steepest(overlap: float) -> float:
    """Largest step between neighbouring pixels when tiles contradict each other: 0 and 1 in turn along a strip."""
    turn = iter(range(1000))

    def score(tiles: np.ndarray) -> np.ndarray:
        return np.stack([np.full(tiles.shape[1:3], next(turn) % 2, np.float32) for _ in tiles])

    blended = score_in_tiles(noise(64, 64 * 5), 64, overlap, score)
    return float(np.abs(np.diff(blended, axis=1)).max())


def test_there_are_no_seams_between_tiles_that_disagree() -> None:
    """The change from 0 to 1 is spread over the shared pixels: with n of them no step is larger than that of a raised cosine
    over n pixels, π/2n, but for the uneven weights of tiles that are not flat there (a quarter more). Without overlap: 1."""
    assert steepest(0.5) < 1.25 * np.pi / 2 / 32
    assert steepest(0.25) < 1.25 * np.pi / 2 / 16
    assert steepest(0.0) == 1.0


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_no_more_tiles_at_a_time_than_a_batch(batch_size: int) -> None:
    image, sizes = noise(200, 200), []

    def score(tiles: np.ndarray) -> np.ndarray:
        sizes.append(len(tiles))
        return brightness(tiles)

    blended = score_in_tiles(image, 64, 0.25, score, batch_size)
    assert max(sizes) <= batch_size and sum(sizes) == 16
    assert np.array_equal(blended, score_in_tiles(image, 64, 0.25, brightness, 7))
