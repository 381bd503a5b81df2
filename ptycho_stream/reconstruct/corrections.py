"""Corrected positions: which pairs of a scan were superseded by a later one for the same frame.

A frame is in an image once, at one place.  A correction that comes after its frame was stitched
waits for the next generation, which takes the newest pair of each frame only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.scans.reader import ScanReader


class Corrections:
    """The pairs with a revision above 0, found as the log of pairs grows."""

    def __init__(self, reader: ScanReader) -> None:
        self._reader = reader
        self._indices: list[int] = []
        self._slots: list[int] = []
        self._looked_at = 0

    def look(self) -> None:
        """Take in what has been added to the log."""
        count = self._reader.pair_count
        if count == self._looked_at:
            return
        pairs = self._reader.pairs(self._looked_at, count)
        revised = np.flatnonzero(pairs["revision"])
        self._indices += (self._looked_at + revised).tolist()
        self._slots += pairs["slot"][revised].tolist()
        self._looked_at = count

    def any_from(self, index: int) -> bool:
        """Whether a pair at ``index`` or later corrects an earlier one."""
        return bool(self._indices) and self._indices[-1] >= index

    def usable(
        self, indices: NDArray[np.int64], pairs: NDArray[Any], below: int
    ) -> NDArray[np.bool_]:
        """Which of ``pairs`` (B,) belong into an image that knows corrections ``below`` an index.

        Those that were not superseded below it, and that correct nothing themselves beyond it.
        """
        newest = {
            slot: index
            for index, slot in zip(self._indices, self._slots, strict=True)
            if index < below
        }
        late = (pairs["revision"] > 0) & (indices >= below)
        if not newest:
            return ~late
        superseded = [
            newest.get(slot, index) != index
            for index, slot in zip(indices.tolist(), pairs["slot"].tolist(), strict=True)
        ]
        return ~late & ~np.array(superseded)
