"""How far a scan has come: a page of 64-bit counters that its writer and all readers map.

The writer advances ``committed`` after a frame's data and record are written and ``durable`` after
both are synced; readers in other processes poll them for the price of a memory access.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

from ptycho_stream.errors import StoreError
from ptycho_stream.scans.disk import allocate

COUNTERS_NAME: Final = "counters"
_MAGIC: Final = int.from_bytes(b"PTYCNT01", "little")
_SIZE_BYTES: Final = 4096

_MAGIC_AT, _COMMITTED, _DURABLE, _POSITIONS, _PAIRS, _RECOVERIES, _DURABLE_CHECK = range(7)
_ALL_BITS: Final = (1 << 64) - 1


class Counters:
    """The counters file, mapped.  Every counter is one aligned 8-byte store or load.

    The order of stores that x86 guarantees (data before counter) is relied upon; on other machines
    a reader may meet a record whose check fails and has to look again.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Map ``path``; a writer creates it where it is missing or was never finished.

        Raises:
            StoreError: a reader meets a file that is missing, short or of another format.
        """
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        try:
            fd = os.open(path, flags, 0o644)
        except OSError as error:
            raise StoreError(f"cannot open {path}: {error.strerror}") from error
        try:
            if writable:
                allocate(fd, _SIZE_BYTES, path)
            elif os.fstat(fd).st_size < _SIZE_BYTES:  # to map it would be a SIGBUS
                raise StoreError(f"{path} is cut short: recover the scan")
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(fd, _SIZE_BYTES, access=access)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        if self._words[_MAGIC_AT] != _MAGIC:
            if not writable:
                self.close()
                raise StoreError(f"{path} is not a counters file: recover the scan")
            for index in range(_DURABLE_CHECK + 1):
                self._words[index] = 0
            self._words[_MAGIC_AT] = _MAGIC

    @property
    def committed(self) -> int:
        """Frames that readers may see."""
        return self._words[_COMMITTED]

    @committed.setter
    def committed(self, value: int) -> None:
        self._words[_COMMITTED] = value

    @property
    def durable(self) -> int:
        """Frames that a power loss cannot take."""
        return self._words[_DURABLE]

    @durable.setter
    def durable(self, value: int) -> None:
        self._words[_DURABLE] = value
        self._words[_DURABLE_CHECK] = value ^ _ALL_BITS

    @property
    def surely_durable(self) -> int:
        """``durable``, or 0 where its complement beside it says otherwise.

        That is after a kill between the two stores, or where a bit has changed on the disk: what
        relies on this looks at more frames than it must, never at fewer.
        """
        durable = self._words[_DURABLE]
        return durable if self._words[_DURABLE_CHECK] == durable ^ _ALL_BITS else 0

    @property
    def positions(self) -> int:
        """Position records that readers may see."""
        return self._words[_POSITIONS]

    @positions.setter
    def positions(self, value: int) -> None:
        self._words[_POSITIONS] = value

    @property
    def pairs(self) -> int:
        """Pair records that readers may see."""
        return self._words[_PAIRS]

    @pairs.setter
    def pairs(self, value: int) -> None:
        self._words[_PAIRS] = value

    @property
    def recoveries(self) -> int:
        """How often the scan was recovered; readers reopen its logs when this changes."""
        return self._words[_RECOVERIES]

    @recoveries.setter
    def recoveries(self, value: int) -> None:
        self._words[_RECOVERIES] = value

    def close(self) -> None:
        """Unmap."""
        self._words.release()
        self._map.close()
