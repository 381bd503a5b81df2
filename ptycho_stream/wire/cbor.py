"""Reads CBOR (RFC 8949) from outside within bounds, and leaves byte strings where they are.

Used by :mod:`ptycho_stream.wire.dectris_v2`; why it is not the cbor2 library that reads here, with
measurements, is in ``docs/decisions/0008-a-bounded-reader-of-cbor.md``.  Items, nesting and text
are counted before anything is made of them; a byte string is a view of the message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from ptycho_stream.errors import LimitExceeded, MalformedMessage
from ptycho_stream.messages import BytesLike

MAX_DEPTH: Final = 16
"""Of maps, arrays and tags in each other; a DECTRIS image has 7."""

_BREAK: Final = 0xFF
_INDEFINITE: Final = 31
# What follows an item's first byte, by the lower 5 bits of that: how it is read, and its length.
_UNSIGNED: Final = {
    24 + n: (struct.Struct(code).unpack_from, 1 << n)
    for n, code in enumerate((">B", ">H", ">I", ">Q"))
}
_FLOATS: Final = {
    25 + n: (struct.Struct(code).unpack_from, 2 << n) for n, code in enumerate((">e", ">f", ">d"))
}
_SIMPLE: Final = {20: False, 21: True, 22: None, 23: None}


@dataclass(slots=True)
class Tag:
    """An item with a number that says what it means; not frozen, which would take longer."""

    number: int
    value: Any


def read_cbor(data: BytesLike, max_items: int, max_text_bytes: int) -> Any:
    """The one item that ``data`` is.

    Args:
        data: the whole message.
        max_items: in all maps, arrays, tags and strings in pieces together.
        max_text_bytes: of all text together.

    Returns:
        dict with text as its keys, list, str, int, float, bool, None (null, undefined),
        :class:`Tag`, and memoryview for byte strings.

    Raises:
        MalformedMessage: it is not CBOR, breaks off, or goes on after the item.
        LimitExceeded: it holds more items or text than accepted, or is nested deeper than
            :data:`MAX_DEPTH`.
    """
    reader = _Reader(data, max_items, max_text_bytes)
    try:
        item = reader.item(MAX_DEPTH)
    except (IndexError, struct.error) as error:
        raise MalformedMessage("CBOR breaks off within an item") from error
    except UnicodeDecodeError as error:
        raise MalformedMessage(f"CBOR has text that is not UTF-8: {error.reason}") from error
    if reader.at != len(data):
        raise MalformedMessage(f"CBOR ends after {reader.at} of {len(data)} bytes")
    return item


class _Reader:
    """Reads items one after another; ``at`` is where the next one begins.

    ``depth`` is how many more levels an item may have below it.
    """

    __slots__ = ("_data", "_end", "_items_left", "_text_left", "at")

    def __init__(self, data: BytesLike, max_items: int, max_text_bytes: int) -> None:
        self.at = 0
        self._data = data
        self._end = len(data)
        self._items_left = max_items
        self._text_left = max_text_bytes

    def item(self, depth: int) -> Any:
        """The next item."""
        head = self._data[self.at]
        self.at += 1
        if head < 24:
            return head
        kind, number = head >> 5, head & 31
        if kind == 7:
            return self._simple(number)
        if number > 23:
            number = self._number(number, kind)
        match kind:  # the most frequent first
            case 3:
                return self._text(number) if number >= 0 else "".join(self._pieces(kind))
            case 4:
                return self._array(number, depth)
            case 0:
                return number
            case 6:
                self._count(1, depth)
                return Tag(number, self.item(depth - 1))
            case 5:
                return self._map(number, depth)
            case 2:
                return self._bytes(number) if number >= 0 else self._joined_bytes()
            case _:
                return -1 - number

    def _number(self, info: int, kind: int) -> int:
        """The number that follows an item's first byte; -1: the item ends with a break."""
        if info == _INDEFINITE and 2 <= kind <= 5:
            return -1
        try:
            unpack, size = _UNSIGNED[info]
        except KeyError:
            raise MalformedMessage(f"CBOR has an item of kind {kind} and length {info}") from None
        number: int = unpack(self._data, self.at)[0]
        self.at += size
        return number

    def _count(self, items: int, depth: int = MAX_DEPTH) -> None:
        self._items_left -= items
        if self._items_left < 0:
            raise LimitExceeded("a CBOR message announces more items than accepted")
        if depth < 1:
            raise LimitExceeded(f"a CBOR message is nested deeper than {MAX_DEPTH} levels")

    def _text(self, length: int) -> str:
        self._text_left -= length
        if self._text_left < 0:
            raise LimitExceeded("a CBOR message holds more text than accepted")
        at = self.at
        self.at = end = at + length
        if end > self._end:
            raise IndexError
        return str(self._data[at:end], "utf-8")

    def _bytes(self, length: int) -> memoryview:
        at = self.at
        self.at = end = at + length
        if end > self._end:
            raise IndexError
        return memoryview(self._data)[at:end]

    def _joined_bytes(self) -> memoryview:
        return memoryview(b"".join(self._pieces(2)))

    def _pieces(self, kind: int) -> Iterator[Any]:
        """The pieces of a string that ends with a break."""
        while (head := self._data[self.at]) != _BREAK:
            self._count(1)
            self.at += 1
            if head >> 5 != kind:
                raise MalformedMessage("CBOR has a string with a piece of another kind")
            length = head & 31
            if length > 23:
                length = self._number(length, 0)
            yield self._text(length) if kind == 3 else self._bytes(length)
        self.at += 1

    def _array(self, length: int, depth: int) -> list[Any]:
        item = self.item
        if length >= 0:
            self._count(length, depth)
            return [item(depth - 1) for _ in range(length)]
        self._count(0, depth)
        made: list[Any] = []
        while self._data[self.at] != _BREAK:
            self._count(1)
            made.append(item(depth - 1))
        self.at += 1
        return made

    def _map(self, length: int, depth: int) -> dict[str, Any]:
        item = self.item
        made: dict[str, Any] = {}
        if length >= 0:
            self._count(2 * length, depth)
            for _ in range(length):
                key = item(depth - 1)
                made[key if type(key) is str else _as_text(key)] = item(depth - 1)
            return made
        self._count(0, depth)
        while self._data[self.at] != _BREAK:
            self._count(2)
            key = item(depth - 1)
            made[key if type(key) is str else _as_text(key)] = item(depth - 1)
        self.at += 1
        return made

    def _simple(self, info: int) -> Any:
        if info in _SIMPLE:
            return _SIMPLE[info]
        if info not in _FLOATS:
            raise MalformedMessage(f"CBOR has a break or a simple value, {info}, out of place")
        unpack, size = _FLOATS[info]
        number: float = unpack(self._data, self.at)[0]
        self.at += size
        return number


def _as_text(key: Any) -> str:
    if not isinstance(key, int | float):
        raise MalformedMessage("CBOR has a map with a key that is neither text nor a number")
    return str(key)
