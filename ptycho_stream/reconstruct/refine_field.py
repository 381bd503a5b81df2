"""The object that refinement works on: arrays on the canvas' pixel grid that grow with the scan.

World coordinates are never re-anchored: growing pads the arrays and moves their corner, which is a
canvas pixel. Only :class:`~ptycho_stream.reconstruct.refine.Refiner` uses this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import GeometryError
from ptycho_stream.reconstruct.refine_gauge import Drift

_GRAIN_PX = 64
"""Edges grow by whole multiples of this."""

_SPARE = 0.25
"""Edges grow by at least this share of the length, so that copying stays a small cost."""

_MEAN_SPAN = 6.0
"""Light over which the object's mean is taken, 1 = a visit of a frame at the probe's peak; at most
half of what all frames gave. After two sweeps from the network's image of a siemens star the error
is an eighth less by it; from a flat start that is far from converged it is a twentieth more."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the frames of a batch lie in the arrays.

    ``corners`` are rows and columns of the windows' [0, 0]; ``index`` int64 (B, N, N) of the flat
    arrays is there on a GPU only. Slices are four times faster than indices on a CPU, and one
    kernel a frame too many on a GPU.
    """

    corners: list[tuple[int, int]]
    size_px: int
    index: Tensor | None

    def gather(self, array: Tensor) -> Tensor:
        """Copy the windows of a (H, W) array: (B, N, N)."""
        if self.index is not None:
            return array.view(-1)[self.index]
        n = self.size_px
        return torch.stack([array[y : y + n, x : x + n] for y, x in self.corners])

    def add(self, array: Tensor, values: Tensor) -> None:
        """Add ``values`` (B|1, N, N) to the windows; they sum where windows overlap."""
        n = self.size_px
        if self.index is not None:
            flat = values.expand(len(self.corners), n, n).reshape(-1)
            array.view(-1).index_add_(0, self.index.view(-1), flat)
            return
        shared = len(values) == 1
        for number, (y, x) in enumerate(self.corners):
            array[y : y + n, x : x + n] += values[0 if shared else number]

    def put(self, array: Tensor, values: Tensor) -> None:
        """Overwrite the windows with ``values`` (B, N, N), equal where windows overlap."""
        if self.index is not None:
            array.view(-1)[self.index] = values
            return
        n = self.size_px
        for number, (y, x) in enumerate(self.corners):
            array[y : y + n, x : x + n] = values[number]

    def clear(self, array: Tensor) -> None:
        """Make the windows zero."""
        if self.index is not None:
            array.view(-1)[self.index] = 0
            return
        n = self.size_px
        for y, x in self.corners:
            array[y : y + n, x : x + n] = 0


class ObjectField:
    """Object, its mean, momentum, illumination and scratch sums, all (H, W).

    Attributes:
        corner_yx_px: canvas pixel of [0, 0].
        object: complex64, ``background`` where nothing is known.
        mean: complex64, of the last values of ``object``, which steps leave noisy: what is shown.
        velocity: complex64, the last step at each pixel.
        weight: float32, illumination by the frames that were visited, 1 = one frame at the
            probe's peak.
        anchor: complex64, the image that holds the gauge; 0 where there is none.
        background: of modulus 1: 1, or with the phase of the first image that was given.
        numerator: complex64, zero between steps.
        denominator: float32, zero between steps.
    """

    def __init__(self, device: torch.device, max_px: int) -> None:
        self._device, self._max_px = device, max_px
        self._anchored = False
        self.background = complex(1)
        self.corner_yx_px = (0, 0)
        self.object = self._made(0, 0, torch.complex64)
        self.mean = self._made(0, 0, torch.complex64)
        self.velocity = self._made(0, 0, torch.complex64)
        self.weight = self._made(0, 0, torch.float32)
        self.anchor = self._made(0, 0, torch.complex64)
        self.numerator = self._made(0, 0, torch.complex64)
        self.denominator = self._made(0, 0, torch.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.object.shape[0], self.object.shape[1]

    def cover(self, low_yx_px: NDArray[np.int64], high_yx_px: NDArray[np.int64]) -> None:
        """Grow until canvas pixels from ``low`` up to, but without, ``high`` are inside.

        Raises:
            GeometryError: the array would be larger than allowed.
        """
        corner, shape = np.array(self.corner_yx_px), np.array(self.shape)
        low, high = low_yx_px, high_yx_px
        if shape.all():
            if (low >= corner).all() and (high <= corner + shape).all():
                return
            spare = (shape * _SPARE).astype(np.int64)
            low = np.where(low < corner, np.minimum(low, corner - spare), corner)
            high = np.where(high > corner + shape, np.maximum(high, corner + shape + spare), high)
            high = np.maximum(high, corner + shape)
        low = low // _GRAIN_PX * _GRAIN_PX
        high = -(-high // _GRAIN_PX) * _GRAIN_PX
        rows, columns = (int(v) for v in high - low)
        if rows * columns > self._max_px:
            raise GeometryError(
                f"the positions span {rows} x {columns} pixels, more than refine.max_object_px = "
                f"{self._max_px}: leave out stray positions, or raise it if memory allows"
            )
        top, left = (int(v) for v in corner - low) if shape.all() else (0, 0)
        self._move(rows, columns, top, left)
        self.corner_yx_px = int(low[0]), int(low[1])

    def windows(self, corner_yx_px: NDArray[np.int64], size_px: int) -> Windows:
        """Windows whose [0, 0] are canvas pixels ``corner_yx_px`` (B, 2); they must be inside."""
        local = corner_yx_px - np.array(self.corner_yx_px)
        corners = cast("list[tuple[int, int]]", [tuple(row) for row in local.tolist()])
        if self._device.type == "cpu":
            return Windows(corners, size_px, None)
        grid = np.arange(size_px)
        rows = local[:, 0, None, None] + grid[:, None]
        index = rows * self.shape[1] + (local[:, 1, None, None] + grid)
        return Windows(corners, size_px, torch.as_tensor(index).to(self._device))

    def start_from(
        self,
        object_yx: NDArray[np.complex64],
        corner_yx_px: tuple[int, int],
        drift: Drift | None,
        below: float,
    ) -> None:
        """Take an image (NaN where unseen) as the gauge, and as the object where it is dark.

        If it comes before all frames it gives its mean phase to what is not known, lest a wall of
        phase surround it, into which the next frames would run.

        Args:
            object_yx: complex (H, W).
            corner_yx_px: canvas pixel of [0, 0].
            drift: of the object against the gauge, if that is known.
            below: a pixel that got less light than this is dark.
        """
        low = np.array(corner_yx_px, np.int64)
        self.cover(low, low + np.array(object_yx.shape))
        top, left = (int(v) for v in low - np.array(self.corner_yx_px))
        height, width = object_yx.shape
        box = slice(top, top + height), slice(left, left + width)
        image = torch.as_tensor(np.ascontiguousarray(object_yx, np.complex64)).to(self._device)
        known = torch.isfinite(image.real) & torch.isfinite(image.imag)
        self.anchor[box] = torch.where(known, image, self.anchor[box])
        if not self._anchored and bool(known.any()):
            self._anchored = True
            if not bool((self.weight > 0).any()):
                self.background = self._anchor_phase()
                self.object.fill_(self.background)
                self.mean.fill_(self.background)
        fresh = known & (self.weight[box] < below)
        if drift is not None:
            image = drift.turned(image, corner_yx_px, 1)
        self.object[box] = torch.where(fresh, image, self.object[box])
        self.mean[box] = torch.where(fresh, image, self.mean[box])
        self.velocity[box].masked_fill_(fresh, 0)

    def put(self, windows: Windows, values: Tensor, light: Tensor) -> None:
        """Give the object new values, and take them into its mean.

        Args:
            windows: of a batch.
            values: complex (B, N, N), equal where windows overlap.
            light: real (B, N, N), by which the batch lit each pixel, 1 = a frame at the probe's
                peak; equal where windows overlap.
        """
        windows.put(self.object, values)
        # Not all that a pixel ever was: at first it is far from what it will be.
        span = windows.gather(self.weight).mul_(0.5).clamp_max_(_MEAN_SPAN)
        share = light / torch.maximum(span, light).clamp_min_(1e-20)
        mean = windows.gather(self.mean)
        windows.put(self.mean, mean.add_(share * (values - mean)))

    @property
    def anchored(self) -> bool:
        """Whether an image was given that holds the gauge."""
        return self._anchored

    def restore(
        self,
        obj: NDArray[np.complex64],
        mean: NDArray[np.complex64],
        anchor: NDArray[np.complex64],
        weight: NDArray[np.float32],
        corner_yx_px: NDArray[np.int64],
    ) -> None:
        """Take over arrays (H, W) that were saved; the momentum starts from rest."""
        self.cover(corner_yx_px, corner_yx_px + np.array(obj.shape))
        top, left = (int(v) for v in corner_yx_px - np.array(self.corner_yx_px))
        box = slice(top, top + obj.shape[0]), slice(left, left + obj.shape[1])
        self.object[box] = torch.as_tensor(obj).to(self._device)
        self.mean[box] = torch.as_tensor(mean).to(self._device)
        self.anchor[box] = torch.as_tensor(anchor).to(self._device)
        self.weight[box] = torch.as_tensor(weight).to(self._device)
        self._anchored = bool(anchor.any())
        if self._anchored:
            self.background = self._anchor_phase()

    def _anchor_phase(self) -> complex:
        return complex(np.exp(1j * float(self.anchor.sum().angle())))

    def _move(self, rows: int, columns: int, top: int, left: int) -> None:
        height, width = self.shape
        names = ("object", "mean", "velocity", "weight", "anchor", "numerator", "denominator")
        for name in names:
            old = cast("Tensor", getattr(self, name))
            new = self._made(rows, columns, old.dtype)
            if name in ("object", "mean"):
                new.fill_(self.background)
            new[top : top + height, left : left + width] = old
            setattr(self, name, new)

    def _made(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((rows, columns), dtype=dtype, device=self._device)
