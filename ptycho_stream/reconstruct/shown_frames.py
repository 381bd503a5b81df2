"""Which frames are in the image that subscribers see, in the order in which they came into it.

The network and refinement may get to a frame in any order; it is listed once, and never leaves the
list. Used by the scan image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.scans.records import positions_of


class ShownFrames:
    """Frames by the index of their pairs in the scan's log.

    Attributes:
        number: int64 (n,), of the frames.
        position_yx_m: float64 (n, 2).
        slot: int64 (n,), in the scan store.
    """

    def __init__(self) -> None:
        self.number = np.zeros(0, np.int64)
        self.position_yx_m = np.zeros((0, 2))
        self.slot = np.zeros(0, np.int64)
        self._listed = np.zeros(0, bool)

    def __len__(self) -> int:
        return len(self.number)

    def missing(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of ``indices`` (n,) that are not listed yet."""
        if len(indices) and indices.max() >= len(self._listed):
            grown = np.zeros(max(2 * len(self._listed), int(indices.max()) + 1), bool)
            grown[: len(self._listed)] = self._listed
            self._listed = grown
        return indices[~self._listed[indices]]

    def add(self, indices: NDArray[np.int64], pairs: NDArray[Any]) -> None:
        """List frames that :meth:`missing` named, whose ``pairs`` (n,) these are."""
        position_yx_m = positions_of(pairs)
        self.number = np.concatenate([self.number, pairs["number"].astype(np.int64)])
        self.position_yx_m = np.concatenate([self.position_yx_m, position_yx_m])
        self.slot = np.concatenate([self.slot, pairs["slot"].astype(np.int64)])
        self._listed[indices] = True
