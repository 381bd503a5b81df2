"""Pictures that pages look at: the tiles of an image as bytes, at any level of detail.

At level k a pixel is the mean of 2^k squared canvas pixels, so that a page is never sent more than
its screen can show.  What was made for one page is there for the next.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.bins import bin_means, binned_window
from ptycho_stream.client import AsyncDaemon
from ptycho_stream.results import MISFIT_BIN_PX, MisfitTile, Tile, TileKey
from ptycho_stream.wire.stored import Piece, StoredImage
from ptycho_streamd.web.byte_tiles import ByteTile, Quantity, phase_about, quantised

MAX_LEVEL = 10
MISFIT_LEVEL = 2
"""The misfit map has no finer one: its bins are 4 pixels a side."""
KEPT_TILE_PX = 256
KEPT_BYTES = 32 << 20
"""Of byte tiles, of each picture."""

Rectangle = tuple[int, int, int, int]
_numbers = itertools.count(1)


class Picture(ABC):
    """Tiles of bytes by quantity, level and (ty, tx).

    Attributes:
        number: that no other picture has.
        tile_px: T; a tile has T x T pixels at every level.
        max_level: the coarsest.
    """

    def __init__(self, tile_px: int) -> None:
        self.number = next(_numbers)
        self.tile_px = tile_px
        trailing_zeros = (tile_px & -tile_px).bit_length() - 1
        self.max_level = min(trailing_zeros, MAX_LEVEL)
        self._held: OrderedDict[tuple[Quantity, int, TileKey], tuple[int, ByteTile]] = OrderedDict()

    @property
    @abstractmethod
    def bounds_yx_px(self) -> Rectangle | None:
        """Top, left, bottom and right of what was seen, in canvas pixels; None: nothing was."""

    @abstractmethod
    def versions(self, quantity: Quantity, level: int) -> Mapping[TileKey, int]:
        """The tiles that there are at a level, and for each a number that grows with changes."""

    @abstractmethod
    async def _object(self, level: int, key: TileKey) -> NDArray[np.complex64]:
        """The object in a tile, NaN where unseen."""

    @abstractmethod
    async def _weight(self, level: int, key: TileKey) -> NDArray[np.float32]:
        """The light in a tile, 0 where there was none."""

    @abstractmethod
    def _misfit(self, level: int, key: TileKey) -> NDArray[np.float32]:
        """The excess in a tile, NaN where unknown."""

    def level_of(self, quantity: Quantity, level: int) -> int:
        """The level that there is of a quantity next to the one wished for."""
        return min(max(level, MISFIT_LEVEL if quantity == "misfit" else 0), self.max_level)

    async def tile(self, quantity: Quantity, level: int, key: TileKey) -> tuple[int, ByteTile]:
        """A tile as it is now, and its version; it must be one of :meth:`versions`."""
        version = self.versions(quantity, level)[key]
        place = (quantity, level, key)
        known = self._held.get(place)
        if known is None or known[0] != version:
            former = None if known is None else known[1]
            known = (version, quantised(await self._values(quantity, level, key, former), former))
            self._held[place] = known
            while len(self._held) * self.tile_px**2 > KEPT_BYTES:
                self._held.popitem(last=False)
        if place in self._held:
            self._held.move_to_end(place)
        return known

    async def _values(
        self, quantity: Quantity, level: int, key: TileKey, former: ByteTile | None
    ) -> NDArray[np.float32]:
        match quantity:
            case "phase":
                known = former is not None and bool(former.levels.any())
                middle = (former.low + former.high) / 2 if former and known else None
                return phase_about(await self._object(level, key), middle)
            case "amplitude":
                return np.abs(await self._object(level, key))
            case "coverage":
                weight = await self._weight(level, key)
                return np.where(weight > 0, weight, np.float32(np.nan))
            case "misfit":
                return self._misfit(level, key)


class GrowingPicture(Picture):
    """Of an image whose tiles come from the results socket.

    Args:
        tile_px: of the image.

    Attributes:
        tiles: the object, as it is now.
        misfit: the misfit map, as far as it is known.
    """

    def __init__(self, tile_px: int) -> None:
        super().__init__(tile_px)
        self.tiles: Mapping[TileKey, Tile] = {}
        self.misfit: Mapping[TileKey, MisfitTile] = {}
        # Versions of our own: a publisher that is started again counts its anew.
        self._changes: dict[bool, dict[TileKey, int]] = {False: {}, True: {}}
        self._levels: dict[tuple[bool, int], Mapping[TileKey, int]] = {}
        self._seen: dict[TileKey, Rectangle] = {}

    def show(self, tiles: Mapping[TileKey, Tile]) -> None:
        """Go on with these tiles, which are all those before, and perhaps others."""
        for key in self._note(False, self.tiles, tiles):
            part = _seen_part(tiles[key], key, self.tile_px)
            if part is not None:
                self._seen[key] = part
        self.tiles = tiles

    def show_misfit(self, misfit: Mapping[TileKey, MisfitTile]) -> None:
        """Go on with this misfit map."""
        self._note(True, self.misfit, misfit)
        self.misfit = misfit

    def _note(
        self, of_misfit: bool, before: Mapping[TileKey, Any], after: Mapping[TileKey, Any]
    ) -> list[TileKey]:
        """Count the changes of each tile; those that have changed."""
        changed = [key for key, tile in after.items() if before.get(key) is not tile]
        changes = self._changes[of_misfit]
        for key in changed:
            changes[key] = changes.get(key, 0) + 1
        if changed:
            self._levels = {
                place: held for place, held in self._levels.items() if place[0] != of_misfit
            }
        return changed

    @property
    def bounds_yx_px(self) -> Rectangle | None:
        """See :class:`Picture`."""
        if not self._seen:
            return None
        tops, lefts, bottoms, rights = zip(*self._seen.values(), strict=True)
        return min(tops), min(lefts), max(bottoms), max(rights)

    def versions(self, quantity: Quantity, level: int) -> Mapping[TileKey, int]:
        """See :class:`Picture`."""
        place = (quantity == "misfit", level)
        known = self._levels.get(place)
        if known is None:
            # Counts only grow, and so does their sum whenever one of them does.
            sums: dict[TileKey, int] = {}
            for (ty, tx), changes in self._changes[place[0]].items():
                key = (ty >> level, tx >> level)
                sums[key] = sums.get(key, 0) + changes
            known = self._levels[place] = sums
        return known

    async def _object(self, level: int, key: TileKey) -> NDArray[np.complex64]:
        whole = np.full((self.tile_px, self.tile_px), np.nan, np.complex64)
        for place, tile in self._parts(level, key, self.tiles):
            whole[place] = bin_means(tile.object_yx, 1 << level)
        return whole

    async def _weight(self, level: int, key: TileKey) -> NDArray[np.float32]:
        whole = np.zeros((self.tile_px, self.tile_px), np.float32)
        for place, tile in self._parts(level, key, self.tiles):
            whole[place] = bin_means(tile.weight_yx, 1 << level)
        return whole

    def _misfit(self, level: int, key: TileKey) -> NDArray[np.float32]:
        whole = np.full((self.tile_px, self.tile_px), np.nan, np.float32)
        for place, tile in self._parts(level, key, self.misfit):
            whole[place] = bin_means(tile.excess_yx, (1 << level) // MISFIT_BIN_PX)
        return whole

    def _parts(
        self, level: int, key: TileKey, tiles: Mapping[TileKey, Any]
    ) -> Iterator[tuple[tuple[slice, slice], Any]]:
        """The canvas' tiles in a tile of a level, and where in it they lie."""
        across, side = 1 << level, self.tile_px >> level
        for i in range(across):
            for j in range(across):
                tile = tiles.get((key[0] * across + i, key[1] * across + j))
                if tile is not None:
                    rows, columns = slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side)
                    yield (rows, columns), tile


def _seen_part(tile: Tile, key: TileKey, tile_px: int) -> Rectangle | None:
    seen = tile.weight_yx > 0
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not len(rows):
        return None
    top, left = key[0] * tile_px, key[1] * tile_px
    return (
        top + int(rows[0]),
        left + int(columns[0]),
        top + int(rows[-1]) + 1,
        left + int(columns[-1]) + 1,
    )


class KeptPicture(Picture):
    """Of an image that is kept with its scan; pieces are fetched when they are looked at.

    Args:
        daemon: to ask.
        image: its words, and its misfit map if there is one.
    """

    def __init__(self, daemon: AsyncDaemon, image: StoredImage) -> None:
        super().__init__(KEPT_TILE_PX)
        self._daemon = daemon
        self._words = image.words
        self._map: Piece | None = image.misfit
        self._piece: tuple[tuple[int, TileKey], Piece] | None = None
        self._one_at_a_time = asyncio.Lock()

    @property
    def bounds_yx_px(self) -> Rectangle | None:
        """See :class:`Picture`."""
        top, left = self._words["corner_yx_px"]
        height, width = self._words["shape_yx"]
        return (top, left, top + height, left + width) if height and width else None

    def versions(self, quantity: Quantity, level: int) -> Mapping[TileKey, int]:
        """See :class:`Picture`."""
        bounds = self.bounds_yx_px
        if bounds is None or (quantity == "misfit" and self._map is None):
            return {}
        side = self.tile_px << level
        rows = range(bounds[0] // side, -(-bounds[2] // side))
        columns = range(bounds[1] // side, -(-bounds[3] // side))
        return {(ty, tx): 1 for ty in rows for tx in columns}

    async def _object(self, level: int, key: TileKey) -> NDArray[np.complex64]:
        return (await self._fetched(level, key)).values_yx

    async def _weight(self, level: int, key: TileKey) -> NDArray[np.float32]:
        weight = (await self._fetched(level, key)).weight_yx
        return np.zeros((self.tile_px, self.tile_px), np.float32) if weight is None else weight

    def _misfit(self, level: int, key: TileKey) -> NDArray[np.float32]:
        held = self._map
        assert held is not None
        # In units of the map's own bins, which may be larger than those of the level.
        bins = max((1 << level) // held.bin_px, 1)
        repeated = max(held.bin_px // (1 << level), 1)
        side = -(-self.tile_px // repeated)
        corner = tuple((at * self.tile_px << level) // held.bin_px for at in key)
        first = (held.corner_yx_px[0] // held.bin_px, held.corner_yx_px[1] // held.bin_px)
        found = binned_window(held.values_yx, first, (corner[0], corner[1]), (side, side), bins)
        return np.repeat(np.repeat(found, repeated, 0), repeated, 1)[: self.tile_px, : self.tile_px]

    async def _fetched(self, level: int, key: TileKey) -> Piece:
        """The piece of the object under a tile; the last one is kept, for its other quantities."""
        async with self._one_at_a_time:
            if self._piece is None or self._piece[0] != (level, key):
                side = self.tile_px << level
                image = await self._daemon.image(
                    self._words["scan_id"],
                    self._words["snapshot"],
                    parts=["object"],
                    corner_yx_px=(key[0] * side, key[1] * side),
                    shape_yx=(self.tile_px, self.tile_px),
                    bin_px=1 << level,
                )
                assert image.object is not None
                self._piece = ((level, key), image.object)
            return self._piece[1]
