"""Frames as a JSON header and a blob: STINS (MAX IV), PSI ``array-1.0`` and Odin live view.

Ingest feeds :class:`JsonBlobDecoder` the messages of its sockets.  The dialects differ in the names
of the header's keys, which :mod:`~ptycho_stream.wire.json_blob_head` knows, and in how they say
where a series begins: STINS does, the others leave it to frame numbers and names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from ptycho_stream.errors import MalformedMessage, WireError
from ptycho_stream.messages import (
    BytesLike,
    Frame,
    Message,
    ScanEnd,
    ScanStart,
    Undecodable,
)
from ptycho_stream.settings import FirstNumber, OdinSettings, PsiSettings
from ptycho_stream.wire.detector_config import expected_frames, geometry_of
from ptycho_stream.wire.json_blob_head import (
    ODIN,
    PSI,
    STINS,
    Header,
    Profile,
    read_header,
    read_image,
    read_number,
    read_object,
)
from ptycho_stream.wire.limits import WireLimits, checked_name
from ptycho_stream.wire.message_numbers import MessageNumbers
from ptycho_stream.wire.series_tracker import SeriesTracker

MAX_LOST_SAID: Final = 100
"""Lost messages are reported one by one, but not more than so many at once."""
STARTS: Final = ("header", "series_start")
DEFAULT_SILENCE_NS: Final = 60_000_000_000


class StinsDecoder:
    """MAX IV STINS: ``header``, ``image`` and ``series_end`` messages, numbered through.

    All series have the same name: an image does not say of which it is, and the file name that the
    header gives goes into the metadata.
    """

    def __init__(self, limits: WireLimits | None = None) -> None:
        self._limits = limits or WireLimits()
        self._numbers = MessageNumbers()

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """Messages completed by one received ZeroMQ message; the blob is kept by reference."""
        try:
            header = read_header(parts, self._limits)
        except WireError as error:
            return [Undecodable(error.reason, str(error), STINS.name)]
        out = self._lost(header)
        try:
            out.append(self._message(header, parts))
        except WireError as error:
            out.append(Undecodable(error.reason, str(error), STINS.name))
            if header.get("htype") in STARTS:  # whatever else it holds, a series begins
                out.append(ScanStart(STINS.name, STINS.name))
        return out

    def _message(self, header: Header, parts: Sequence[BytesLike]) -> Message:
        match header.get("htype"):
            case "image":
                return self._image(header, parts)
            case "header" | "series_start":
                return self._start(header, parts)
            case "series_end":
                return ScanEnd(STINS.name)
            case kind:
                text = f"htype is {kind!r:.40}: known are header, image and series_end"
                raise MalformedMessage(text)

    def _image(self, header: Header, parts: Sequence[BytesLike]) -> Frame:
        number = read_number(header, STINS.number, self._limits)
        return Frame(STINS.name, number, read_image(STINS, header, parts, self._limits))

    def _start(self, header: Header, parts: Sequence[BytesLike]) -> ScanStart:
        told: Header = {}
        for part in parts[1:2]:
            told = read_object(part)
        if "count_time" not in told and "exptime" in told:
            told = {**told, "count_time": told["exptime"]}
        about = {key: value for key, value in header.items() if key not in ("htype", "msg_number")}
        return ScanStart(
            STINS.name,
            STINS.name,
            expected_frames(told, self._limits),
            geometry=geometry_of(told),
            metadata=self._limits.bounded_metadata({**about, **told}),
        )

    def _lost(self, header: Header) -> list[Message]:
        """One message for each that is known by now to be lost."""
        number, kind = header.get("msg_number"), header.get("htype")
        if isinstance(number, bool) or not isinstance(number, int):
            return []
        numbers = self._numbers
        lost = numbers.begin(number) if kind in STARTS else numbers.take(number)
        if kind == "series_end":
            lost += numbers.settle()
        if not lost:
            return []
        text = f"{lost} messages before msg_number {number} never came"
        text = f"{text}: is there a second receiver, which takes them?"
        return [Undecodable("lost", text, STINS.name)] * min(lost, MAX_LOST_SAID)


class TrackedDecoder:
    """PSI ``array-1.0`` and Odin live view, whose series are found by names and numbers.

    Args:
        profile: the dialect.
        name_of: the sender's name of a frame's series, from its header.
        wanted: whether a header's frame is of those to take.
        first_number: of a series' first frame.
        silence_ns: so long without a frame ends a series.
        limits: what is accepted.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        profile: Profile,
        name_of: Callable[[Header], str],
        wanted: Callable[[Header], bool],
        first_number: FirstNumber,
        silence_ns: int,
        limits: WireLimits | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._profile = profile
        self._name_of = name_of
        self._wanted = wanted
        self._limits = limits or WireLimits()
        self._tracker = SeriesTracker(profile.name, first_number, silence_ns, clock)

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """Messages completed by one received ZeroMQ message; the blob is kept by reference."""
        try:
            header = read_header(parts, self._limits)
            if not self._wanted(header):
                return []
            frame = self._frame(header, parts)
        except WireError as error:
            return [Undecodable(error.reason, str(error), self._tracker.series)]
        return [self._described(message, header) for message in self._tracker.take(frame)]

    def _frame(self, header: Header, parts: Sequence[BytesLike]) -> Frame:
        profile = self._profile
        number = read_number(header, profile.number, self._limits)
        image = read_image(profile, header, parts, self._limits)
        return Frame(self._name_of(header), number, image)

    def _described(self, message: Message, header: Header) -> Message:
        if type(message) is not ScanStart:
            return message
        own = ("shape", "htype", self._profile.number)
        about = {key: value for key, value in header.items() if key not in own}
        try:
            return replace(message, metadata=self._limits.bounded_metadata(about))
        except WireError:
            return message  # a frame whose header says too much is a frame all the same


def psi_decoder(
    settings: PsiSettings | None = None,
    limits: WireLimits | None = None,
    silence_ns: int = DEFAULT_SILENCE_NS,
    clock: Callable[[], int] = time.monotonic_ns,
) -> TrackedDecoder:
    """A decoder of PSI's ``array-1.0`` messages."""
    options = settings or PsiSettings()
    return TrackedDecoder(PSI, _psi_name, _always, options.first_number, silence_ns, limits, clock)


def odin_decoder(
    settings: OdinSettings | None = None,
    limits: WireLimits | None = None,
    silence_ns: int = DEFAULT_SILENCE_NS,
    clock: Callable[[], int] = time.monotonic_ns,
) -> TrackedDecoder:
    """A decoder of Odin live view messages."""
    options = settings or OdinSettings()

    def wanted(header: Header) -> bool:
        return options.dataset is None or header.get("dataset") == options.dataset

    profile = replace(ODIN, shape_order=options.shape_order)
    return TrackedDecoder(
        profile, _odin_name, wanted, options.first_number, silence_ns, limits, clock
    )


def _always(header: Mapping[str, Any]) -> bool:
    return True


def _psi_name(header: Header) -> str:
    htype: Any = header.get("htype")
    known = htype if isinstance(htype, list) else [htype]
    if "array-1.0" not in known:
        raise MalformedMessage(f"htype is {htype!r:.40} and should be array-1.0")
    return PSI.name


def _odin_name(header: Header) -> str:
    name = header.get("acquisition_id")
    if name in (None, ""):
        return ODIN.name
    if not isinstance(name, str):
        raise MalformedMessage(f"acquisition_id is {name!r:.40} and should be text")
    return checked_name(name)
