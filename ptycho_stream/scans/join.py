"""Joins the frames of one scan with its positions, by absolute frame number, in any order.

Used by ingest, one a scan; arrays only, no I/O.  Frames and positions come in whichever order,
again or not at all; a pair is made when both are known, and anew when a position is corrected.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from math import hypot
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.scans.records import (
    PAIR_FLAG_JUMP,
    PAIR_FLAG_OUT_OF_EXTENT,
    PAIR_RECORD,
)

_CHUNK_BITS: Final = 13
_CHUNK: Final = 1 << _CHUNK_BITS
_NAN: Final = float("nan")


@dataclass(frozen=True, slots=True)
class PositionLimits:
    """Where positions stop being believable: distance from the origin, and between neighbours."""

    max_extent_m: float
    max_step_m: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A frame that found its position."""

    y_m: float
    x_m: float
    revision: int
    flags: int


class _Chunk:
    """8192 consecutive frame numbers; arrays for single access and numpy views of them for many."""

    __slots__ = ("flags", "revision", "slot", "slot_view", "x", "x_view", "y", "y_view")

    def __init__(self) -> None:
        self.slot = array("q", [-1]) * _CHUNK
        self.y = array("d", [_NAN]) * _CHUNK
        self.x = array("d", [_NAN]) * _CHUNK
        self.flags = np.zeros(_CHUNK, np.uint32)
        self.revision = np.zeros(_CHUNK, np.uint32)
        self.slot_view: NDArray[np.int64] = np.frombuffer(self.slot, np.int64)
        self.y_view: NDArray[np.float64] = np.frombuffer(self.y, np.float64)
        self.x_view: NDArray[np.float64] = np.frombuffer(self.x, np.float64)


class Join:
    """What is known of a scan's frames and positions.

    Attributes:
        positioned: frames that have a position.
        invalid: positions that are NaN or infinite, or of negative numbers: as if never sent.
        out_of_extent: positions beyond ``max_extent_m``, flagged in their pairs.
        jumps: positions further than ``max_step_m`` from the one before, flagged likewise.
    """

    def __init__(self, limits: PositionLimits) -> None:
        self._limits = limits
        self._chunks: dict[int, _Chunk] = {}
        self._last_yx: tuple[float, float] | None = None
        self._doubted_yx: tuple[float, float] | None = None
        self.positioned = 0
        self.invalid = 0
        self.out_of_extent = 0
        self.jumps = 0

    def frame(self, number: int, slot: int) -> Pair | None:
        """Take a stored frame; its pair, if its position is known."""
        chunk = self._chunk(number >> _CHUNK_BITS)
        at = number & (_CHUNK - 1)
        chunk.slot[at] = slot
        y_m = chunk.y[at]
        if y_m != y_m:  # NaN: no position yet
            return None
        self.positioned += 1
        return Pair(y_m, chunk.x[at], int(chunk.revision[at]), int(chunk.flags[at]))

    def frame_with_position(self, number: int, slot: int, y_m: float, x_m: float) -> Pair | None:
        """Take a stored frame that brought its position; its pair, if the position is finite."""
        if not (abs(y_m) < float("inf") and abs(x_m) < float("inf")):
            self.invalid += 1
            return self.frame(number, slot)
        chunk = self._chunk(number >> _CHUNK_BITS)
        at = number & (_CHUNK - 1)
        chunk.slot[at] = slot
        chunk.y[at], chunk.x[at] = y_m, x_m
        flags = self._flag(y_m, x_m)
        chunk.flags[at] = flags
        self.positioned += 1
        return Pair(y_m, x_m, int(chunk.revision[at]), flags)

    def positions(
        self, numbers: NDArray[np.int64], position_yx_m: NDArray[np.float64], at_ns: int
    ) -> NDArray[np.void]:
        """Take positions and find the frames that waited for them.

        Args:
            numbers: (n,) frame numbers.
            position_yx_m: (n, 2) metres.
            at_ns: monotonic time, for the pairs.

        Returns:
            New or corrected pairs, ``PAIR_RECORD``; positions sent again unchanged make none.
        """
        good = np.isfinite(position_yx_m).all(axis=1) & (numbers >= 0)
        self.invalid += int(numbers.size - np.count_nonzero(good))
        if not good.all():
            numbers, position_yx_m = numbers[good], position_yx_m[good]
        flags = self._flag_batch(position_yx_m)
        # Of a number that is there twice the last counts.
        _, last = np.unique(numbers[::-1], return_index=True)
        if last.size < numbers.size:
            rows = np.sort(numbers.size - 1 - last)
            numbers, position_yx_m, flags = numbers[rows], position_yx_m[rows], flags[rows]
        keys = numbers >> _CHUNK_BITS
        pieces = [np.zeros(0, PAIR_RECORD)]
        for key in np.unique(keys).tolist():
            rows = np.flatnonzero(keys == key)
            pieces.append(self._place(key, numbers[rows], position_yx_m[rows], flags[rows]))
        pairs = np.concatenate(pieces)
        pairs["paired_monotonic_ns"] = at_ns
        return pairs

    def restore(
        self, frames: NDArray[np.void], positions: NDArray[np.void], pairs: NDArray[np.void]
    ) -> NDArray[np.void]:
        """Rebuild from the logs of a recovered scan, in a new instance.

        Returns:
            Pairs that were not written any more before the scan's writer died.
        """
        for number, slot in zip(frames["number"].tolist(), frames["slot"].tolist(), strict=True):
            self._chunk(number >> _CHUNK_BITS).slot[number & (_CHUNK - 1)] = slot
        for pair in pairs:
            number = int(pair["number"])
            chunk, at = self._chunk(number >> _CHUNK_BITS), number & (_CHUNK - 1)
            self.positioned += chunk.y[at] != chunk.y[at]
            chunk.y[at], chunk.x[at] = float(pair["y_m"]), float(pair["x_m"])
            chunk.flags[at], chunk.revision[at] = pair["flags"], pair["revision"]
        known = np.stack([positions["y_m"], positions["x_m"]], axis=1)
        return self.positions(positions["number"].astype(np.int64), known, 0)

    def _place(
        self,
        key: int,
        numbers: NDArray[np.int64],
        position_yx_m: NDArray[np.float64],
        flags: NDArray[np.uint32],
    ) -> NDArray[np.void]:
        chunk = self._chunk(key)
        at = numbers & (_CHUNK - 1)
        y_m, x_m = position_yx_m[:, 0], position_yx_m[:, 1]
        changed = (chunk.y_view[at] != y_m) | (chunk.x_view[at] != x_m)
        at, y_m, x_m, flags = at[changed], y_m[changed], x_m[changed], flags[changed]
        known = ~np.isnan(chunk.y_view[at])
        chunk.revision[at] += known
        chunk.y_view[at], chunk.x_view[at], chunk.flags[at] = y_m, x_m, flags
        stored = chunk.slot_view[at] >= 0
        self.positioned += int(np.count_nonzero(stored & ~known))
        pairs = np.zeros(int(np.count_nonzero(stored)), PAIR_RECORD)
        pairs["number"] = numbers[changed][stored]
        pairs["slot"] = chunk.slot_view[at[stored]]
        pairs["revision"] = chunk.revision[at[stored]]
        pairs["y_m"], pairs["x_m"] = y_m[stored], x_m[stored]
        pairs["flags"] = flags[stored]
        return pairs

    def _flag_batch(self, position_yx_m: NDArray[np.float64]) -> NDArray[np.uint32]:
        """Flags (n,) of positions (n, 2); one by one only where something is wrong."""
        flags = np.zeros(len(position_yx_m), np.uint32)
        if not len(position_yx_m):
            return flags
        first = position_yx_m[0] if self._last_yx is None else np.asarray(self._last_yx)
        steps = np.diff(position_yx_m, axis=0, prepend=first[None])
        far = np.hypot(steps[:, 0], steps[:, 1]).max() > self._limits.max_step_m
        if not far and np.abs(position_yx_m).max() <= self._limits.max_extent_m:
            self._last_yx = (float(position_yx_m[-1, 0]), float(position_yx_m[-1, 1]))
            return flags
        flags[:] = [self._flag(y_m, x_m) for y_m, x_m in position_yx_m.tolist()]
        return flags

    def _flag(self, y_m: float, x_m: float) -> int:
        """Flags of the next position.  An outlier is flagged once, not its successor too; two
        in a row that agree with each other are a move that is meant.
        """
        flags = 0
        if max(abs(y_m), abs(x_m)) > self._limits.max_extent_m:
            flags = PAIR_FLAG_OUT_OF_EXTENT
            self.out_of_extent += 1
        if self._is_step(self._last_yx, y_m, x_m) or (
            self._doubted_yx is not None and self._is_step(self._doubted_yx, y_m, x_m)
        ):
            if not flags:
                self._last_yx, self._doubted_yx = (y_m, x_m), None
            return flags
        self._doubted_yx = (y_m, x_m)
        self.jumps += 1
        return flags | PAIR_FLAG_JUMP

    def _is_step(self, from_yx: tuple[float, float] | None, y_m: float, x_m: float) -> bool:
        if from_yx is None:
            return True
        return hypot(y_m - from_yx[0], x_m - from_yx[1]) <= self._limits.max_step_m

    def _chunk(self, key: int) -> _Chunk:
        chunk = self._chunks.get(key)
        if chunk is None:
            chunk = self._chunks[key] = _Chunk()
        return chunk
