"""Leases: whoever still needs a scan keeps the retention limit from deleting it.

A lease is a file in the scan's folder, named after its holder and locked by it; the kernel drops
the lock when the holder dies, so that no lease outlives its process.  Taken by readers that work
on a scan for long (reconstruct, export, training).
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Self

from ptycho_stream.errors import ScanNotFound, StoreError
from ptycho_stream.scans.ulid import new_scan_id

_HOLDER = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PREFIX = "lease-"


class Lease:
    """A held lease; ends with :meth:`release`, its context, or its process."""

    def __init__(self, directory: Path, holder: str) -> None:
        """Take a lease on the scan in ``directory``.

        Args:
            directory: the scan's folder.
            holder: who holds it, for people (letters, digits, ``-`` and ``_``).

        Raises:
            ScanNotFound: the scan is gone.
            StoreError: the holder's name cannot be part of a file's name, or the folder cannot be
                written.
        """
        if not _HOLDER.fullmatch(holder):
            raise StoreError(f"lease holder {holder!r}: use letters, digits, - and _ only")
        self._path = directory / f"{_PREFIX}{holder}-{os.getpid()}-{new_scan_id()}"
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:
            raise ScanNotFound(f"there is no scan {directory.name}: it was deleted") from None
        except OSError as error:
            raise StoreError(f"cannot take a lease {self._path}: {error.strerror}") from error
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def release(self) -> None:
        """Give the lease back; a second time does nothing."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def live_holders(directory: Path) -> list[str]:
    """Holders of leases on the scan in ``directory``; those left by dead processes are removed.

    The caller keeps new leases from being taken meanwhile (the catalogue's lock).
    """
    holders: list[str] = []
    for path in sorted(directory.glob(f"{_PREFIX}*")):
        try:
            fd = os.open(path, os.O_RDWR)
        except FileNotFoundError:  # just given back
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            holders.append(path.name.removeprefix(_PREFIX).rsplit("-", 2)[0])
        finally:
            os.close(fd)
    return holders
