"""The results protocol as bytes: image updates, beacons, scan notices and resync requests.

Sans-IO; ``docs/protocol.md`` ("Results") describes every field.  The publisher encodes with it,
clients decode, and every shape is checked against limits before an array is made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import LimitExceeded, MalformedMessage
from ptycho_stream.messages import BytesLike
from ptycho_stream.results import ImageState, Tile

VERSION = 1
BEACON_TOPIC = b"beacon"
IMAGE_TOPIC = b"image/"
SCAN_TOPIC = b"scan/"

# A message larger than this is never sent (but one tile must fit); longer updates are split.  It
# bounds what waits for a slow subscriber: high-water mark times this.
MAX_UPDATE_BYTES = 4 << 20
# A peer that asks for a resync more often than this is told to wait; with MAX_UPDATE_BYTES it
# bounds what one peer can take to about 80 MB/s.
MIN_RESYNC_INTERVAL_S = 0.05
MAX_FRAMES_PER_UPDATE = 65_536
MAX_TILE_PX = 4096
MAX_PROBE_VALUES = 64 << 20
MAX_HAVE_TILES = 65_536

# What msgspec raises on bytes from outside: text that is not UTF-8 comes as a ValueError.
UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)

Parts = list[BytesLike]


class _ImageHeader(msgspec.Struct, tag="image", tag_field="type", frozen=True):
    v: int
    epoch: str
    seq: int
    scan_id: str
    state: str
    generation: int
    pixel_yx_m: tuple[float, float]
    tile_px: int
    tiles: list[tuple[int, int, int]]
    frames_from: int
    frames: int
    frames_total: int
    probe_shape: tuple[int, int, int] | None
    probe_version: int
    model: str
    layer: str
    final: bool
    fresh: bool
    more: bool
    sent_ns: int
    counts: dict[str, int]
    metadata: dict[str, Any]
    trust: dict[str, float]
    reply_to: int | None = None
    spread: float | None = None
    collapsed: bool = False
    sweeps: float = 0.0
    verdict: str = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ImageUpdate:
    """What is new in an image: some of its tiles, the frames from ``frames_from`` on.

    ``content`` holds only those tiles and frames, and a (0, 0, 0) probe if the probe with
    ``probe_version`` was not sent along.  ``seq`` counts the updates of one scan's image, not
    always from 1; ``fresh`` says that the image begins with this one, ``more`` that others follow
    that belong to the same moment.  ``reply_to`` is the request it answers, if any.
    """

    epoch: str
    seq: int
    content: ImageState
    frames_from: int
    frames_total: int
    probe_version: int
    fresh: bool
    more: bool
    sent_ns: int
    reply_to: int | None = None


class ImageMark(msgspec.Struct, array_like=True, frozen=True):
    """How far the sender has come with the image of one scan."""

    scan_id: str
    generation: int
    seq: int


class Beacon(msgspec.Struct, tag="beacon", tag_field="type", frozen=True, kw_only=True):
    """The sender lives; ``images`` are all that it holds, those of newer scans last."""

    epoch: str
    images: list[ImageMark]
    sent_ns: int
    v: int = VERSION


class ScanNotice(msgspec.Struct, tag="scan", tag_field="type", frozen=True, kw_only=True):
    """A scan changed its state."""

    epoch: str
    scan_id: str
    state: str
    final: bool
    sent_ns: int
    counts: dict[str, int]
    v: int = VERSION


class Refusal(msgspec.Struct, tag="refusal", tag_field="type", frozen=True, kw_only=True):
    """Why a resync request got no image.

    ``reason`` is ``empty`` (there is no image yet), ``unknown_scan`` (not yet, or no longer, held;
    ``newest_scan_id`` tells which), ``busy`` (ask again after ``retry_s``) or ``bad_request``.
    """

    reply_to: int | None
    epoch: str
    reason: str
    message: str
    newest_scan_id: str = ""
    retry_s: float = 0.0
    v: int = VERSION


class ResyncRequest(msgspec.Struct, tag="resync", tag_field="type", frozen=True, kw_only=True):
    """What a client has, so that it gets what is newer; all of it for a new client.

    ``tiles`` are (ty, tx, version).  ``wanted_scan_id`` asks for one scan's image, None for the
    newest; ``layer`` for another layer of it (:mod:`ptycho_stream.wire.layers`).
    """

    id: int
    epoch: str = ""
    scan_id: str = ""
    generation: int = 0
    frames: int = 0
    probe_version: int = 0
    tiles: list[tuple[int, int, int]] = []
    wanted_scan_id: str | None = None
    layer: Literal["", "predicted", "misfit"] = ""
    v: int = VERSION


_ServerHeader = _ImageHeader | Beacon | ScanNotice | Refusal
_server_decoder: msgspec.msgpack.Decoder[_ServerHeader] = msgspec.msgpack.Decoder(_ServerHeader)
_resync_decoder = msgspec.msgpack.Decoder(ResyncRequest)

ServerMessage = ImageUpdate | Beacon | ScanNotice | Refusal
_T = TypeVar("_T")


def _plain(value: Any) -> object:
    """Numpy scalars and arrays in metadata and counts, as JSON-like values."""
    if isinstance(value, np.generic | np.ndarray):
        return cast("NDArray[Any]", value).tolist()
    return str(value)


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)


def encode_image(update: ImageUpdate) -> Parts:
    """Header, frame numbers, positions, probe, then object and weight of each tile.

    The blobs are the arrays' own memory (little endian, C order): they must not be written again.
    """
    content = update.content
    with_probe = content.probe.size > 0
    header = _ImageHeader(
        v=VERSION,
        epoch=update.epoch,
        seq=update.seq,
        scan_id=content.scan_id,
        state=content.state,
        generation=content.generation,
        pixel_yx_m=content.pixel_yx_m,
        tile_px=content.tile_px,
        tiles=[(ty, tx, tile.version) for (ty, tx), tile in content.tiles.items()],
        frames_from=update.frames_from,
        frames=content.frame_numbers.size,
        frames_total=update.frames_total,
        probe_shape=_shape3(content.probe) if with_probe else None,
        probe_version=update.probe_version,
        model=content.model,
        layer=content.layer,
        final=content.final,
        fresh=update.fresh,
        more=update.more,
        sent_ns=update.sent_ns,
        counts=dict(content.counts),
        metadata=dict(content.metadata),
        trust=dict(content.trust),
        reply_to=update.reply_to,
        spread=content.spread,
        collapsed=content.collapsed,
        sweeps=content.sweeps,
        verdict=content.verdict,
        reasons=content.reasons,
    )
    parts: Parts = [
        _encoder.encode(header),
        blob(content.frame_numbers, "<i8"),
        blob(content.position_yx_m, "<f8"),
        blob(content.probe, "<c8") if with_probe else b"",
    ]
    for tile in content.tiles.values():
        parts += [blob(tile.object_yx, "<c8"), blob(tile.weight_yx, "<f4")]
    return parts


def encode(message: Beacon | ScanNotice | Refusal | ResyncRequest) -> Parts:
    """One part."""
    return [_encoder.encode(message)]


def decode_resync(parts: Sequence[BytesLike]) -> ResyncRequest:
    """Read a client's request.

    Raises:
        MalformedMessage: not a resync request of this version.
        LimitExceeded: more tiles than any image has.
    """
    if len(parts) != 1:
        raise MalformedMessage(f"a resync request has one part, this one has {len(parts)}")
    request = read(_resync_decoder, parts[0])
    check_version(request.v)
    if len(request.tiles) > MAX_HAVE_TILES:
        raise LimitExceeded(f"a resync request names {len(request.tiles)} tiles")
    return request


def decode_server_message(parts: Sequence[BytesLike]) -> ServerMessage:
    """Read what a publisher sent (without the topic part).

    The arrays of an update are read-only views of the blobs.

    Raises:
        MalformedMessage: not a message of this protocol and version, or blobs of wrong length.
        LimitExceeded: a tile, probe or frame count beyond what is accepted.
    """
    if not parts:
        raise MalformedMessage("an empty message from the publisher")
    header = read(_server_decoder, parts[0])
    check_version(header.v)
    return _image_update(header, parts[1:]) if isinstance(header, _ImageHeader) else header


def _image_update(header: _ImageHeader, blobs: Sequence[BytesLike]) -> ImageUpdate:
    if not 0 < header.tile_px <= MAX_TILE_PX:
        raise LimitExceeded(f"tiles of {header.tile_px} px; at most {MAX_TILE_PX} are accepted")
    if not 0 <= header.frames <= MAX_FRAMES_PER_UPDATE or header.frames_from < 0:
        raise LimitExceeded(f"{header.frames} frames from {header.frames_from} in one update")
    if len(blobs) != 3 + 2 * len(header.tiles):
        raise MalformedMessage(
            f"an image update with {len(header.tiles)} tiles has {len(blobs)} blobs"
        )
    tiles = {
        (ty, tx): tile(version, blobs[3 + 2 * i], blobs[4 + 2 * i], header.tile_px)
        for i, (ty, tx, version) in enumerate(header.tiles)
    }
    content = ImageState(
        scan_id=header.scan_id,
        state=header.state,
        generation=header.generation,
        pixel_yx_m=header.pixel_yx_m,
        tile_px=header.tile_px,
        tiles=tiles,
        frame_numbers=array(blobs[0], "<i8", (header.frames,), "frame numbers"),
        position_yx_m=array(blobs[1], "<f8", (header.frames, 2), "positions"),
        probe=array(blobs[2], "<c8", _checked_probe_shape(header.probe_shape), "probe"),
        model=header.model,
        layer=header.layer,
        counts=header.counts,
        metadata=header.metadata,
        final=header.final,
        trust=header.trust,
        spread=header.spread,
        collapsed=header.collapsed,
        sweeps=header.sweeps,
        verdict=header.verdict,
        reasons=header.reasons,
    )
    return ImageUpdate(
        epoch=header.epoch,
        seq=header.seq,
        content=content,
        frames_from=header.frames_from,
        frames_total=header.frames_total,
        probe_version=header.probe_version,
        fresh=header.fresh,
        more=header.more,
        sent_ns=header.sent_ns,
        reply_to=header.reply_to,
    )


def _checked_probe_shape(shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
    if shape is None:
        return (0, 0, 0)
    if min(shape) < 1 or shape[0] * shape[1] * shape[2] > MAX_PROBE_VALUES:
        raise LimitExceeded(f"a probe of shape {shape}")
    return shape


def read(decoder: msgspec.msgpack.Decoder[_T], part: BytesLike) -> _T:
    """The header in ``part``.

    Raises:
        MalformedMessage: it is none.
    """
    try:
        return decoder.decode(part)
    except UNREADABLE as error:
        raise MalformedMessage(f"not a message of the results protocol: {error}") from error


def check_version(version: int) -> None:
    """Refuse what is of another version of this protocol.

    Raises:
        MalformedMessage: it is.
    """
    if version != VERSION:
        raise MalformedMessage(
            f"results protocol version {version}; this program speaks {VERSION}: use the same "
            "ptycho-stream on both ends"
        )


def blob(array: NDArray[Any], dtype: str) -> memoryview:
    """An array's memory, as it is sent."""
    # Empty arrays have no memory that memoryview could cast.
    return np.ascontiguousarray(array, dtype).data.cast("B") if array.size else memoryview(b"")


def tile(version: int, object_blob: BytesLike, weight_blob: BytesLike, tile_px: int) -> Tile:
    """A tile of T = ``tile_px`` from its two blobs.

    Raises:
        MalformedMessage: they are not as long as that.
    """
    shape = (tile_px, tile_px)
    return Tile(
        version,
        array(object_blob, "<c8", shape, "object tile"),
        array(weight_blob, "<f4", shape, "weight tile"),
    )


def array(sent: BytesLike, dtype: str, shape: tuple[int, ...], what: str) -> NDArray[Any]:
    """A read-only array over a blob that was sent.

    Raises:
        MalformedMessage: the blob is not as long as its header promises.
    """
    flat = memoryview(sent).cast("B")
    needed = np.dtype(dtype).itemsize * int(np.prod(shape))
    if flat.nbytes != needed:
        raise MalformedMessage(f"{what}: {flat.nbytes} bytes where the header promises {needed}")
    values = np.frombuffer(flat, dtype).reshape(shape)
    values.flags.writeable = False
    return values


def _shape3(array: NDArray[Any]) -> tuple[int, int, int]:
    modes, height, width = array.shape
    return modes, height, width
