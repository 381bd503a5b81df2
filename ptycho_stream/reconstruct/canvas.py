"""The growing image: tiles on the world's pixel grid that collect probe-weighted patches.

A canvas only ever adds, so neither the order of patches nor their batching changes it beyond
rounding, and canvases of several workers can be added.  Used by the generations of a scan's image.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.reconstruct.frame_hash import frame_hash

TileIndex = tuple[int, int]

MIN_WEIGHT = 1e-3
"""Below this sum of weights (1 = one frame at the probe's peak) a pixel counts as never seen."""


_BLOCK_PX = 1024
"""Tiles that lie together share arrays of about this side, so that few patches are cut."""


@dataclass(slots=True)
class CanvasTile:
    """Sums of one tile, for each of the two halves of the frames.

    ``numerator`` complex64 (2, T, T) is the sum of weight * patch, ``denominator`` float32
    (2, T, T) the sum of weights, both parts of larger arrays; ``version`` grows with every change.
    """

    numerator: NDArray[np.complex64]
    denominator: NDArray[np.float32]
    version: int = 0


class _Block(NamedTuple):
    """Sums over a square of S tiles' sides: (2, S, S), pages of which are touched when needed."""

    numerator: NDArray[np.complex64]
    denominator: NDArray[np.float32]


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
        self._block_tiles = max(1, _BLOCK_PX // tile_px)
        self._blocks: dict[TileIndex, _Block] = {}

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
        if not len(patches):
            return
        weighted = patches * weights
        size, side = patches.shape[-1], self._block_tiles * self.tile_px
        block_yx, at_yx = np.divmod(corner_yx_px, side)
        self._touch(corner_yx_px, size)
        places = zip(block_yx.tolist(), at_yx.tolist(), half.tolist(), strict=True)
        for ((by, bx), (y, x), h), patch, weight in zip(places, weighted, weights, strict=True):
            if y + size <= side and x + size <= side:
                numerator, denominator = self._blocks[by, bx]
                under = numerator[h, y : y + size, x : x + size]
                under += patch
                under = denominator[h, y : y + size, x : x + size]
                under += weight
            else:
                self._add_in_pieces(patch, weight, (by, bx), (y, x), h)

    def _add_in_pieces(
        self,
        weighted: NDArray[np.complex64],
        weight: NDArray[np.float32],
        block_yx: TileIndex,
        at_yx: tuple[int, int],
        half: int,
    ) -> None:
        """Add a patch that reaches over the border of its block."""
        size, side = len(weight), self._block_tiles * self.tile_px
        for rows, from_rows, down in _pieces(at_yx[0], size, side):
            for columns, from_columns, across in _pieces(at_yx[1], size, side):
                block = self._blocks[block_yx[0] + down, block_yx[1] + across]
                block.numerator[half, rows, columns] += weighted[from_rows, from_columns]
                block.denominator[half, rows, columns] += weight[from_rows, from_columns]

    def _touch(self, corner_yx_px: NDArray[np.int64], size: int) -> None:
        """Make the tiles under patches where there are none, and count a change of each."""
        first, last = (at // self.tile_px for at in (corner_yx_px, corner_yx_px + (size - 1)))
        changes: dict[tuple[int, int, int, int], int] = {}
        for ends in np.concatenate([first, last], 1).tolist():
            ends = tuple(ends)
            changes[ends] = changes.get(ends, 0) + 1
        for (ty, tx, to_ty, to_tx), count in changes.items():
            for index in product(range(ty, to_ty + 1), range(tx, to_tx + 1)):
                tile = self.tiles.get(index)
                if tile is None:
                    tile = self.tiles[index] = self._new_tile(index)
                tile.version += count

    def _new_tile(self, index: TileIndex) -> CanvasTile:
        count, t = self._block_tiles, self.tile_px
        (by, y), (bx, x) = divmod(index[0], count), divmod(index[1], count)
        block = self._blocks.get((by, bx))
        if block is None:
            shape = (2, count * t, count * t)
            block = _Block(_untouched(shape, np.complex64), _untouched(shape, np.float32))
            self._blocks[by, bx] = block
        part = (slice(None), slice(y * t, (y + 1) * t), slice(x * t, (x + 1) * t))
        return CanvasTile(block.numerator[part], block.denominator[part])

    def merge(self, other: Canvas) -> None:
        """Add all sums of ``other``, a canvas with tiles of the same size."""
        for index, theirs in other.tiles.items():
            tile = self.tiles.get(index)
            if tile is None:
                tile = self.tiles[index] = self._new_tile(index)
            tile.numerator += theirs.numerator
            tile.denominator += theirs.denominator
            tile.version += theirs.version

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
            tile = canvas.tiles[ty, tx] = canvas._new_tile((ty, tx))  # pyright: ignore[reportPrivateUsage]
            tile.numerator[...], tile.denominator[...], tile.version = (
                numerator,
                denominator,
                version,
            )
        return canvas


def _untouched(shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    """Zeros that take memory only where they are written, and give it back when they are gone.

    ``np.zeros`` takes them from the heap, whole, once an array of their size has been freed.
    """
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    held = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(held, dtype).reshape(shape)


def divide(
    numerator: NDArray[np.complex64], denominator: NDArray[np.float32]
) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    """The quotient where there is weight enough, NaN elsewhere; and the weight, 0 elsewhere."""
    seen = denominator >= MIN_WEIGHT
    result = np.full(numerator.shape, complex(np.nan, np.nan), np.complex64)
    np.divide(numerator, denominator, out=result, where=seen)
    return result, np.where(seen, denominator, np.float32(0))


def _pieces(at: int, size: int, side: int) -> Iterator[tuple[slice, slice, int]]:
    """How a length from ``at`` on lies in blocks: where there, which part of it, how many on."""
    done = 0
    while done < size:
        block, start = divmod(at + done, side)
        length = min(size - done, side - start)
        yield slice(start, start + length), slice(done, done + length), block
        done += length
