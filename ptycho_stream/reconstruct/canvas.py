"""The growing image: tiles on the world's pixel grid that collect probe-weighted patches.

A canvas only ever adds, so neither the order of patches nor their batching changes it beyond
rounding, and canvases of several workers can be added.  Used by the generations of a scan's image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.reconstruct.frame_hash import frame_hash

TileIndex = tuple[int, int]

MIN_WEIGHT = 1e-3
"""Below this sum of weights (1 = one frame at the probe's peak) a pixel counts as never seen."""


@dataclass(slots=True)
class CanvasTile:
    """Sums of one tile, for each of the two halves of the frames.

    ``numerator`` complex64 (2, T, T) is the sum of weight * patch, ``denominator`` float32
    (2, T, T) the sum of weights; ``version`` grows with every change.
    """

    numerator: NDArray[np.complex64]
    denominator: NDArray[np.float32]
    version: int = 0


def half_of(frame_numbers: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Which half-canvas (0 or 1) frames belong to: a hash of the number, so that it never changes.

    Even and odd numbers would put neighbouring scan rows into different halves; the hash
    spreads both over the whole sample.
    """
    return (frame_hash(frame_numbers, 0) & np.uint64(1)).astype(np.int64)


class Canvas:
    """Tiles of ``tile_px`` squared, allocated where patches arrive.

    Tile (ty, tx) covers canvas pixels [ty T, (ty + 1) T) x [tx T, (tx + 1) T); indices may be
    negative.  The centre of canvas pixel (0, 0) is the world's origin.
    """

    def __init__(self, tile_px: int) -> None:
        self.tile_px = tile_px
        self.tiles: dict[TileIndex, CanvasTile] = {}

    def add(
        self,
        patches: NDArray[np.complex64],
        weights: NDArray[np.float32],
        corner_yx_px: NDArray[np.int64],
        half: NDArray[np.int64],
    ) -> None:
        """Add patches (B, N, N) with weights (B, N, N) at canvas pixels ``corner_yx_px`` (B, 2).

        ``half`` (B,) names the half-canvas of each.
        """
        weighted = patches * weights
        size = patches.shape[-1]
        for index in range(len(patches)):
            self._add_one(
                weighted[index],
                weights[index],
                (int(corner_yx_px[index, 0]), int(corner_yx_px[index, 1])),
                int(half[index]),
                size,
            )

    def _add_one(
        self,
        weighted: NDArray[np.complex64],
        weight: NDArray[np.float32],
        corner: TileIndex,
        half: int,
        size: int,
    ) -> None:
        t = self.tile_px
        top, left = corner
        for ty in range(top // t, (top + size - 1) // t + 1):
            y0, y1 = max(top, ty * t), min(top + size, (ty + 1) * t)
            rows, from_rows = slice(y0 - ty * t, y1 - ty * t), slice(y0 - top, y1 - top)
            for tx in range(left // t, (left + size - 1) // t + 1):
                x0, x1 = max(left, tx * t), min(left + size, (tx + 1) * t)
                columns, from_columns = (
                    slice(x0 - tx * t, x1 - tx * t),
                    slice(x0 - left, x1 - left),
                )
                tile = self._tile((ty, tx))
                tile.numerator[half, rows, columns] += weighted[from_rows, from_columns]
                tile.denominator[half, rows, columns] += weight[from_rows, from_columns]
                tile.version += 1

    def _tile(self, index: TileIndex) -> CanvasTile:
        tile = self.tiles.get(index)
        if tile is None:
            shape = (2, self.tile_px, self.tile_px)
            tile = CanvasTile(np.zeros(shape, np.complex64), np.zeros(shape, np.float32))
            self.tiles[index] = tile
        return tile

    def object_tile(self, index: TileIndex) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
        """Object complex64 (T, T), NaN where never seen, and weight float32 (T, T) of one tile."""
        tile = self.tiles[index]
        return divide(tile.numerator.sum(0), tile.denominator.sum(0))

    def state(self) -> dict[str, NDArray[Any]]:
        """All sums as arrays, for saving; :meth:`from_state` is the way back."""
        indices = sorted(self.tiles)
        t = self.tile_px
        shape = (len(indices), 2, t, t)
        numerator, denominator = np.empty(shape, np.complex64), np.empty(shape, np.float32)
        for row, index in enumerate(indices):
            numerator[row] = self.tiles[index].numerator
            denominator[row] = self.tiles[index].denominator
        return {
            "tile_index_yx": np.array(indices, np.int64).reshape(-1, 2),
            "tile_version": np.array([self.tiles[i].version for i in indices], np.int64),
            "numerator": numerator,
            "denominator": denominator,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray[Any]], tile_px: int) -> Canvas:
        """The canvas whose :meth:`state` this is."""
        canvas = cls(tile_px)
        rows: Iterable[Any] = zip(
            state["tile_index_yx"].tolist(),
            state["tile_version"].tolist(),
            state["numerator"],
            state["denominator"],
            strict=True,
        )
        for (ty, tx), version, numerator, denominator in rows:
            canvas.tiles[ty, tx] = CanvasTile(numerator.copy(), denominator.copy(), version)
        return canvas


def divide(
    numerator: NDArray[np.complex64], denominator: NDArray[np.float32]
) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    """The quotient where there is weight enough, NaN elsewhere; and the weight, 0 elsewhere."""
    seen = denominator >= MIN_WEIGHT
    result = np.full(numerator.shape, complex(np.nan, np.nan), np.complex64)
    np.divide(numerator, denominator, out=result, where=seen)
    return result, np.where(seen, denominator, np.float32(0))
