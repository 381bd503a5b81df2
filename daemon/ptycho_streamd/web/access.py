"""Who may talk to the viewer: the one place that decides it, for pages and sockets alike.

A browser on this machine also runs pages of strangers.  Such a page can send requests to a loopback
address, under its own name (cross-site) or, by having its name resolve to the loopback, under one
that looks like ours (DNS rebinding).  So the name asked for must be ours, and what connects a
WebSocket must be a page that came from us.  No cookies are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from ptycho_stream.settings import LOOPBACK_HOSTS, ViewerSettings

SAFE_METHODS = frozenset({"GET", "HEAD"})


class Access:
    """Decides on requests by their headers.

    Args:
        settings: of the viewer.
    """

    def __init__(self, settings: ViewerSettings) -> None:
        self._hosts = frozenset({*LOOPBACK_HOSTS, settings.host}) - {"::1"} | {"[::1]"}

    def refusal(self, method: str, headers: Mapping[str, str]) -> str | None:
        """Why a request is refused; None: it is not.

        Args:
            method: ``GET`` ..., or ``WEBSOCKET``.
            headers: by lower-case name.
        """
        host = headers.get("host", "")
        # The port does not matter: a tunnel may come in by another one.
        if _name_of(host) not in self._hosts:
            return "host"
        origin = headers.get("origin")
        if method not in SAFE_METHODS and origin is None:
            return "origin"
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return "origin"
        # Pictures and scripts are not for other sites to embed; to follow a link to us is fine.
        embedded = headers.get("sec-fetch-mode") not in (None, "navigate")
        if embedded and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return "cross-site"
        return None


def _name_of(host: str) -> str:
    """The host of a ``Host`` header without its port, in lower case; "" if it is malformed."""
    if any(c in host for c in "/@?#\\ ,") or not host:
        return ""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return ""
    name = (parts.hostname or "").lower()
    return f"[{name}]" if ":" in name else name


def security_headers(host: str) -> dict[str, str]:
    """What every answer says to the browser.

    Args:
        host: that was asked for, with its port; it has been allowed.
    """
    policy = "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data:",
            # Not every browser counts WebSockets of the same host as 'self'.
            f"connect-src 'self' ws://{host} wss://{host}",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), microphone=(), geolocation=()",
    }
