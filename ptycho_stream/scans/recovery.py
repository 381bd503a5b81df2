"""Finding out what of an unsealed scan is whole after its writer, or the machine, went down.

Used by :meth:`ScanWriter.recover`.  Nothing is believed but the records' check words and, for
frames not known to be synced, the checksum of their pixels; the counters are only a hint.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from ptycho_stream.scans.append_log import FRAMES_LOG, PAIRS_LOG, POSITIONS_LOG, AppendLog
from ptycho_stream.scans.batch_files import batch_file_name
from ptycho_stream.scans.counters import COUNTERS_NAME, Counters
from ptycho_stream.scans.disk import read_up_to, replace_file
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.records import FRAME_RECORD, PAIR_RECORD, POSITION_RECORD

_RECORDS_AT_ONCE: Final = 8192


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What recovery found.

    Attributes:
        frames: whole frames that the scan now has.
        adopted_frames: of these, whole ones that had been written but not yet committed.
        dropped_records: frame records cut from the end, begun ones included.
        dropped_positions: position records cut from the end.
        dropped_pairs: pair records cut from the end, or belonging to frames that were cut.
    """

    frames: int
    adopted_frames: int
    dropped_records: int
    dropped_positions: int
    dropped_pairs: int


def recover_files(directory: Path, header: ScanHeader) -> RecoveryReport:
    """Cut the logs of a scan to what is whole, and set its counters accordingly.

    The caller holds the scan's lock.  Readers that have the scan open go on.

    Raises:
        DiskFull: there is no room to write the logs anew.
        StoreError: a file cannot be opened or written.
    """
    for leftover in (*directory.glob("*.new"), *directory.glob("*.tmp")):
        leftover.unlink()
    counters = Counters(directory / COUNTERS_NAME, writable=True)
    frame_log = AppendLog(directory / FRAMES_LOG, FRAME_RECORD, writable=True)
    position_log = AppendLog(directory / POSITIONS_LOG, POSITION_RECORD, writable=True)
    try:
        frames = _whole_frames(directory, header, frame_log, counters.durable)
        adopted = max(frames - counters.committed, 0)
        dropped_pairs, pairs = _recover_pairs(directory / PAIRS_LOG, frames)
        counters.committed = frames
        counters.durable = min(counters.durable, frames)
        counters.positions = position_log.find_intact()
        counters.pairs = pairs
        counters.recoveries += 1
        return RecoveryReport(
            frames=frames,
            adopted_frames=adopted,
            dropped_records=frame_log.cut(frames),
            dropped_positions=position_log.cut(counters.positions),
            dropped_pairs=dropped_pairs,
        )
    finally:
        position_log.close()
        frame_log.close()
        counters.close()


def _whole_frames(directory: Path, header: ScanHeader, log: AppendLog, synced: int) -> int:
    """Number of frames, from the first, whose record and (from ``synced`` on) pixels are whole."""
    there = log.find_intact()
    for start in range(0, there, _RECORDS_AT_ONCE):
        slots = log.read(start, min(start + _RECORDS_AT_ONCE, there))["slot"]
        in_place = slots == np.arange(start, start + len(slots))
        if not in_place.all():
            there = start + int(np.argmin(in_place))
            break
    pixels = memoryview(bytearray(header.frame_bytes))
    for start in range(min(synced, there), there, _RECORDS_AT_ONCE):
        records = log.read(start, min(start + _RECORDS_AT_ONCE, there))
        for slot, checksum in enumerate(records["checksum"].tolist(), start):
            if not _pixels_are_whole(directory, header, slot, pixels, checksum):
                return slot
    return there


def _pixels_are_whole(
    directory: Path, header: ScanHeader, slot: int, pixels: memoryview, checksum: int
) -> bool:
    index, within = divmod(slot, header.frames_per_file)
    try:
        fd = os.open(directory / batch_file_name(index), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        there = read_up_to(fd, pixels, within * header.frame_bytes)
    finally:
        os.close(fd)
    return there == len(pixels) and xxhash.xxh3_64_intdigest(pixels) == checksum


def _recover_pairs(path: Path, frames: int) -> tuple[int, int]:
    """Cut torn pairs, and drop those of frames that are gone: their slots will be used again."""
    log = AppendLog(path, PAIR_RECORD, writable=True)
    try:
        count = log.find_intact()
        dropped = log.cut(count)
        pairs = log.read(0, count)
    finally:
        log.close()
    kept = np.ascontiguousarray(pairs[pairs["slot"] < frames])
    if len(kept) < count:
        replace_file(path, kept.tobytes())
    return dropped + count - len(kept), len(kept)
