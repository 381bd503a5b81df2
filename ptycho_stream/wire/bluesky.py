"""Bluesky documents over 0MQ: positions from the events of a run, and what the run says of itself.

One part a message, ``prefix name document`` with spaces between; documents are msgpack or JSON.
Pickle, which bluesky sends unless told otherwise, is refused and never loaded: loading it would run
whatever its sender likes.  Fed by ingest where ``positions.source = "bluesky"``.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import LimitExceeded, MalformedMessage, TornMessage, WireError
from ptycho_stream.messages import (
    BytesLike,
    Message,
    Positions,
    PositionsEnd,
    PositionsStart,
    Undecodable,
)
from ptycho_stream.settings import BlueskySettings
from ptycho_stream.wire.bluesky_documents import Descriptor, DocumentReader, Readings, split_message
from ptycho_stream.wire.limits import WireLimits, bounded_document, checked_name

MAX_RUNS: Final = 64
"""Of which something is remembered; the oldest are forgotten."""
METRES: Final[Mapping[str, float]] = {
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1.0),
    **dict.fromkeys(("cm",), 1e-2),
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1e-3),
    **dict.fromkeys(("um", "\N{MICRO SIGN}m", "\N{GREEK SMALL LETTER MU}m"), 1e-6),
    **dict.fromkeys(("micron", "microns", "micrometer", "micrometers", "micrometre"), 1e-6),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-9),
    **dict.fromkeys(("pm", "picometer", "picometers", "picometre"), 1e-12),
}
"""Of the units that a field's description may name, in lower case."""
RENAMED: Final[Mapping[str, str]] = {
    "uid": "run_uid",
    "scan_id": "scan_number",
    "time": "run_time_s",
    "shape": "scan_shape",
}
"""Keys of a start document that mean something else in a scan's header."""
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class _Run:
    """A run whose start was heard: what its epoch begins with.

    ``unwanted``: it is none of those that were asked for; ``problem``: it should be, and cannot.
    """

    series: str | None
    metadata: Mapping[str, Any]
    unwanted: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Stream:
    """The events of one descriptor: their epoch, and how their fields become metres.

    ``problem`` says why they cannot.
    """

    epoch: str
    series: str | None
    scale_yx_m: tuple[float, float] = (1.0, 1.0)
    problem: str = ""


class BlueskyDecoder:
    """Turns Bluesky's documents into positions.  It never raises on bad input.

    An epoch is a run.  It begins with the descriptor of the event stream that has y and x, so that
    other runs and other streams (baseline, monitors) leave no trace.

    Args:
        settings: which fields are what.
        limits: what is accepted.
    """

    def __init__(self, settings: BlueskySettings, limits: WireLimits | None = None) -> None:
        self._settings = settings
        self._limits = limits or WireLimits()
        names = {"y": settings.y, "x": settings.x, "i0": settings.i0}
        self._names = {key: name for key, name in names.items() if name is not None}
        self._reader = DocumentReader(self._names, self._limits)
        self._prefix = None if settings.prefix is None else settings.prefix.encode()
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._streams: OrderedDict[str, _Stream | None] = OrderedDict()
        self._joined: str | None = None

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """What one received ZeroMQ message completes: positions of frames, starts and ends."""
        try:
            if len(parts) != 1:
                raise TornMessage(f"a Bluesky document comes in one part, not {len(parts)}")
            prefix, name, document = split_message(bytes(parts[0]))
            if self._prefix is not None and prefix != self._prefix:
                return []
            return self._document(name, document)
        except WireError as error:
            return [Undecodable(error.reason, str(error))]

    def _document(self, name: bytes, document: bytes) -> list[Message]:
        reader = self._reader
        match name:
            case b"start":
                self._start(reader.start(document))
                return []
            case b"descriptor":
                return self._descriptor(reader.descriptor(document), document)
            case b"event":
                return self._events(reader.event(document))
            case b"event_page":
                return self._events(reader.event_page(document))
            case b"stop":
                return self._stop(reader.stop(document))
            case b"resource" | b"datum" | b"datum_page" | b"stream_resource" | b"stream_datum":
                return []  # files that a detector wrote
            case _:
                raise MalformedMessage(f"{name[:40]!r} is no name of a Bluesky document")

    # ---- runs ----------------------------------------------------------------------------------

    def _start(self, document: dict[str, Any]) -> None:
        uid = document.get("uid")
        if not isinstance(uid, str):
            raise MalformedMessage("a start document has no uid")
        uid = checked_name(uid)
        if self._unwanted(document):
            _remember(self._runs, uid, _Run(None, {}, unwanted=True))
            return
        told = {RENAMED.get(key, key): value for key, value in document.items()}
        series: str | None = None
        problem, key = "", self._settings.series_key
        if key is not None:
            value = document.get(key)
            if isinstance(value, str | int) and not isinstance(value, bool):
                series = checked_name(str(value))
            else:
                problem = (
                    f"run {uid} has no {key!r} with the detector's series in its start document: "
                    "its events are left out; let the plan put it there, or leave "
                    "positions.bluesky.series_key out"
                )
        _remember(self._runs, uid, _Run(series, bounded_document(told), problem=problem))

    def _unwanted(self, document: Mapping[str, Any]) -> bool:
        """Whether a run is none of those that were asked for."""
        for key, accepted in self._settings.only.items():
            value = document.get(key)
            held: list[Any] = value if isinstance(value, list) else [value]
            if not any(one in accepted for one in held if isinstance(one, str | int | float)):
                return True
        return False

    def _descriptor(self, descriptor: Descriptor, document: bytes) -> list[Message]:
        uid = checked_name(descriptor.uid)
        epoch = checked_name(descriptor.run_start)
        run = self._runs.get(epoch) or _Run(None, {"run_uid": epoch})
        former = self._streams.get(uid)
        if former is not None:  # doubled, or overtaken by the first event
            overtaken = former.epoch == self._joined
            return [PositionsStart(former.epoch, None, run.metadata)] if overtaken else []
        _remember(self._streams, uid, None)
        if descriptor.name != self._settings.stream or run.unwanted:
            return []
        problem = run.problem or self._problem(epoch, descriptor, document)
        if problem:
            raise MalformedMessage(problem)
        stream = self._scaled(epoch, run.series, descriptor.units)
        _remember(self._streams, uid, stream)
        if stream.problem:
            raise MalformedMessage(stream.problem)
        self._joined = None
        return [PositionsStart(epoch, run.series, run.metadata)]

    def _problem(self, epoch: str, descriptor: Descriptor, document: bytes) -> str:
        """Why the events of a descriptor are of no use; empty: they are."""
        if self._settings.only and epoch not in self._runs:
            return f"the start of run {epoch} was not heard: whether it is one of only is not known"
        for key, name in self._names.items():
            if key not in descriptor.units:
                fields = self._reader.fields_of(document)
                return (
                    f"the stream {descriptor.name!r} of run {epoch} has no field {name!r}, only "
                    f"{fields}: its events are left out; correct positions.bluesky, or tell with "
                    "positions.bluesky.only which runs are scans"
                )
        return ""

    def _scaled(self, epoch: str, series: str | None, units: Mapping[str, str | None]) -> _Stream:
        scale_yx_m = self._settings.scale_yx_m
        if scale_yx_m is not None:
            return _Stream(epoch, series, scale_yx_m)
        told = [units["y"], units["x"]]
        found = [METRES.get((unit or "").strip().lower()) for unit in told]
        if found[0] is not None and found[1] is not None:
            return _Stream(epoch, series, (found[0], found[1]))
        at = 0 if found[0] is None else 1
        name, unit = (self._settings.y, self._settings.x)[at], told[at]
        return _Stream(
            epoch,
            series,
            problem=f"run {epoch} gives {'no units' if not unit else f'units {unit[:40]!r}'} for "
            f"the field {name!r}: it has no positions; set positions.bluesky.scale_yx_m, the "
            "metres of a unit",
        )

    def _stop(self, run_start: str) -> list[Message]:
        epoch = checked_name(run_start)
        self._runs.pop(epoch, None)
        if self._joined is not None:
            # The run that was joined is the one that ends: no other has told its descriptor.
            joined, self._joined = self._joined, None
            return [PositionsEnd(joined)]
        known = any(
            stream is not None and stream.epoch == epoch and not stream.problem
            for stream in self._streams.values()
        )
        return [PositionsEnd(epoch)] if known else []

    # ---- events --------------------------------------------------------------------------------

    def _events(self, readings: Readings) -> list[Message]:
        uid = checked_name(readings.descriptor)
        out: list[Message] = []
        if uid not in self._streams:
            out += self._join(uid, readings)
        stream = self._streams[uid]
        self._streams.move_to_end(uid)
        if stream is None:
            return out
        if stream.problem:
            raise MalformedMessage(stream.problem)
        for key, name in self._names.items():
            if key not in readings.values:
                raise MalformedMessage(f"an event of run {stream.epoch} lacks its field {name!r}")
        return [*out, self._positions(stream, readings)]

    def _join(self, uid: str, readings: Readings) -> list[Message]:
        """An event whose descriptor was not heard: its run began before we listened."""
        settings = self._settings
        if any(key not in readings.values for key in ("y", "x")) or self._joined is not None:
            _remember(self._streams, uid, None)  # of another stream
            return []
        if settings.scale_yx_m is None or settings.only or settings.series_key is not None:
            _remember(self._streams, uid, None)
            raise MalformedMessage(
                "joined a run without its start and descriptor, which tell units and what run it "
                "is: its events are left out; to join in mid-run, set positions.bluesky.scale_yx_m "
                "and neither only nor series_key"
            )
        self._joined = f"joined {uuid.uuid4().hex}"
        _remember(self._streams, uid, _Stream(self._joined, None, settings.scale_yx_m))
        return [PositionsStart(self._joined, None, {}, joined=True)]

    def _positions(self, stream: _Stream, readings: Readings) -> Positions:
        frames = self._settings.frames_per_event
        events = readings.numbers - 1
        if events.size:
            self._limits.check_number(int(events.min()))
            self._limits.check_number((int(events.max()) + 1) * frames)
        if events.size * frames > self._limits.max_positions:
            raise LimitExceeded(
                f"{events.size} events of {frames} frames in one document: publish smaller pages"
            )
        numbers: NDArray[np.int64] = (events[:, None] * frames + np.arange(frames)).ravel()
        where = np.stack([readings.values["y"], readings.values["x"]], axis=1)
        position_yx_m = where * stream.scale_yx_m + np.asarray(self._settings.offset_yx_m)
        i0 = readings.values.get("i0")
        return Positions(
            stream.epoch,
            stream.series,
            numbers,
            np.repeat(position_yx_m, frames, axis=0),
            None if i0 is None else np.repeat(i0, frames),
        )


def _remember(known: OrderedDict[str, _Value], uid: str, value: _Value) -> None:
    known[uid] = value
    if len(known) > MAX_RUNS:
        known.popitem(last=False)
