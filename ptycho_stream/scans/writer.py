"""The one writer of a scan: frames, positions and pairs in, committed and durable counters out.

Used by ingest, the simulators' tests and everything else that makes scans.  The commit protocol is
described in ``docs/store.md``: pixels are written, then their records, then ``committed`` advances;
``durable`` follows when both are synced, which a second thread may do.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.atomic_file import sync_path
from ptycho_stream.errors import DiskFull, ScanSealed, StoreError
from ptycho_stream.scans.append_log import FRAMES_LOG, AppendLog
from ptycho_stream.scans.batch_files import BatchFiles
from ptycho_stream.scans.counters import COUNTERS_NAME, Counters
from ptycho_stream.scans.creation import (
    RESERVE_BYTES,
    check_frame_size,
    fill_new_scan,
    fitted_header,
    release_reserve,
    try_to_reserve_space,
)
from ptycho_stream.scans.disk import disk_errors, write_all
from ptycho_stream.scans.folders import announce_change, scan_directory
from ptycho_stream.scans.frame_buffer import FrameBuffer
from ptycho_stream.scans.header import (
    SEALED_STATES,
    ScanHeader,
    ScanState,
    read_header,
    write_header,
)
from ptycho_stream.scans.join_logs import JoinLogs, count_positioned
from ptycho_stream.scans.records import FRAME_FLAG_LOST, FRAME_RECORD
from ptycho_stream.scans.recovery import RecoveryReport, recover_files
from ptycho_stream.scans.scan_lock import ScanLock
from ptycho_stream.scans.spare import SpareFiles

_log = logging.getLogger(__name__)

_FILES_AHEAD: Final = 3


class ScanWriter:
    """Exclusive write access to one scan; made by :meth:`create` or :meth:`recover`.

    Frames are gathered in a buffer of at most 64 and written by :meth:`commit`: positions before
    them, pairs after them, so that a reader never meets the pair of a frame that it cannot see.
    All methods but :meth:`sync` belong to one thread.  Leaving the context commits and syncs, but
    does not seal.
    """

    def __init__(self, root: Path, header: ScanHeader, lock: ScanLock) -> None:
        """Open the files of a scan whose folder and lock the caller has; not for users.

        Raises:
            StoreError: a file cannot be opened.
        """
        directory = scan_directory(root, header.scan_id)
        self._root = root
        self._directory = directory
        self._header = header
        self._lock = lock
        self._counters = Counters(directory / COUNTERS_NAME, writable=True)
        self._frames = AppendLog(directory / FRAMES_LOG, FRAME_RECORD, writable=True)
        self._frames.count = self._committed = self._counters.committed
        self._joins = JoinLogs(directory, self._counters)
        self._buffer = FrameBuffer(header.frame_shape_yx, header.dtype)
        file_bytes = header.frames_per_file * header.frame_bytes
        self._files = BatchFiles(directory, SpareFiles(root), file_bytes)
        self._sync_lock = threading.Lock()
        self._sync_failed = False
        self._closed = False
        self._enter_file(self._committed // header.frames_per_file)

    @classmethod
    def create(
        cls,
        root: Path,
        header: ScanHeader,
        frames_per_file: int = 1024,
        bad_pixels: NDArray[np.bool_] | None = None,
    ) -> Self:
        """Begin a new scan under ``root``; its first batch files are prepared in the background.

        Args:
            root: the data directory.
            header: what is known; ``frames_per_file`` in it is set here.
            frames_per_file: at most; large frames make it fewer.
            bad_pixels: bool (h, w) of the stored frame, True where a pixel is bad.

        Raises:
            DiskFull: there is no room even for an empty scan.
            ScanSealed: the header's state is that of an ended scan.
            StoreError: the folder exists already or cannot be made.
        """
        header = fitted_header(header, frames_per_file)
        directory = scan_directory(root, header.scan_id)
        if directory.exists():
            raise StoreError(f"{directory} exists already: make a new scan id with new_scan_id()")
        # Built under another name, so that the catalogue meets a whole scan or none.
        building = directory.with_name(f".new-{header.scan_id}")
        with disk_errors(directory, RESERVE_BYTES):
            building.mkdir(parents=True)
            SpareFiles(root).make_directory()
        lock = None
        try:
            lock = ScanLock(building)
            fill_new_scan(building, header, bad_pixels)
            with disk_errors(directory):
                building.rename(directory)
                sync_path(directory.parent)
                announce_change(root)
            return cls(root, header, lock)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            if lock is not None:
                lock.release()
            raise

    @classmethod
    def recover(cls, root: Path, scan_id: str) -> tuple[Self, RecoveryReport]:
        """Take over an unsealed scan whose writer is gone, cut to what is whole.

        Raises:
            ScanNotFound: there is no such scan.
            ScanLocked: its writer lives.
            ScanSealed: it has ended.
            StoreError: it is damaged beyond what recovery can cut, or the disk is full.
        """
        directory = scan_directory(root, scan_id)
        lock = ScanLock(directory)
        try:
            header = read_header(directory)
            if header.sealed:
                raise ScanSealed(f"scan {scan_id} is {header.state}: there is nothing to recover")
            check_frame_size(header)
            with disk_errors(directory):
                report = recover_files(directory, header)
            try_to_reserve_space(directory)
            writer = cls(root, header, lock)
        except BaseException:
            lock.release()
            raise
        _log.info("recovered scan %s: %s", scan_id, report)
        return writer, report

    @property
    def header(self) -> ScanHeader:
        """The scan's header as last written."""
        return self._header

    @property
    def scan_id(self) -> str:
        """The scan's identity."""
        return self._header.scan_id

    @property
    def committed(self) -> int:
        """Frames that readers may see."""
        return self._committed

    @property
    def durable(self) -> int:
        """Frames that a power loss cannot take."""
        return self._counters.durable

    @property
    def pending(self) -> int:
        """Frames taken and not yet committed."""
        return self._buffer.pending

    @property
    def full(self) -> bool:
        """Whether a commit must come before the next frame: 64 of them, or 64 MiB, are pending."""
        return self._buffer.pending >= self._buffer.capacity

    def records(self, start: int = 0, stop: int | None = None) -> NDArray[np.void]:
        """Committed frame records of slots [start, stop) that are not lost: what is there."""
        records = self._frames.read(start, self._frames.count if stop is None else stop)
        lost = (records["flags"] & FRAME_FLAG_LOST) != 0
        return records[~lost] if lost.any() else records

    def positions(self, start: int = 0, stop: int | None = None) -> NDArray[np.void]:
        """Position records [start, stop) written so far."""
        log = self._joins.positions
        return log.read(start, log.count if stop is None else stop)

    def pairs(self, start: int = 0, stop: int | None = None) -> NDArray[np.void]:
        """Pair records [start, stop) written so far."""
        log = self._joins.pairs
        return log.read(start, log.count if stop is None else stop)

    def next_buffer(self) -> NDArray[Any]:
        """Where the next frame (h, w) may be decoded to, for :meth:`append_buffered`.

        Raises:
            DiskFull: the buffer is full and cannot be committed.
            ScanSealed: the writer is closed.
        """
        if self._buffer.pending >= self._buffer.capacity or self._closed:
            self._make_room()
        return self._buffer.next()

    def append_buffered(
        self,
        number: int,
        received_ns: int,
        received_monotonic_ns: int,
        start_ns: int = -1,
        stop_ns: int = -1,
        flags: int = 0,
        i0: float = 0.0,
    ) -> int:
        """Take what was put into :meth:`next_buffer` as frame ``number``; returns its slot.

        Times are UTC nanoseconds but for ``received_monotonic_ns``; -1 is unknown. ``flags`` are
        ``FRAME_FLAG_...``, ``i0`` a reading of the beam monitor, 0 without one.
        """
        buffer = self._buffer
        slot = self._committed + buffer.pending
        buffer.take(slot, number, received_ns, received_monotonic_ns, start_ns, stop_ns, flags, i0)
        return slot

    def append(
        self,
        number: int,
        pixels: NDArray[Any],
        received_ns: int,
        received_monotonic_ns: int,
        start_ns: int = -1,
        stop_ns: int = -1,
        flags: int = 0,
        i0: float = 0.0,
    ) -> int:
        """Take a copy of ``pixels`` (h, w) as frame ``number``; returns its slot.

        Raises:
            StoreError: shape or dtype are not the scan's.
            DiskFull: the buffer is full and cannot be committed; the frame was not taken.
            ScanSealed: the writer is closed.
        """
        buffer = self.next_buffer()
        if pixels.shape != buffer.shape or pixels.dtype != buffer.dtype:
            raise StoreError(
                f"frame {number} is {pixels.dtype} {pixels.shape} and scan {self.scan_id} holds "
                f"{buffer.dtype} {buffer.shape}: begin a new scan for it"
            )
        np.copyto(buffer, pixels)
        return self.append_buffered(
            number, received_ns, received_monotonic_ns, start_ns, stop_ns, flags, i0
        )

    def append_positions(
        self,
        numbers: NDArray[np.int64],
        position_yx_m: NDArray[np.float64],
        received_ns: int,
        i0: NDArray[np.float64] | None = None,
        gate: NDArray[np.uint64] | None = None,
    ) -> None:
        """Log positions (n, 2) in metres of frames ``numbers`` (n,), as received.

        With them may come readings of the beam monitor (n,), 0 where there is none, and what is
        said of their gates (n,): ``POSITION_GATE_...``, 0 where nothing is.
        """
        self._joins.add_positions(numbers, position_yx_m, received_ns, i0, gate)

    def append_position(self, number: int, y_m: float, x_m: float, received_ns: int) -> None:
        """Log one position, of a frame that brought it along."""
        self._joins.add_position(number, y_m, x_m, received_ns)

    def append_pairs(self, pairs: NDArray[np.void]) -> None:
        """Log ``pairs`` (n,) of dtype ``PAIR_RECORD``; their slots may still be pending."""
        self._joins.add_pairs(pairs)

    def append_pair(
        self,
        number: int,
        slot: int,
        y_m: float,
        x_m: float,
        paired_monotonic_ns: int,
        revision: int = 0,
        flags: int = 0,
        i0: float = 0.0,
    ) -> None:
        """Log one pair: :meth:`append_pairs` without the price of an array."""
        self._joins.add_pair(number, slot, y_m, x_m, paired_monotonic_ns, revision, flags, i0)

    def commit(self) -> int:
        """Write all that is pending and show it to readers; returns the frames committed so far.

        Raises:
            DiskFull: there is no room; what was not written stays pending.
            StoreError: the disk failed.
        """
        self._joins.commit_positions()
        self._commit_frames()
        self._joins.commit_pairs()
        return self._committed

    def _commit_frames(self) -> None:
        while self._buffer.pending:
            self._commit_within_file()

    def _commit_within_file(self) -> None:
        index, within = divmod(self._committed, self._header.frames_per_file)
        count = min(self._buffer.pending, self._header.frames_per_file - within)
        if index != self._file_index:
            self._enter_file(index)
        pixels = self._buffer.first_pixels(count)
        fd = self._files.fd(index)
        with disk_errors(self._directory, len(pixels)):
            write_all(fd, pixels, within * self._header.frame_bytes)
        self._frames.append(self._buffer.first_records(count))
        self._committed += count
        self._counters.committed = self._committed
        self._buffer.drop_first(count)

    def _make_room(self) -> None:
        if self._closed:
            raise ScanSealed(f"scan {self.scan_id} is closed for writing")
        self.commit()

    def _enter_file(self, index: int) -> None:
        self._file_index = index
        stop = index + 1 + _FILES_AHEAD
        expected = self._header.expected_frames
        if expected is not None:
            stop = min(stop, -(-expected // self._header.frames_per_file))
        self._files.prepare(index, stop)

    def wait_prepared(self, timeout_s: float) -> bool:
        """Wait until the files to be prepared ahead are; False if they are not by then."""
        return self._files.wait_prepared(timeout_s)

    def sync(self) -> int:
        """Make all that is committed survive a power loss; returns the frames that do.

        May be called by another thread than the writer's, and does not hold up its commits.  On a
        closed writer there is nothing left to do.

        Raises:
            StoreError: the disk failed, now or in an earlier call; ``durable`` has not advanced.
        """
        with self._sync_lock:
            if self._closed:
                return 0
            if self._sync_failed:
                # The kernel reports lost pages once: a later fdatasync succeeds without them.
                raise StoreError(
                    f"an earlier sync of scan {self.scan_id} failed, so nobody knows what is on "
                    "the disk: close the scan and recover it"
                )
            self._sync_failed = True
            committed = self._sync_files()
            self._sync_failed = False
            self._counters.durable = committed
            return committed

    def _sync_files(self) -> int:
        committed, durable = self._committed, self._counters.durable
        if committed > durable:
            per_file = self._header.frames_per_file
            last, full = (committed - 1) // per_file, committed // per_file
            self._files.sync(durable // per_file, last, full)
            self._frames.sync()
        self._joins.sync()
        return committed

    def update_header(self, **changes: Any) -> None:
        """Replace fields of the header (views, metadata, expected_frames, ...).

        Raises:
            ScanSealed: the writer is closed, or ``state`` is one that :meth:`seal` sets.
            StoreError: a value makes no sense.
            DiskFull: there is no room for the new header.
        """
        if self._closed or changes.get("state") in SEALED_STATES:
            raise ScanSealed(f"scan {self.scan_id} is closed, or has to be by seal()")
        self._write_header(replace(self._header, **changes))

    def _write_header(self, header: ScanHeader) -> None:
        write_header(self._directory, header)
        self._header = header
        announce_change(self._root)

    def seal(self, state: ScanState, counts: Mapping[str, int], reason: str = "") -> ScanHeader:
        """End the scan: commit, sync, write the final accounting, close.

        On a full disk the space set aside for this moment is used; frames that still do not fit are
        dropped and added to ``dropped_disk_full``.  ``frames`` counts those that are stored.

        Returns:
            The final header.

        Raises:
            StoreError: ``state`` is none that a scan can end in, or the disk failed; the scan is
                closed but unsealed, and can be recovered.
            ScanSealed: the writer is closed already.
        """
        if state not in SEALED_STATES:
            raise StoreError(f"a scan cannot end {state}: say one of {sorted(SEALED_STATES)}")
        if self._closed:
            raise ScanSealed(f"scan {self.scan_id} is closed already")
        try:
            release_reserve(self._directory)
            pending = self._buffer.pending > 0 or self._joins.has_pending_pairs
            dropped = self._commit_or_drop()
            self.sync()
            with disk_errors(self._directory):  # nobody recovers a sealed scan
                sync_path(self._directory / COUNTERS_NAME)
            records = self.records()
            final = {**self._header.counts, **counts, "frames": len(records)}
            if pending and "positioned" in counts:  # what became of these is known only now
                final |= count_positioned(self._header, records, self.pairs())
            for name, number in dropped.items():
                final[name] = final.get(name, 0) + number
            header = replace(
                self._header, state=state, ended_ns=time.time_ns(), counts=final, reason=reason
            )
            self._write_header(header)
        finally:
            self._close(retire_unused_files=True)
        return header

    def _commit_or_drop(self) -> dict[str, int]:
        """Commit; what does not fit on the disk is dropped, and counted in what is returned."""
        try:
            self.commit()
        except DiskFull as error:
            _log.warning("scan %s drops its last frames: %s", self.scan_id, error)
        else:
            return {}
        frames = positions = pairs = 0
        try:
            self._commit_frames()
        except DiskFull:
            frames = self._buffer.pending
            self._buffer.drop_first(frames)
            self._joins.drop_pairs_from(self._committed)
        try:
            self._joins.commit_positions()
            self._joins.commit_pairs()
        except DiskFull:
            positions, pairs = self._joins.drop_pending()
        return {
            "dropped_disk_full": frames,
            "dropped_positions_disk_full": positions,
            "dropped_pairs_disk_full": pairs,
        }

    def close(self) -> None:
        """Commit and sync what is pending and let go of the scan, which stays unsealed.

        Raises:
            DiskFull: what is pending does not fit; the scan is closed nevertheless.
        """
        if self._closed:
            return
        try:
            self.commit()
            self.sync()
        finally:
            self._close(retire_unused_files=False)

    def _close(self, *, retire_unused_files: bool) -> None:
        with self._sync_lock:
            self._closed = True
            used = -(-self._committed // self._header.frames_per_file)
            try:
                self._files.close(keep=used if retire_unused_files else None)
            finally:
                self._frames.close()
                self._joins.close()
                self._counters.close()
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
