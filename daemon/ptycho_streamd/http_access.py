"""Whether an HTTP request may be answered: by its token, and by the Host and Origin it names.

Used by every HTTP address of the daemon, whatever framework serves it: it looks at headers only.
Host is checked on loopback too: else a web page anywhere could have a browser on this machine ask,
under a name of the page's own that it lets point to 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit

from ptycho_stream.keys import read_token


class Headers(Protocol):
    """Headers of a request, whatever the case of their names."""

    def get(self, name: str, /) -> str | None:
        """The value of one; None if it is not there."""
        ...


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a request is not answered.

    Attributes:
        reason: ``host``, ``origin`` or ``token``, for the metric.
        status: of the answer.
        text: of the answer.
    """

    reason: Literal["host", "origin", "token"]
    status: HTTPStatus
    text: str


class HttpAccess:
    """Decides about requests to one address.

    Args:
        host_names: that clients may use for this machine, beside its addresses, ``localhost`` and
            its own name.
        token_path: file with the word that they must show; None: they need none.

    Raises:
        KeyFileError: the token file cannot be used.
    """

    def __init__(self, host_names: Iterable[str] = (), token_path: Path | None = None) -> None:
        self._names = {name.lower() for name in ("localhost", socket.gethostname(), *host_names)}
        self._token = None if token_path is None else read_token(token_path)

    def refused(self, headers: Headers) -> Refused | None:
        """Why a request is refused; None: it may be answered."""
        stranger = self.stranger(headers)
        if stranger is None and not self.shows_token(_bearer(headers)):
            return Refused(
                "token",
                HTTPStatus.UNAUTHORIZED,
                "a token is needed: Authorization: Bearer, with the word in http.token_path",
            )
        return stranger

    def stranger(self, headers: Headers) -> Refused | None:
        """Why a request is refused whatever its token; None: it is not."""
        host = headers.get("Host") or ""
        if not self._is_ours(host):
            return Refused(
                "host",
                HTTPStatus.MISDIRECTED_REQUEST,
                "this host name is not one of the daemon's: use its address, or add the name to "
                "http.host_names",
            )
        origin = headers.get("Origin")
        if (origin is not None and not _same_place(origin, host)) or _is_embedded(headers):
            return Refused(
                "origin", HTTPStatus.FORBIDDEN, "pages of other sites may not ask the daemon"
            )
        return None

    def shows_token(self, word: str) -> bool:
        """Whether ``word`` is the token, or none is needed; takes as long whatever it is."""
        if self._token is None:
            return True
        return hmac.compare_digest(word.encode(), self._token.encode())

    def _is_ours(self, host: str) -> bool:
        if any(c in host for c in "/@?#\\ ,"):
            return False
        try:
            parts = urlsplit(f"//{host}")
            _ = parts.port  # a number; which one does not matter: a tunnel may come in by another
        except ValueError:
            return False
        name = parts.hostname or ""
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)  # nobody's name server has a say in where that leads
        except ValueError:
            return False
        return True


def _same_place(origin: str, host: str) -> bool:
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and place.lower() == host.lower()


def _is_embedded(headers: Headers) -> bool:
    """Whether a page of another site would show or run what it gets; to follow a link is fine."""
    mode, site = headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Site")
    return mode not in (None, "navigate") and site in ("cross-site", "same-site")


def _bearer(headers: Headers) -> str:
    scheme, _, word = (headers.get("Authorization") or "").partition(" ")
    return word.strip() if scheme.lower() == "bearer" else ""
