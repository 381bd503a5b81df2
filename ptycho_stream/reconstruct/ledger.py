"""Which pairs (frame and position) of a scan are in an image, and in which order they came.

A set, not a cursor: pairs may be taken in any order.  Saved together with the canvas that the pairs
made, so that after a crash none is added twice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class PairLedger:
    """The set of pairs done, by their index in the scan's log of pairs.

    ``added`` are in the image, in order of arrival there; ``skipped`` were looked at and left out
    (flagged positions, damaged frames).
    """

    def __init__(
        self, added: NDArray[np.int64] | None = None, skipped: NDArray[np.int64] | None = None
    ) -> None:
        empty = np.empty(0, np.int64)
        self._added = [empty if added is None else added]
        self._skipped = [empty if skipped is None else skipped]
        self._done = np.zeros(1024, bool)
        self._all_done_below = 0
        self.count = 0
        for indices in (*self._added, *self._skipped):
            self._mark(indices)

    @property
    def added(self) -> NDArray[np.int64]:
        """Indices (n,) of the pairs in the image, in the order in which they were added."""
        return self._joined(self._added)

    @property
    def skipped(self) -> NDArray[np.int64]:
        """Indices (n,) of the pairs left out."""
        return self._joined(self._skipped)

    def pending(self, pair_count: int, limit: int) -> NDArray[np.int64]:
        """The first ``limit`` indices below ``pair_count`` that are not done."""
        self._grow(pair_count)
        low = self._all_done_below
        return low + np.flatnonzero(~self._done[low:pair_count])[:limit]

    def add(self, indices: NDArray[np.int64]) -> None:
        """Pairs that are in the image now."""
        self._added.append(indices)
        self._mark(indices)

    def skip(self, indices: NDArray[np.int64]) -> None:
        """Pairs that are left out for good."""
        self._skipped.append(indices)
        self._mark(indices)

    def _mark(self, indices: NDArray[np.int64]) -> None:
        if not len(indices):
            return
        self._grow(int(indices.max()) + 1)
        self._done[indices] = True
        self.count += len(indices)
        gaps = np.flatnonzero(~self._done[self._all_done_below :])
        self._all_done_below += int(gaps[0]) if len(gaps) else 0

    def _grow(self, length: int) -> None:
        # Always one undone entry past the end, so that _mark finds where the done ones stop.
        if length >= len(self._done):
            grown = np.zeros(max(2 * len(self._done), length + 1), bool)
            grown[: len(self._done)] = self._done
            self._done = grown

    @staticmethod
    def _joined(chunks: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        chunks[:] = [np.concatenate(chunks)]
        return chunks[0]
