"""Where the frames lie, and how their misfit corrects that.

Moving the probe by d over the object and moving the object by -d under the probe give the same
intensities, so the gradient needs the object's slope only, and no transform. Used by
:class:`~ptycho_stream.reconstruct.refine.Refiner`, also where positions are not corrected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MOST_PX = 0.5
"""Furthest that a position moves in one visit: the slope says nothing about more."""

_SEARCH_PX = 6.0
"""Furthest from the measured position that a search looks; its cost grows as the square."""


def position_steps(patch: Tensor, back: Tensor, power: Tensor) -> Tensor:
    """Least-squares displacement of each frame, pixels.

    With chi = P (dO/dr) d for a small displacement d, d minimises sum over modes and pixels of
    |chi - P (dO/dr) d|^2 (Odstrcil et al. 2018, doi:10.1364/OE.26.003108, sec. 3.4, with both axes
    solved together).

    Args:
        patch: complex (B, N, N), the object under each frame.
        back: complex (B, N, N), sum over modes of conj(P) chi.
        power: real (N, N), sum over modes of |P|^2.

    Returns:
        float32 (B, 2), at most ``_MOST_PX`` long; 0 where the object has no slope.
    """
    slope_y = torch.zeros_like(patch)
    slope_x = torch.zeros_like(patch)
    slope_y[:, 1:-1] = (patch[:, 2:] - patch[:, :-2]) / 2
    slope_x[:, :, 1:-1] = (patch[:, :, 2:] - patch[:, :, :-2]) / 2
    by, bx = (_inner(slope, back) for slope in (slope_y, slope_x))
    yy = _inner(slope_y, slope_y * power)
    xx = _inner(slope_x, slope_x * power)
    yx = _inner(slope_y, slope_x * power)
    # A tenth of the mean keeps directions without slope from blowing up.
    floor = 0.05 * (yy + xx) + 1e-12
    yy, xx = yy + floor, xx + floor
    determinant = yy * xx - yx * yx
    step = torch.stack([xx * by - yx * bx, yy * bx - yx * by], 1) / determinant[:, None]
    length = step.square().sum(1, keepdim=True).sqrt()
    return step * (_MOST_PX / length.clamp_min(_MOST_PX))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).real.sum((1, 2))


class Positions:
    """Where the frames lie: as measured, as corrected, and on the grid.

    Attributes:
        measured_yx_px: float64 (n, 2), the probe's centres in canvas pixels.
        position_yx_px: float64 (n, 2), corrected.
        corner_yx_px: int64 (n, 2), canvas pixel of each window's [0, 0].
        fraction_yx: int64 (n, 2), the rest of the position, in 1 / ``subpixel_steps`` of a pixel.
    """

    def __init__(self, size_px: int, subpixel_steps: int, limit_px: float) -> None:
        self._size_px, self._steps, self._limit_px = size_px, subpixel_steps, limit_px
        self.measured_yx_px: NDArray[np.float64] = np.zeros((0, 2))
        self.position_yx_px: NDArray[np.float64] = np.zeros((0, 2))
        self.corner_yx_px: NDArray[np.int64] = np.zeros((0, 2), np.int64)
        self.fraction_yx: NDArray[np.int64] = np.zeros((0, 2), np.int64)
        self._moved: NDArray[np.bool_] = np.zeros(0, bool)

    def add(self, measured_yx_px: NDArray[np.float64], position_yx_px: NDArray[np.float64]) -> None:
        """Append frames (n, 2)."""
        self.measured_yx_px = np.concatenate([self.measured_yx_px, measured_yx_px])
        self.position_yx_px = np.concatenate([self.position_yx_px, position_yx_px])
        corner, fraction = self.on_grid(position_yx_px)
        self.corner_yx_px = np.concatenate([self.corner_yx_px, corner])
        self.fraction_yx = np.concatenate([self.fraction_yx, fraction])
        moved = (measured_yx_px != position_yx_px).any(1)
        self._moved = np.concatenate([self._moved, moved])

    @property
    def group(self) -> NDArray[np.int64]:
        """(n,), equal for frames of equal fraction."""
        return self.fraction_yx[:, 0] * (4 * self._steps) + self.fraction_yx[:, 1]

    def move(self, indices: NDArray[np.int64], step_yx_px: NDArray[np.floating[Any]]) -> None:
        """Displace frames (k,) by (k, 2), not further than the limit from where they were."""
        wanted = self.position_yx_px[indices] + step_yx_px - self.measured_yx_px[indices]
        self._moved[indices] = True
        self._set(indices, wanted)

    def centre(self) -> None:
        """Take the corrections' common shift away: it moves the object, and nobody can know it."""
        indices = np.flatnonzero(self._moved)
        if len(indices):
            offset = self.position_yx_px[indices] - self.measured_yx_px[indices]
            self._set(indices, offset - offset.mean(0))

    def _set(self, indices: NDArray[np.int64], offset: NDArray[np.float64]) -> None:
        length = np.hypot(offset[:, 0], offset[:, 1])
        shorter = np.minimum(1.0, self._limit_px / np.maximum(length, 1e-30))
        position = self.measured_yx_px[indices] + offset * shorter[:, None]
        self.position_yx_px[indices] = position
        self.corner_yx_px[indices], self.fraction_yx[indices] = self.on_grid(position)

    def around(self, index: int) -> NDArray[np.float64]:
        """Positions (k, 2) on a grid of whole pixels about where a frame was measured."""
        reach = int(min(self._limit_px, _SEARCH_PX))
        grid = np.arange(-reach, reach + 1.0)
        offset = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
        return self.measured_yx_px[index] + offset[np.hypot(*offset.T) <= reach]

    def on_grid(
        self, position_yx_px: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Corners (k, 2) and fractions (k, 2) of positions (k, 2)."""
        top = np.rint((position_yx_px - (self._size_px - 1) / 2) * self._steps)
        corner = np.floor(top / self._steps + 0.5)
        return corner.astype(np.int64), (top - corner * self._steps).astype(np.int64)
