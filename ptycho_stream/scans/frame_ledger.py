"""Which frame numbers of a scan have come: tells duplicates, disorder and holes.

Used by the scan state machine for every frame, so it costs a fraction of a microsecond and two
bytes a number.  Numbers are absolute and may be sparse: a wild one costs a chunk of 256 bytes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_CHUNK_BITS: Final = 8
_CHUNK: Final = 1 << _CHUNK_BITS


class FrameLedger:
    """The set of frame numbers stored in one scan.

    Attributes:
        count: different numbers taken.
        highest: the largest number taken, -1 before the first.
        duplicate: numbers that came again.
        out_of_order: numbers that came after a larger one.
    """

    __slots__ = ("_chunks", "count", "duplicate", "highest", "out_of_order")

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray] = {}
        self.count = 0
        self.highest = -1
        self.duplicate = 0
        self.out_of_order = 0

    def __contains__(self, number: int) -> bool:
        chunk = self._chunks.get(number >> _CHUNK_BITS)
        return chunk is not None and chunk[number & (_CHUNK - 1)] != 0

    def take(self, number: int) -> bool:
        """Take a number; False, and counted, if it was there."""
        chunk = self._chunks.get(number >> _CHUNK_BITS)
        if chunk is None:
            chunk = self._chunks[number >> _CHUNK_BITS] = bytearray(_CHUNK)
        at = number & (_CHUNK - 1)
        if chunk[at]:
            self.duplicate += 1
            return False
        chunk[at] = 1
        self.count += 1
        if number > self.highest:
            self.highest = number
        else:
            self.out_of_order += 1
        return True

    def forget(self, number: int) -> None:
        """Take a number back: its frame could not be decoded and is a hole."""
        if number in self:
            self._chunks[number >> _CHUNK_BITS][number & (_CHUNK - 1)] = 0
            self.count -= 1

    def restore(self, numbers: NDArray[np.uint64]) -> None:
        """Take the numbers (n,) of a recovered scan, without counting their order anew."""
        for number in numbers.tolist():
            self.take(number)
        self.duplicate = self.out_of_order = 0

    def missing(self, expected: int | None = None) -> int:
        """Holes below the highest number, or below ``expected`` if that is more."""
        return max(self.highest + 1, expected or 0) - self.count
