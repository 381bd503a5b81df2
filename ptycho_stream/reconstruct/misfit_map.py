"""Where on the sample the image does not explain the frames: their misfit, laid onto the canvas.

Each frame's excess is spread with its probe's intensity, so a spoiled region shows up where it is.
Pixels are binned, as a frame's misfit cannot be placed finer than its probe. Used with each
published image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import GeometryError
from ptycho_stream.reconstruct.canvas import TileIndex
from ptycho_stream.results import MISFIT_BIN_PX as BIN_PX
from ptycho_stream.results import MisfitTile, stitch_misfit


class MisfitMap:
    """Mean excess of the frames that lit each spot, in tiles like the canvas'.

    A frame that is judged again, or moved, takes the place of its former self. Sums are float64,
    so taking a frame out leaves nothing behind that could be seen.

    Args:
        tile_px: of the canvas; tile (ty, tx) covers the same place as the canvas' tile.
        power_yx: (N, N), the probe's intensity in any unit.
    """

    def __init__(self, tile_px: int, power_yx: NDArray[np.floating[Any]]) -> None:
        if tile_px % BIN_PX:
            raise GeometryError(f"tiles of {tile_px} pixels are no multiple of {BIN_PX}")
        self._tile = tile_px // BIN_PX
        self._power = power_yx.astype(np.float64) / max(float(np.max(power_yx)), 1e-30)
        self._stamps: dict[TileIndex, NDArray[np.float64]] = {}
        self._tiles: dict[TileIndex, NDArray[np.float64]] = {}
        self._frames: dict[int, tuple[int, int, float]] = {}
        self._versions: dict[TileIndex, int] = {}
        self._snapshots: dict[TileIndex, MisfitTile] = {}

    def put(
        self,
        indices: NDArray[np.integer[Any]],
        corner_yx_px: NDArray[np.integer[Any]],
        excess: NDArray[np.floating[Any]],
    ) -> None:
        """Lay frames onto the map, in place of what it held of them.

        Args:
            indices: (n,), what names each frame for good.
            corner_yx_px: (n, 2), canvas pixel of its window's [0, 0].
            excess: (n,); NaN takes the frame off the map.
        """
        for index, (top, left), value in zip(
            indices.tolist(), corner_yx_px.tolist(), excess.tolist(), strict=True
        ):
            former = self._frames.pop(index, None)
            if former is not None:
                self._add(former[0], former[1], -former[2], -1)
            if np.isfinite(value):
                self._add(top, left, value, 1)
                self._frames[index] = (top, left, value)

    def _add(self, top: int, left: int, excess: float, sign: int) -> None:
        stamp = self._stamp(top % BIN_PX, left % BIN_PX)
        size, t = len(stamp), self._tile
        y, x = top // BIN_PX, left // BIN_PX
        for ty in range(y // t, (y + size - 1) // t + 1):
            y0, y1 = max(y, ty * t), min(y + size, (ty + 1) * t)
            for tx in range(x // t, (x + size - 1) // t + 1):
                x0, x1 = max(x, tx * t), min(x + size, (tx + 1) * t)
                tile = self._tiles.setdefault((ty, tx), np.zeros((2, t, t)))
                self._versions[ty, tx] = self._versions.get((ty, tx), 0) + 1
                part = stamp[y0 - y : y1 - y, x0 - x : x1 - x]
                place = slice(y0 - ty * t, y1 - ty * t), slice(x0 - tx * t, x1 - tx * t)
                tile[0][place] += excess * part
                tile[1][place] += sign * part

    def _stamp(self, dy: int, dx: int) -> NDArray[np.float64]:
        """The probe's intensity on the map's pixels, for a corner (dy, dx) pixels off them."""
        stamp = self._stamps.get((dy, dx))
        if stamp is None:
            bins = -(-(len(self._power) + BIN_PX - 1) // BIN_PX)
            laid = np.zeros((bins * BIN_PX, bins * BIN_PX))
            laid[dy : dy + len(self._power), dx : dx + len(self._power)] = self._power
            stamp = laid.reshape(bins, BIN_PX, bins, BIN_PX).mean((1, 3))
            self._stamps[dy, dx] = stamp
        return stamp

    @property
    def tiles(self) -> tuple[TileIndex, ...]:
        """Indices (ty, tx) of the tiles that frames have touched."""
        return tuple(sorted(self._tiles))

    def tile(self, index: TileIndex, least_weight: float = 0.05) -> NDArray[np.float32]:
        """Mean excess, float32 (T / BIN_PX, T / BIN_PX) of one tile.

        NaN where fewer frames than ``least_weight`` lit the spot (1: one frame at its peak).
        """
        numerator, denominator = self._tiles[index]
        enough = denominator >= least_weight
        mean = np.full(numerator.shape, np.nan, np.float32)
        np.divide(numerator, denominator, out=mean, where=enough, casting="same_kind")
        return mean

    def snapshots(self) -> dict[TileIndex, MisfitTile]:
        """All tiles as they are now; those that have not changed are the same objects as before."""
        for index, version in self._versions.items():
            known = self._snapshots.get(index)
            if known is None or known.version != version:
                self._snapshots[index] = MisfitTile(version, self.tile(index))
        return dict(self._snapshots)

    def picture(self, least_weight: float = 0.05) -> tuple[NDArray[np.float32], TileIndex]:
        """All tiles joined: the map (H, W), and the canvas pixel of its first corner."""
        tiles = {index: MisfitTile(1, self.tile(index, least_weight)) for index in self._tiles}
        return stitch_misfit(tiles, self._tile * BIN_PX)
