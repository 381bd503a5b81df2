"""One append-only log of fixed-size records: frames, positions or pairs of a scan.

The writer appends and syncs, readers read ranges of it, recovery cuts what is torn at its end.
Logs are read with ``pread`` and never mapped, so that cutting one is safe.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import StoreError
from ptycho_stream.scans.disk import disk_errors, read_up_to, write_all
from ptycho_stream.scans.records import stamp

FRAMES_LOG: Final = "frames.rec"
POSITIONS_LOG: Final = "positions.log"
PAIRS_LOG: Final = "pairs.log"


class AppendLog:
    """An open log.  ``count`` is the number of records appended or kept."""

    def __init__(self, path: Path, dtype: np.dtype[np.void], *, writable: bool) -> None:
        """Open ``path``; a writer creates it where it is missing.

        Raises:
            StoreError: it cannot be opened.
        """
        self._path = path
        self._dtype = dtype
        self.count = 0
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        try:
            self._fd = os.open(path, flags, 0o644)
        except OSError as error:
            raise StoreError(f"cannot open {path}: {error.strerror}") from error

    def append(self, records: NDArray[np.void]) -> None:
        """Stamp contiguous ``records`` and write them behind the last ones.

        Raises:
            DiskFull: there is no room; ``count`` is unchanged and the call can be repeated.
        """
        stamp(records)
        data = records.view(np.uint8).data
        with disk_errors(self._path, len(data)):
            write_all(self._fd, data, self.count * self._dtype.itemsize)
        self.count += len(records)

    def read(self, start: int, stop: int) -> NDArray[np.void]:
        """Records [start, stop), unchecked; those that the file does not hold whole are zeros.

        Raises:
            StoreError: the disk cannot read them.
        """
        records = np.zeros(max(stop - start, 0), self._dtype)
        if len(records):
            target = records.view(np.uint8).data
            try:
                read_up_to(self._fd, target, start * self._dtype.itemsize)
            except OSError as error:
                raise StoreError(f"cannot read {self._path}: {error.strerror}") from error
        return records

    def records_begun(self) -> int:
        """How many records the file holds, one that is not whole included."""
        return -(-os.fstat(self._fd).st_size // self._dtype.itemsize)

    def rewrite(self, index: int, records: NDArray[np.void]) -> None:
        """Stamp contiguous ``records`` and write them over those from ``index`` on.

        Raises:
            StoreError: the disk failed.
        """
        stamp(records)
        with disk_errors(self._path):
            write_all(self._fd, records.view(np.uint8).data, index * self._dtype.itemsize)

    def cut(self, count: int) -> int:
        """Keep ``count`` records and drop what follows; returns how many, begun ones included."""
        begun = self.records_begun()
        self.count = count
        with disk_errors(self._path):
            os.ftruncate(self._fd, count * self._dtype.itemsize)
        return max(begun - count, 0)

    def sync(self) -> None:
        """Make what was appended survive a power loss."""
        with disk_errors(self._path):
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
