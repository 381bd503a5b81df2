"""DECTRIS SIMPLON stream, version 1 (JSON headers and blobs): received parts to messages.

Ingest feeds :class:`DectrisV1Decoder` whatever the socket gives.  It works on parts, not messages,
because proxies break multipart messages up; a whole image message takes a short cut.  The format
is described in ``docs/dialects/dectris.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ptycho_stream.errors import LimitExceeded, MalformedMessage, TornMessage, WireError
from ptycho_stream.messages import (
    BytesLike,
    EncodedImage,
    Frame,
    Message,
    ScanEnd,
    Undecodable,
)
from ptycho_stream.wire.dectris_v1_header import PendingHeader
from ptycho_stream.wire.dectris_v1_parts import (
    BAD_JSON,
    PIXEL_TYPES,
    ArrayHead,
    Head,
    Times,
    kind_of,
    parse_array_head,
    parse_head,
    parse_times,
    peek,
    split_encoding,
)
from ptycho_stream.wire.limits import WireLimits

SOURCE = "dectris-v1"


class PendingImage:
    """Collects the parts of one image."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.series = head.series_name
        self.array: ArrayHead | None = None
        self.blob: BytesLike | None = None
        self.times: Times | None = None

    def wants(self, part: BytesLike, head: Head | None) -> bool:
        """Whether ``part`` is the one that comes next."""
        if self.array is None:
            return head is not None and kind_of(head.htype) == "dimage_d"
        if self.blob is None:
            # A header in the blob's place means that the blob was lost.
            return head is None or len(part) == self.array.size
        return self.times is None and head is not None and kind_of(head.htype) == "dconfig"

    def take(self, part: BytesLike) -> None:
        """Take the part that :meth:`wants` agreed to.

        Raises:
            MalformedMessage: it is not what it should be.
        """
        try:
            if self.array is None:
                self.array = parse_array_head(part)
            elif self.blob is None:
                self.blob = part
            else:
                self.times = parse_times(part)
        except BAD_JSON as error:
            raise MalformedMessage(
                f"frame {self.head.frame} of series {self.series}: {error}"
            ) from error


class DectrisV1Decoder:
    """Turns the parts of a version 1 stream into messages; keeps what is unfinished between calls.

    A broken message costs itself only: the decoder says ``Undecodable`` and goes on at the next
    header.  It never raises on bad input.  A series header is given out at the end of the message
    that completes it, with the appendix if that message holds one.

    Example::

        decoder = DectrisV1Decoder()
        for message in decoder.receive(socket.recv_multipart()):
            ...
    """

    def __init__(self, limits: WireLimits | None = None) -> None:
        self._limits = limits or WireLimits()
        self._header: PendingHeader | None = None
        self._image: PendingImage | None = None
        self._appendix_may_come = False  # what came last may have one, in a message of its own

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """Messages completed by one received ZeroMQ message, whole or a piece of one.

        Args:
            parts: its parts in order; blobs are kept by reference, not copied.
        """
        if 4 <= len(parts) <= 5 and self._image is None and self._header is None:
            frame = self._whole_image(parts)
            if frame is not None:
                self._appendix_may_come = False
                return [frame]
        out: list[Message] = []
        finished = len(parts) == 1 and self._appendix_may_come  # appendices may stand here
        self._appendix_may_come = False
        for part in parts:
            try:
                finished = self._part(part, finished, out)
            except WireError as error:
                out.append(self._undecodable(error))
                self._image = None
                finished = self._header is not None and self._header.complete
        if self._header is not None and self._header.complete:
            self._flush(out)
        self._appendix_may_come = finished and len(parts) == 1
        return out

    def _whole_image(self, parts: Sequence[BytesLike]) -> Frame | None:
        """The common case, one message is one image.  None of anything else or odd."""
        longest = self._limits.max_header_bytes
        if len(parts[0]) > longest or len(parts[1]) > longest or len(parts[3]) > longest:
            return None
        try:
            head = parse_head(parts[0])
            if kind_of(head.htype) != "dimage":
                return None
            array = parse_array_head(parts[1])
            times = parse_times(parts[3])
            if kind_of(array.htype) != "dimage_d" or kind_of(times.htype) != "dconfig":
                return None
            return self._frame(head, array, parts[2], times)
        except (*BAD_JSON, WireError):
            return None  # the slow way says what is wrong with it

    def _part(self, part: BytesLike, finished: bool, out: list[Message]) -> bool:
        """Work on one part; True if it finished an image or a header."""
        limits = self._limits
        if len(part) > limits.max_message_bytes:
            raise LimitExceeded(f"a part of {len(part)} bytes, above {limits.max_message_bytes}")
        head = peek(part, limits.max_header_bytes)
        if self._image is not None and self._image.wants(part, head):
            self._image.take(part)
            if self._image.times is None:
                return False
            self._flush(out)
            return True
        if self._header is not None and self._header.wants(part, head):
            self._header.take(part)
            return self._header.complete
        if head is None:
            return self._part_without_htype(part, finished, out)
        self._flush(out)
        kind = kind_of(head.htype)
        if kind == "dimage":
            self._image = PendingImage(head)
        elif kind == "dheader":
            self._header = PendingHeader(head, limits)
            return self._header.complete
        elif kind == "dseries_end":
            out.append(ScanEnd(head.series_name))
        else:
            raise TornMessage(f"a {head.htype!r} part came where none was expected")
        return False

    def _part_without_htype(self, part: BytesLike, finished: bool, out: list[Message]) -> bool:
        if finished and _is_free_text(part, self._limits.max_header_bytes):
            if self._header is not None:
                self._header.take_appendix(part)
            return False
        self._flush(out)
        start = bytes(part[:40])
        if start.startswith(_DESCRIBED_AS_CBOR):
            raise MalformedMessage(
                "CBOR came, as the detector sends it in version 2: set detector.dialect to "
                "'dectris-v2', or the detector's stream format to 'legacy'"
            )
        raise MalformedMessage(f"a part of {len(part)} bytes is no JSON with htype: {start!r}")

    def _flush(self, out: list[Message]) -> None:
        """Give out what is pending, as far as it came."""
        header, self._header = self._header, None
        image, self._image = self._image, None
        if header is not None:
            out += header.messages(SOURCE)
        if image is not None:
            try:
                if image.array is None or image.blob is None:
                    raise TornMessage(f"frame {image.head.frame} came without its pixels")
                out.append(self._frame(image.head, image.array, image.blob, image.times))
            except WireError as error:
                out.append(Undecodable(error.reason, str(error), image.series))

    def _frame(self, head: Head, array: ArrayHead, blob: BytesLike, times: Times | None) -> Frame:
        limits = self._limits
        if len(blob) > limits.max_message_bytes:
            raise LimitExceeded(f"a blob of {len(blob)} bytes, above {limits.max_message_bytes}")
        limits.check_number(head.frame)
        shape_yx = array.shape_yx
        encoding, dtype, shuffle_bits = split_encoding(array.encoding, array.type)
        limits.check_shape(shape_yx, _ITEMSIZES[array.type])
        return Frame(
            head.series_name,
            head.frame,
            EncodedImage(blob, encoding, dtype, shape_yx, shuffle_bits),
            None,
            _nanoseconds(times.start_time) if times else None,
            _nanoseconds(times.stop_time) if times else None,
        )

    def _undecodable(self, error: WireError) -> Undecodable:
        series = None
        if self._image is not None:
            series = self._image.series
        elif self._header is not None:
            series = self._header.series
        return Undecodable(error.reason, str(error), series)


_ITEMSIZES = {name: int(code[1:]) for name, code in PIXEL_TYPES.items()}
_INT64_MAX = 2**63 - 1
_DESCRIBED_AS_CBOR = b"\xd9\xd9\xf7"


def _nanoseconds(value: object) -> int | None:
    if isinstance(value, int | float) and 0 <= value <= _INT64_MAX:
        return int(value)
    return None


def _is_free_text(part: BytesLike, max_bytes: int) -> bool:
    """Whether ``part`` can be an appendix: JSON, or text that does not pretend to be JSON."""
    if len(part) > max_bytes:
        return False
    try:
        text = bytes(part).decode("utf-8")
        if text.lstrip()[:1] in ("{", "["):
            msgspec.json.decode(part)
    except BAD_JSON:
        return False
    return "\0" not in text
