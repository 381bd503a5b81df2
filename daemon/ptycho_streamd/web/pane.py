"""One pane of a page: what it has of its picture, and what it lacks.

A pane always catches up with the newest picture, not with all that were in between: what a slow
browser did not take is never made.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptycho_stream.errors import PtychoStreamError
from ptycho_stream.results import TileKey
from ptycho_streamd.web.byte_tiles import ByteTile, encoded, settled
from ptycho_streamd.web.messages import Look
from ptycho_streamd.web.pictures import Picture
from ptycho_streamd.web.sources import Shown

MAX_SENT_BYTES = 16 << 20
"""Of levels in a page's memory: tiles not looked at for longest are dropped there. Half of it may
be in view at once; of a larger window a coarser level is sent."""
MAX_UPDATE_BYTES = 1 << 20
"""Of levels in one message, before they are deflated."""
WORK_S = 0.04
"""A message is made in about so long, so that other pages need not wait."""

TILE_RECORD = np.dtype(
    [
        ("ty", "<i4"),
        ("tx", "<i4"),
        ("low", "<f4"),
        ("high", "<f4"),
        ("level", "<u2"),
        ("difference", "<u2"),
    ]
)
_Place = tuple[int, TileKey]


@dataclass(frozen=True, slots=True)
class TileUpdate:
    """Tiles for a page.

    Attributes:
        payload: a ``TILE_RECORD`` each, then T * T bytes each.
        tiles: how many.
        dropped: (level, ty, tx) of tiles that the page is to forget.
        more: others are due now.
    """

    payload: bytes
    tiles: int
    dropped: list[tuple[int, int, int]]
    more: bool


@dataclass(slots=True)
class Pane:
    """What one pane shows.

    Attributes:
        look: what the page wishes to see.
        picture: number of that which it has tiles of; None: it has none.
        words: that it was told.
    """

    look: Look
    picture: int | None = None
    words: dict[str, Any] = field(default_factory=dict[str, Any])
    _sent: OrderedDict[_Place, tuple[int, ByteTile]] = field(
        default_factory=OrderedDict[_Place, tuple[int, ByteTile]]
    )

    def wish(self, look: Look) -> None:
        """The page wishes to see something else, or more of the same."""
        before, self.look = self.look, look
        if before.stream != look.stream or before.quantity != look.quantity:
            self.picture = None

    def begin(self, shown: Shown) -> bool:
        """Begin anew if this is another picture; whether it is."""
        if self.picture == shown.picture.number:
            return False
        self.picture, self.words = shown.picture.number, {}
        self._sent.clear()
        return True

    def new_words(self, words: dict[str, Any]) -> dict[str, Any]:
        """Those that the page does not have."""
        new = {name: value for name, value in words.items() if self.words.get(name, ...) != value}
        self.words = words
        return new

    async def update(self, picture: Picture, budget_bytes: float) -> TileUpdate | None:
        """Tiles that the page lacks, as many as it may be sent now; None: it lacks none.

        Args:
            picture: to take them from.
            budget_bytes: about so many bytes of levels, not deflated.

        Raises:
            PtychoStreamError: not one can be read just now.
        """
        look = self.look
        level, versions = self._in_view(picture)
        due = self._due(level, versions)
        if not due:
            return None
        until_s = time.monotonic() + WORK_S
        most = max(1, int(min(budget_bytes, MAX_UPDATE_BYTES) / picture.tile_px**2))
        records: list[tuple[Any, ...]] = []
        levels: list[bytes] = []
        looked_at = 0
        for key in due:
            if looked_at and time.monotonic() > until_s:
                break
            try:
                version, tile = await picture.tile(look.quantity, level, key)
            except PtychoStreamError:
                if not records:
                    raise
                break  # those before it count as sent, and are
            looked_at += 1
            if self.look.stream != look.stream:
                return None  # the page has thought of something else meanwhile
            sent = self._sent.get((level, key))
            tile = tile if sent is None else settled(tile, sent[1])
            self._sent[level, key] = (version, tile)
            self._sent.move_to_end((level, key))
            if sent is not None and _same(tile, sent[1]):
                continue
            difference, steps = encoded(tile, None if sent is None else sent[1])
            records.append((*key, tile.low, tile.high, level, difference))
            levels.append(steps)
            if len(records) >= most:
                break
        dropped = self._drop(_most_tiles(picture))
        if not records and not dropped:
            return None
        table = np.array(records, TILE_RECORD).tobytes()
        return TileUpdate(
            payload=table + b"".join(levels),
            tiles=len(records),
            dropped=dropped,
            more=looked_at < len(due),
        )

    def _in_view(self, picture: Picture) -> tuple[int, Mapping[TileKey, int]]:
        """The level that is shown, and the versions of the tiles in the window at that level."""
        look = self.look
        level = picture.level_of(look.quantity, look.level)
        while True:
            versions = picture.versions(look.quantity, level)
            if look.window is not None:
                side = picture.tile_px << level
                top, left, bottom, right = (at // side for at in look.window)
                versions = {
                    key: version
                    for key, version in versions.items()
                    if top <= key[0] <= bottom and left <= key[1] <= right
                }
            enough = 2 * len(versions) <= _most_tiles(picture)
            if enough or level >= picture.max_level:
                return level, versions
            level += 1

    def _due(self, level: int, versions: Mapping[TileKey, int]) -> list[TileKey]:
        """Tiles to send: those never sent from the middle out, then those sent longest ago."""
        fresh = [key for key in versions if (level, key) not in self._sent]
        if fresh:
            middle = np.mean(fresh, axis=0)
            fresh.sort(key=lambda key: math.dist(key, middle))
        stale = [
            key
            for (held_level, key), (version, _) in self._sent.items()
            if held_level == level and key in versions and versions[key] != version
        ]
        return fresh + stale

    def _drop(self, most: int) -> list[tuple[int, int, int]]:
        """Forget what was sent longest ago, beyond ``most`` tiles."""
        dropped: list[tuple[int, int, int]] = []
        while len(self._sent) > most:
            (level, key), _ = self._sent.popitem(last=False)
            dropped.append((level, *key))
        return dropped


def _same(one: ByteTile, other: ByteTile) -> bool:
    same_range = (one.low, one.high) == (other.low, other.high)
    return same_range and np.array_equal(one.levels, other.levels)


def _most_tiles(picture: Picture) -> int:
    """So many tiles a page may have."""
    return max(MAX_SENT_BYTES // picture.tile_px**2, 4)
