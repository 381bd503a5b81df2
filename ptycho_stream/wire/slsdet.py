"""The stream of slsReceiver (slsDetectorPackage): a PUB socket a module, JSON header and pixels.

Ingest feeds one :class:`SlsdetDecoder` the messages of all its sockets, so that the modules of a
frame find each other by the frame's number and their row and column, and an acquisition is over
when all of them say so.  The facts are in ``docs/dialects/json-blob.md``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Final, cast

from ptycho_stream.errors import LimitExceeded, MalformedMessage, WireError
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
from ptycho_stream.wire.module_frames import Layout, Module, ModuleFrames, Place, PutTogether
from ptycho_stream.wire.series_tracker import SeriesTracker

MAX_MODULES: Final = 1024
VERSIONS: Final = (4, 5)
"""``jsonversion`` of slsDetectorPackage 6 to 9."""
METADATA_KEYS: Final = ("fname", "fileIndex", "jsonversion", "detType", "bitmode", "addJsonHeader")


@dataclass(slots=True)
class _Sender:
    """What one endpoint has sent of the acquisition that is going on.

    ``last`` are its modules and the last frame of each, ``ends`` how many of them are over.  It is
    ``done`` if all are, or if it has gone on to another acquisition, of which what has come is
    ``held``.  One that was not ``heard`` of in the acquisition before is not waited for.
    """

    last: dict[Place, int] = field(default_factory=dict[Place, int])
    ends: int = 0
    done: bool = False
    heard: bool = True
    held: deque[Sequence[BytesLike]] = field(default_factory=deque[Sequence[BytesLike]])


class SlsdetDecoder:
    """Turns modules into frames.  It never raises on bad input.

    The endpoints of a detector share one.  One that has gone on to the next acquisition waits for
    the others, at most ``wait_ms`` and ``wait_bytes``.

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
        self._frames = ModuleFrames(self._wait_ns, self._settings.wait_bytes)
        self._tracker = SeriesTracker(SLSDET.name, 0, silence_ns, clock)
        self._header: Header = {}
        self._name: str | None = None
        self._modules = 1
        self._senders: list[_Sender] = []
        self._held_bytes = 0
        self._done_ns = 0  # when an endpoint was done with the acquisition; 0: none is

    def endpoint(self) -> SlsdetEndpoint:
        """A decoder for another endpoint of the detector."""
        self._senders.append(_Sender())
        return SlsdetEndpoint(self, len(self._senders) - 1)

    def receive(self, sender: int, parts: Sequence[BytesLike]) -> list[Message]:
        """Messages completed by one received ZeroMQ message of an endpoint."""
        out: list[Message] = []
        one = self._senders[sender]
        if one.done or not self._take(one, parts, out):
            self._hold(one, parts)
        while self._is_over():
            self._end(out)
            self._take_held(out)
        return out

    def overdue(self) -> list[Message]:
        """What has waited long enough; call now and then."""
        out: list[Message] = []
        now_ns = self._clock()
        self._place(self._frames.overdue(now_ns), out)
        if self._done_ns and now_ns - self._done_ns >= self._wait_ns:
            self._end(out)
            self._take_held(out)
        return out

    def _take(self, sender: _Sender, parts: Sequence[BytesLike], out: list[Message]) -> bool:
        """Take a message; False if it belongs to another acquisition than the one going on."""
        try:
            header = read_header(parts, self._limits)
            _check_version(header)
            if header.get("data") != 0:
                return self._take_frame(sender, header, parts, out)
            sender.ends += 1
            if sender.last and sender.ends >= len(sender.last):
                self._done(sender)
        except WireError as error:
            out.append(Undecodable(error.reason, str(error), self._tracker.series))
        return True

    def _take_frame(
        self, sender: _Sender, header: Header, parts: Sequence[BytesLike], out: list[Message]
    ) -> bool:
        series = _series_name(header)
        number = read_number(header, SLSDET.number, self._limits)
        module = self._module(header, parts)
        again = number == 0 and sender.last.get(module.place, 0) > 0
        if again or self._name not in (None, series):
            return False
        self._name = series
        self._header = header
        self._modules = module.layout.count
        sender.last[module.place] = number
        if number == 0 and self._tracker.series is None:
            # Now, not with the first frame that is whole: the others must not come before it.
            layout = module.layout
            started = self._tracker.start(series, layout.shape_yx, layout.dtype)
            out += [self._described(message) for message in started]
        self._place(self._frames.add(series, number, module, self._clock()), out)
        return True

    def _hold(self, sender: _Sender, parts: Sequence[BytesLike]) -> None:
        sender.held.append(parts)
        self._held_bytes += sum(map(len, parts))
        self._done(sender)

    def _done(self, sender: _Sender) -> None:
        if not sender.done:
            sender.done = True
            self._done_ns = self._clock()

    def _is_over(self) -> bool:
        """Whether no endpoint has more to send of the acquisition, as far as that can be known."""
        if not self._done_ns:
            return False
        if self._held_bytes > self._settings.wait_bytes:
            return True
        awaited = [sender for sender in self._senders if sender.last or sender.heard]
        if not all(sender.done for sender in awaited):
            return False
        # Of an endpoint with several modules the first may be over before the others begin.
        complete = sum(len(sender.last) for sender in awaited) >= self._modules
        some_are_gone = len(awaited) < len(self._senders)
        return complete or some_are_gone or all(sender.held for sender in awaited)

    def _end(self, out: list[Message]) -> None:
        self._place(self._frames.flush(), out)
        out += self._tracker.end()
        self._name = None
        self._done_ns = 0
        for sender in self._senders:
            sender.heard = bool(sender.last)
            sender.last, sender.ends, sender.done = {}, 0, False

    def _take_held(self, out: list[Message]) -> None:
        """Go on with what came of the next acquisition, in turns as it would have come."""
        while ahead := [one for one in self._senders if one.held and not one.done]:
            for sender in ahead:
                parts = sender.held[0]
                if self._take(sender, parts, out):
                    sender.held.popleft()
                    self._held_bytes -= sum(map(len, parts))
                else:
                    self._done(sender)

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
        self._limits.check_shape(layout.shape_yx, int(layout.dtype[2:]))
        if layout.count > MAX_MODULES:
            raise LimitExceeded(f"a detector of {modules_yx} modules has over {MAX_MODULES}")
        whole = header.get("completeImage", 1) != 0
        return Module(place, layout, image, whole, header.get("flipRows") == 1)

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


class SlsdetEndpoint:
    """The decoder of one of a detector's endpoints."""

    def __init__(self, detector: SlsdetDecoder, sender: int) -> None:
        self._detector = detector
        self._sender = sender

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """Messages completed by one received ZeroMQ message."""
        return self._detector.receive(self._sender, parts)

    def overdue(self) -> list[Message]:
        """What has waited long enough, of any endpoint; call now and then."""
        return self._detector.overdue()


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
