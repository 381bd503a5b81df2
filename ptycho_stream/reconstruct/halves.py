"""The two half-images of a scan: cut from its canvas, and refined on their own frames.

The correlation of the two tells the resolution. Both are made for a bounded region, the best
covered one, so the cost does not grow with the scan. Used by the watch over a scan's image.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import MIN_WEIGHT, Canvas, TileIndex, divide
from ptycho_stream.reconstruct.refine import Refiner
from ptycho_stream.reconstruct.refine_settings import RefineSettings
from ptycho_stream.reconstruct.resolution import HalfImages

MAX_SIDE_PX = 512
"""Of the region that is compared."""

SWEEPS = 6
"""Visits of each frame after which the halves have little of the network's in common any more; 12
change the resolution by less than the noise of its rings (docs/trust.md)."""

HALF_FRAMES = 64
"""Of each half, at most."""


class CanvasHalves:
    """Cuts the half-images of the best covered region out of a canvas, again and again.

    Only tiles that have changed are looked at.
    """

    def __init__(self, canvas: Canvas, max_side_px: int = MAX_SIDE_PX) -> None:
        self.canvas = canvas
        self._side = max(1, max_side_px // canvas.tile_px)
        self._common: dict[TileIndex, tuple[int, int]] = {}

    def images(self) -> HalfImages | None:
        """The half-images of the region as they are now; None where they have nothing in common."""
        corner = self._best()
        if corner is None:
            return None
        t, side = self.canvas.tile_px, self._side * self.canvas.tile_px
        numerator = np.zeros((2, side, side), np.complex64)
        denominator = np.zeros((2, side, side), np.float32)
        for row in range(self._side):
            for column in range(self._side):
                index = corner[0] + row, corner[1] + column
                if index in self.canvas.versions:
                    place = (
                        slice(None),
                        slice(row * t, (row + 1) * t),
                        slice(column * t, (column + 1) * t),
                    )
                    numerator[place], denominator[place] = self.canvas.sums(index)
        object_yx, weight_yx = divide(numerator, denominator)
        return HalfImages(object_yx, weight_yx, (corner[0] * t, corner[1] * t))

    def _best(self) -> TileIndex | None:
        """First tile of the square of tiles with the most pixels that both halves have seen."""
        for index, version in self.canvas.versions.items():
            known = self._common.get(index)
            if known is None or known[0] != version:
                denominator = self.canvas.sums(index).denominator
                both = int(np.count_nonzero((denominator >= MIN_WEIGHT).all(0)))
                self._common[index] = (version, both)
        area: dict[TileIndex, int] = {}
        for (ty, tx), (_, both) in self._common.items():
            for dy in range(self._side):
                for dx in range(self._side):
                    key = (ty - dy, tx - dx)
                    area[key] = area.get(key, 0) + both
        best = max(area, key=lambda key: (area[key], key), default=None)
        return None if best is None or not area[best] else best


def frames_of_halves(
    halves: HalfImages,
    corner_yx_px: NDArray[np.integer[Any]],
    half: NDArray[np.integer[Any]],
    size_px: int,
    limit: int = HALF_FRAMES,
) -> NDArray[np.int64]:
    """Which frames to refine the halves with: the nearest to the middle of what both have seen.

    Args:
        halves: their images.
        corner_yx_px: (n, 2), canvas pixel of each frame's window's [0, 0].
        half: (n,), 0 or 1.
        size_px: N.
        limit: of each half.

    Returns:
        Indices into the frames, only of windows within the images; both halves are as many, so
        that neither is the better one; empty where one has none.
    """
    seen = (halves.weight_yx > 0).all(0)
    if not seen.any():
        return np.empty(0, np.int64)
    relative = corner_yx_px - np.asarray(halves.corner_yx_px)
    inside = ((relative >= 0) & (relative + size_px <= np.asarray(seen.shape))).all(1)
    middle = np.argwhere(seen).mean(0) - (size_px - 1) / 2
    distance = np.where(inside, np.hypot(*(relative - middle).T), np.inf)
    nearest = [np.flatnonzero((half == k) & inside) for k in (0, 1)]
    nearest = [part[np.argsort(distance[part], kind="stable")] for part in nearest]
    count = min(limit, *(len(part) for part in nearest))
    return np.concatenate([part[:count] for part in nearest]).astype(np.int64)


def refining_halves(
    halves: HalfImages,
    counts: NDArray[Any],
    position_yx_px: NDArray[np.floating[Any]],
    half: NDArray[np.integer[Any]],
    probe: Probe,
    valid: NDArray[np.bool_] | None = None,
    *,
    sweeps: float = SWEEPS,
    device: torch.device | str = "cpu",
) -> Generator[None, None, HalfImages]:
    """Refine each half on its own frames, so that the two have no error in common.

    The probe stays as it is. Yields after every step of a few frames, so that the work can be cut
    into slices.

    Args:
        halves: where to begin.
        counts: any real dtype (n, N, N), of the frames of :func:`frames_of_halves`, photons, zero
            frequency at N // 2.
        position_yx_px: (n, 2), of the probe's centre, canvas pixels.
        half: (n,), 0 or 1.
        probe: in photons.
        valid: bool (N, N); None: every pixel is.
        sweeps: visits of each frame.
        device: where to compute.

    Returns:
        Images of the same place, NaN where no usable frame has been.
    """
    settings = RefineSettings(modes=len(probe.modes), probe_step=0.0)
    objects = np.full(halves.object_yx.shape, complex(np.nan, np.nan), np.complex64)
    weights = np.zeros(halves.weight_yx.shape, np.float32)
    for k in (0, 1):
        own = np.flatnonzero(half == k)
        refiner = Refiner(counts[own], probe, settings, valid=valid, device=device)
        refiner.start_from(halves.object_yx[k], halves.corner_yx_px)
        refiner.add(np.arange(len(own)), position_yx_px[own])
        while refiner.sweeps < sweeps and refiner.step():
            yield
        image = refiner.image()
        here, there = _common(halves, image.corner_yx_px, image.object_yx.shape)
        objects[k][here], weights[k][here] = image.object_yx[there], image.weight_yx[there]
    return HalfImages(objects, weights, halves.corner_yx_px)


def _common(
    halves: HalfImages, corner_yx_px: tuple[int, int], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the halves' place and another one meet, in the pixels of each."""
    here: list[slice] = []
    there: list[slice] = []
    whole = halves.object_yx.shape[1:]
    for own, other, n, m in zip(halves.corner_yx_px, corner_yx_px, whole, shape, strict=True):
        low, high = max(own, other), max(min(own + n, other + m), own, other)
        here.append(slice(low - own, high - own))
        there.append(slice(low - other, high - other))
    return tuple(here), tuple(there)
