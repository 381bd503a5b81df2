"""Bluesky documents over 0MQ: positions from the events of a run, and what the run says of itself.

One part a message, ``prefix name document`` with spaces between; documents are msgpack or JSON.
Pickle, which bluesky sends unless told otherwise, is refused and never loaded: loading it would run
whatever its sender likes.  Fed by ingest where ``positions.source = "bluesky"``.
"""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import LimitExceeded, MalformedMessage, TornMessage, WireError
from ptycho_stream.geometry import METRES
from ptycho_stream.messages import (
    BytesLike,
    Message,
    Positions,
    PositionsEnd,
    PositionsStart,
    Undecodable,
)
from ptycho_stream.settings import BlueskySettings
from ptycho_stream.wire.bluesky_documents import (
    Descriptor,
    DocumentReader,
    Readings,
    Stop,
    split_message,
)
from ptycho_stream.wire.limits import WireLimits, bounded_document, checked_name
from ptycho_stream.wire.message_numbers import MessageNumbers

QUIET_NS: Final = 1_000_000_000
"""Without a document, after which events of a run that has ended are not expected any more."""
MAX_RUNS: Final = 64
"""Of which something is remembered; the oldest are forgotten."""
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
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        settings: BlueskySettings,
        limits: WireLimits | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._settings = settings
        self._limits = limits or WireLimits()
        self._clock = clock
        names = {"y": settings.y, "x": settings.x, "i0": settings.i0, "frame": settings.frame}
        self._names = {key: name for key, name in names.items() if name is not None}
        self._reader = DocumentReader(self._names, self._limits)
        self._prefix = None if settings.prefix is None else settings.prefix.encode()
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._streams: OrderedDict[str, _Stream | None] = OrderedDict()
        self._heard: OrderedDict[str, MessageNumbers] = OrderedDict()  # events of each epoch
        self._now: str | None = None  # the run that has begun last, until it ends
        self._joined: str | None = None
        self._ending: OrderedDict[str, int] = OrderedDict()
        self._last_ns = 0

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """What one received ZeroMQ message completes: positions of frames, starts and ends."""
        try:
            if len(parts) != 1:
                raise TornMessage(f"a Bluesky document comes in one part, not {len(parts)}")
            prefix, name, document = split_message(bytes(parts[0]))
            if self._prefix is not None and prefix != self._prefix:
                return []
            self._last_ns = self._clock()
            return self._document(name, document)
        except WireError as error:
            return [Undecodable(error.reason, str(error))]

    def overdue(self) -> list[Message]:
        """Ends of runs whose last events have not come, once the stream is quiet."""
        if not self._ending or self._clock() - self._last_ns < QUIET_NS:
            return []
        ended = list(self._ending)
        self._ending.clear()
        return [PositionsEnd(epoch) for epoch in ended]

    def _document(self, name: bytes, document: bytes) -> list[Message]:
        reader = self._reader
        match name:
            case b"start":
                return self._start(reader.start(document))
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

    def _start(self, document: dict[str, Any]) -> list[Message]:
        uid = document.get("uid")
        if not isinstance(uid, str):
            raise MalformedMessage("a start document has no uid")
        uid = checked_name(uid)
        if uid in self._runs:
            return []  # doubled
        run = self._run_of(uid, document)
        _remember(self._runs, uid, run)
        if not run.unwanted:
            self._now, self._joined = uid, None
        if uid in self._heard and not run.unwanted:  # its descriptor has overtaken it
            return [PositionsStart(uid, run.series, run.metadata)]
        return []

    def _run_of(self, uid: str, document: Mapping[str, Any]) -> _Run:
        if self._unwanted(document):
            return _Run(None, {}, unwanted=True)
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
        return _Run(series, bounded_document(told), problem=problem)

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
            overtaken = former.epoch != epoch
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
        return self._begin(epoch, run)

    def _begin(self, epoch: str, run: _Run) -> list[Message]:
        """An epoch begins with the descriptor of its events, or another one of them."""
        if epoch in self._heard:
            return []
        events = MessageNumbers()
        events.expect(1)
        _remember(self._heard, epoch, events)
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

    def _stop(self, stop: Stop) -> list[Message]:
        epoch = checked_name(stop.run_start)
        unheard = self._runs.pop(epoch, None) is None
        if epoch == self._now:
            self._now = None
        if self._joined is not None and unheard:
            # The run that was joined is the one that ends: no other has told its descriptor.
            epoch, self._joined = self._joined, None
        events = self._heard.get(epoch)
        if events is None:
            return []
        last = stop.num_events.get(self._settings.stream, 0)
        if events.awaits(last):
            _remember(self._ending, epoch, last)
            return []
        return [PositionsEnd(epoch)]

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
        out.append(self._positions(stream, readings))
        return [*out, *self._ended(stream.epoch, readings)]

    def _ended(self, epoch: str, readings: Readings) -> list[Message]:
        """The end of a run that was told before its last events came."""
        events = self._heard.get(epoch)
        if events is None:
            return []
        for number in readings.numbers.tolist():
            events.take(number)
        last = self._ending.get(epoch)
        if last is None or events.awaits(last):
            return []
        del self._ending[epoch]
        return [PositionsEnd(epoch)]

    def _join(self, uid: str, readings: Readings) -> list[Message]:
        """An event whose descriptor was not heard: it was lost, or it came before we listened."""
        settings = self._settings
        epoch = self._now or ""
        run = self._runs.get(epoch)
        known = self._joined is not None or epoch in self._heard
        _remember(self._streams, uid, None)
        if known or any(key not in readings.values for key in ("y", "x")):
            return []  # of another stream
        problem = "" if run is None else run.problem
        if settings.scale_yx_m is None:
            problem = "which tells units: set positions.bluesky.scale_yx_m to do without it"
        elif run is None and (settings.only or settings.series_key is not None):
            problem = (
                "nor the start, which tells what run it is: a run can be joined only without "
                "positions.bluesky.only and series_key"
            )
        if problem or settings.scale_yx_m is None:
            raise MalformedMessage(
                f"the descriptor of a run was not heard, {problem}; its events are left out"
            )
        if run is not None:
            _remember(self._streams, uid, _Stream(epoch, run.series, settings.scale_yx_m))
            return self._begin(epoch, run)
        self._joined = f"joined {uuid.uuid4().hex}"
        _remember(self._streams, uid, _Stream(self._joined, None, settings.scale_yx_m))
        _remember(self._heard, self._joined, MessageNumbers())
        from_the_first = bool(readings.numbers.size) and int(readings.numbers[0]) == 1
        return [PositionsStart(self._joined, joined=not from_the_first)]

    def _positions(self, stream: _Stream, readings: Readings) -> Positions:
        frames = self._settings.frames_per_event
        first = self._first_frames(readings)
        if first.size * frames > self._limits.max_positions:
            raise LimitExceeded(
                f"{first.size} events of {frames} frames in one document: publish smaller pages"
            )
        numbers: NDArray[np.int64] = (first[:, None] + np.arange(frames)).ravel()
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

    def _first_frames(self, readings: Readings) -> NDArray[np.int64]:
        """Number of the first frame of each event (n,)."""
        settings, limits = self._settings, self._limits
        events = readings.numbers - 1
        if events.size:
            limits.check_number(int(events.min()))
            limits.check_number((int(events.max()) + 1) * settings.frames_per_event)
        told = readings.values.get("frame")
        if told is None:
            return events * settings.frames_per_event
        if not np.isfinite(told).all() or (told % 1).any():
            raise MalformedMessage(
                f"the field {settings.frame!r} holds no whole number: it is to be that of the "
                "event's first frame (positions.bluesky.frame)"
            )
        first = told - settings.first_frame
        for number in (first.min(initial=0), first.max(initial=0)):
            limits.check_number(int(number))
        return first.astype(np.int64)


def _remember(known: OrderedDict[str, _Value], uid: str, value: _Value) -> None:
    known[uid] = value
    if len(known) > MAX_RUNS:
        known.popitem(last=False)
