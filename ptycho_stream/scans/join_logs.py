"""The positions and pairs of a scan as its writer logs them: gathered, then written at a commit.

Positions are written before the frames that were taken with them, so that a crash in between loses
none; pairs after theirs, so that no reader meets the pair of a frame that it cannot see.  Used by
the writer only.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.scans.append_log import PAIRS_LOG, POSITIONS_LOG, AppendLog
from ptycho_stream.scans.counters import Counters
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.records import (
    PAIR_RECORD,
    PAIR_RECORD_FORMAT,
    POSITION_RECORD,
    POSITION_RECORD_FORMAT,
)


def count_positioned(
    header: ScanHeader, records: NDArray[np.void], pairs: NDArray[np.void]
) -> dict[str, int]:
    """How many of a scan's frames have a position and how many lack one, for its accounting.

    Frames that are dark or gated need none, nor do those of a stored detector.
    """
    if header.detector:
        return {"positioned": 0, "unpositioned": 0}
    paired = np.unique(pairs["slot"])
    spared = np.setdiff1d(records["slot"][records["flags"] != 0], paired)
    return {"positioned": len(paired), "unpositioned": len(records) - len(paired) - len(spared)}


class JoinLogs:
    """The open logs of positions and pairs, with what is pending for each."""

    def __init__(self, directory: Path, counters: Counters) -> None:
        """Open the logs of the scan in ``directory``, behind what ``counters`` says is there.

        Raises:
            StoreError: one cannot be opened.
        """
        self._counters = counters
        self.positions = AppendLog(directory / POSITIONS_LOG, POSITION_RECORD, writable=True)
        self.pairs = AppendLog(directory / PAIRS_LOG, PAIR_RECORD, writable=True)
        self.positions.count = counters.positions
        self.pairs.count = counters.pairs
        self._pending_positions = bytearray()
        self._pending_pairs = bytearray()
        self._pack_position = struct.Struct(POSITION_RECORD_FORMAT).pack
        self._pack_pair = struct.Struct(PAIR_RECORD_FORMAT).pack

    @property
    def has_pending_pairs(self) -> bool:
        """Whether there are pairs that no reader sees yet."""
        return bool(self._pending_pairs)

    def add_positions(
        self,
        numbers: NDArray[np.int64],
        position_yx_m: NDArray[np.float64],
        received_ns: int,
        i0: NDArray[np.float64] | None = None,
        gate: NDArray[np.uint64] | None = None,
    ) -> None:
        """Take positions (n, 2) in metres of frames ``numbers`` (n,), with what else is told."""
        records = np.zeros(len(numbers), POSITION_RECORD)
        records["number"] = numbers
        records["y_m"] = position_yx_m[:, 0]
        records["x_m"] = position_yx_m[:, 1]
        records["received_ns"] = received_ns
        if i0 is not None:
            records["i0"] = i0
        if gate is not None:
            records["gate"] = gate
        self._pending_positions += records.tobytes()

    def add_position(self, number: int, y_m: float, x_m: float, received_ns: int) -> None:
        """Take one position: :meth:`add_positions` without the price of an array."""
        self._pending_positions += self._pack_position(number, y_m, x_m, received_ns, 0, 0, 0)

    def add_pairs(self, pairs: NDArray[np.void]) -> None:
        """Take ``pairs`` (n,) of dtype ``PAIR_RECORD``."""
        self._pending_pairs += pairs.astype(PAIR_RECORD, copy=False).tobytes()

    def add_pair(
        self,
        number: int,
        slot: int,
        y_m: float,
        x_m: float,
        paired_monotonic_ns: int,
        revision: int,
        flags: int,
        i0: float,
    ) -> None:
        """Take one pair."""
        self._pending_pairs += self._pack_pair(
            number, slot, revision, y_m, x_m, paired_monotonic_ns, flags, 0, i0, 0
        )

    def commit_positions(self) -> None:
        """Write the positions that are pending and show them to readers.

        Raises:
            DiskFull: there is no room; what was not written stays pending.
        """
        if self._pending_positions:
            records = np.frombuffer(bytes(self._pending_positions), POSITION_RECORD)
            self.positions.append(records.copy())
            self._counters.positions = self.positions.count
            self._pending_positions.clear()

    def commit_pairs(self) -> None:
        """Write the pairs that are pending and show them to readers.

        Raises:
            DiskFull: there is no room; what was not written stays pending.
        """
        if self._pending_pairs:
            self.pairs.append(np.frombuffer(bytes(self._pending_pairs), PAIR_RECORD).copy())
            self._counters.pairs = self.pairs.count
            self._pending_pairs.clear()

    def drop_pairs_from(self, slot: int) -> None:
        """Forget pending pairs of frames from ``slot`` on, which will never be."""
        pairs = np.frombuffer(bytes(self._pending_pairs), PAIR_RECORD)
        self._pending_pairs = bytearray(pairs[pairs["slot"] < slot].tobytes())

    def drop_pending(self) -> tuple[int, int]:
        """Forget all that is pending; returns how many positions and pairs that were."""
        positions = len(self._pending_positions) // POSITION_RECORD.itemsize
        pairs = len(self._pending_pairs) // PAIR_RECORD.itemsize
        self._pending_positions.clear()
        self._pending_pairs.clear()
        return positions, pairs

    def sync(self) -> None:
        """Make what was written survive a power loss."""
        self.positions.sync()
        self.pairs.sync()

    def close(self) -> None:
        """Close the files."""
        self.positions.close()
        self.pairs.close()
