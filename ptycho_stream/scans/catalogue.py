"""All scans of a data directory: listing, leases, the retention limit, recovery after a crash.

Used by ingest (recovery, retention), reconstruct (which scans are there), control and the command
line.  Any number of processes may have one; what must not happen twice is under the store's lock.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ptycho_stream.atomic_file import sync_path
from ptycho_stream.errors import ScanLocked, ScanNotFound, StoreError
from ptycho_stream.geometry import View
from ptycho_stream.scans.counters import COUNTERS_NAME
from ptycho_stream.scans.creation import MAX_FRAME_BYTES, check_frame_size
from ptycho_stream.scans.disk import disk_errors
from ptycho_stream.scans.folders import announce_change, scan_directory, scans_directory
from ptycho_stream.scans.frame_ledger import FrameLedger
from ptycho_stream.scans.header import HEADER_NAME, ScanHeader, read_header, write_header
from ptycho_stream.scans.leases import Lease, live_holders
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.recovery import RecoveryReport, recover_files
from ptycho_stream.scans.retirement import directory_bytes, retire, sweep
from ptycho_stream.scans.scan_lock import ScanLock
from ptycho_stream.scans.spare import SpareFiles
from ptycho_stream.scans.ulid import is_scan_id
from ptycho_stream.scans.writer import ScanWriter

_log = logging.getLogger(__name__)

_LOCK_NAME: Final = ".lock"
_SPARE_SHARE: Final = 10
"""Spare files may take one in so many of the retention limit's bytes."""
_MAX_SPARE_BYTES: Final = 2**30


@dataclass(frozen=True, slots=True)
class Recovered:
    """A scan taken over from a writer that died; seal it or go on with it, then close it."""

    writer: ScanWriter
    report: RecoveryReport


@dataclass(frozen=True, slots=True)
class RetentionReport:
    """What enforcing the retention limit did.

    Attributes:
        deleted: ids of the scans deleted, oldest first.
        freed_bytes: given back to the disk; batch files kept as spares are not in it.
        kept_bytes: what the store takes now, spares included.
    """

    deleted: tuple[str, ...]
    freed_bytes: int
    kept_bytes: int


class Catalogue:
    """The scans under a data directory."""

    def __init__(self, root: Path, *, verify_reads: bool = False) -> None:
        """The catalogue of the data directory ``root``, which need not exist yet.

        ``verify_reads`` is handed on to the readers that :meth:`open` makes.
        """
        self._root = root
        self._verify_reads = verify_reads
        self._scans = scans_directory(root)
        self._seen_change: int | None = None
        self._headers: dict[str, tuple[tuple[int, int], ScanHeader]] = {}

    def changed(self) -> bool:
        """Whether :meth:`scans` may return something else than the last time: one ``stat``."""
        return self._change_time() != self._seen_change

    def _change_time(self) -> int | None:
        try:
            return self._scans.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def scans(self) -> list[ScanHeader]:
        """Headers of all scans, newest first; one that cannot be read is logged and left out."""
        self._seen_change = self._change_time()
        found: dict[str, tuple[tuple[int, int], ScanHeader]] = {}
        for scan_id in self.ids():
            try:
                found[scan_id] = self._header(scan_id)
            except ScanNotFound:  # deleted while we looked
                continue
            except StoreError as error:
                _log.warning("left out of the catalogue: %s", error)
        self._headers = found
        return [header for _, header in found.values()]

    def ids(self) -> list[str]:
        """Ids of all scans, newest first, also of those whose header cannot be read."""
        try:
            names = [path.name for path in self._scans.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(filter(is_scan_id, names), reverse=True)

    def _header(self, scan_id: str) -> tuple[tuple[int, int], ScanHeader]:
        directory = scan_directory(self._root, scan_id)
        try:
            status = (directory / HEADER_NAME).stat()
        except FileNotFoundError:
            raise ScanNotFound(f"there is no scan {scan_id}") from None
        identity = (status.st_ino, status.st_mtime_ns)
        known = self._headers.get(scan_id)
        return known if known and known[0] == identity else (identity, read_header(directory))

    def latest(self) -> ScanHeader | None:
        """The newest scan that is reconstructed; None if there is none."""
        return next((header for header in self.scans() if not header.detector), None)

    def directory(self, scan_id: str) -> Path:
        """The folder of a scan, which need not be there.

        Raises:
            ScanNotFound: ``scan_id``, which may come from outside, is not a scan's name.
        """
        return scan_directory(self._root, scan_id)

    def open(self, scan_id: str) -> ScanReader:
        """Open a scan for reading.

        Raises:
            ScanNotFound: there is no such scan.
            StoreError: it cannot be read.
        """
        return ScanReader.open(self._root, scan_id, verify_reads=self._verify_reads)

    def add_view(self, scan_id: str, view: View) -> ScanHeader:
        """Correct how the frames of a sealed scan are looked at; its frames stay as they are.

        Raises:
            ScanNotFound: there is no such scan.
            ScanLocked: it is being written; its writer has to do it.
            DiskFull: there is no room for the new header.
        """
        directory = scan_directory(self._root, scan_id)
        lock = ScanLock(directory)
        try:
            header = read_header(directory)
            header = replace(header, views=(*header.views, view))
            write_header(directory, header)
        finally:
            lock.release()
        announce_change(self._root)
        return header

    def lease(self, scan_id: str, holder: str) -> Lease:
        """Keep a scan from being deleted until the lease is released or this process ends.

        Raises:
            ScanNotFound: there is no such scan.
            StoreError: the holder's name is unusable, or the store cannot be written.
        """
        directory = scan_directory(self._root, scan_id)
        if not directory.is_dir():
            raise ScanNotFound(f"there is no scan {scan_id} in {self._scans}")
        with self._locked():
            return Lease(directory, holder)

    @contextmanager
    def _locked(self) -> Generator[None]:
        """Keep other processes from taking leases or retiring scans."""
        path = self._root / _LOCK_NAME
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(
                f"cannot lock the store with {path}: {error.strerror}; leases and retention need "
                "to write there"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def retain(self, max_bytes: int, ended_before_ns: int = 0) -> RetentionReport:
        """Delete sealed scans without a lease that are too old or too much.

        Those that ended before ``ended_before_ns`` (UTC), and then the oldest until the store takes
        ``max_bytes``. Their batch files are kept as spares as far as a tenth of the limit (at most
        1 GiB) goes.

        Raises:
            StoreError: a file cannot be deleted.
        """
        if not self._scans.is_dir():
            return RetentionReport((), 0, 0)
        with disk_errors(self._root):
            return self._retain(max_bytes, ended_before_ns)

    def _retain(self, max_bytes: int, ended_before_ns: int) -> RetentionReport:
        spare = SpareFiles(self._root)
        spare.make_directory()
        max_spare_bytes = min(max_bytes // _SPARE_SHARE, _MAX_SPARE_BYTES)
        freed = sweep(self._root) + spare.trim(max_spare_bytes)
        headers = self.scans()
        total = self._total_bytes(headers, spare)
        groups = _groups(headers)
        aged = [group for group in groups if _all_ended_before(group, ended_before_ns)]
        deleted, gained = self._delete_oldest(aged, math.inf, spare, max_spare_bytes)
        rest = [group for group in groups if group[0].scan_id not in deleted]
        excess = total - gained - max_bytes
        more, gained_more = self._delete_oldest(rest, excess, spare, max_spare_bytes)
        gained += gained_more
        return RetentionReport((*deleted, *more), freed + gained, total - gained)

    def make_room(self, wanted_bytes: int) -> RetentionReport:
        """Free so many bytes of the disk: spare files first, then the oldest scans.

        What is unsealed, leased, or the newest of all with what is beside it, is left alone, so it
        may come to less.

        Raises:
            StoreError: a file cannot be deleted.
        """
        if not self._scans.is_dir():
            return RetentionReport((), 0, 0)
        with disk_errors(self._root):
            spare = SpareFiles(self._root)
            spare.make_directory()
            freed = sweep(self._root)
            freed += spare.trim(max(spare.total_bytes() - max(wanted_bytes - freed, 0), 0))
            newest = self.latest()
            kept_id = "" if newest is None else newest.scan_id
            groups = [group for group in _groups(self.scans()) if group[0].scan_id != kept_id]
            deleted, gained = self._delete_oldest(groups, wanted_bytes - freed, spare, 0)
            kept = self._total_bytes(self.scans(), spare)
            return RetentionReport(tuple(deleted), freed + gained, kept)

    def _total_bytes(self, headers: list[ScanHeader], spare: SpareFiles) -> int:
        directories = (scan_directory(self._root, header.scan_id) for header in headers)
        return spare.total_bytes() + sum(map(directory_bytes, directories))

    def _delete_oldest(
        self,
        groups: list[list[ScanHeader]],
        wanted_bytes: float,
        spare: SpareFiles,
        max_spare_bytes: int,
    ) -> tuple[list[str], int]:
        """Delete groups until ``wanted_bytes`` are gained; which scans, and what was gained."""
        gained = 0
        deleted: list[str] = []
        for group in reversed(groups):
            if gained >= wanted_bytes:
                break
            try:
                locks = self._set_aside(group)
            except StoreError as error:  # of one scan, which must not keep all others
                _log.error("scan %s cannot be deleted: %s", group[0].scan_id, error)
                continue
            if locks is None:
                continue
            gained += self._retire(locks, spare) + spare.trim(max_spare_bytes)
            deleted += locks
        if deleted:
            announce_change(self._root)
        return deleted, gained

    def _set_aside(self, group: list[ScanHeader]) -> dict[str, ScanLock] | None:
        """Take a group out of the catalogue; None where one of it is open or leased.

        The locks that are returned keep :func:`sweep` of another process away from its scans.
        """
        if not all(header.sealed for header in group):
            return None
        locks: dict[str, ScanLock] = {}
        with self._locked(), ExitStack() as unwinding:
            for header in group:
                directory = scan_directory(self._root, header.scan_id)
                try:
                    lock = ScanLock(directory)
                except (ScanLocked, ScanNotFound):
                    return None
                unwinding.callback(lock.release)
                if live_holders(directory):
                    return None
                locks[header.scan_id] = lock
            for scan_id in locks:
                directory = scan_directory(self._root, scan_id)
                directory.rename(directory.with_name(f".old-{scan_id}"))
            unwinding.pop_all()
        return locks

    def _retire(self, locks: dict[str, ScanLock], spare: SpareFiles) -> int:
        """Delete scans that were set aside; returns the bytes that became free."""
        try:
            return sum(retire(self._root, scan_id, spare) for scan_id in locks)
        finally:
            for lock in locks.values():
                lock.release()

    def recover_all(
        self, wanted: Callable[[ScanHeader | None], bool] = lambda header: True
    ) -> tuple[list[Recovered], list[str]]:
        """Take over every unsealed scan whose writer is gone, newest first.

        The caller goes on with each, or seals it as interrupted.

        Args:
            wanted: which scans are the caller's to take over, or (None) to tell of because their
                headers cannot be read.

        Returns:
            The scans, and the ids of those that cannot be recovered: they are logged and left as
            they are, or sealed as interrupted where not even a later try could succeed.
        """
        recovered: list[Recovered] = []
        failed: list[str] = []
        for scan_id in self.ids():
            try:
                header = read_header(scan_directory(self._root, scan_id))
            except ScanNotFound:
                continue
            except StoreError as error:
                if wanted(None):
                    _log.error("scan %s cannot be recovered: %s", scan_id, error)
                    failed.append(scan_id)
                continue
            if header.sealed or not wanted(header):
                continue
            try:
                recovered.append(Recovered(*ScanWriter.recover(self._root, header.scan_id)))
            except ScanLocked:
                continue
            except (StoreError, OverflowError, ValueError, MemoryError) as error:
                _log.error("scan %s cannot be recovered: %s", header.scan_id, error)
                failed.append(header.scan_id)
                if header.frame_bytes > MAX_FRAME_BYTES:
                    self._seal_unopened(header, str(error))
        return recovered, failed

    def recover(self, scan_id: str) -> RecoveryReport:
        """Bring a scan that nobody writes to what is whole of it, and its header and counters too.

        One that is open is sealed as interrupted; the daemon does so by itself at its start.

        Raises:
            ScanNotFound: there is no such scan.
            ScanLocked: it is being written.
            StoreError: its header is damaged, or the disk refuses.
        """
        directory = scan_directory(self._root, scan_id)
        header = read_header(directory)
        if not header.sealed:
            writer, report = ScanWriter.recover(self._root, scan_id)
            with writer:
                ledger = FrameLedger()
                ledger.restore(writer.records()["number"])
                counts = {"missing": ledger.missing(), "torn": report.dropped_records}
                writer.seal("interrupted", counts, reason="its writer died; recovered by hand")
            return report
        lock = ScanLock(directory)
        try:
            check_frame_size(header)
            with disk_errors(directory):
                report = recover_files(directory, header)
                sync_path(directory / COUNTERS_NAME)
            counts = {**header.counts, "frames": report.whole_frames}
            write_header(directory, replace(header, counts=counts))
        finally:
            lock.release()
        announce_change(self._root)
        return report

    def beside(self, scan_id: str) -> list[str]:
        """Ids of the scans of stored detectors that belong to a scan, and are deleted with it."""
        return [header.scan_id for header in self.scans() if header.beside == scan_id]

    def delete(self, scan_id: str) -> tuple[list[str], int]:
        """Delete a sealed scan and those beside it; which they are, and what became free (bytes).

        Raises:
            ScanNotFound: there is no such scan.
            ScanLocked: one of them is open, or somebody holds a lease on it.
            StoreError: a file cannot be deleted.
        """
        directories = [scan_directory(self._root, s) for s in (scan_id, *self.beside(scan_id))]
        group = [read_header(directory) for directory in directories]
        locks = self._set_aside(group)
        if locks is None:
            states = ", ".join(f"scan {header.scan_id} is {header.state}" for header in group)
            holders = ", ".join(name for d in directories for name in live_holders(d))
            raise ScanLocked(
                f"{states} and in use"
                + (f" by {holders}" if holders else "")
                + ": wait until it is sealed and nobody works on it"
            )
        with disk_errors(self._root):
            freed = self._retire(locks, SpareFiles(self._root))
        announce_change(self._root)
        return list(locks), freed

    def _seal_unopened(self, header: ScanHeader, reason: str) -> None:
        directory = scan_directory(self._root, header.scan_id)
        sealed = replace(header, state="interrupted", ended_ns=time.time_ns(), reason=reason)
        try:
            lock = ScanLock(directory)
            try:
                write_header(directory, sealed)
            finally:
                lock.release()
        except StoreError as error:
            _log.error("scan %s cannot be sealed either: %s", header.scan_id, error)
            return
        announce_change(self._root)


def _groups(headers: Sequence[ScanHeader]) -> list[list[ScanHeader]]:
    """Each scan with those of stored detectors that are beside it; a lone one is its own group.

    They are deleted together.
    """
    groups = {header.scan_id: [header] for header in headers}
    for header in headers:
        if header.beside in groups:
            groups[header.beside] += groups.pop(header.scan_id)
    return list(groups.values())


def _all_ended_before(group: list[ScanHeader], time_ns: int) -> bool:
    return all(header.ended_ns is not None and header.ended_ns < time_ns for header in group)
