"""Frames that were read once, kept up to a bound: each once, whatever is made of it.

Used by the raw data of a stored scan.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class FrameCache:
    """Amplitudes of frames by their row.

    Args:
        frames: M, how many rows there are.
        size_px: N.
        max_bytes: for frames; those that are read later are not kept.
    """

    def __init__(self, frames: int, size_px: int, max_bytes: int) -> None:
        room = min(frames, max_bytes // (4 * size_px**2))
        # Memory that is never written is never taken.
        self._held = np.empty((room, size_px, size_px), np.float32)
        self._place = np.full(frames, -1)
        self._used = 0

    @property
    def held_bytes(self) -> int:
        """Memory that kept frames use."""
        return self._held[: self._used].nbytes

    def get(
        self,
        rows: NDArray[np.int64],
        read: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        """Frames (n, N, N) of ``rows``, read with ``read`` where they are not held."""
        missing = np.unique(rows[self._place[rows] < 0])
        fresh = read(missing)
        kept = min(len(missing), len(self._held) - self._used)
        if kept:
            self._held[self._used : self._used + kept] = fresh[:kept]
            self._place[missing[:kept]] = np.arange(self._used, self._used + kept)
            self._used += kept
        out = np.empty((len(rows), *self._held.shape[1:]), np.float32)
        place = self._place[rows]
        held = place >= 0
        out[held] = self._held[place[held]]
        out[~held] = fresh[np.searchsorted(missing, rows[~held])]
        return out
