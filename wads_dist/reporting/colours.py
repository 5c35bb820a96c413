"""Colours of probabilities."""

import numpy as np
from numpy.typing import NDArray


def heat_colours(probability: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[...] in [0, 1] -> RGB [..., 3], matplotlib's colours "inferno"."""
    import matplotlib  # scores alone need none of it

    colours = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
    return np.take(colours, levels(probability, 255), axis=0)


def levels(probability: NDArray[np.float32], top: int) -> NDArray[np.uint8]:
    """[0, 1] → 0 to ``top``."""
    return np.rint(probability * top).astype(np.uint8)
