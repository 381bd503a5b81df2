"""The batch files of a scan as its writer sees them: allocated, touched and opened before need.

A thread works ahead of the writer from the scan's creation on: it takes a spare file or allocates a
new one, and reads it once, so that its pages are in memory when frames come (a write into pages
never touched is 10 to 30 times slower on a virtual machine).  Reading, not writing: the pages stay
clean and are not written to the disk twice.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Final

from ptycho_stream.atomic_file import sync_path
from ptycho_stream.errors import StoreError
from ptycho_stream.scans.disk import allocate, disk_errors
from ptycho_stream.scans.spare import SpareFiles

_log = logging.getLogger(__name__)

_TOUCH_BYTES: Final = 2**20


def batch_file_name(index: int) -> str:
    """Name of the batch file that holds slots [index * frames_per_file, ...)."""
    return f"frames-{index:06d}.bin"


class BatchFiles:
    """Open batch files of one scan.  :meth:`fd` is the writer's, :meth:`sync` any thread's."""

    def __init__(self, directory: Path, spare: SpareFiles, file_bytes: int) -> None:
        self._directory = directory
        self._spare = spare
        self._file_bytes = file_bytes
        self._fds: dict[int, int] = {}
        self._making = threading.Lock()
        self._new_names: list[str] = []  # not yet synced in the directory
        self._wake = threading.Condition()
        self._current = 0  # the file that the writer is in
        self._ahead_to = 0  # files below this index are to be prepared
        self._touched_to = 0  # files below this index are prepared
        self._stalled = False  # the disk was full when the thread last tried
        self._closing = False
        self._thread: threading.Thread | None = None

    def fd(self, index: int) -> int:
        """Descriptor of batch file ``index``, which is allocated here if it is not yet.

        Raises:
            DiskFull: there is no room for it.
        """
        fd = self._fds.get(index)
        return self._make(index) if fd is None else fd

    def prepare(self, current: int, stop: int) -> None:
        """Let the thread prepare files up to ``stop`` (exclusive); the writer is at ``current``."""
        with self._wake:
            self._current = current
            self._ahead_to = max(stop, self._ahead_to)
            self._stalled = False
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work_ahead, name="batch-files", daemon=True
                )
                self._thread.start()
            self._wake.notify_all()

    def wait_prepared(self, timeout_s: float) -> bool:
        """Wait until the files asked for are prepared; False if they are not by then."""
        with self._wake:
            return self._wake.wait_for(self._nothing_to_prepare, timeout_s)

    def sync(self, first: int, last: int, full: int) -> None:
        """Make files ``first`` to ``last`` (inclusive) survive a power loss.

        Those below ``full``, which are written to their ends, are closed then.

        Raises:
            StoreError: the disk failed.
        """
        with disk_errors(self._directory):
            if self._new_names:
                names, self._new_names = self._new_names, []
                try:
                    sync_path(self._directory)
                except OSError:
                    self._new_names += names
                    raise
            for index in range(first, last + 1):
                os.fdatasync(self.fd(index))
        with self._making:
            for index in [i for i in self._fds if i < full]:
                os.close(self._fds.pop(index))

    def close(self, keep: int | None = None) -> None:
        """End the thread and close the files; those from ``keep`` on are given to the spares."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        for index in list(self._fds):
            os.close(self._fds.pop(index))
        if keep is not None:
            with disk_errors(self._directory):
                for path in self._directory.glob("frames-*.bin"):
                    if path.name >= batch_file_name(keep):
                        self._spare.put(path)

    def _make(self, index: int) -> int:
        with self._making:
            if index in self._fds:
                return self._fds[index]
            path = self._directory / batch_file_name(index)
            # A file has its name only once it has its size: whoever can open it may map it whole.
            new = path.with_suffix(".new")
            with disk_errors(path, self._file_bytes):
                source = path if path.exists() else new
                if source is new:
                    self._spare.take(self._file_bytes, new)
                fd = os.open(source, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                allocate(fd, self._file_bytes, path)
            except StoreError:
                os.close(fd)
                new.unlink(missing_ok=True)
                raise
            if source is new:
                new.rename(path)
                self._new_names.append(path.name)
            self._fds[index] = fd
            return fd

    def _work_ahead(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._should_go_on)
                if self._closing:
                    return
                index = max(self._touched_to, self._current)
            try:
                self._make(index)
                self._touch(index)
            except StoreError as error:
                # The writer meets the same when it needs the file, and can tell somebody.
                _log.warning("cannot prepare files ahead: %s", error)
                with self._wake:
                    self._stalled = True
                continue
            with self._wake:
                self._touched_to = index + 1
                self._wake.notify_all()

    def _nothing_to_prepare(self) -> bool:
        return max(self._touched_to, self._current) >= self._ahead_to

    def _should_go_on(self) -> bool:
        return self._closing or not (self._stalled or self._nothing_to_prepare())

    def _touch(self, index: int) -> None:
        """Read a file once, for its pages; given up when the writer gets there."""
        path = self._directory / batch_file_name(index)
        scratch = bytearray(min(_TOUCH_BYTES, self._file_bytes))
        # Opened anew, because sync() closes the writer's descriptor when it is done with the file.
        with disk_errors(path), path.open("rb", buffering=0) as file:
            while not self._closing and self._current <= index and file.readinto(scratch):
                pass
