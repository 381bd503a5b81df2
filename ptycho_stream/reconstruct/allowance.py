"""Time for something that may not go on for ever.

Used by open scans, for what is done after the network, and while something is waited for.
"""

from __future__ import annotations

import time


class Allowance:
    """``limit_s`` seconds, which begin when they are first asked for and end when nobody does."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._until_s: float | None = None

    def left(self, *, running: bool) -> bool:
        """Whether there is time left; not ``running``, all of it is."""
        if not running:
            self._until_s = None
            return True
        if self._until_s is None:
            self._until_s = time.monotonic() + self._limit_s
        return time.monotonic() < self._until_s
