"""What happened to a stream that ingest reads, so that the daemon can say whether it lives.

Used by all of ingest's sources (:mod:`ptycho_streamd.sources`, :mod:`ptycho_streamd.pva_source`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Health:
    """What happened to a socket since the start of ingest."""

    peers: int = 0
    connected: int = 0
    disconnected: int = 0
    handshakes_failed: int = 0
    last_failure: str = ""
    messages: int = 0
    last_message_ns: int = 0

    def plain(self) -> dict[str, Any]:
        """Plain values for ``ptycho-stream doctor`` and ``ctl endpoints``."""
        age_s = (time.monotonic_ns() - self.last_message_ns) / 1e9
        return {
            "peers": self.peers,
            "connected": self.connected,
            "disconnected": self.disconnected,
            "handshakes_failed": self.handshakes_failed,
            "last_failure": self.last_failure,
            "messages": self.messages,
            "last_message_age_s": age_s if self.last_message_ns else None,
        }
