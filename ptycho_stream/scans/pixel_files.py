"""Stored pixels read from the disk instead of mapped, and compared with their checksums.

A map of a file that was cut short, or that lies on a bad sector, ends the process that touches it;
a read says what is wrong.  Used by recovery, by :meth:`ScanReader.verify` and by readers that check
all that they hand out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ptycho_stream.scans.batch_files import batch_file_name
from ptycho_stream.scans.disk import read_up_to
from ptycho_stream.scans.header import ScanHeader


class PixelFiles:
    """The batch files of one scan, one of them open at a time; use as a context manager."""

    def __init__(self, directory: Path, header: ScanHeader) -> None:
        self._directory = directory
        self._header = header
        self._index = -1
        self._fd: int | None = None

    def __enter__(self) -> PixelFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, slot: int, pixels: NDArray[Any], checksum: int) -> bool:
        """Read the frame in ``slot`` into ``pixels`` (h, w); whether it is whole.

        It is not where its checksum is another, the file is missing or ends before, or the disk
        cannot read it.
        """
        index, within = divmod(slot, self._header.frames_per_file)
        target = pixels.reshape(-1).view(np.uint8).data
        try:
            fd = self._open(index)
            there = read_up_to(fd, target, within * self._header.frame_bytes)
        except OSError:
            return False
        return there == len(target) and xxhash.xxh3_64_intdigest(target) == checksum

    def _open(self, index: int) -> int:
        if self._fd is None or index != self._index:
            self._close()
            self._fd = os.open(self._directory / batch_file_name(index), os.O_RDONLY)
            self._index = index
        return self._fd

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def frame_room(header: ScanHeader) -> NDArray[Any]:
    """Room for one frame (h, w)."""
    return np.empty(header.frame_shape_yx, header.dtype)
