"""Which pairs (frame and position) of a scan are in an image, and in which order they came.

A set, not a cursor: pairs may be taken in any order.  Saved together with the canvas that the pairs
made, so that after a crash none is added twice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0.6180339887
"""Steps of this share of a gap fall into every gap's largest rest (a Kronecker sequence)."""


class PairLedger:
    """The set of pairs done, by their index in the scan's log of pairs.

    ``added`` are in the image, in order of arrival there; ``skipped`` were looked at and left out
    (flagged positions, damaged frames); ``waiting`` were looked at and wait for the rest of their
    group. Pairs that are lent to another process are offered to nobody else; they are not saved,
    so that after a restart they are done again.

    Attributes:
        count: how many are done, added or skipped.
    """

    def __init__(
        self,
        added: NDArray[np.int64] | None = None,
        skipped: NDArray[np.int64] | None = None,
        waiting: NDArray[np.int64] | None = None,
    ) -> None:
        empty = np.empty(0, np.int64)
        self._added = [empty if added is None else added]
        self._skipped = [empty if skipped is None else skipped]
        self._waiting: set[int] = set()
        self._lent: list[NDArray[np.int64]] = []
        self._taken = np.zeros(1024, bool)
        self._all_taken_below = 0
        self._offered_below = 0
        self._phase = 0.0
        self.count = 0
        for indices in (*self._added, *self._skipped):
            self._done(indices)
        if waiting is not None:
            self.wait(waiting)

    @property
    def added(self) -> NDArray[np.int64]:
        """Indices (n,) of the pairs in the image, in the order in which they were added."""
        return self._joined(self._added)

    @property
    def skipped(self) -> NDArray[np.int64]:
        """Indices (n,) of the pairs left out."""
        return self._joined(self._skipped)

    @property
    def waiting(self) -> NDArray[np.int64]:
        """Indices (n,) of the pairs that wait for the rest of their group, ascending."""
        return np.array(sorted(self._waiting), np.int64)

    @property
    def waiting_count(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def lent_count(self) -> int:
        """How many are lent."""
        return sum(map(len, self._lent))

    @property
    def taken(self) -> int:
        """How many were looked at: done or waiting."""
        return self.count + len(self._waiting)

    @property
    def offered_below(self) -> int:
        """Of all pairs below, some were offered to the network, spread over them."""
        return max(self._offered_below, self._all_taken_below)

    def pending(self, pair_count: int, limit: int) -> NDArray[np.int64]:
        """The first ``limit`` indices below ``pair_count`` that were not looked at."""
        self._grow(pair_count)
        low = self._all_taken_below
        return low + np.flatnonzero(~self._taken[low:pair_count])[:limit]

    def spread(self, pair_count: int, limit: int) -> NDArray[np.int64]:
        """Up to ``limit`` indices below ``pair_count`` that were not looked at, ascending.

        Where there are more, those that came since the last call go first, evenly thinned out, so
        that a network that cannot keep up covers the whole scan; what it leaves out follows when
        there is time.
        """
        waiting = self.pending(pair_count, pair_count)
        if len(waiting) > limit:
            at = int(np.searchsorted(waiting, self._offered_below))
            fresh = _evenly(waiting[at:], limit, 1.0)
            self._phase = (self._phase + _GOLDEN) % 1
            older = _evenly(waiting[:at], limit - len(fresh), self._phase)
            waiting = np.concatenate([older, fresh])
        self._offered_below = pair_count
        return waiting

    def add(self, indices: NDArray[np.int64]) -> None:
        """Pairs that are in the image now."""
        self._added.append(indices)
        self._done(indices)

    def skip(self, indices: NDArray[np.int64]) -> None:
        """Pairs that are left out for good."""
        self._skipped.append(indices)
        self._done(indices)

    def wait(self, indices: NDArray[np.int64]) -> None:
        """Pairs that wait for the rest of their group."""
        self._waiting.update(indices.tolist())
        self._take(indices)

    def lend(self, indices: NDArray[np.int64]) -> None:
        """Pairs that another process works on."""
        self._lent.append(indices)
        self._take(indices)

    def has_lent(self, indices: NDArray[np.int64]) -> bool:
        """Whether this very array was lent here, and not taken back yet.

        Equal ones may have been lent by a former image of the scan.
        """
        return any(lent is indices for lent in self._lent)

    def take_back(self, indices: NDArray[np.int64]) -> None:
        """Pairs that were lent, and are offered again."""
        self._lent = [lent for lent in self._lent if lent is not indices]
        self._taken[indices] = False
        if len(indices):
            self._all_taken_below = min(self._all_taken_below, int(indices.min()))

    def _done(self, indices: NDArray[np.int64]) -> None:
        if self._waiting:
            self._waiting.difference_update(indices.tolist())
        self.count += len(indices)
        self._take(indices)

    def _take(self, indices: NDArray[np.int64]) -> None:
        if not len(indices):
            return
        self._grow(int(indices.max()) + 1)
        self._taken[indices] = True
        gaps = np.flatnonzero(~self._taken[self._all_taken_below :])
        self._all_taken_below += int(gaps[0]) if len(gaps) else 0

    def _grow(self, length: int) -> None:
        # Always one entry past the end that is not taken, so that _take finds where they stop.
        if length >= len(self._taken):
            grown = np.zeros(max(2 * len(self._taken), length + 1), bool)
            grown[: len(self._taken)] = self._taken
            self._taken = grown

    @staticmethod
    def _joined(chunks: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        chunks[:] = [np.concatenate(chunks)]
        return chunks[0]


def _evenly(values: NDArray[np.int64], most: int, phase: float) -> NDArray[np.int64]:
    """All of ``values``, or ``most`` of them at even distances.

    ``phase`` in [0, 1] says where between two of them the choice lies; at 1 the last is chosen.
    """
    if len(values) <= most:
        return values
    at = (np.arange(most) + phase) * (len(values) / max(most, 1))
    # Rounding may carry the last one past the end.
    return values[np.clip(np.ceil(at).astype(np.int64) - 1, 0, len(values) - 1)]
