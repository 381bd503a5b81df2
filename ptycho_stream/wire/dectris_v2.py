"""DECTRIS SIMPLON stream, version 2 (CBOR): received parts to messages.

Ingest feeds :class:`DectrisV2Decoder` whatever the socket gives; each part is one message, a CBOR
map with ``type`` start, image or end.  Pixels stay where they are in the message.  The format is
described in ``docs/dialects/dectris.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, cast

from ptycho_stream.errors import LimitExceeded, MalformedMessage, TornMessage, WireError
from ptycho_stream.messages import BytesLike, Frame, Message, ScanEnd, ScanStart, Undecodable
from ptycho_stream.wire.cbor import Tag, read_cbor
from ptycho_stream.wire.dectris_v2_header import SOURCE, channels_of, read_start
from ptycho_stream.wire.dectris_v2_parts import SELF_DESCRIBED, read_array
from ptycho_stream.wire.detector_config import series_name
from ptycho_stream.wire.limits import MAX_NAME_LENGTH, WireLimits

MAX_SERIES: Final = 64
"""So many series are remembered by their unique ids."""
_INT64_MAX: Final = 2**63 - 1


@dataclass(slots=True)
class _Series:
    """What must be known of a series to understand its images.

    Attributes:
        unique_id: of the series; None: not told.
        channel: that is recorded; None: not known before the first image.
    """

    unique_id: str | None
    channel: str | None

    def differs_from(self, unique_id: str | None) -> bool:
        """Whether an image with this id is of another series of the same name."""
        return None not in (self.unique_id, unique_id) and self.unique_id != unique_id


class DectrisV2Decoder:
    """Turns version 2 messages into ours.  It never raises on bad input.

    One decoder serves all endpoints of a detector: a series starts at one of them.

    Args:
        channel: that is recorded of several (thresholds); None: the first.
        limits: what is accepted.

    Example::

        decoder = DectrisV2Decoder()
        for message in decoder.receive(socket.recv_multipart()):
            ...
    """

    def __init__(self, channel: str | None = None, limits: WireLimits | None = None) -> None:
        self._channel = channel
        self._limits = limits or WireLimits()
        self._series: dict[str, _Series] = {}

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """Messages in one received ZeroMQ message.

        Args:
            parts: in order, one message each; the pixels are kept by reference.
        """
        out: list[Message] = []
        for part in parts:
            try:
                told = self._read(part)
                name = series_name(told.get("series_id"), str(told.get("type")))
            except WireError as error:
                out.append(Undecodable(error.reason, str(error)))
                continue
            try:
                self._take(told, name, out)
            except WireError as error:
                out.append(Undecodable(error.reason, str(error), name))
        return out

    def _read(self, part: BytesLike) -> dict[str, Any]:
        limits = self._limits
        if len(part) > limits.max_message_bytes:
            raise LimitExceeded(f"a part of {len(part)} bytes, above {limits.max_message_bytes}")
        if bytes(part[:1]) == b"{":
            raise MalformedMessage(
                "JSON came, as the detector sends it in version 1: set detector.dialect to "
                "'dectris-v1', or the detector's stream format to 'cbor'"
            )
        told = read_cbor(part, limits.max_metadata_items, limits.max_header_bytes)
        if type(told) is Tag and told.number == SELF_DESCRIBED:
            told = told.value
        if not isinstance(told, dict):
            raise MalformedMessage(f"a message is no CBOR map but {type(told).__name__}")
        return cast("dict[str, Any]", told)

    def _take(self, told: Mapping[str, Any], name: str, out: list[Message]) -> None:
        match told.get("type"):
            case "image":
                self._image(told, name, out)
            case "start":
                self._start(told, name, out)
            case "end":
                out.append(ScanEnd(name))
            case kind:
                text = f"type is {kind!r:.40}: known are start, image and end"
                raise MalformedMessage(text)

    def _start(self, told: Mapping[str, Any], name: str, out: list[Message]) -> None:
        channels = channels_of(told)
        channel = self._channel or (channels[0] if channels else None)
        self._remember(name, _Series(_unique_id(told), channel))
        start, problems = read_start(told, name, channel, self._limits)
        out.append(start)
        out += [Undecodable(error.reason, str(error), name) for error in problems]
        self._tell_of_channels(channels, channel, name, out)

    def _image(self, told: Mapping[str, Any], name: str, out: list[Message]) -> None:
        number, data = told.get("image_id"), told.get("data")
        if not isinstance(number, int) or isinstance(number, bool):
            raise MalformedMessage(f"image_id is {number!r:.40} and should be a whole number")
        self._limits.check_number(number)
        if not isinstance(data, dict) or not data:
            raise TornMessage(f"frame {number} came without its pixels")
        by_channel = cast("dict[str, Any]", data)
        known, unique_id = self._series.get(name), _unique_id(told)
        began = known is not None and known.differs_from(unique_id)
        series = _Series(unique_id, self._channel) if known is None or began else known
        channel = series.channel or next(iter(by_channel))
        if channel not in by_channel:
            raise MalformedMessage(
                f"frame {number} has no channel {channel!r:.80}, only "
                f"{', '.join(by_channel)!r:.200}: correct detector.dectris_v2.channel"
            )
        image = read_array(by_channel[channel], self._limits)
        if series is not known:  # only now: a damaged image tells of no new series
            self._remember(name, series)
        if began:
            about = {"series_unique_id": series.unique_id, "channel": channel}
            out.append(ScanStart(SOURCE, name, None, image.shape_yx, image.dtype, metadata=about))
            text = f"the start of {unique_id!r} never came: is there a second receiver?"
            out.append(Undecodable("lost", text, name))
        series.unique_id = series.unique_id or unique_id
        if series.channel is None:
            series.channel = channel
            self._tell_of_channels(list(by_channel), channel, name, out)
        out.append(Frame(name, number, image, None, *_exposure_ns(told)))

    def _remember(self, name: str, series: _Series) -> None:
        self._series.pop(name, None)
        self._series[name] = series
        if len(self._series) > MAX_SERIES:
            del self._series[next(iter(self._series))]

    def _tell_of_channels(
        self, channels: Sequence[str], channel: str | None, name: str, out: list[Message]
    ) -> None:
        if self._channel is None and len(channels) > 1:
            text = f"frames have the channels {', '.join(channels)!r:.200}: only {channel!r:.80} is"
            text = f"{text} recorded; name the one that you want in detector.dectris_v2.channel"
            out.append(Undecodable("channels", text, name))


def _unique_id(told: Mapping[str, Any]) -> str | None:
    value = told.get("series_unique_id")
    return value if isinstance(value, str) and 0 < len(value) <= MAX_NAME_LENGTH else None


def _exposure_ns(told: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Start and stop of an image in UTC; None where the message does not date its series."""
    date = told.get("series_date")
    if type(date) is Tag:
        date = date.value
    series_ns = _date_ns(date) if isinstance(date, str) and len(date) < 64 else None
    if series_ns is None:
        return None, None
    start_ns, stop_ns = _fraction_ns(told.get("start_time")), _fraction_ns(told.get("stop_time"))
    if stop_ns is None and start_ns is not None:
        real_ns = _fraction_ns(told.get("real_time"))
        stop_ns = None if real_ns is None else start_ns + real_ns
    return _sum_ns(series_ns, start_ns), _sum_ns(series_ns, stop_ns)


@lru_cache(maxsize=16)
def _date_ns(text: str) -> int | None:
    """UTC nanoseconds of an ISO 8601 date; None of one that does not say how far it is off UTC."""
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        return None
    return round(date.timestamp() * 1e6) * 1000


def _fraction_ns(value: Any) -> int | None:
    """Nanoseconds of [numerator, denominator] in seconds."""
    match value:
        case [int(numerator), int(denominator)] if denominator > 0:
            return numerator * 1_000_000_000 // denominator
        case _:
            return None


def _sum_ns(series_ns: int, offset_ns: int | None) -> int | None:
    if offset_ns is None or not 0 <= series_ns + offset_ns <= _INT64_MAX:
        return None
    return series_ns + offset_ns
