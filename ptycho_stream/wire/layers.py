"""Layers beside a published image, as bytes: what the network alone made, and the misfit map.

Sans-IO; ``docs/protocol.md`` ("Other layers") describes every field.  The publisher answers with
it, clients decode, and :class:`LayerFollower` puts the answers together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import msgspec
from numpy.typing import NDArray

from ptycho_stream.errors import LimitExceeded, MalformedMessage
from ptycho_stream.messages import BytesLike
from ptycho_stream.results import (
    MISFIT_BIN_PX,
    ImageState,
    MisfitTile,
    Tile,
    TileKey,
    stitch,
    stitch_misfit,
)
from ptycho_stream.wire import results as wire

LayerName = Literal["predicted", "misfit"]
LayerTiles = Mapping[TileKey, Tile | MisfitTile]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer of a scan's image, or some of its tiles.

    Attributes:
        name: ``predicted`` or ``misfit``.
        scan_id: of the scan.
        generation: of the image that it belongs to.
        tile_px: T, side of the canvas' tiles; those of the misfit map hold one value for each
            ``MISFIT_BIN_PX`` squared of their pixels.
        pixel_yx_m: of the canvas.
        tiles: by (ty, tx), like those of the image.
    """

    name: LayerName
    scan_id: str
    generation: int
    tile_px: int
    pixel_yx_m: tuple[float, float]
    tiles: LayerTiles

    def joined(self) -> tuple[NDArray[Any], tuple[int, int]]:
        """The values as one array, NaN where there are none, and its first canvas pixel (y, x).

        Complex64 (H, W) of ``predicted``, float32 (H / MISFIT_BIN_PX, ...) of ``misfit``.
        """
        if self.name == "misfit":
            return stitch_misfit(cast("Mapping[TileKey, MisfitTile]", self.tiles), self.tile_px)
        tiles = cast("Mapping[TileKey, Tile]", self.tiles)
        object_yx, _, corner_yx_px = stitch(tiles, self.tile_px)
        return object_yx, corner_yx_px


@dataclass(frozen=True, slots=True, eq=False)
class LayerUpdate:
    """Tiles that a client lacks; ``more`` says that it should ask for others."""

    reply_to: int
    epoch: str
    more: bool
    content: Layer


class _LayerHeader(msgspec.Struct, tag="layer", tag_field="type", frozen=True, kw_only=True):
    reply_to: int
    epoch: str
    scan_id: str
    generation: int
    layer: LayerName
    tile_px: int
    pixel_yx_m: tuple[float, float]
    tiles: list[tuple[int, int, int]]
    more: bool
    v: int = wire.VERSION


_decoder: msgspec.msgpack.Decoder[_LayerHeader | wire.Refusal] = msgspec.msgpack.Decoder(
    _LayerHeader | wire.Refusal
)


def layer_tiles(image: ImageState, name: LayerName) -> LayerTiles:
    """The tiles of a layer of an image."""
    if name == "misfit":
        return image.misfit
    return image.predicted if image.layer == "refined" else image.tiles


def encode_layer(update: LayerUpdate) -> wire.Parts:
    """Header, then for each tile its object and weight, or its excess.

    The blobs are the arrays' own memory: they must not be written again.
    """
    content = update.content
    header = _LayerHeader(
        reply_to=update.reply_to,
        epoch=update.epoch,
        scan_id=content.scan_id,
        generation=content.generation,
        layer=content.name,
        tile_px=content.tile_px,
        pixel_yx_m=content.pixel_yx_m,
        tiles=[(ty, tx, tile.version) for (ty, tx), tile in content.tiles.items()],
        more=update.more,
    )
    parts: wire.Parts = [msgspec.msgpack.encode(header)]
    for tile in content.tiles.values():
        if isinstance(tile, Tile):
            parts += [wire.blob(tile.object_yx, "<c8"), wire.blob(tile.weight_yx, "<f4")]
        else:
            parts.append(wire.blob(tile.excess_yx, "<f4"))
    return parts


def decode_layer(parts: Sequence[BytesLike]) -> LayerUpdate | wire.Refusal:
    """Read what a publisher answered.

    Raises:
        MalformedMessage: not such an answer of this version, or blobs of wrong length.
        LimitExceeded: tiles larger than is accepted.
    """
    if not parts:
        raise MalformedMessage("an empty message from the publisher")
    header = wire.read(_decoder, parts[0])
    wire.check_version(header.v)
    if isinstance(header, wire.Refusal):
        return header
    if not MISFIT_BIN_PX <= header.tile_px <= wire.MAX_TILE_PX:
        raise LimitExceeded(
            f"tiles of {header.tile_px} px; from {MISFIT_BIN_PX} to {wire.MAX_TILE_PX} are accepted"
        )
    content = Layer(
        name=header.layer,
        scan_id=header.scan_id,
        generation=header.generation,
        tile_px=header.tile_px,
        pixel_yx_m=header.pixel_yx_m,
        tiles=_misfit_tiles(header, parts[1:])
        if header.layer == "misfit"
        else _object_tiles(header, parts[1:]),
    )
    return LayerUpdate(header.reply_to, header.epoch, header.more, content)


def _misfit_tiles(header: _LayerHeader, blobs: Sequence[BytesLike]) -> Mapping[TileKey, MisfitTile]:
    _check_count(header, blobs, 1)
    side = header.tile_px // MISFIT_BIN_PX
    return {
        (ty, tx): MisfitTile(version, wire.array(blob, "<f4", (side, side), "misfit tile"))
        for (ty, tx, version), blob in zip(header.tiles, blobs, strict=True)
    }


def _object_tiles(header: _LayerHeader, blobs: Sequence[BytesLike]) -> Mapping[TileKey, Tile]:
    _check_count(header, blobs, 2)
    return {
        (ty, tx): wire.tile(version, blobs[2 * i], blobs[2 * i + 1], header.tile_px)
        for i, (ty, tx, version) in enumerate(header.tiles)
    }


def _check_count(header: _LayerHeader, blobs: Sequence[BytesLike], of_tile: int) -> None:
    if len(blobs) != of_tile * len(header.tiles):
        raise MalformedMessage(f"{len(header.tiles)} tiles of a layer came in {len(blobs)} blobs")


@dataclass(slots=True)
class LayerFollower:
    """Asks for one layer of a scan's image again and again, and keeps what has come of it.

    Attributes:
        name: of the layer.
        scan_id: of the scan; None: the newest.
        held: the layer as far as it has come; None before anything has.
    """

    name: LayerName
    scan_id: str | None = None
    held: Layer | None = None
    _epoch: str = field(default="", init=False)
    _last_id: int = field(default=0, init=False)

    def request(self) -> wire.Parts:
        """What to send to the resync socket now."""
        self._last_id += 1
        held = self.held
        request = wire.ResyncRequest(id=self._last_id, layer=self.name, wanted_scan_id=self.scan_id)
        if held is not None:
            request = msgspec.structs.replace(
                request,
                epoch=self._epoch,
                scan_id=held.scan_id,
                generation=held.generation,
                tiles=[(ty, tx, tile.version) for (ty, tx), tile in held.tiles.items()],
            )
        return wire.encode(request)

    def receive(self, parts: Sequence[BytesLike]) -> LayerUpdate | wire.Refusal | None:
        """Take an answer; None if it answers an earlier request.

        Raises:
            WireError: it cannot be understood.
        """
        answer = decode_layer(parts)
        if answer.reply_to != self._last_id:
            return None
        if isinstance(answer, wire.Refusal):
            if answer.reason != "busy":
                self.held = None
            return answer
        if self.held is not None and self._continues(answer):
            tiles: Any = {**self.held.tiles, **answer.content.tiles}
            self.held = replace(answer.content, tiles=tiles)
        else:
            self.held = answer.content
        self._epoch = answer.epoch
        return answer

    def _continues(self, answer: LayerUpdate) -> bool:
        """Whether the tiles are to be added to those held: they are of the same image."""
        held, new = self.held, answer.content
        assert held is not None
        return (self._epoch, held.scan_id, held.generation, held.tile_px) == (
            answer.epoch,
            new.scan_id,
            new.generation,
            new.tile_px,
        )
