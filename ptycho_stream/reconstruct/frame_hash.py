"""A hash of frame numbers, by which frames are dealt out: to halves, and out of fits.

It depends on the number alone, so a growing scan, a restart or another order changes nothing.
Used by the canvas, by trust and by training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def frame_hash(frame_numbers: NDArray[np.integer[Any]], stream: int) -> NDArray[np.uint64]:
    """Uint64 (n,) of the numbers (n,); two streams know nothing of each other.

    The splitmix64 finaliser (Steele et al., OOPSLA 2014).
    """
    x = frame_numbers.astype(np.uint64) + np.uint64(stream * _GOLDEN_GAMMA % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def in_share(
    frame_numbers: NDArray[np.integer[Any]], share: float, stream: int
) -> NDArray[np.bool_]:
    """Which of the frames (n,) are in a share, 0 to 1, of all."""
    return (frame_hash(frame_numbers, stream) >> np.uint64(11)).astype(np.float64) < share * 2.0**53
