"""Reads single Bluesky documents, msgpack or JSON, and makes nothing of what nobody asks for.

Used by :mod:`ptycho_stream.wire.bluesky`, which knows what follows from them.  Numbers may be plain
or as the package msgpack-numpy writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import LimitExceeded, MalformedMessage, WireError
from ptycho_stream.wire.limits import WireLimits

MAX_BYTES_AN_EVENT: Final = 48
"""A page of events may be as long as a header and so much for each of the positions accepted."""
PICKLED: Final = (
    "documents come as pickle, which is never loaded here because loading it runs what its sender "
    "likes: publish with a safe serializer, bluesky.callbacks.zmq.Publisher(ADDRESS, "
    "serializer=msgpack.packb) or serializer=lambda document: json.dumps(document).encode()"
)
_BAD = (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError, TypeError)
_NUMPY_DTYPES: Final = frozenset(
    f"{order}{kind}{size}" for order in "<>|" for kind in "fiu" for size in (1, 2, 4, 8)
) - {"<f1", ">f1", "|f1"}
MAX_READING_BYTES: Final = 4096
"""Of a single number, as whatever."""
_decode_list = (
    msgspec.msgpack.Decoder(list[float | None]).decode,
    msgspec.json.Decoder(list[float | None]).decode,
)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a descriptor says: ``units`` by our name of each wanted field that it has."""

    uid: str
    run_start: str
    name: str | None
    units: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Readings:
    """Events of one descriptor.

    ``numbers`` int64 (n,) from 1; ``values`` float64 (n,) by our name of each wanted field.
    """

    descriptor: str
    numbers: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]


class Stop(msgspec.Struct, frozen=True):
    """The end of a run; ``num_events`` by the name of their stream."""

    run_start: str
    num_events: dict[str, int] = {}


class _Key(msgspec.Struct):
    units: str | None = None


class _Fields(msgspec.Struct):
    data_keys: dict[str, msgspec.Raw]


def split_message(message: bytes) -> tuple[bytes, bytes, bytes]:
    """Prefix, name and document of a message.

    Raises:
        MalformedMessage: it is not made of these, or the document is pickled.
    """
    pieces = message.split(b" ", 2)
    if len(pieces) != 3:
        raise MalformedMessage("a message without prefix, name and document is not Bluesky's")
    prefix, name, document = pieces
    if document[:1] == b"\x80" and document[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise MalformedMessage(PICKLED)  # 0x80 alone is msgpack's empty map
    if document[-1:] == b"." and document[:1] in (b"(", b"}", b"c"):
        raise MalformedMessage(PICKLED)
    return prefix, name, document


class DocumentReader:
    """Reads documents with the fields ``names``, by our name of each."""

    def __init__(self, names: Mapping[str, str], limits: WireLimits) -> None:
        self._limits = limits
        self._names = names
        # Not `Raw | None`: msgspec then takes nothing but null.
        raws: list[tuple[str, Any, Any]] = [(key, msgspec.Raw, None) for key in names]
        data = msgspec.defstruct("_Data", raws, rename=names)
        described: list[tuple[str, Any, Any]] = [(key, _Key | None, None) for key in names]
        data_keys = msgspec.defstruct("_DataKeys", described, rename=names)
        head: list[Any] = [("descriptor", str), ("data", data)]
        self._event = _Either(msgspec.defstruct("_Event", [*head, ("seq_num", int)]))
        self._page = _Either(msgspec.defstruct("_EventPage", [*head, ("seq_num", msgspec.Raw)]))
        self._descriptor = _Either(
            msgspec.defstruct(
                "_Descriptor",
                [
                    ("uid", str),
                    ("run_start", str),
                    ("data_keys", data_keys),
                    ("name", str | None, None),
                ],
            )
        )
        self._stop = _Either(Stop)
        self._start = _Either(dict[str, Any])
        self._fields = _Either(_Fields)

    def start(self, document: bytes) -> dict[str, Any]:
        """A start document, whole, with lists for tuples.

        Raises:
            WireError: it is too long, or cannot be read; as all methods below.
        """
        self._check_header(document, "start")
        return self._start(document)

    def descriptor(self, document: bytes) -> Descriptor:
        """What a descriptor says of the wanted fields."""
        self._check_events(document)
        raw = self._descriptor(document)
        held = {key: getattr(raw.data_keys, key) for key in self._names}
        units = {key: one.units for key, one in held.items() if one is not None}
        return Descriptor(raw.uid, raw.run_start, raw.name, units)

    def fields_of(self, document: bytes) -> str:
        """The fields that a descriptor has, for people; of very many the first."""
        if len(document) > self._limits.max_header_bytes:
            return "others"
        try:
            names = list(self._fields(document).data_keys)
        except WireError:
            return "others"
        told = ", ".join(repr(name[:60]) for name in names[:12])
        return f"{told} ..." if len(names) > 12 else told or "none"

    def event(self, document: bytes) -> Readings:
        """One event."""
        self._check_events(document)
        raw = self._event(document)
        self._limits.check_number(raw.seq_num)
        is_json = document[:1] == b"{"
        values: dict[str, NDArray[np.float64]] = {}
        for key, name in self._names.items():
            held: msgspec.Raw | None = getattr(raw.data, key)
            if held is not None:
                values[key] = np.array([_number(name, bytes(held), is_json)], np.float64)
        return Readings(raw.descriptor, np.array([raw.seq_num], np.int64), values)

    def event_page(self, document: bytes) -> Readings:
        """A page of events."""
        self._check_events(document)
        raw = self._page(document)
        is_json = document[:1] == b"{"
        most = self._limits.max_positions
        seq_num = _numbers("seq_num", bytes(raw.seq_num), is_json, most)
        if not (np.abs(seq_num) < 2**53).all() or (seq_num % 1).any():
            raise MalformedMessage("a page of events has a seq_num that is not a whole number")
        numbers = seq_num.astype(np.int64)
        values: dict[str, NDArray[np.float64]] = {}
        for key, name in self._names.items():
            held: msgspec.Raw | None = getattr(raw.data, key)
            if held is None:
                continue
            values[key] = _numbers(name, bytes(held), is_json, most)
            if len(values[key]) != len(numbers):
                raise MalformedMessage(
                    f"a page of {len(numbers)} events has {len(values[key])} values of {name!r}"
                )
        return Readings(raw.descriptor, numbers, values)

    def stop(self, document: bytes) -> Stop:
        """The end of a run."""
        self._check_header(document, "stop")
        return self._stop(document)

    def _check_header(self, document: bytes, name: str) -> None:
        if len(document) > self._limits.max_header_bytes:
            raise LimitExceeded(
                f"a {name} document of {len(document)} bytes, above {self._limits.max_header_bytes}"
            )

    def _check_events(self, document: bytes) -> None:
        limits = self._limits
        longest = limits.max_header_bytes + MAX_BYTES_AN_EVENT * limits.max_positions
        if len(document) > min(longest, limits.max_message_bytes):
            raise LimitExceeded(f"a document of {len(document)} bytes: publish smaller pages")


class _Either:
    """Decodes a type from JSON or msgpack, whichever it is."""

    def __init__(self, kind: Any) -> None:
        self._json: Callable[[bytes], Any] = msgspec.json.Decoder(kind).decode
        self._msgpack: Callable[[bytes], Any] = msgspec.msgpack.Decoder(kind).decode

    def __call__(self, document: bytes) -> Any:
        decode = self._json if document[:1] == b"{" else self._msgpack
        try:
            return decode(document)
        except _BAD as error:
            problem = error
        if document[:1] == b"{" and b"NaN" in document:  # Python's json; JSON has no word for it
            try:
                return decode(document.replace(b"NaN", b"null"))
            except _BAD as error:
                problem = error
        raise MalformedMessage(f"not a Bluesky document: {problem}") from problem


def _number(name: str, raw: bytes, is_json: bool) -> float:
    """A reading; NaN where there is none."""
    if len(raw) > MAX_READING_BYTES:
        raise MalformedMessage(f"the field {name!r} holds no single number")
    return _plain(name, _value(name, raw, is_json))


def _numbers(name: str, raw: bytes, is_json: bool, most: int) -> NDArray[np.float64]:
    """Readings (n,) of a page: a list of numbers, or an array of msgpack-numpy."""
    if is_json:
        count = raw.count(b",") + 1 if raw.strip(b"[] \t\r\n") else 0
    else:
        count = _msgpack_length(raw)
    if count > most:
        raise LimitExceeded(f"a page of {count} events, above {most}: publish smaller ones")
    try:
        return np.array(_decode_list[is_json](raw), np.float64)
    except _BAD:  # not all of them are plain numbers
        if len(raw) > MAX_READING_BYTES * count + MAX_BYTES_AN_EVENT * most:
            raise MalformedMessage(f"the field {name!r} of a page is no list of numbers") from None
    value = _value(name, raw, is_json)
    if isinstance(value, Mapping):
        values = _numpy_values(name, value)
        if values.size > most:
            raise LimitExceeded(f"a page of {values.size} events, above {most}")
        return values
    if not isinstance(value, list):
        raise MalformedMessage(f"the field {name!r} of a page is no list of numbers")
    return np.array([_plain(name, one) for one in value], np.float64)


def _value(name: str, raw: bytes, is_json: bool) -> Any:
    try:
        return msgspec.json.decode(raw) if is_json else msgspec.msgpack.decode(raw)
    except _BAD as error:
        raise MalformedMessage(f"the field {name!r} cannot be read: {error}") from error


def _plain(name: str, value: Any) -> float:
    if value is None:
        return float("nan")
    if isinstance(value, Mapping):
        values = _numpy_values(name, value)
        if values.size == 1:
            return float(values[0])
    elif isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError as error:
            raise MalformedMessage(f"the field {name!r} holds an impossible number") from error
    raise MalformedMessage(f"the field {name!r} holds no single number: {str(value)[:60]}")


def _msgpack_length(raw: bytes) -> int:
    """Of the list that ``raw`` begins with; 0 of anything else."""
    match raw[:1]:
        case b"\xdc":
            return int.from_bytes(raw[1:3], "big")
        case b"\xdd":
            return int.from_bytes(raw[1:5], "big")
        case head:
            return head[0] & 0x0F if head and head[0] & 0xF0 == 0x90 else 0


def _numpy_values(name: str, held: Mapping[Any, Any]) -> NDArray[np.float64]:
    """What msgpack-numpy made of a numpy scalar or array, flat."""
    plain = {key.decode("latin-1") if isinstance(key, bytes) else key: held[key] for key in held}
    dtype, data, shape = plain.get("type"), plain.get("data"), plain.get("shape", [])
    if isinstance(dtype, bytes):
        dtype = dtype.decode("latin-1")
    if plain.get("nd") not in (True, False) or dtype not in _NUMPY_DTYPES:
        raise MalformedMessage(f"the field {name!r} holds something else than numbers")
    if not isinstance(data, bytes) or not isinstance(shape, list | tuple):
        raise MalformedMessage(f"the field {name!r} holds a numpy array without data")
    kind = np.dtype(dtype)
    if not all(isinstance(n, int) and n >= 0 for n in shape) or (
        prod(shape) * kind.itemsize != len(data)
    ):
        raise MalformedMessage(f"the field {name!r} holds a numpy array cut short")
    return np.frombuffer(data, kind).astype(np.float64)
