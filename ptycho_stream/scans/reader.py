"""Reading a scan, also while another process writes it: frames as views of the mapped files.

Used by reconstruct, training, exports and people's own programs.  Any number of readers, no lock:
what is below ``committed`` never changes.  Whoever reads for long holds a lease of the catalogue,
so that the scan is not deleted meanwhile; frames already handed out stay valid in any case.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import CorruptRecord, ScanNotFound, StoreError
from ptycho_stream.scans.append_log import FRAMES_LOG, PAIRS_LOG, POSITIONS_LOG, AppendLog
from ptycho_stream.scans.batch_files import batch_file_name
from ptycho_stream.scans.counters import COUNTERS_NAME, Counters
from ptycho_stream.scans.folders import mask_path, scan_directory
from ptycho_stream.scans.header import HEADER_NAME, ScanHeader, read_header
from ptycho_stream.scans.pixel_files import PixelFiles, frame_room
from ptycho_stream.scans.records import (
    FRAME_FLAG_LOST,
    FRAME_RECORD,
    PAIR_RECORD,
    POSITION_RECORD,
    intact,
)

# A map holds a file descriptor; frames handed out keep theirs alive after it has left the cache.
_MAPS_KEPT: Final = 4
_RECORDS_AT_ONCE: Final = 65536


class ScanReader:
    """Read access to one scan; made by :meth:`open`.  Belongs to one thread."""

    def __init__(self, directory: Path, *, verify_reads: bool = False) -> None:
        """Open the scan in ``directory``.

        With ``verify_reads`` frames are read instead of mapped, and compared with their checksums
        whenever they are asked for.

        Raises:
            ScanNotFound: there is none.
            StoreError: it cannot be read.
        """
        self._directory = directory
        self._verify_reads = verify_reads
        self._header_identity = (0, 0)
        self._header = self._read_header()
        self._counters = Counters(directory / COUNTERS_NAME, writable=False)
        self._maps: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._logs: tuple[AppendLog, AppendLog, AppendLog] | None = None
        self._recoveries = -1
        self._checked = 0
        self._bad_slots: set[int] = set()

    @classmethod
    def open(cls, root: Path, scan_id: str, *, verify_reads: bool = False) -> Self:
        """Open scan ``scan_id`` of the data directory ``root``; see the constructor.

        Raises:
            ScanNotFound: there is no such scan.
            StoreError: it cannot be read.
        """
        return cls(scan_directory(root, scan_id), verify_reads=verify_reads)

    @property
    def directory(self) -> Path:
        """The scan's folder."""
        return self._directory

    @property
    def scan_id(self) -> str:
        """The scan's identity."""
        return self._header.scan_id

    @property
    def header(self) -> ScanHeader:
        """The header as of the last :meth:`refresh`."""
        return self._header

    def refresh(self) -> bool:
        """Read the header again if it was replaced; True if it was.

        Raises:
            ScanNotFound: the scan was deleted.
        """
        if self._identity_of_header() == self._header_identity:
            return False
        self._header = self._read_header()
        return True

    def _read_header(self) -> ScanHeader:
        # Identity before content: a header replaced in between is read again the next time.
        self._header_identity = self._identity_of_header()
        return read_header(self._directory)

    def _identity_of_header(self) -> tuple[int, int]:
        try:
            status = (self._directory / HEADER_NAME).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise ScanNotFound(
                f"there is no scan {self._directory.name} in {self._directory.parent}"
            ) from None
        return status.st_ino, status.st_mtime_ns

    @property
    def committed(self) -> int:
        """Frames that can be read."""
        return self._counters.committed

    @property
    def durable(self) -> int:
        """Frames that a power loss cannot take."""
        return self._counters.durable

    @property
    def position_count(self) -> int:
        """Position records that can be read."""
        return self._counters.positions

    @property
    def pair_count(self) -> int:
        """Pair records that can be read."""
        return self._counters.pairs

    @property
    def bad_pixels(self) -> NDArray[np.bool_] | None:
        """Bool (h, w) of the stored frame, True where a pixel is bad; None if there is no mask.

        Raises:
            StoreError: the mask cannot be read.
        """
        path = mask_path(self._directory)
        try:
            return np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, EOFError, MemoryError) as error:
            raise StoreError(f"cannot read {path}: {error}") from error

    def records(self, start: int = 0, stop: int | None = None) -> NDArray[np.void]:
        """Frame records (n,) of slots [start, stop), checked.

        Raises:
            CorruptRecord: the check word of one does not fit; :meth:`verify` names all such slots.
                Or fewer are there than are counted.
            StoreError: the range is not committed.
        """
        return self._read_checked(0, start, stop, self.committed, "frame")

    def whole_records(self, start: int, stop: int) -> NDArray[np.void]:
        """Frame records of slots [start, stop); damaged ones are left out.

        Raises:
            StoreError: the range is not committed.
        """
        self._require_range(start, stop, self.committed, "frame")
        records = self._open_logs()[0].read(start, stop)
        return records[_whole(records, start)]

    def positions(self, start: int = 0, stop: int | None = None) -> NDArray[np.void]:
        """Position records (n,) [start, stop) as received, checked.

        Raises:
            CorruptRecord: the check word of one does not fit, or fewer are there than are counted.
            StoreError: the range is not there.
        """
        return self._read_checked(1, start, stop, self.position_count, "position")

    def pairs(self, start: int = 0, stop: int | None = None) -> NDArray[np.void]:
        """Pair records (n,) [start, stop), checked.

        Raises:
            CorruptRecord: the check word of one does not fit, or fewer are there than are counted.
            StoreError: the range is not there.
        """
        return self._read_checked(2, start, stop, self.pair_count, "pair")

    def _read_checked(
        self, which: int, start: int, stop: int | None, count: int, kind: str
    ) -> NDArray[np.void]:
        stop = count if stop is None else stop
        self._require_range(start, stop, count, kind)
        self._require_there(which, stop, count, kind)  # before memory is taken for them
        log = self._open_logs()[which]
        records = log.read(start, stop)
        good = intact(records)
        if not good.all():
            bad = start + int(np.argmin(good))
            raise CorruptRecord(
                f"{kind} record {bad} of scan {self.scan_id} is damaged: verify() names all"
            )
        return records

    def _require_range(self, start: int, stop: int, count: int, kind: str) -> None:
        if not 0 <= start <= stop <= count:
            raise StoreError(
                f"{kind}s [{start}, {stop}) of scan {self.scan_id} were asked for and {count} are "
                "there: ask for committed ones"
            )

    def _open_logs(self) -> tuple[AppendLog, AppendLog, AppendLog]:
        """The three logs, opened anew after a recovery, which may have replaced or cut them."""
        recoveries = self._counters.recoveries
        if self._logs is None or recoveries != self._recoveries:
            self._close_logs()
            self._logs = (
                AppendLog(self._directory / FRAMES_LOG, FRAME_RECORD, writable=False),
                AppendLog(self._directory / POSITIONS_LOG, POSITION_RECORD, writable=False),
                AppendLog(self._directory / PAIRS_LOG, PAIR_RECORD, writable=False),
            )
            self._recoveries = recoveries
            self._checked = 0
            self._bad_slots.clear()
        return self._logs

    def frame(self, slot: int) -> NDArray[Any]:
        """The pixels (h, w) of a committed frame: a read-only view of the mapped file.

        Raises:
            CorruptRecord: its record is damaged; with ``verify_reads``, or its pixels are.
            StoreError: it is not committed, or its file is damaged.
        """
        self._require_whole(slot, slot + 1)
        if self._verify_reads:
            return self._verified(np.array([slot]))[0]
        index, within = divmod(slot, self._header.frames_per_file)
        return self._map(index)[within]

    def frames(self, slots: slice | Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[Any]:
        """The pixels (n, h, w) of committed frames.

        A read-only view where ``slots`` is a run within one batch file, else gathered.

        Raises:
            CorruptRecord: the record of one is damaged; with ``verify_reads``, or its pixels are.
            StoreError: one is not committed, or a file is damaged.
        """
        wanted = self._slots(slots)
        if len(wanted) == 0:
            return np.zeros((0, *self._header.frame_shape_yx), self._header.dtype)
        low, high = int(wanted.min()), int(wanted.max())
        self._require_whole(low, high + 1, wanted)
        if self._verify_reads:
            return self._verified(wanted)
        per_file = self._header.frames_per_file
        run = bool((np.diff(wanted) == 1).all())
        if run and low // per_file == high // per_file:
            return self._map(low // per_file)[low % per_file : high % per_file + 1]
        gathered = np.empty((len(wanted), *self._header.frame_shape_yx), self._header.dtype)
        files = wanted // per_file
        for index in np.unique(files):
            here = np.flatnonzero(files == index)
            gathered[here] = self._map(int(index))[wanted[here] % per_file]
        return gathered

    def _slots(self, slots: slice | Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        if not isinstance(slots, slice):
            return np.asarray(slots, np.int64)
        committed = self.committed
        bounds = slots.indices(committed)
        if wanted := range(*bounds):
            self._require_there(0, max(wanted[0], wanted[-1]) + 1, committed, "frame")
        return np.arange(*bounds, dtype=np.int64)

    def _require_there(self, which: int, stop: int, count: int, kind: str) -> None:
        """Check that a log holds the records before ``stop``: the counters have no check."""
        there = self._open_logs()[which].records_begun()
        if stop > there:
            raise CorruptRecord(
                f"{count} {kind} records of scan {self.scan_id} are counted and {there} are there: "
                f"`ptycho-stream scans recover {self.scan_id}` counts anew"
            )

    def _require_whole(self, start: int, stop: int, slots: NDArray[np.int64] | None = None) -> None:
        """Check that a range is committed and, once for every record, that the records are whole.

        ``slots`` are those of the range that matter; None: all.
        """
        self._require_range(start, stop, self.committed, "frame")
        log = self._open_logs()[0]
        while self._checked < stop:
            end = min(self._checked + _RECORDS_AT_ONCE, self.committed)
            self._bad_slots.update(self._bad_records(log, self._checked, end))
            self._checked = end
        if self._bad_slots:
            asked = range(start, stop) if slots is None else slots.tolist()
            bad = self._still_bad(log, self._bad_slots.intersection(asked))
            if bad:
                raise CorruptRecord(
                    f"the records of slots {sorted(bad)} of scan {self.scan_id} are damaged: "
                    "leave these frames out"
                )

    def _still_bad(self, log: AppendLog, slots: set[int]) -> set[int]:
        """Which of ``slots`` are damaged when they are read again.

        Where stores of another processor may be seen in another order than they were made (not on
        x86), a record may have been looked at before it was there.
        """
        healed = {slot for slot in slots if not self._bad_records(log, slot, slot + 1)}
        self._bad_slots -= healed
        return slots - healed

    def _bad_records(self, log: AppendLog, start: int, stop: int) -> list[int]:
        return (start + np.flatnonzero(~_whole(log.read(start, stop), start))).tolist()

    def _verified(self, slots: NDArray[np.int64]) -> NDArray[Any]:
        """Frames (n, h, w), read and compared with their checksums."""
        gathered = np.empty((len(slots), *self._header.frame_shape_yx), self._header.dtype)
        log = self._open_logs()[0]
        low = int(slots.min())
        checksums = log.read(low, int(slots.max()) + 1)["checksum"][slots - low].tolist()
        with PixelFiles(self._directory, self._header) as pixels:
            bad = [
                slot
                for at, (slot, checksum) in enumerate(zip(slots.tolist(), checksums, strict=True))
                if not pixels.read(slot, gathered[at], checksum)
            ]
        if bad:
            raise CorruptRecord(
                f"the pixels of slots {bad} of scan {self.scan_id} are not what was written: "
                "leave these frames out"
            )
        return gathered

    def _map(self, index: int) -> NDArray[Any]:
        """Batch file ``index`` as a read-only array (frames_per_file, h, w)."""
        path = self._directory / batch_file_name(index)
        frames = self._maps.get(index)
        if frames is not None:
            self._maps.move_to_end(index)
            self._check_not_cut(path)
            return frames
        frames = self._map_file(path)
        self._maps[index] = frames
        if len(self._maps) > _MAPS_KEPT:
            self._maps.popitem(last=False)
        return frames

    def _check_not_cut(self, path: Path) -> None:
        """Look whether a mapped file still has its size: pages past its end are a SIGBUS."""
        try:
            size = path.stat().st_size
        except FileNotFoundError:  # deleted: what is mapped stays
            return
        if size < self._header.frames_per_file * self._header.frame_bytes:
            raise StoreError(f"{path} was cut short to {size} bytes: the store is damaged")

    def _map_file(self, path: Path) -> NDArray[Any]:
        header = self._header
        size = header.frames_per_file * header.frame_bytes
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ScanNotFound(
                f"{path} is gone: the scan was deleted; hold a lease to keep one"
            ) from None
        except OSError as error:
            raise StoreError(f"cannot open {path}: {error.strerror}") from error
        try:
            if os.fstat(fd).st_size < size:  # to touch pages past its end would be a SIGBUS
                raise StoreError(f"{path} is shorter than its {size} bytes: the store is damaged")
            mapped = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
        shape = (header.frames_per_file, *header.frame_shape_yx)
        return np.frombuffer(mapped, header.dtype).reshape(shape)

    def verify(
        self, slots: slice | Sequence[int] | NDArray[np.integer[Any]] | None = None
    ) -> list[int]:
        """Slots, of all committed or of ``slots``, whose record or pixels are damaged.

        Raises:
            StoreError: one is not committed.
        """
        wanted = self._slots(slice(None) if slots is None else slots)
        if len(wanted) == 0:
            return []
        self._require_range(int(wanted.min()), int(wanted.max()) + 1, self.committed, "frame")
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        return [slot for run in runs for slot in self._damaged(int(run[0]), int(run[-1]) + 1)]

    def _damaged(self, start: int, stop: int) -> list[int]:
        damaged: list[int] = []
        log, room = self._open_logs()[0], frame_room(self._header)
        with PixelFiles(self._directory, self._header) as pixels:
            for first in range(start, stop, _RECORDS_AT_ONCE):
                end = min(first + _RECORDS_AT_ONCE, stop)
                bad = set(self._bad_records(log, first, end))
                checksums = log.read(first, end)["checksum"].tolist()
                damaged += [
                    slot
                    for slot, checksum in enumerate(checksums, first)
                    if slot in bad or not pixels.read(slot, room, checksum)
                ]
        return damaged

    def _close_logs(self) -> None:
        for log in self._logs or ():
            log.close()
        self._logs = None

    def close(self) -> None:
        """Close the files.  Frames handed out stay valid."""
        self._maps.clear()
        self._close_logs()
        self._counters.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _whole(records: NDArray[np.void], start: int) -> NDArray[np.bool_]:
    """Which frame records (n,) of the slots from ``start`` on are as they were written."""
    whole = intact(records) & (records["slot"] == np.arange(start, start + len(records)))
    return whole & ((records["flags"] & FRAME_FLAG_LOST) == 0)
