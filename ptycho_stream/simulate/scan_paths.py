"""Scan paths in pixels: where the probe goes, in the order in which it goes there.

Used by the scan simulator.
"""

import numpy as np
from numpy.typing import NDArray


def jittered_raster(
    rng: np.random.Generator, frames: int, step_px: float, jitter: float = 0.25
) -> NDArray[np.float64]:
    """A near-square raster, every second row backwards, each point displaced at random.

    The jitter breaks the periodicity that makes pathological rasters (Thibault et al. 2009,
    doi:10.1016/j.ultramic.2008.12.011).

    Args:
        rng: the only source of randomness.
        frames: number of points; the last row may be short.
        step_px: distance of neighbours.
        jitter: largest displacement along each axis, in steps.

    Returns:
        float64 (frames, 2), y and x, about a centre of (0, 0).
    """
    columns = int(np.ceil(np.sqrt(frames)))
    rows = -(-frames // columns)
    number = np.arange(frames)
    row, column = number // columns, number % columns
    column = np.where(row % 2 == 1, columns - 1 - column, column)
    grid = np.stack([row - (rows - 1) / 2, column - (columns - 1) / 2], axis=1)
    return step_px * (grid + rng.uniform(-jitter, jitter, grid.shape))
