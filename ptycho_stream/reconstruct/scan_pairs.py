"""The pairs of one scan as an image takes them: read by index, and which of them can be in it.

Used by the scan's image, and by helpers that predict a part of it in processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.reconstruct.corrections import Corrections
from ptycho_stream.reconstruct.generation import Generation, GenerationIdentity
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.viewed_scan import ViewedScan

_GAP = 256
"""Pairs that lie closer in the log are read at once."""


class ScanPairs:
    """The log of pairs of ``reader``'s scan.

    Attributes:
        corrections: which pairs correct an earlier one, as far as was looked at.
    """

    def __init__(self, reader: ScanReader) -> None:
        self._reader = reader
        self._viewed = ViewedScan(reader)
        self.corrections = Corrections(reader)

    @property
    def viewed(self) -> ViewedScan:
        """The scan as its frames are looked at now."""
        if not self._viewed.is_current:
            self._viewed = ViewedScan(self._reader)
        return self._viewed

    def at(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Records (n,) of the log at ``indices`` (n,), in any order; read run by run."""
        if not len(indices):
            return self._reader.pairs(0, 0)
        wanted, back = np.unique(indices, return_inverse=True)
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > _GAP) + 1)
        found = [self._reader.pairs(int(r[0]), int(r[-1]) + 1)[r - r[0]] for r in runs]
        return np.concatenate(found)[back]

    def usable(
        self, identity: GenerationIdentity, indices: NDArray[np.int64], pairs: NDArray[Any]
    ) -> tuple[NDArray[np.bool_], list[int]]:
        """Which pairs (n,) can be in an image of ``identity``; and the slots of damaged frames."""
        usable = self.viewed.usable(pairs)
        damaged = self._reader.verify(pairs["slot"]) if len(pairs) else []
        usable &= ~np.isin(pairs["slot"], damaged)
        usable &= self.corrections.usable(indices, pairs, identity.corrected_below)
        return usable, damaged

    def sift(
        self,
        target: Generation,
        indices: NDArray[np.int64],
        on_damaged: Callable[[list[int]], None],
    ) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Of ``indices`` (n,) those that can be in ``target``, and their pairs; it skips the rest.

        ``on_damaged`` is told the slots of frames that fail their checksum.
        """
        pairs = self.at(indices)
        if not len(indices):
            return indices, pairs
        usable, damaged = self.usable(target.identity, indices, pairs)
        if damaged:
            on_damaged(damaged)
        target.ledger.skip(indices[~usable])
        return indices[usable], pairs[usable]
