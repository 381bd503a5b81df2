"""Finding out what of a scan is whole after its writer, the machine or the disk went down.

Used by :meth:`ScanWriter.recover` and by ``ptycho-stream scans recover``.  Nothing is believed but
the records' check words and, for frames not known to be synced, the checksum of their pixels; the
counters are only a hint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.scans.append_log import FRAMES_LOG, PAIRS_LOG, POSITIONS_LOG, AppendLog
from ptycho_stream.scans.counters import COUNTERS_NAME, Counters
from ptycho_stream.scans.disk import being_written, replace_file
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.pixel_files import PixelFiles, frame_room
from ptycho_stream.scans.records import (
    FRAME_FLAG_LOST,
    FRAME_RECORD,
    PAIR_RECORD,
    POSITION_RECORD,
    intact,
)

_RECORDS_AT_ONCE: Final = 8192
_NO_NUMBER: Final = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What recovery found.

    Attributes:
        frames: slots that the scan now has, lost ones among them.
        whole_frames: of these, frames that are whole.
        adopted_frames: of these, whole ones that had been written but not yet committed.
        lost_frames: frames that are damaged while later ones are whole; their slots are marked.
        dropped_records: frame records cut from the end, begun ones included.
        dropped_positions: position records that were damaged, or cut from the end.
        dropped_pairs: pair records that were damaged, cut, or belong to frames that are gone.
    """

    frames: int
    whole_frames: int
    adopted_frames: int
    lost_frames: int
    dropped_records: int
    dropped_positions: int
    dropped_pairs: int


def recover_files(directory: Path, header: ScanHeader) -> RecoveryReport:
    """Bring the logs of a scan to what is whole, and set its counters accordingly.

    The caller holds the scan's lock.  Readers that have the scan open go on.

    Raises:
        DiskFull: there is no room to write the logs anew.
        StoreError: a file cannot be opened or written.
    """
    abandoned = [path for path in directory.glob("*.tmp") if not being_written(path)]
    for leftover in (*directory.glob("*.new"), *abandoned):
        leftover.unlink(missing_ok=True)  # its writer may be at work and take it away
    counters = Counters(directory / COUNTERS_NAME, writable=True)
    frame_log = AppendLog(directory / FRAMES_LOG, FRAME_RECORD, writable=True)
    try:
        # A sealed scan was synced as a whole: a pixel that has changed since is no reason to cut.
        synced = frame_log.records_begun() if header.sealed else counters.surely_durable
        whole = _whole_frames(directory, header, frame_log, synced)
        frames = len(whole)
        adopted = max(frames - counters.committed, 0)
        lost = _mark_lost(frame_log, whole)
        numbers = np.where(whole, frame_log.read(0, frames)["number"], _NO_NUMBER)
        dropped_pairs, pairs = _recover_log(directory / PAIRS_LOG, PAIR_RECORD, numbers)
        dropped_positions, positions = _recover_log(directory / POSITIONS_LOG, POSITION_RECORD)
        counters.committed = frames
        counters.durable = min(synced, frames)
        counters.positions = positions
        counters.pairs = pairs
        counters.recoveries += 1
        return RecoveryReport(
            frames=frames,
            whole_frames=int(whole.sum()),
            adopted_frames=adopted,
            lost_frames=lost,
            dropped_records=frame_log.cut(frames),
            dropped_positions=dropped_positions,
            dropped_pairs=dropped_pairs,
        )
    finally:
        frame_log.close()
        counters.close()


def _whole_frames(
    directory: Path, header: ScanHeader, log: AppendLog, synced: int
) -> NDArray[np.bool_]:
    """Of each frame up to the last whole one: whether record and (from ``synced``) pixels are."""
    there = log.records_begun()
    whole = np.zeros(there, bool)
    room = frame_room(header)
    with PixelFiles(directory, header) as pixels:
        for start in range(0, there, _RECORDS_AT_ONCE):
            records = log.read(start, min(start + _RECORDS_AT_ONCE, there))
            slots = np.arange(start, start + len(records))
            good = intact(records) & (records["slot"] == slots)
            good &= (records["flags"] & FRAME_FLAG_LOST) == 0
            for at in np.flatnonzero(good & (slots >= synced)).tolist():
                good[at] = pixels.read(start + at, room, int(records["checksum"][at]))
            whole[slots] = good
    kept = np.flatnonzero(whole)
    return whole[: kept[-1] + 1] if len(kept) else whole[:0]


def _mark_lost(log: AppendLog, whole: NDArray[np.bool_]) -> int:
    """Write records that say so in the place of frames that are not whole; how many are new."""
    new = 0
    for slot in np.flatnonzero(~whole).tolist():
        record = log.read(slot, slot + 1)
        if intact(record)[0] and record["flags"][0] & FRAME_FLAG_LOST:
            continue
        record = np.zeros(1, FRAME_RECORD)
        record["slot"], record["flags"] = slot, FRAME_FLAG_LOST
        log.rewrite(slot, record)
        new += 1
    if new:
        log.sync()
    return new


def _recover_log(
    path: Path,
    dtype: np.dtype[np.void],
    numbers: NDArray[np.uint64] | None = None,
) -> tuple[int, int]:
    """Drop damaged records of positions or pairs, and pairs that name no frame that is there.

    Args:
        path: the log.
        dtype: of its records.
        numbers: for pairs, the frame number in each slot that is left, or ``_NO_NUMBER``.

    Returns:
        How many records were dropped, and how many are left.
    """
    log = AppendLog(path, dtype, writable=True)
    try:
        begun = log.records_begun()
        records = log.read(0, begun)
        kept = intact(records)
        if numbers is not None:
            known = kept & (records["slot"] < len(numbers))
            kept = known.copy()
            kept[known] = numbers[records["slot"][known]] == records["number"][known]
        left = int(kept.sum())
        if kept[:left].all():
            log.cut(left)
            return begun - left, left
    finally:
        log.close()
    replace_file(path, np.ascontiguousarray(records[kept]).tobytes())
    return begun - left, left
