"""How much a page may be sent: so many bytes a second, and more at once for a new picture."""

from __future__ import annotations

SAVED_S = 1.0
"""A page that was sent little for so long may be sent as much at once."""
NEW_PICTURE_S = 5.0
"""So many seconds' worth may be sent at once when a page looks at another picture."""
PAUSE_S = 2.0
"""Between two such grants."""


class Budget:
    """Bytes that may be sent.

    Args:
        bytes_per_s: that are added.
        now_s: monotonic time.
    """

    def __init__(self, bytes_per_s: float, now_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._left = bytes_per_s * NEW_PICTURE_S
        self._at_s = self._granted_at_s = now_s

    def left(self, now_s: float) -> float:
        """How many may be sent now; below zero if too many were."""
        most = max(self._left, self._bytes_per_s * SAVED_S)
        self._left = min(self._left + (now_s - self._at_s) * self._bytes_per_s, most)
        self._at_s = now_s
        return self._left

    def new_picture(self, now_s: float) -> None:
        """The page looks at another picture, and should have it soon."""
        if now_s - self._granted_at_s >= PAUSE_S:
            self._granted_at_s = now_s
            self._left = max(self.left(now_s), self._bytes_per_s * NEW_PICTURE_S)

    def spend(self, sent: int) -> None:
        """So many were sent."""
        self._left -= sent
