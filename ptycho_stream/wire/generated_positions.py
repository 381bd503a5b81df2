"""Positions of a path that is known beforehand, for frames by their absolute number.

Used by ingest where ``positions.source = "generated"``; the spiral is also the simulator's.  No
table is made: a scan may have any number of frames.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.settings import GeneratedSettings

GOLDEN_ANGLE: Final = float(np.pi * (3 - 5**0.5))
_BLOCK: Final = 1024
_MAX_BLOCKS: Final = 8


def fermat_spiral(number: NDArray[np.int64], angle: float = 0.0) -> NDArray[np.float64]:
    """Fermat's spiral from the centre outwards: even density without any period.

    Point n lies at radius c sqrt(n) and turns by the golden angle (Huang et al. 2014,
    doi:10.1364/OE.22.012634); c makes the area of a point 1.

    Args:
        number: (n,) of points, from 0.
        angle: radians by which it is turned.

    Returns:
        float64 (n, 2), y and x.
    """
    turned = number * GOLDEN_ANGLE + angle
    return np.sqrt(number / np.pi)[:, None] * np.stack([np.sin(turned), np.cos(turned)], axis=1)


def path_yx_m(path: GeneratedSettings, frames: NDArray[np.int64]) -> NDArray[np.float64]:
    """Where frames are taken.

    Args:
        path: its kind and size.
        frames: (n,) absolute numbers.

    Returns:
        float64 (n, 2) metres in the stage's frame; NaN beyond the end of the path.
    """
    point = frames // path.frames_per_point
    if path.kind == "spiral":
        where = fermat_spiral(point) * path.step_yx_m
        beyond = np.zeros(len(point), np.bool_)
        if path.radius_m is not None:
            beyond = np.hypot(where[:, 0], where[:, 1]) > path.radius_m
    else:
        where, beyond = _grid(path, point)
    angle = np.deg2rad(path.angle_deg)
    y, x = where[:, 0], where[:, 1]
    turned = np.stack(
        [y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)], axis=1
    )
    turned[beyond] = np.nan
    return turned + np.asarray(path.origin_yx_m)


def _grid(
    path: GeneratedSettings, point: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Points (n, 2) of a raster or snake about its first one, and which are beyond its last."""
    assert path.shape_yx is not None
    fast = 1 if path.fast_axis == "x" else 0
    length = path.shape_yx[fast]
    slow, along = np.divmod(point, length)
    if path.kind == "snake":
        along = np.where(slow % 2 == 1, length - 1 - along, along)
    steps = np.stack([slow, along] if fast == 1 else [along, slow], axis=1)
    return steps * np.asarray(path.step_yx_m), point >= path.shape_yx[0] * path.shape_yx[1]


class GeneratedPositions:
    """Positions of a path, one frame at a time.

    Frames come nearly in order, so a block of their neighbours is made at once; a few blocks are
    kept.
    """

    def __init__(self, path: GeneratedSettings) -> None:
        self._path = path
        self._blocks: dict[int, list[list[float]]] = {}

    def of(self, frame: int) -> tuple[float, float] | None:
        """Position (y, x) of a frame in metres; None beyond the end of the path."""
        index, at = divmod(frame, _BLOCK)
        block = self._blocks.get(index)
        if block is None:
            numbers = np.arange(index * _BLOCK, (index + 1) * _BLOCK)
            block = self._blocks[index] = path_yx_m(self._path, numbers).tolist()
            if len(self._blocks) > _MAX_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
        y_m, x_m = block[at]
        return None if y_m != y_m else (y_m, x_m)
