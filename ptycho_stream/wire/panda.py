"""PandA over ZeroMQ: positions from encoder samples, published as JSON while they are taken.

One part a message, ``msg_type`` ``start``, ``data`` or ``stop``; a sample is known by its absolute
number (``starting_sample_number``), never by the order in which messages come.  Fed by ingest where
``positions.source = "panda"``; :mod:`ptycho_stream.wire.panda_encoder` makes what simulators send.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, cast

import msgspec
import numpy as np
import xxhash
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
from ptycho_stream.settings import PandaSettings
from ptycho_stream.wire.limits import WireLimits, bounded_document
from ptycho_stream.wire.panda_arming import QUIET_NS, Arming
from ptycho_stream.wire.sample_frames import FrameSamples, SampleFrames

MAX_BYTES_A_SAMPLE: Final = 48
"""Of JSON: a message may be as long as a header and so much for each of the positions accepted."""
_BAD_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


class _Dataset(msgspec.Struct):
    starting_sample_number: int
    data: msgspec.Raw
    size: int | None = None


class _Start(msgspec.Struct, tag_field="msg_type", tag="start"):
    arm_time: str | int | float | None = None


class _Stop(msgspec.Struct, tag_field="msg_type", tag="stop"):
    emitted_frames: int | None = None


class _Names(msgspec.Struct):
    datasets: dict[str, msgspec.Raw] = {}


class _Data(Protocol):
    """A data message with the datasets that were asked for, under the settings' names."""

    frame_number: int
    datasets: Any


_decode_values = msgspec.json.Decoder(list[float | bool | None]).decode
_decode_names = msgspec.json.Decoder(_Names).decode
_decode_document = msgspec.json.Decoder(dict[str, Any]).decode


class PandaDecoder:
    """Turns PandA's messages into positions.  It never raises on bad input.

    An epoch reaches from arming to stop and is named by its arm time.  A stream that is joined in
    between, or whose start was lost, makes an epoch of its own.

    Args:
        settings: which datasets are what, and their scale.
        limits: what is accepted.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        settings: PandaSettings,
        limits: WireLimits | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._settings = settings
        self._limits = limits or WireLimits()
        self._clock = clock
        names = {"y": settings.y, "x": settings.x, "i0": settings.i0, "gate": settings.gate}
        self._names = {key: name for key, name in names.items() if name is not None}
        self._decode = _decoder_of(self._names)
        self._arming: Arming | None = None
        self._last_ns = 0

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """What one received ZeroMQ message completes: positions of frames, starts and ends."""
        try:
            return self._message(parts)
        except WireError as error:
            return [Undecodable(error.reason, str(error))]

    def overdue(self) -> list[Message]:
        """Frames that wait for samples which will not come, once the stream is quiet."""
        arming = self._arming
        if arming is None or arming.settled or self._clock() - self._last_ns < QUIET_NS:
            return []
        arming.settled = True
        if not arming.stopped:
            return self._partial(arming, arming.samples.passed)
        out = self._closed(arming)
        arming.samples = self._new_samples()  # of little use now, and large
        return out

    # ---- messages ------------------------------------------------------------------------------

    def _message(self, parts: Sequence[BytesLike]) -> list[Message]:
        if len(parts) != 1:
            raise TornMessage(f"a message of PandA has one part, not {len(parts)}")
        part = parts[0]
        limits = self._limits
        longest = limits.max_header_bytes + MAX_BYTES_A_SAMPLE * limits.max_positions
        if len(part) > min(longest, limits.max_message_bytes):
            raise LimitExceeded(f"a message of {len(part)} bytes: send fewer samples in each")
        message = self._parsed(bytes(part))
        self._last_ns = self._clock()
        match message:
            case _Start():
                return self._start(message, part)
            case _Stop():
                return self._stop(message)
            case _:
                return self._data(cast("_Data", message), bytes(part))

    def _parsed(self, part: bytes) -> Any:
        try:
            return self._decode(part)
        except _BAD_JSON as error:
            problem = error
        if b"NaN" in part:  # which Python's json writes and JSON has no word for
            try:
                return self._decode(part.replace(b"NaN", b"null"))
            except _BAD_JSON as error:
                problem = error
        raise MalformedMessage(f"not a message of PandA: {problem}") from problem

    def _start(self, message: _Start, part: BytesLike) -> list[Message]:
        arm_time = None if message.arm_time is None else str(message.arm_time)
        arming = self._arming
        if arming is not None and arming.started:
            doubled = arming.silent if arm_time is None else arm_time == arming.arm_time
            if doubled:
                return []
        if len(part) > self._limits.max_header_bytes:
            raise LimitExceeded(f"a start of {len(part)} bytes")
        document = {key: value for key, value in _document(part).items() if key != "msg_type"}
        metadata = {f"panda_{key}": value for key, value in bounded_document(document).items()}
        if arming is not None and arming.overtaken(self._last_ns):
            arming.arm_time, arming.started = arm_time, True
            return [PositionsStart(arming.name, None, metadata)]
        out = self._finish()
        arming = self._begin(arm_time)
        arming.started = True
        return [*out, PositionsStart(arming.name, None, metadata)]

    def _stop(self, message: _Stop) -> list[Message]:
        arming = self._arming
        if arming is None or arming.stopped:
            return []
        arming.stopped, arming.emitted, arming.settled = True, message.emitted_frames, False
        return self._closed(arming) if arming.complete() else []

    def _data(self, message: _Data, part: bytes) -> list[Message]:
        columns = self._columns(message, part)
        number, digest = message.frame_number, xxhash.xxh3_64_intdigest(part)
        if number < 0:
            raise MalformedMessage(f"message number {number} is negative")
        out: list[Message] = []
        arming = self._arming
        taken = "of the next" if arming is None else arming.take(number, digest, self._last_ns)
        if taken == "doubled":
            return []
        if arming is None or taken == "of the next":
            out += self._finish()
            arming = self._begin(None)
            out.append(PositionsStart(arming.name, joined=number > 0))
            arming.take(number, digest, self._last_ns)
        arming.settled = False
        touched: list[int] = []
        for column, (first, values) in enumerate(columns):
            touched += arming.samples.add(column, first, values)
        out += self._positions(arming, arming.samples.ready(touched))
        if arming.complete():
            return [*out, *self._closed(arming)]
        if self._settings.min_fraction < 1:
            out += self._partial(arming, arming.samples.left_behind)
        return [*out, *self._counted(arming, arming.samples.surplus())]

    def _columns(self, message: _Data, part: bytes) -> list[tuple[int, NDArray[np.float64]]]:
        """First sample number and values of each dataset that is wanted."""
        columns: list[tuple[int, NDArray[np.float64]]] = []
        for key, name in self._names.items():
            dataset: _Dataset | None = getattr(message.datasets, key)
            if dataset is None:
                raise MalformedMessage(
                    f"a data message has no dataset {name!r}, only {_names_in(part)}: correct "
                    f"positions.panda.{key}, or let PandA capture it"
                )
            columns.append(self._column(name, dataset))
        return columns

    def _column(self, name: str, dataset: _Dataset) -> tuple[int, NDArray[np.float64]]:
        raw = bytes(dataset.data)
        told = raw.count(b",") + 1 if raw.strip(b"[] \t\r\n") else 0
        if dataset.size is not None and dataset.size != told:
            raise MalformedMessage(f"dataset {name!r} says {dataset.size} values and has {told}")
        if told > self._limits.max_positions:
            raise LimitExceeded(f"{told} samples in one message: send fewer in each")
        try:
            values = np.array(_decode_values(raw), np.float64)
        except _BAD_JSON as error:
            raise MalformedMessage(f"dataset {name!r} holds something else than numbers") from error
        settings = self._settings
        first = dataset.starting_sample_number - settings.first_sample
        if first < 0:  # before the first frame
            first, values = 0, values[min(-first, len(values)) :]
        self._limits.check_number((first + len(values)) // settings.samples_per_frame)
        return first, values

    # ---- epochs --------------------------------------------------------------------------------

    def _new_samples(self) -> SampleFrames:
        return SampleFrames(len(self._names), self._settings.samples_per_frame)

    def _begin(self, arm_time: str | None) -> Arming:
        name = f"panda {arm_time}"
        if arm_time is None or not name.isprintable() or len(name) > 200:
            name = f"panda {uuid.uuid4().hex}"
        self._arming = Arming(name, self._new_samples(), self._last_ns, arm_time)
        return self._arming

    def _finish(self) -> list[Message]:
        """Another epoch follows."""
        arming, self._arming = self._arming, None
        return [] if arming is None else self._closed(arming)

    def _closed(self, arming: Arming) -> list[Message]:
        """All that will come of an epoch has come: count what is lost of it."""
        out = self._partial(arming, None)
        if not arming.complete():
            whole = None if arming.stopped else arming.samples.passed
            out += self._counted(arming, arming.samples.lost(whole))
        if not arming.ended:
            out.append(PositionsEnd(arming.name))
            arming.ended = True
        return out

    # ---- positions -----------------------------------------------------------------------------

    def _partial(self, arming: Arming, before: int | None) -> list[Message]:
        settings = self._settings
        if settings.min_fraction >= 1:
            return []
        least = max(math.ceil(settings.min_fraction * settings.samples_per_frame), 1)
        return self._positions(arming, arming.samples.partial(least, before))

    def _positions(self, arming: Arming, found: list[FrameSamples]) -> list[Message]:
        return [self._positions_of(arming.name, samples) for samples in found]

    def _positions_of(self, epoch: str, samples: FrameSamples) -> Positions:
        settings = self._settings
        means = dict(zip(self._names, samples.means(), strict=True))
        counts_yx = np.stack([means["y"], means["x"]], axis=1)
        position_yx_m = counts_yx * settings.scale_yx_m + np.asarray(settings.offset_yx_m)
        i0: NDArray[np.float64] | None = means.get("i0")
        if i0 is not None and settings.i0_from == "sum":
            i0 = i0 * settings.samples_per_frame
        skip = self._without_beam(samples) if "gate" in self._names else None
        return Positions(epoch, None, samples.numbers, position_yx_m, i0, skip)

    def _without_beam(self, samples: FrameSamples) -> NDArray[np.bool_]:
        """Which frames (n,) were without beam for one of their samples or more."""
        gate = samples.values[list(self._names).index("gate")]
        threshold = self._settings.gate_threshold
        opened = gate > threshold if self._settings.gate_open == "above" else gate < threshold
        return ~(opened | ~samples.known).all(axis=1)

    def _counted(self, arming: Arming, lost: list[tuple[int, int]]) -> list[Message]:
        if not lost:
            return []
        number, count = lost[0]
        detail = (
            f"{len(lost)} frames of epoch {arming.name} have no position, because a part of their "
            f"samples was lost: frame {number} has {count} of {self._settings.samples_per_frame} "
            "(positions.panda.min_fraction says how many are enough)"
        )
        return [Undecodable("torn", detail, epoch=arming.name, count=len(lost))]


def _decoder_of(names: Mapping[str, str]) -> Callable[[bytes], Any]:
    """A decoder that makes nothing of datasets that nobody asks for."""
    fields: list[tuple[str, Any, Any]] = [(key, _Dataset | None, None) for key in names]
    datasets = msgspec.defstruct("_Datasets", fields, rename=names)
    data = msgspec.defstruct(
        "_Data",
        [("frame_number", int), ("datasets", datasets)],
        tag_field="msg_type",
        tag="data",
    )
    return msgspec.json.Decoder(_Start | _Stop | data).decode


def _document(part: BytesLike) -> dict[str, Any]:
    try:
        return _decode_document(part)
    except _BAD_JSON as error:
        raise MalformedMessage(f"not a start of PandA: {error}") from error


def _names_in(part: bytes) -> str:
    """The datasets of a message, for people; of an endless one the first."""
    if len(part) > 100_000:
        return "others"
    try:
        names = list(_decode_names(part).datasets)
    except _BAD_JSON:
        return "others"
    told = ", ".join(name[:60] for name in names[:12])
    return f"{told} ..." if len(names) > 12 else told or "none"
