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
    FRAME_FLAG_DARK,
    FRAME_FLAG_SKIP,
    PAIR_FLAG_GATED,
    PAIR_FLAG_JUMP,
    PAIR_FLAG_OUT_OF_EXTENT,
    PAIR_RECORD,
    POSITION_GATE_SKIP,
    positions_of,
)

MAX_WAITING: Final = 2**21
"""Positions that may wait for their frames; a row of the table costs some 150 bytes."""
_FIRST_ROWS: Final = 1024
_OWN: Final = 1
_TOLD_BY_POSITION: Final = 2
"""Who says that a frame is to be left out of the image: bits of the table's ``gate``."""
_TOLD: Final = np.dtype([("i0", np.float64), ("gate", np.uint64)])
_NAN: Final = float("nan")


@dataclass(frozen=True, slots=True)
class PositionLimits:
    """Where positions stop being believable: distance from the origin, and between neighbours."""

    max_extent_m: float
    max_step_m: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A frame that found its position; ``i0`` is 0 where no beam monitor was read."""

    y_m: float
    x_m: float
    revision: int
    flags: int
    i0: float


class _Table:
    """A row for every number that is known; arrays for single access, numpy views for many."""

    __slots__ = (
        "_size",
        "flags",
        "gate",
        "i0",
        "i0s",
        "revision",
        "rows",
        "slot",
        "slots",
        "x",
        "xs",
        "y",
        "ys",
    )

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self._size = 0
        self.slot = array("q")
        self.y = array("d")
        self.x = array("d")
        self.i0 = array("d")
        self.gate: NDArray[np.uint32] = np.zeros(0, np.uint32)
        self.flags: NDArray[np.uint32] = np.zeros(0, np.uint32)
        self.revision: NDArray[np.uint32] = np.zeros(0, np.uint32)
        self._grow(_FIRST_ROWS)

    def row(self, number: int) -> int:
        """The row of ``number``, a new one if it is not known."""
        row = self.rows.get(number)
        if row is None:
            row = self.rows[number] = len(self.rows)
            if row >= self._size:
                self._grow(self._size)
        return row

    def rows_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows (n,) of ``numbers`` (n,), new ones for those that are not known."""
        rows = self.rows
        found = [rows.setdefault(number, len(rows)) for number in numbers.tolist()]
        if len(rows) > self._size:
            self._grow(max(self._size, len(rows) - self._size))
        return np.array(found, np.int64)

    def _grow(self, by: int) -> None:
        if self._size:  # an array that is viewed cannot grow
            del self.slots, self.ys, self.xs, self.i0s
        self.slot.extend(array("q", [-1]) * by)
        self.y.extend(array("d", [_NAN]) * by)
        self.x.extend(array("d", [_NAN]) * by)
        self.i0.extend(array("d", [0.0]) * by)
        self._size += by
        self.slots: NDArray[np.int64] = np.frombuffer(self.slot, np.int64)
        self.ys: NDArray[np.float64] = np.frombuffer(self.y, np.float64)
        self.xs: NDArray[np.float64] = np.frombuffer(self.x, np.float64)
        self.i0s: NDArray[np.float64] = np.frombuffer(self.i0, np.float64)
        more = np.zeros(by, np.uint32)
        self.flags = np.concatenate([self.flags, more])
        self.gate = np.concatenate([self.gate, more])
        self.revision = np.concatenate([self.revision, more])


class Join:
    """What is known of a scan's frames and positions.

    Attributes:
        positioned: frames that have a position.
        invalid: positions that are NaN or infinite, of negative numbers, or beyond the number that
            may wait for their frames: as if never sent.
        out_of_extent: positions beyond ``max_extent_m``, flagged in their pairs.
        jumps: positions further than ``max_step_m`` from the one before, flagged likewise.
        dark: frames taken without beam; they have no positions.
    """

    def __init__(self, limits: PositionLimits, max_waiting: int = MAX_WAITING) -> None:
        self._limits = limits
        self._max_waiting = max_waiting
        self._table = _Table()
        self._frames = 0
        self._last_yx: tuple[float, float] | None = None
        self._doubted_yx: tuple[float, float] | None = None
        self.positioned = 0
        self.invalid = 0
        self.out_of_extent = 0
        self.jumps = 0
        self.dark = 0
        self._gated_unpositioned = 0

    @property
    def gated(self) -> int:
        """Frames to be left out of the image, by their own word or by their positioner's."""
        return int(np.count_nonzero((self._table.slots >= 0) & (self._table.gate != 0)))

    def readings(self) -> NDArray[np.float64]:
        """Readings of the beam monitor (n,) of the stored frames that have one."""
        table = self._table
        return table.i0s[(table.slots >= 0) & (table.i0s > 0)]

    @property
    def spared(self) -> int:
        """Frames that have no position and need none: dark ones, and those gated by themselves."""
        return self.dark + self._gated_unpositioned

    def frame(self, number: int, slot: int, i0: float = 0.0, *, skip: bool = False) -> Pair | None:
        """Take a stored frame; its pair, if its position is known."""
        table = self._table
        row = self._take(number, slot, i0, skip)
        y_m = table.y[row]
        if y_m != y_m:  # NaN: no position yet
            self._gated_unpositioned += skip
            return None
        return self._paired(row)

    def frame_with_position(
        self, number: int, slot: int, y_m: float, x_m: float, i0: float = 0.0, *, skip: bool = False
    ) -> Pair | None:
        """Take a stored frame that brought its position; its pair, if the position is finite."""
        if not (abs(y_m) < float("inf") and abs(x_m) < float("inf")):
            self.invalid += 1
            return self.frame(number, slot, i0, skip=skip)
        table = self._table
        row = self._take(number, slot, i0, skip)
        table.y[row], table.x[row] = y_m, x_m
        table.flags[row] = self._flag(y_m, x_m)
        return self._paired(row)

    def dark_frame(self) -> None:
        """Take a stored frame that was taken without beam."""
        self.dark += 1

    def _take(self, number: int, slot: int, i0: float, skip: bool) -> int:
        """The row of a stored frame."""
        table = self._table
        row = table.row(number)
        self._frames += 1
        table.slot[row] = slot
        if i0:
            table.i0[row] = i0
        if skip:
            table.gate[row] |= _OWN
        return row

    def _paired(self, row: int) -> Pair:
        table = self._table
        self.positioned += 1
        flags = int(table.flags[row]) | (PAIR_FLAG_GATED if table.gate[row] else 0)
        return Pair(table.y[row], table.x[row], int(table.revision[row]), flags, table.i0[row])

    def positions(
        self,
        numbers: NDArray[np.int64],
        position_yx_m: NDArray[np.float64],
        at_ns: int,
        i0: NDArray[np.float64] | None = None,
        gate: NDArray[np.uint64] | None = None,
    ) -> NDArray[np.void]:
        """Take positions and find the frames that waited for them.

        Args:
            numbers: (n,) frame numbers.
            position_yx_m: (n, 2) metres.
            at_ns: monotonic time, for the pairs.
            i0: (n,) readings of the beam monitor, 0 where there is none; None: there are none.
            gate: (n,) as in the log of positions, 0 where nothing is said; None: nothing is.

        Returns:
            New or corrected pairs, ``PAIR_RECORD``; positions sent again unchanged make none.
        """
        told: NDArray[np.void] | None = None
        if i0 is not None or gate is not None:
            told = np.zeros(numbers.size, _TOLD)
            told["i0"] = 0 if i0 is None else i0
            told["gate"] = 0 if gate is None else gate
        good = np.isfinite(position_yx_m).all(axis=1) & (numbers >= 0)
        self.invalid += int(numbers.size - np.count_nonzero(good))
        if not good.all():
            numbers, position_yx_m = numbers[good], position_yx_m[good]
            told = told if told is None else told[good]
        flags = self._flag_batch(position_yx_m)
        # Of a number that is there twice the last counts.
        _, last = np.unique(numbers[::-1], return_index=True)
        if last.size < numbers.size:
            rows = np.sort(numbers.size - 1 - last)
            numbers, position_yx_m, flags = numbers[rows], position_yx_m[rows], flags[rows]
            told = told if told is None else told[rows]
        kept = self._kept(numbers)
        if kept is not None:
            self.invalid += numbers.size - kept.size
            numbers, position_yx_m, flags = numbers[kept], position_yx_m[kept], flags[kept]
            told = told if told is None else told[kept]
        pairs = self._place(numbers, position_yx_m, flags, told)
        pairs["paired_monotonic_ns"] = at_ns
        return pairs

    def restore(
        self, frames: NDArray[np.void], positions: NDArray[np.void], pairs: NDArray[np.void]
    ) -> NDArray[np.void]:
        """Rebuild from the logs of a recovered scan, in a new instance.

        Returns:
            Pairs that were not written any more before the scan's writer died.
        """
        table = self._table
        dark = (frames["flags"] & FRAME_FLAG_DARK) != 0
        self.dark, frames = int(dark.sum()), frames[~dark]
        at = table.rows_of(frames["number"].astype(np.int64))
        table.slots[at] = frames["slot"]
        table.i0s[at] = frames["i0"]
        skipped = (frames["flags"] & FRAME_FLAG_SKIP) != 0
        table.gate[at[skipped]] = _OWN
        self._gated_unpositioned = int(skipped.sum())
        self._frames = len(frames)
        for pair in pairs:
            row = table.row(int(pair["number"]))
            new = table.y[row] != table.y[row]
            self.positioned += new
            self._gated_unpositioned -= bool(new and table.gate[row])
            table.y[row], table.x[row] = float(pair["y_m"]), float(pair["x_m"])
            table.i0[row] = float(pair["i0"])
            gated, flags = divmod(int(pair["flags"]), PAIR_FLAG_GATED)
            own = int(table.gate[row]) & _OWN
            table.gate[row] = own or gated * _TOLD_BY_POSITION
            table.flags[row], table.revision[row] = flags, pair["revision"]
        known, numbers = positions_of(positions), positions["number"].astype(np.int64)
        return self.positions(numbers, known, 0, positions["i0"], positions["gate"])

    def _kept(self, numbers: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Which of ``numbers`` there is room for, as indices; None: for all."""
        rows = self._table.rows
        room = self._max_waiting - (len(rows) - self._frames)
        if numbers.size <= room:
            return None
        new = np.array([number not in rows for number in numbers.tolist()], np.bool_)
        return np.flatnonzero(~new | (np.cumsum(new) <= room))

    def _place(
        self,
        numbers: NDArray[np.int64],
        position_yx_m: NDArray[np.float64],
        flags: NDArray[np.uint32],
        told: NDArray[np.void] | None,
    ) -> NDArray[np.void]:
        table = self._table
        at = table.rows_of(numbers)
        y_m, x_m = position_yx_m[:, 0], position_yx_m[:, 1]
        changed = (table.ys[at] != y_m) | (table.xs[at] != x_m)
        if told is not None:
            changed |= self._tell(at, told)
        at, y_m, x_m, flags = at[changed], y_m[changed], x_m[changed], flags[changed]
        known = ~np.isnan(table.ys[at])
        table.revision[at] += known
        table.ys[at], table.xs[at], table.flags[at] = y_m, x_m, flags
        stored = table.slots[at] >= 0
        fresh = at[stored & ~known]
        self.positioned += len(fresh)
        self._gated_unpositioned -= int(np.count_nonzero(table.gate[fresh] & _OWN))
        pairs = np.zeros(int(np.count_nonzero(stored)), PAIR_RECORD)
        pairs["number"] = numbers[changed][stored]
        pairs["slot"] = table.slots[at[stored]]
        pairs["revision"] = table.revision[at[stored]]
        pairs["y_m"], pairs["x_m"] = y_m[stored], x_m[stored]
        pairs["flags"] = flags[stored] + PAIR_FLAG_GATED * (table.gate[at[stored]] != 0)
        pairs["i0"] = table.i0s[at[stored]]
        return pairs

    def _tell(self, at: NDArray[np.int64], told: NDArray[np.void]) -> NDArray[np.bool_]:
        """Note monitor readings and gates of rows (n,); which of them are new.

        What a position does not tell stays as it was told before.
        """
        table = self._table
        i0 = np.where(told["i0"] > 0, told["i0"], table.i0s[at])
        skip = np.where(told["gate"], told["gate"] == POSITION_GATE_SKIP, table.gate[at] > _OWN)
        gate = (table.gate[at] & _OWN) | skip * np.uint32(_TOLD_BY_POSITION)
        changed = (table.i0s[at] != i0) | (table.gate[at] != gate)
        table.i0s[at], table.gate[at] = i0, gate
        return changed

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


class FramesAlone(Join):
    """Of a detector whose frames are stored and not reconstructed: none needs a position."""

    @property
    def spared(self) -> int:
        """All frames."""
        return self._frames

    def frame(self, number: int, slot: int, i0: float = 0.0, *, skip: bool = False) -> Pair | None:
        """Count a stored frame."""
        self._frames += 1
        return None

    def frame_with_position(
        self, number: int, slot: int, y_m: float, x_m: float, i0: float = 0.0, *, skip: bool = False
    ) -> Pair | None:
        """Count a stored frame; its position stays in the log of positions."""
        self._frames += 1
        return None

    def dark_frame(self) -> None:
        """Count a stored frame that was taken without beam."""
        super().dark_frame()
        self._frames += 1

    def restore(
        self, frames: NDArray[np.void], positions: NDArray[np.void], pairs: NDArray[np.void]
    ) -> NDArray[np.void]:
        """Count the frames of a recovered scan; there are no pairs to write."""
        self.dark = int(np.count_nonzero(frames["flags"] & FRAME_FLAG_DARK))
        self._frames = len(frames)
        return np.zeros(0, PAIR_RECORD)
