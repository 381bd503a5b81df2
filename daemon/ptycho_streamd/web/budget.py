"""How much a page may be sent: so many bytes a second, with some saved up for a new picture."""

from __future__ import annotations

SAVED_S = 5.0
"""A page that was sent little for so long may be sent as much at once."""


class Budget:
    """Bytes that may be sent.

    Args:
        bytes_per_s: that are added; at first as many are there as may ever be saved.
        now_s: monotonic time.
    """

    def __init__(self, bytes_per_s: float, now_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._left = bytes_per_s * SAVED_S
        self._at_s = now_s

    def left(self, now_s: float) -> float:
        """How many may be sent now; below zero if too many were."""
        most = self._bytes_per_s * SAVED_S
        self._left = min(self._left + (now_s - self._at_s) * self._bytes_per_s, most)
        self._at_s = now_s
        return self._left

    def spend(self, sent: int) -> None:
        """So many were sent."""
        self._left -= sent
