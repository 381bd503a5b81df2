"""systemd's notification protocol (sd_notify(3)): readiness, status text and watchdog.

Used by the supervisor; where ``NOTIFY_SOCKET`` is unset (no systemd) all of it does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import time

log = logging.getLogger(__name__)


class Notifier:
    """Sends state to the service manager; ``watchdog_interval_s`` is None if none is asked for."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # an abstract socket, unix(7)
            self._address = "\0" + self._address[1:]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self._address else None
        limit_us = os.environ.get("WATCHDOG_USEC")
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        # A third of the limit, so that one late beat does not cost a restart.
        self._watchdog_s = int(limit_us) / 1e6 / 3 if limit_us and ours else None
        self._next_watchdog_s = 0.0
        self._status = ""

    def ready(self) -> None:
        """All stages run and the endpoints are bound."""
        self._send("READY=1")

    def stopping(self) -> None:
        """An orderly stop has begun."""
        self._send("STOPPING=1")

    def reloading(self) -> None:
        """The settings are being re-read; :meth:`ready` follows (Type=notify-reload wants both)."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def status(self, text: str) -> None:
        """The line that ``systemctl status`` shows; sent when it has changed.

        It may hold names from outside: a line break in one would be another message to systemd.
        """
        text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def watchdog(self) -> None:
        """Tell that the supervisor's loop turns; call every turn."""
        if self._watchdog_s is not None and time.monotonic() >= self._next_watchdog_s:
            self._next_watchdog_s = time.monotonic() + self._watchdog_s
            self._send("WATCHDOG=1")

    def close(self) -> None:
        """Close the socket."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError as error:
            log.warning("systemd is not reachable at NOTIFY_SOCKET: %s", error.strerror)
