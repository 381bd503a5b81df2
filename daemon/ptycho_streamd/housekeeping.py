"""What ingest does beside the stream, in a thread of its own: sync, retention, room on the disk.

All of it waits for disks, none of it may make the stream wait.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from ptycho_stream.errors import StoreError
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.writer import ScanWriter
from ptycho_stream.settings import DataSettings

ROOM_INTERVAL_S = 0.5
RETENTION_INTERVAL_S = 30.0
FULL_INTERVAL_S = 5.0
"""Where nothing could be deleted, before it is tried again."""
STEADY_CLOCK_S = 3600.0
"""No scan is deleted for its age before the clock has been right for so long: one that is set to
another year for a moment must not cost all scans."""
CLOCK_STEP_S = 60.0
DAY_NS = 86_400 * 10**9
log = logging.getLogger(__name__)


class Housekeeper:
    """Keeps the store while ingest writes; use as a context manager.

    Args:
        settings: of the store.
        deletes: whether it is this one that deletes old scans; one process is enough.

    Attributes:
        settings: may be replaced at any time.
        free_bytes: on the disk of the store, half a second old at most; what could be deleted for
            ``data.min_free_bytes`` is gone already.
    """

    def __init__(self, settings: DataSettings, *, deletes: bool = True) -> None:
        self.settings = settings
        self._deletes = deletes
        self._root: Path = settings.directory
        self._catalogue = Catalogue(self._root)
        self._lock = threading.Lock()
        self._writers: dict[str, ScanWriter] = {}
        self._failures: dict[str, str] = {}
        self._wake = threading.Event()
        self._closed = False
        self._ended = ""
        self._retain_at_s = 0.0
        self._room_at_s = 0.0
        self._make_room_at_s = 0.0
        self._clock_ahead_s = time.time() - time.monotonic()
        self._age_counts_at_s = time.monotonic() + STEADY_CLOCK_S
        self._root.mkdir(parents=True, exist_ok=True)
        self.free_bytes = self._room()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def __enter__(self) -> Housekeeper:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()

    def attach(self, writer: ScanWriter) -> None:
        """Sync a scan from now on."""
        with self._lock:
            self._writers[writer.scan_id] = writer

    def detach(self, scan_id: str) -> None:
        """A scan is sealed; there may be something to retire."""
        with self._lock:
            self._writers.pop(scan_id, None)
        self._retain_at_s = self._make_room_at_s = 0.0

    def take_failures(self) -> dict[str, str]:
        """Scans that could not be synced, and why, since the last call."""
        with self._lock:
            failures, self._failures = self._failures, {}
        return failures

    def check(self) -> None:
        """Make sure that the thread runs; call now and then.

        Raises:
            StoreError: it has ended, and nothing is synced any more: the process must be started
                again.
        """
        if self._ended:
            raise StoreError(f"frames are not synced to the disk any more: {self._ended}")

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            log.exception("housekeeping ends")
            self._ended = repr(error)

    def _work(self) -> None:
        while not self._wake.wait(self.settings.sync_interval_ms / 1e3):
            self._sync()
            now_s = time.monotonic()
            if now_s >= self._room_at_s:
                self._room_at_s = now_s + ROOM_INTERVAL_S
                self.free_bytes = self._room()
            if self._deletes and now_s >= self._retain_at_s:
                self._retain_at_s = now_s + RETENTION_INTERVAL_S
                self._retain(self.settings.retention_bytes, self._ended_before_ns())

    def _sync(self) -> None:
        with self._lock:
            writers = list(self._writers.values())
        for writer in writers:
            if self._closed:
                return
            try:
                writer.sync()
            except StoreError as error:
                with self._lock:
                    if self._writers.pop(writer.scan_id, None) is not None:
                        self._failures[writer.scan_id] = str(error)

    def _room(self) -> int:
        """Bytes that are free, after old scans have made room if there were too few."""
        free = self._free()
        wanted = self.settings.min_free_bytes - free
        if wanted <= 0 or not self._deletes or time.monotonic() < self._make_room_at_s:
            return free
        try:
            report = self._catalogue.make_room(wanted)
        except StoreError as error:
            log.error("no room could be made on the disk: %s", error)
            self._make_room_at_s = time.monotonic() + FULL_INTERVAL_S
            return free
        for scan_id in report.deleted:
            log.warning("scan %s was deleted: less than data.min_free_bytes were free", scan_id)
        if report.freed_bytes < wanted:
            self._make_room_at_s = time.monotonic() + FULL_INTERVAL_S
        return self._free()

    def _ended_before_ns(self) -> int:
        """Before when a scan has ended that is too old; 0: none is."""
        ahead_s, now_s = time.time() - time.monotonic(), time.monotonic()
        if abs(ahead_s - self._clock_ahead_s) > CLOCK_STEP_S:
            log.warning("the clock was set by %.0f s", ahead_s - self._clock_ahead_s)
            self._age_counts_at_s = now_s + STEADY_CLOCK_S
        self._clock_ahead_s = ahead_s
        days = self.settings.retention_days
        if days is None or now_s < self._age_counts_at_s:
            return 0
        return time.time_ns() - int(days * DAY_NS)

    def _retain(self, max_bytes: int, ended_before_ns: int) -> None:
        try:
            report = self._catalogue.retain(max_bytes, ended_before_ns)
        except StoreError as error:
            log.error("the retention limit could not be enforced: %s", error)
            return
        for scan_id in report.deleted:
            log.info(
                "scan %s was deleted: over data.retention_bytes or data.retention_days", scan_id
            )

    def _free(self) -> int:
        figures = os.statvfs(self._root)
        return figures.f_bavail * figures.f_frsize
