"""At most one log line a second for each kind of trouble, so that a wrong stream floods no disk.

Used by ingest for messages from outside; what is left out is counted in the next line, and every
single one in the metrics.
"""

from __future__ import annotations

import logging
import time

INTERVAL_S = 1.0


class LimitedLog:
    """Warnings of ``log``, limited by kind."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._next_s: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, kind: str, text: str) -> None:
        """Log ``text``, unless a line of this ``kind`` was logged less than a second ago."""
        now_s = time.monotonic()
        if now_s < self._next_s.get(kind, 0.0):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._next_s[kind] = now_s + INTERVAL_S
        left_out = self._left_out.pop(kind, 0)
        self._log.warning("%s%s", text, f" (and {left_out} more like it)" if left_out else "")
