"""What happened to a socket, so that the daemon can say whether it lives.

Used by ingest's sources (:mod:`ptycho_streamd.sources`, :mod:`ptycho_streamd.pva_source`) and by
the sockets that the daemon binds (:mod:`ptycho_streamd.door`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import zmq

HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
WATCHED = (
    zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | HANDSHAKE_FAILED
)
"""Events that a monitor tells; those of each try to connect are left out, nobody needs them."""


@dataclass(slots=True)
class Health:
    """What happened to a socket since the start of its process."""

    peers: int = 0
    connected: int = 0
    disconnected: int = 0
    handshakes_failed: int = 0
    last_failure: str = ""
    messages: int = 0
    last_message_ns: int = 0

    def take(self, kind: int) -> None:
        """Count an event of a socket monitor."""
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.connected += 1
        elif kind == zmq.EVENT_DISCONNECTED:
            self.disconnected += 1
        elif kind & HANDSHAKE_FAILED:
            self.handshakes_failed += 1
            self.last_failure = str(zmq.Event(kind).name).lower()

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
