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
from ptycho_stream.wire.sample_frames import FrameSamples, SampleFrames

MAX_BYTES_A_SAMPLE: Final = 48
"""Of JSON: a message may be as long as a header and so much for each of the positions accepted."""
WINDOW: Final = 1024
"""So many messages are remembered to tell doubled ones, and so far behind they may still come."""
LATE_START: Final = 64
"""A start that comes after no more messages than these has been overtaken by them."""
QUIET_NS: Final = 1_000_000_000
"""Without a message, after which nothing is expected to come late any more."""
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
        self._samples = self._new_samples()
        self._epoch: str | None = None
        self._arm_time: str | None = None
        self._joined = self._stopped = self._settled = False
        self._late_start: tuple[str, dict[str, Any]] | None = None
        self._recent: dict[int, int] = {}
        self._highest = -1
        self._last_ns = 0

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """What one received ZeroMQ message completes: positions of frames, starts and ends."""
        try:
            return self._message(parts)
        except WireError as error:
            return [Undecodable(error.reason, str(error))]

    def overdue(self) -> list[Message]:
        """Frames that wait for samples which will not come, once the stream is quiet."""
        if self._epoch is None or self._settled or self._clock() - self._last_ns < QUIET_NS:
            return []
        self._settled = True
        out = self._partial(left_behind=False)
        return [*out, *self._finish()] if self._stopped else out

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
        self._last_ns, self._settled = self._clock(), False
        match message:
            case _Start():
                return self._start(message, part)
            case _Stop():
                return self._stop()
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
        if arm_time is not None and arm_time == self._arm_time:
            return []  # doubled
        if arm_time is None and self._epoch is not None and self._highest < 0:
            return []
        if len(part) > self._limits.max_header_bytes:
            raise LimitExceeded(f"a start of {len(part)} bytes")
        document = {key: value for key, value in _document(part).items() if key != "msg_type"}
        metadata = {f"panda_{key}": value for key, value in bounded_document(document).items()}
        name = f"panda {arm_time}"
        if arm_time is None or not name.isprintable() or len(name) > 200:
            name = f"panda {uuid.uuid4().hex}"
        if self._epoch is not None:
            if self._joined and not self._stopped and self._highest < LATE_START:
                self._arm_time, self._joined = arm_time, False
                self._late_start = (name, metadata)
                return [PositionsStart(self._epoch, None, metadata)]
            return [*self._finish(), *self._begin(name, arm_time, metadata)]
        return self._begin(name, arm_time, metadata)

    def _stop(self) -> list[Message]:
        if self._epoch is None or self._stopped:
            return []
        self._stopped = True
        return [*self._partial(left_behind=False), PositionsEnd(self._epoch)]

    def _data(self, message: _Data, part: bytes) -> list[Message]:
        columns = self._columns(message, part)
        number, digest = message.frame_number, xxhash.xxh3_64_intdigest(part)
        if number < 0:
            raise MalformedMessage(f"message number {number} is negative")
        former = self._recent.get(number)
        if former == digest:
            return []  # doubled
        out: list[Message] = []
        anew = former is not None or number <= self._highest - WINDOW
        if self._epoch is not None and anew:  # armed again, and this is the first that we hear
            told, arm_time = self._late_start, self._arm_time
            out += self._finish()
            if told is not None:  # but for a start that was taken for the former's
                out += self._begin(told[0], arm_time, told[1])
        if self._epoch is None:
            out += self._begin(f"panda joined {uuid.uuid4().hex}", None, {}, joined=True)
        self._recent[number] = digest
        if len(self._recent) > WINDOW:
            del self._recent[next(iter(self._recent))]
        self._highest = max(self._highest, number)
        touched: list[int] = []
        for column, (first, values) in enumerate(columns):
            touched += self._samples.add(column, first, values)
        out += self._positions(self._samples.ready(touched))
        if self._settings.min_fraction < 1:
            out += self._partial(left_behind=True)
        return [*out, *self._counted(self._samples.surplus())]

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

    def _begin(
        self,
        name: str,
        arm_time: str | None,
        metadata: Mapping[str, Any],
        joined: bool = False,
    ) -> list[Message]:
        self._epoch, self._arm_time = name, arm_time
        self._joined, self._stopped, self._late_start = joined, False, None
        self._recent.clear()
        self._highest = -1
        return [PositionsStart(name, None, metadata, joined)]

    def _finish(self) -> list[Message]:
        """The epoch is over: count what is lost of it."""
        if self._epoch is None:
            return []
        out = self._partial(left_behind=False)
        out += self._counted(self._samples.lost())
        if not self._stopped:
            out.append(PositionsEnd(self._epoch))
        self._epoch, self._late_start = None, None
        self._samples = self._new_samples()
        return out

    # ---- positions -----------------------------------------------------------------------------

    def _partial(self, *, left_behind: bool) -> list[Message]:
        settings = self._settings
        if settings.min_fraction >= 1:
            return []
        least = max(math.ceil(settings.min_fraction * settings.samples_per_frame), 1)
        return self._positions(self._samples.partial(least, left_behind=left_behind))

    def _positions(self, found: list[FrameSamples]) -> list[Message]:
        return [self._positions_of(samples) for samples in found]

    def _positions_of(self, samples: FrameSamples) -> Positions:
        assert self._epoch is not None
        settings = self._settings
        means = dict(zip(self._names, samples.means(), strict=True))
        counts_yx = np.stack([means["y"], means["x"]], axis=1)
        position_yx_m = counts_yx * settings.scale_yx_m + np.asarray(settings.offset_yx_m)
        i0: NDArray[np.float64] | None = means.get("i0")
        if i0 is not None and settings.i0_from == "sum":
            i0 = i0 * settings.samples_per_frame
        skip = self._closed(samples) if "gate" in self._names else None
        return Positions(self._epoch, None, samples.numbers, position_yx_m, i0, skip)

    def _closed(self, samples: FrameSamples) -> NDArray[np.bool_]:
        """Which frames (n,) were without beam for one of their samples or more."""
        gate = samples.values[list(self._names).index("gate")]
        threshold = self._settings.gate_threshold
        opened = gate > threshold if self._settings.gate_open == "above" else gate < threshold
        return ~(opened | ~samples.known).all(axis=1)

    def _counted(self, lost: list[tuple[int, int]]) -> list[Message]:
        total = self._settings.samples_per_frame
        return [
            Undecodable(
                "torn",
                f"frame {number} of epoch {self._epoch} has {count} of its {total} samples: it has "
                "no position (positions.panda.min_fraction says how many are enough)",
            )
            for number, count in lost
        ]


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
