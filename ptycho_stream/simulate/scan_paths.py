"""Scan paths in pixels: where the probe goes, in the order in which it goes there.

Used by the scan simulator and ``ptycho-stream simulate``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.wire.generated_positions import fermat_spiral

Path = NDArray[np.float64]


def jittered_raster(
    rng: np.random.Generator, frames: int, step_px: float, jitter: float = 0.25
) -> Path:
    """A near-square raster, every second row backwards, each point displaced at random.

    The jitter breaks the periodicity that makes pathological rasters (Thibault et al. 2009,
    doi:10.1016/j.ultramic.2008.12.011); without it this is one.

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


def spiral(rng: np.random.Generator, frames: int, step_px: float, jitter: float) -> Path:
    """Fermat's spiral from a random angle, whose points have an area of step_px squared.

    Arguments and result are those of :func:`jittered_raster`.
    """
    points = step_px * fermat_spiral(np.arange(frames), rng.uniform(0, 2 * np.pi))
    return points + step_px * rng.uniform(-jitter, jitter, points.shape)


def fly_lines(rng: np.random.Generator, frames: int, step_px: float, jitter: float) -> Path:
    """Lines flown at constant speed, there and back, with gaps where no frame was taken.

    Each line starts at a phase of its own and drifts sideways by up to ``jitter`` steps; in a third
    of the lines a run of frames, a twentieth to a quarter of the line, is missing. Arguments and
    result are those of :func:`jittered_raster`. The motion within an exposure is not simulated.
    """
    columns = int(np.ceil(np.sqrt(frames)))
    lines: list[Path] = []
    taken = 0
    while taken < frames:
        along = np.arange(columns) + rng.uniform(-0.5, 0.5)
        drift = jitter * np.interp(np.arange(columns), [0, columns], rng.uniform(-1, 1, 2))
        line = np.empty((columns, 2))
        line[:, 0], line[:, 1] = len(lines) + drift, along - (columns - 1) / 2
        if columns > 3 and rng.random() < 1 / 3:
            lost = max(int(columns * rng.uniform(0.05, 0.25)), 1)
            first = int(rng.integers(0, columns - lost + 1))
            line = np.delete(line, slice(first, first + lost), axis=0)
        lines.append(line[::-1] if len(lines) % 2 else line)
        taken += len(line)
    points = np.concatenate(lines)[:frames]
    points[:, 0] -= (len(lines) - 1) / 2
    return step_px * points


@dataclass(frozen=True)
class PathKind:
    """A path by name.

    Attributes:
        draw: takes a generator, the number of frames, the step in pixels and the jitter in steps.
        jitter: what the path is drawn with where nobody says.
    """

    draw: Callable[[np.random.Generator, int, float, float], Path]
    jitter: float


PATH_KINDS: Mapping[str, PathKind] = MappingProxyType(
    {
        "raster": PathKind(jittered_raster, 0.0),
        "jittered-raster": PathKind(jittered_raster, 0.25),
        "spiral": PathKind(spiral, 0.0),
        "fly": PathKind(fly_lines, 0.25),
    }
)
"""Every path by name."""
