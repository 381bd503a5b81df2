"""What a page makes of what it is sent, for tests: as tiles.js and wire.js do it."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_streamd.web.pane import TILE_RECORD

Place = tuple[int, int, int]


def taken_apart(message: bytes) -> tuple[dict[str, Any], bytes]:
    """Head and payload of a binary message."""
    (length,) = struct.unpack_from("<I", message)
    return json.loads(message[4 : 4 + length]), zlib.decompress(message[4 + length :])


class PageMirror:
    """Tiles by (level, ty, tx), as a page has them."""

    def __init__(self) -> None:
        self.levels: dict[Place, NDArray[np.uint8]] = {}
        self.ranges: dict[Place, tuple[float, float]] = {}

    def take(self, side: int, count: int, payload: bytes, dropped: list[list[int]]) -> list[Place]:
        """Take tiles in; which they were."""
        for level, ty, tx in dropped:
            del self.levels[level, ty, tx]
        table = np.frombuffer(payload, TILE_RECORD, count)
        pixels = np.frombuffer(payload, np.uint8, offset=table.nbytes).reshape(count, side, side)
        places: list[Place] = []
        for record, steps in zip(table, pixels, strict=True):
            place = (int(record["level"]), int(record["ty"]), int(record["tx"]))
            if record["difference"]:
                self.levels[place] = self.levels[place] + steps
            else:
                rows = np.add.accumulate(steps[:, 0], dtype=np.uint8)
                steps = steps.copy()
                steps[:, 0] = rows
                self.levels[place] = np.add.accumulate(steps, axis=1, dtype=np.uint8)
            self.ranges[place] = (float(record["low"]), float(record["high"]))
            places.append(place)
        return places

    def values(self, place: Place) -> NDArray[np.float32]:
        """Of one tile, NaN where unseen."""
        low, high = self.ranges[place]
        levels = self.levels[place]
        values = low + (levels.astype(np.float32) - 1) * (high - low) / 254
        return np.where(levels > 0, values, np.nan).astype(np.float32)

    def step(self, place: Place) -> float:
        """By which values of a tile may be off."""
        low, high = self.ranges[place]
        return (high - low) / 254
