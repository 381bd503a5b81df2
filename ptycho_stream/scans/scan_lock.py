"""The lock that makes a scan have one writer: an exclusive ``flock`` on a file in its folder.

The kernel drops it when its holder dies, however it dies.  Taken by the writer for its lifetime,
and by the catalogue for the moment in which it retires a scan or corrects its view.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from ptycho_stream.errors import ScanLocked, ScanNotFound, StoreError
from ptycho_stream.scans.disk import disk_errors

LOCK_NAME: Final = "lock"
_PID_DIGITS: Final = 10


class ScanLock:
    """Exclusive ownership of a scan's folder until :meth:`release`."""

    def __init__(self, directory: Path) -> None:
        """Take the lock without waiting.

        Raises:
            ScanLocked: another process (or another object in this one) has it.
            ScanNotFound: there is no such folder.
            DiskFull: there is no room even for the lock.
            StoreError: the operating system refused otherwise.
        """
        path = directory / LOCK_NAME
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, NotADirectoryError):
            raise ScanNotFound(f"there is no scan {directory.name} in {directory.parent}") from None
        except OSError as error:
            raise StoreError(f"cannot lock {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, _PID_DIGITS, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise ScanLocked(
                f"scan {directory.name} in {directory.parent} is being written by process "
                f"{holder or '(unknown)'}: stop that one first"
            ) from None
        try:
            # Of one width, so that to write it again takes no new room on a full disk.
            with disk_errors(path, _PID_DIGITS):
                os.pwrite(self._fd, b"%*d" % (_PID_DIGITS, os.getpid()), 0)
        except StoreError:
            os.close(self._fd)
            raise

    def release(self) -> None:
        """Let others have the scan."""
        os.close(self._fd)
