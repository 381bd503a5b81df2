"""Scan identities: ULIDs, 26 characters that sort by the time at which they were made.

Made by whoever creates a scan (ingest, tests, tools); checked wherever an identity from outside
becomes part of a path.  Format: https://github.com/ulid/spec (48 bits of UTC milliseconds, 80 bits
of chance, Crockford's base 32).
"""

from __future__ import annotations

import re
import secrets
import threading
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PATTERN = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_RANDOM_BITS = 80


class UlidGenerator:
    """Makes ULIDs that strictly increase within this process, also when the clock steps back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def go_on_after(self, scan_id: str) -> None:
        """Make none from now on that sorts before ``scan_id``: the clock may have been set back."""
        with self._lock:
            self._last = max(self._last, decode_ulid(scan_id))

    def __call__(self) -> str:
        """The next ULID."""
        now = (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        with self._lock:
            same_or_later_ms = self._last >> _RANDOM_BITS >= now >> _RANDOM_BITS
            self._last = self._last + 1 if same_or_later_ms else now
            return encode_ulid(self._last)


def encode_ulid(value: int) -> str:
    """The 26 characters of a 128-bit ``value``.

    >>> encode_ulid(31)
    '0000000000000000000000000Z'
    """
    return "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))


def decode_ulid(text: str) -> int:
    """The value of 26 characters that :func:`is_scan_id` has accepted.

    >>> decode_ulid("0000000000000000000000000Z")
    31
    """
    value = 0
    for character in text:
        value = value << 5 | _ALPHABET.index(character)
    return value


def is_scan_id(text: str) -> bool:
    """Whether ``text`` has the form of a scan id, and so is safe as the name of a folder.

    >>> is_scan_id("01ARZ3NDEKTSV4RRFFQ69G5FAV"), is_scan_id("../01ARZ3NDEKTSV4RRFFQ69G5")
    (True, False)
    """
    return _PATTERN.fullmatch(text) is not None


new_scan_id = UlidGenerator()
