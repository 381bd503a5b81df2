"""The messages between a page and the viewer over their WebSocket, checked and put into bytes.

What a page says is JSON text of a few kinds, bounded and typed.  What it is told is JSON text, and
for pixels and positions a binary message: u32 little endian length of a JSON head, the head, and a
deflated (zlib) payload.
"""

from __future__ import annotations

import struct
import zlib
from typing import Annotated, Any, Literal

import msgspec

from ptycho_stream.errors import MalformedMessage
from ptycho_stream.wire.control import SNAPSHOT_NAME
from ptycho_streamd.web.byte_tiles import Quantity
from ptycho_streamd.web.sources import Part

MAX_MESSAGE_BYTES = 64 << 10
COMPRESSION = 6
"""Of zlib: level 1 makes differences of tiles a third larger, level 9 is no better than this."""

PaneName = Literal["a", "b"]
ScanId = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-HJKMNP-TV-Z]{26}\Z")]
_Pixel = Annotated[int, msgspec.Meta(ge=-(1 << 40), le=1 << 40)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class Look(msgspec.Struct, tag="look", tag_field="type", frozen=True, forbid_unknown_fields=True):
    """What a pane of the page shows from now on.

    Attributes:
        pane: ``a``: the picture; ``b``: what it is compared with.
        stream: number of this wish, which comes back with what is sent for it.
        quantity: of the object.
        scan_id: None: the newest scan.
        snapshot: of that scan; None: its image.
        generation: an earlier one of the scan's image; None: the present one.
        part: the image as published, or what the network alone made.
        level: of detail: a pixel is 2^level canvas pixels a side.
        window: top, left, bottom and right in canvas pixels; None: all there is.
        nothing: the pane is closed.
    """

    pane: PaneName
    stream: _Count
    quantity: Quantity = "phase"
    scan_id: ScanId | None = None
    snapshot: Annotated[str, msgspec.Meta(pattern=SNAPSHOT_NAME)] | None = None
    generation: _Count | None = None
    part: Part = "shown"
    level: Annotated[int, msgspec.Meta(ge=0, le=16)] = 0
    window: tuple[_Pixel, _Pixel, _Pixel, _Pixel] | None = None
    nothing: bool = False


class Watch(msgspec.Struct, tag="watch", tag_field="type", frozen=True, forbid_unknown_fields=True):
    """What else the page shows: a diffraction frame, the probe, the path of the scan.

    Attributes:
        frame: whether it shows one.
        frame_number: of pane a's scan; None: the newest.
        frame_look: through the view, or as it is stored.
        probe: whether it shows the probe.
        path: whether it shows the path.
    """

    frame: bool = False
    frame_number: _Count | None = None
    frame_look: Literal["view", "stored"] = "view"
    probe: bool = False
    path: bool = False


class Ack(msgspec.Struct, tag="ack", tag_field="type", frozen=True, forbid_unknown_fields=True):
    """The page has shown the binary message with this number, and all before it."""

    seq: _Count


class Command(
    msgspec.Struct, tag="command", tag_field="type", frozen=True, forbid_unknown_fields=True
):
    """A control command, answered with ``id``; the daemon checks the arguments."""

    id: _Count
    command: Annotated[str, msgspec.Meta(max_length=64)]
    arguments: dict[str, Any] = {}


PageMessage = Look | Watch | Ack | Command
_decoder: msgspec.json.Decoder[PageMessage] = msgspec.json.Decoder(PageMessage)


def decode_page_message(text: str | bytes) -> PageMessage:
    """What a page has said.

    Raises:
        MalformedMessage: it is none of these messages.
    """
    if len(text) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"a message of {len(text)} bytes; at most {MAX_MESSAGE_BYTES}")
    try:
        return _decoder.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"not a message of the page: {error}") from error


def encode_text(kind: str, **content: Any) -> str:
    """A message of JSON values to a page."""
    return msgspec.json.encode({"type": kind, **content}).decode()


def encode_binary(kind: str, payload: bytes, **head: Any) -> bytes:
    """A message with bytes to a page."""
    text = msgspec.json.encode({"type": kind, **head})
    return struct.pack("<I", len(text)) + text + zlib.compress(payload, COMPRESSION)
