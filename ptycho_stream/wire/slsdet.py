"""The stream of slsReceiver (slsDetectorPackage): a PUB socket a module, JSON header and pixels.

Ingest feeds one :class:`SlsdetDecoder` the messages of all its sockets, so that the modules of a
frame find each other by the frame's number and their row and column.  The facts are in
``docs/dialects/json-blob.md``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, Final, cast

from ptycho_stream.errors import MalformedMessage, WireError
from ptycho_stream.messages import BytesLike, Frame, Message, ScanStart, Undecodable
from ptycho_stream.settings import SlsdetSettings
from ptycho_stream.wire.json_blob_head import (
    SLSDET,
    Header,
    check_raw,
    read_header,
    read_image,
    read_number,
)
from ptycho_stream.wire.limits import WireLimits, checked_name
from ptycho_stream.wire.module_frames import Layout, Module, ModuleFrames, PutTogether
from ptycho_stream.wire.series_tracker import SeriesTracker

VERSIONS: Final = (4, 5)
"""``jsonversion`` of slsDetectorPackage 6 to 9."""
METADATA_KEYS: Final = ("fname", "fileIndex", "jsonversion", "detType", "bitmode", "addJsonHeader")


class SlsdetDecoder:
    """Turns modules into frames.  It never raises on bad input.

    Args:
        settings: how modules make a frame, and what to do without one.
        limits: what is accepted.
        silence_ns: so long without a frame ends a series.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        settings: SlsdetSettings | None = None,
        limits: WireLimits | None = None,
        silence_ns: int = 60_000_000_000,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._settings = settings or SlsdetSettings()
        self._limits = limits or WireLimits()
        self._clock = clock
        self._wait_ns = round(self._settings.wait_ms * 1e6)
        self._frames = ModuleFrames(self._limits, self._wait_ns, self._settings.wait_bytes)
        self._tracker = SeriesTracker(SLSDET.name, 0, silence_ns, clock)
        self._header: Header = {}
        self._modules = 1
        self._ended = 0  # modules whose sender has said that the acquisition is over
        self._ended_ns = 0

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """Messages completed by one received ZeroMQ message."""
        out: list[Message] = []
        try:
            header = read_header(parts, self._limits)
            _check_version(header)
            if header.get("data") == 0:
                self._module_ended(out)
                return out
            series = _series_name(header)
            number = read_number(header, SLSDET.number, self._limits)
            if self._ended and number == 0 and (series, number) not in self._frames:
                self._end(out)  # some module's end was lost, and the next acquisition begins
            module = self._module(header, parts)
            self._header = header
            self._modules = module.layout.count
            if number == 0 and self._tracker.series != series:
                # Now, not with the first frame that is whole: the others must not come before it.
                layout = module.layout
                started = self._tracker.start(series, layout.shape_yx, layout.dtype)
                out += [self._described(message) for message in started]
            self._place(self._frames.add(series, number, module, self._clock()), out)
        except WireError as error:
            out.append(Undecodable(error.reason, str(error), self._tracker.series))
        return out

    def overdue(self) -> list[Message]:
        """What has waited long enough; call now and then."""
        out: list[Message] = []
        now_ns = self._clock()
        self._place(self._frames.overdue(now_ns), out)
        if self._ended and now_ns - self._ended_ns >= self._wait_ns:
            self._end(out)
        return out

    def _module(self, header: Header, parts: Sequence[BytesLike]) -> Module:
        image = read_image(SLSDET, header, parts, self._limits)
        check_raw(image)
        if header.get("quad") == 1:
            raise MalformedMessage(
                "modules of an Eiger quad are not put together: stream it from one receiver"
            )
        modules_yx = self._settings.modules_yx or _pair(header, "detshape")
        place = (
            read_number(header, "row", self._limits),
            read_number(header, "column", self._limits),
        )
        if modules_yx == (1, 1) and self._settings.modules_yx is None:
            place = (0, 0)  # a module alone keeps the place it once had in a larger detector
        if place[0] >= modules_yx[0] or place[1] >= modules_yx[1]:
            raise MalformedMessage(
                f"a module in row {place[0]} and column {place[1]} of {modules_yx}: correct "
                "detector.slsdet.modules_yx"
            )
        layout = Layout(modules_yx, image.shape_yx, image.dtype, self._settings.gap_yx_px)
        whole = header.get("completeImage", 1) != 0
        return Module(place, layout, image, whole, header.get("flipRows") == 1)

    def _module_ended(self, out: list[Message]) -> None:
        if self._tracker.series is None and not len(self._frames):
            return
        self._ended += 1
        self._ended_ns = self._clock()
        if self._ended >= self._modules:
            self._end(out)

    def _end(self, out: list[Message]) -> None:
        self._place(self._frames.flush(), out)
        out += self._tracker.end()
        self._ended = 0

    def _place(self, frames: list[PutTogether], out: list[Message]) -> None:
        policy = self._settings.incomplete
        for made in frames:
            if made.lacks:
                text = f"frame {made.number} lacks {made.lacks}"
                out.append(Undecodable("incomplete", text, made.series))
                if policy == "drop":
                    continue
            gate = "skip" if made.lacks and policy == "skip" else "open"
            frame = Frame(made.series, made.number, made.image, gate=gate)
            out += [self._described(message) for message in self._tracker.take(frame)]

    def _described(self, message: Message) -> Message:
        if type(message) is not ScanStart:
            return message
        about = {key: self._header[key] for key in METADATA_KEYS if key in self._header}
        try:
            return replace(message, metadata=self._limits.bounded_metadata(about))
        except WireError:
            return message  # a frame whose header says too much is a frame all the same


def _check_version(header: Header) -> None:
    version = header.get("jsonversion")
    if version not in VERSIONS:
        raise MalformedMessage(
            f"jsonversion is {version!r:.40}: {', '.join(map(str, VERSIONS))} are known, of "
            "slsDetectorPackage 6 to 9"
        )


def _series_name(header: Header) -> str:
    fname = header.get("fname")
    stem = PurePosixPath(fname).name if isinstance(fname, str) else ""
    index = header.get("fileIndex")
    known = isinstance(index, int) and not isinstance(index, bool)
    return checked_name(f"{stem or SLSDET.name}_{index if known else 0}")


def _pair(header: Header, key: str) -> tuple[int, int]:
    """Rows and columns of a header's [x, y].

    Raises:
        MalformedMessage: these are no two counts.
    """
    value = header.get(key)
    if isinstance(value, list) and len(cast("list[Any]", value)) == 2:
        x, y = cast("list[Any]", value)
        if type(x) is int and type(y) is int and x > 0 and y > 0:
            return y, x
    raise MalformedMessage(f"{key} is {value!r:.40} and should be two counts")
