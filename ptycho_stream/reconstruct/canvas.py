"""The growing image: tiles on the world's pixel grid that collect probe-weighted patches.

A canvas only ever adds, so neither the order of patches nor their batching changes it beyond
rounding, and canvases of several workers can be added.  Used by the generations of a scan's image.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.reconstruct.frame_hash import frame_hash

TileIndex = tuple[int, int]
Values = NDArray[Any] | Tensor
"""Numbers in the host's memory or on a device."""
Whole = NDArray[np.int64]

MIN_WEIGHT = 1e-3
"""Below this sum of weights (1 = one frame at the probe's peak) a pixel counts as never seen."""


_BLOCK_PX = 1024
"""Tiles that lie together share arrays of about this side, so that few patches are cut."""


class TileSums(NamedTuple):
    """Sums of one tile, for each of the two halves of the frames.

    ``numerator`` complex64 (2, T, T) is the sum of weight * patch, ``denominator`` float32
    (2, T, T) the sum of weights.
    """

    numerator: NDArray[np.complex64]
    denominator: NDArray[np.float32]


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

    Attributes:
        versions: of each tile that there is; grows with every change.
    """

    def __init__(self, tile_px: int) -> None:
        self.tile_px = tile_px
        self.versions: dict[TileIndex, int] = {}
        self._tiles: dict[TileIndex, TileSums] = {}
        self._block_tiles = max(1, _BLOCK_PX // tile_px)
        self._blocks: dict[TileIndex, _Block] = {}

    def add(
        self,
        patches: Values,
        weights: Values,
        corner_yx_px: Whole,
        half: Whole,
    ) -> None:
        """Add patches to the canvas, wherever they lie in memory.

        Args:
            patches: complex64 (B, N, N).
            weights: float32 (B, N, N).
            corner_yx_px: (B, 2), the canvas pixel of each patch's [0, 0].
            half: (B,), 0 or 1, the half-canvas of each.
        """
        if len(patches):
            self._touch(corner_yx_px, patches.shape[-1])
            self._sum_up(patches, weights, corner_yx_px, half)

    def _sum_up(self, patches: Values, weights: Values, corner_yx_px: Whole, half: Whole) -> None:
        """Add patches to tiles, all of which there are."""
        patches, weights = _on_host(patches), _on_host(weights)
        weighted = patches * weights
        size, side = patches.shape[-1], self._block_tiles * self.tile_px
        block_yx, at_yx = np.divmod(corner_yx_px, side)
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
                self._change(index, count)

    def _change(self, index: TileIndex, count: int) -> None:
        """Count changes of a tile, and make it where there is none."""
        if index not in self.versions:
            self._make_tile(index)
        self.versions[index] = self.versions.get(index, 0) + count

    def _make_tile(self, index: TileIndex) -> None:
        count, t = self._block_tiles, self.tile_px
        (by, y), (bx, x) = divmod(index[0], count), divmod(index[1], count)
        block = self._blocks.get((by, bx))
        if block is None:
            shape = (2, count * t, count * t)
            block = _Block(_untouched(shape, np.complex64), _untouched(shape, np.float32))
            self._blocks[by, bx] = block
        part = (slice(None), slice(y * t, (y + 1) * t), slice(x * t, (x + 1) * t))
        self._tiles[index] = TileSums(block.numerator[part], block.denominator[part])

    def sums(self, index: TileIndex) -> TileSums:
        """The sums of a tile as they are now; to be read only."""
        return self._tiles[index]

    def _add_sums(self, index: TileIndex, sums: TileSums) -> None:
        """Add to the sums of a tile that there is."""
        numerator, denominator = self._tiles[index]
        numerator += sums.numerator
        denominator += sums.denominator

    def merge(self, other: Canvas) -> None:
        """Add all sums of ``other``, a canvas with tiles of the same size."""
        for index, version in other.versions.items():
            self._change(index, version)
            self._add_sums(index, other.sums(index))

    def object_tile(self, index: TileIndex) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
        """Object complex64 (T, T), NaN where never seen, and weight float32 (T, T) of one tile."""
        numerator, denominator = self.sums(index)
        return divide(numerator.sum(0), denominator.sum(0))

    def state(self) -> dict[str, NDArray[Any]]:
        """All sums as arrays, for saving; :meth:`restore` is the way back."""
        indices = sorted(self.versions)
        t = self.tile_px
        shape = (len(indices), 2, t, t)
        numerator, denominator = np.empty(shape, np.complex64), np.empty(shape, np.float32)
        for row, index in enumerate(indices):
            numerator[row], denominator[row] = self.sums(index)
        return {
            "tile_index_yx": np.array(indices, np.int64).reshape(-1, 2),
            "tile_version": np.array([self.versions[i] for i in indices], np.int64),
            "numerator": numerator,
            "denominator": denominator,
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add to an empty canvas what :meth:`state` told of another one."""
        rows: Iterable[Any] = zip(
            state["tile_index_yx"].tolist(),
            state["tile_version"].tolist(),
            state["numerator"],
            state["denominator"],
            strict=True,
        )
        for (ty, tx), version, numerator, denominator in rows:
            self._change((ty, tx), version)
            self._add_sums((ty, tx), TileSums(numerator, denominator))


def _on_host(values: Values) -> NDArray[Any]:
    return values.numpy(force=True) if isinstance(values, Tensor) else values


def _untouched(shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    """Zeros that take memory only where they are written, and give it back when they are gone.

    ``np.zeros`` takes them from the heap, whole, once an array of their size has been freed. Pages
    of 2 MB, where the system has them, save a tenth of the time that a small patch takes.
    """
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    held = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not on every system, nor in every kernel
        held.madvise(mmap.MADV_HUGEPAGE)
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
