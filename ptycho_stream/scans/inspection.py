"""Looking for damage in a stored scan, without changing a byte: ``ptycho-stream scans verify``.

Headers, counters, logs, pixels, masks and the files of views are read and compared with their
checksums and with each other; what is wrong comes back in words, with what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import StoreError
from ptycho_stream.geometry import View
from ptycho_stream.scans.append_log import FRAMES_LOG, PAIRS_LOG, POSITIONS_LOG, AppendLog
from ptycho_stream.scans.counters import COUNTERS_NAME, Counters
from ptycho_stream.scans.creation import check_frame_size
from ptycho_stream.scans.folders import MASK_NAME
from ptycho_stream.scans.header import HEADER_NAME, ScanHeader, read_header, read_header_file
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import (
    FRAME_FLAG_LOST,
    FRAME_RECORD,
    PAIR_RECORD,
    POSITION_RECORD,
    intact,
)
from ptycho_stream.scans.view_data import view_data

_FRAMES_AT_ONCE: Final = 256
_NAMED: Final = 20
"""So many damaged records are named; of more, the number is told."""

_BACKUP: Final = (
    "restore the scan from a backup; without one, images leave these frames out. Look at the "
    "kernel's log: the disk may be failing"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with a scan.

    Attributes:
        part: the file.
        what: is wrong with it.
        advice: what to do.
    """

    part: str
    what: str
    advice: str


def inspect_scan(directory: Path, on_frames: Callable[[int], None]) -> list[Fault]:
    """What is wrong with the scan in ``directory``; empty if all of it is as it was written.

    A scan that is being written is looked at as far as it is committed.

    Args:
        directory: the scan's folder.
        on_frames: told, now and then, how many more frames were looked at.

    Raises:
        ScanNotFound: there is no such scan.
    """
    mend = f"`ptycho-stream scans recover {directory.name}`"
    try:
        header = read_header(directory)
        check_frame_size(header)
    except StoreError as error:
        if not (directory / HEADER_NAME).exists():
            raise
        return [Fault(HEADER_NAME, str(error), "restore it from a backup")]
    faults = [*_header_faults(directory, mend), *_counter_faults(directory, header, mend)]
    if any(fault.part == COUNTERS_NAME for fault in faults):
        return faults  # how far to look is not known
    with ScanReader(directory) as reader:
        faults += _frame_faults(reader, mend, on_frames)
        faults += _join_faults(reader, mend)
        faults += _view_faults(reader)
    return faults


def _header_faults(directory: Path, mend: str) -> Iterator[Fault]:
    try:
        read_header_file(directory / HEADER_NAME)
    except StoreError as error:
        yield Fault(HEADER_NAME, str(error), f"its copy is whole: {mend} writes it anew from that")


def _counter_faults(directory: Path, header: ScanHeader, mend: str) -> Iterator[Fault]:
    try:
        counters = Counters(directory / COUNTERS_NAME, writable=False)
    except StoreError as error:
        yield Fault(COUNTERS_NAME, str(error), f"{mend} counts anew")
        return
    told = (counters.committed, counters.positions, counters.pairs)
    counters.close()
    logs = ((FRAMES_LOG, FRAME_RECORD), (POSITIONS_LOG, POSITION_RECORD), (PAIRS_LOG, PAIR_RECORD))
    for (name, dtype), count in zip(logs, told, strict=True):
        begun = _records_begun(directory / name, dtype)
        if begun < count or (header.sealed and begun != count):
            what = f"{count} records are counted and {name} holds {begun}"
            yield Fault(COUNTERS_NAME, what, f"{mend} counts anew what is whole")


def _records_begun(path: Path, dtype: np.dtype[np.void]) -> int:
    try:
        log = AppendLog(path, dtype, writable=False)
    except StoreError:
        return 0
    try:
        return log.records_begun()
    finally:
        log.close()


def _frame_faults(
    reader: ScanReader, mend: str, on_frames: Callable[[int], None]
) -> Iterator[Fault]:
    committed = reader.committed
    damaged: list[int] = []
    for first in range(0, committed, _FRAMES_AT_ONCE):
        stop = min(first + _FRAMES_AT_ONCE, committed)
        damaged += reader.verify(slice(first, stop))
        on_frames(stop - first)
    records = _read(reader.directory / FRAMES_LOG, FRAME_RECORD, committed)
    good = intact(records) & (records["slot"] == np.arange(committed))
    lost = good & ((records["flags"] & FRAME_FLAG_LOST) != 0)
    broken = np.flatnonzero(~good).tolist()
    pixels = sorted(set(damaged) - set(broken) - set(np.flatnonzero(lost).tolist()))
    if broken:
        yield Fault(FRAMES_LOG, f"the records of slots {_named(broken)} are damaged", _BACKUP)
    if pixels:
        what = f"the pixels of slots {_named(pixels)} are not what was written"
        yield Fault("frames-*.bin", what, _BACKUP)
    numbers = records["number"][good & ~lost]
    if len(np.unique(numbers)) < len(numbers):
        advice = "keep the scan as it is and report it: this program writes no number twice"
        yield Fault(FRAMES_LOG, "a frame number is there twice", advice)


def _join_faults(reader: ScanReader, mend: str) -> Iterator[Fault]:
    drop = f"{mend} drops these records; the frames stay, without their positions"
    positions = _read(reader.directory / POSITIONS_LOG, POSITION_RECORD, reader.position_count)
    pairs = _read(reader.directory / PAIRS_LOG, PAIR_RECORD, reader.pair_count)
    for name, records in ((POSITIONS_LOG, positions), (PAIRS_LOG, pairs)):
        broken = np.flatnonzero(~intact(records)).tolist()
        if broken:
            yield Fault(name, f"records {_named(broken)} are damaged", drop)
    frames = _read(reader.directory / FRAMES_LOG, FRAME_RECORD, reader.committed)
    known = intact(pairs) & (pairs["slot"] < len(frames))
    of_frame = frames[pairs["slot"] * known]
    astray = known & intact(of_frame) & (of_frame["number"] != pairs["number"])
    astray |= intact(pairs) & ~known
    if astray.any():
        what = f"records {_named(np.flatnonzero(astray).tolist())} name frames that are not there"
        yield Fault(PAIRS_LOG, what, drop)


def _view_faults(reader: ScanReader) -> Iterator[Fault]:
    header, mask = reader.header, None
    try:
        mask = reader.bad_pixels
    except StoreError as error:
        advice = "delete it, and name a mask with `ptycho-stream ctl reprocess --bad-pixels`"
        yield Fault(MASK_NAME, str(error), advice)
    if mask is not None and (mask.shape, mask.dtype) != (header.frame_shape_yx, np.dtype(bool)):
        what = f"it is {mask.dtype} {mask.shape} and frames are {header.frame_shape_yx}"
        yield Fault(MASK_NAME, what, "restore it from a backup, or delete it")
    for digest in sorted({digest for view in header.views for digest in _digests(view)}):
        try:
            view_data(reader.directory, digest)
        except StoreError as error:
            advice = "restore it from a backup, or `ptycho-stream ctl reprocess` with another file"
            yield Fault(f"view-{digest}.npy", str(error), advice)


def _digests(view: View) -> list[str]:
    files = (view.bad_pixels, view.flat_field, view.background, view.bad_frames)
    return [digest for digest in files if digest is not None]


def _read(path: Path, dtype: np.dtype[np.void], count: int) -> NDArray[Any]:
    log = AppendLog(path, dtype, writable=False)
    try:
        return log.read(0, count)
    finally:
        log.close()


def _named(numbers: list[int]) -> str:
    told = ", ".join(map(str, numbers[:_NAMED]))
    return told if len(numbers) <= _NAMED else f"{told} and {len(numbers) - _NAMED} more"
