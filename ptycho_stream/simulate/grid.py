"""Pixel coordinates and soft edges: what every drawn sample is made of.

Used by the sample families (:mod:`shapes`, :mod:`textures`, :mod:`solids`). All are float32:
a sample is drawn for every few training frames, and double precision halves the rate.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]
Shape = tuple[int, int]
Grid = tuple[Field, Field]
"""Row and column coordinates about the middle, (h, 1) and (1, w), pixels."""


def grid_of(shape_yx_px: Shape) -> Grid:
    """Coordinates of a field of ``shape_yx_px`` about its middle."""
    rows, columns = shape_yx_px
    y, x = np.ogrid[:rows, :columns]
    return (y - (rows - 1) / 2).astype(np.float32), (x - (columns - 1) / 2).astype(np.float32)


def shape_of(grid: Grid) -> Shape:
    """Rows and columns of the field that ``grid`` spans."""
    return grid[0].size, grid[1].size


def inside(distance_px: Field, width_px: float) -> Field:
    """1 where the signed distance is negative, 0 where positive, linear over the edge's width."""
    ramp = distance_px * np.float32(-1 / width_px)
    ramp += np.float32(0.5)
    return np.clip(ramp, 0, 1, out=ramp)


def radius_px(y: Field, x: Field) -> Field:
    """sqrt(y^2 + x^2), four times as fast as ``numpy.hypot`` (which guards against overflow)."""
    squared = y * y + x * x
    return np.sqrt(squared, out=squared)


def edge_width_px(rng: np.random.Generator) -> float:
    """Mostly sharp edges, sometimes soft ones."""
    return float(rng.uniform(0.8, 2.0) if rng.random() < 0.7 else rng.uniform(2.0, 6.0))


def rotated(rng: np.random.Generator, grid: Grid) -> tuple[Field, Field]:
    """The coordinates (h, w) of axes turned at random."""
    y, x = grid
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * y - s * x, s * y + c * x


def window(
    grid: Grid, centre_yx_px: tuple[float, float], reach_px: float
) -> tuple[tuple[slice, slice], Grid]:
    """The part of a field within ``reach_px`` of a point, and coordinates about that point.

    ``centre_yx_px`` counts from the first pixel; where the part is empty, so is the grid.
    """
    parts: list[slice] = []
    axes: list[Field] = []
    for centre, size in zip(centre_yx_px, shape_of(grid), strict=True):
        low, high = int(max(centre - reach_px, 0)), int(min(centre + reach_px, size))
        parts.append(slice(low, max(high, low)))
        axes.append(np.arange(low, max(high, low), dtype=np.float32) - np.float32(centre))
    return (parts[0], parts[1]), (axes[0][:, None], axes[1][None, :])


def unit_range(field: Field) -> Field:
    """``field`` scaled to [0, 1], float32."""
    low, high = float(field.min()), float(field.max())
    return ((field - low) / max(high - low, 1e-6)).astype(np.float32)
