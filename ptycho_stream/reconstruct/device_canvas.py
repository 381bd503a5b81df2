"""The canvas on a GPU: patches are added where they were made, tiles come to the host when read.

The twin of :class:`~ptycho_stream.reconstruct.canvas.Canvas`, with the same sums beyond rounding;
all of it also runs on a CPU, where the tests compare the two.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ptycho_stream.reconstruct import devices
from ptycho_stream.reconstruct.canvas import Canvas, TileIndex, TileSums, Values, Whole
from ptycho_stream.reconstruct.devices import on_device

_FIRST_TILES = 16
_AT_ONCE = 128
"""Patches that are scattered together: bounds the memory that their places take."""


def canvas_on(device: torch.device | str, tile_px: int) -> Canvas:
    """An empty canvas with its sums on ``device``."""
    device = torch.device(device)
    return Canvas(tile_px) if devices.computes_on_host(device) else DeviceCanvas(tile_px, device)


class DeviceCanvas(Canvas):
    """Tiles in one array of a device, into which a batch of patches is scattered by one kernel.

    Adding waits for nothing. Where patches overlap, the device chooses the order of the sums.
    """

    def __init__(self, tile_px: int, device: torch.device) -> None:
        super().__init__(tile_px)
        self._device = device
        self._row: dict[TileIndex, int] = {}
        # Re and Im of the numerator beside the denominator: (tiles, 2, T, T, 3).
        self._sums = torch.zeros((_FIRST_TILES, 2, tile_px, tile_px, 3), device=device)

    @torch.no_grad()
    def _sum_up(self, patches: Values, weights: Values, corner_yx_px: Whole, half: Whole) -> None:
        for at in range(0, len(patches), _AT_ONCE):
            part = slice(at, at + _AT_ONCE)
            weight = on_device(weights[part], self._device)
            weighted = torch.view_as_real(on_device(patches[part], self._device) * weight)
            values = torch.cat((weighted, weight.unsqueeze(-1)), -1)
            places = self._places(corner_yx_px[part], half[part], patches.shape[-1])
            self._sums.view(-1, 3).index_add_(0, places.flatten(), values.view(-1, 3))

    def _places(self, corner_yx_px: Whole, half: Whole, size: int) -> Tensor:
        """Where the pixels of patches lie in the sums of both halves: (B, size, size)."""
        t = self.tile_px
        first, within = np.divmod(corner_yx_px, t)
        rows = on_device(self._rows_under(first, (size - 2 + t) // t + 1), self._device)
        at = on_device(within, self._device).unsqueeze(-1) + torch.arange(size, device=self._device)
        (down, across), (y, x) = ((part[:, 0], part[:, 1]) for part in (at // t, at % t))
        frame = torch.arange(len(rows), device=self._device)[:, None, None]
        row = rows[frame, down.unsqueeze(2), across.unsqueeze(1)]
        row = 2 * row + on_device(half, self._device)[:, None, None]
        return (row * t + y.unsqueeze(2)) * t + x.unsqueeze(1)

    def _rows_under(self, first: Whole, reach: int) -> Whole:
        """Rows (B, reach, reach) of the tiles from ``first`` (B, 2) on; any where there is none.

        A patch never reaches those: only the tiles that it touches were made.
        """
        unique, which = np.unique(first, axis=0, return_inverse=True)
        rows = [
            [[self._row.get((y + dy, x + dx), 0) for dx in range(reach)] for dy in range(reach)]
            for y, x in unique.tolist()
        ]
        return np.array(rows, np.int64)[which.ravel()]

    def _make_tile(self, index: TileIndex) -> None:
        if len(self._row) == len(self._sums):
            grown = self._sums.new_zeros((2 * len(self._sums), *self._sums.shape[1:]))
            grown[: len(self._sums)] = self._sums
            self._sums = grown
        self._row[index] = len(self._row)

    def sums(self, index: TileIndex) -> TileSums:
        """The sums of a tile, fetched from the device."""
        held = self._sums[self._row[index]].cpu()
        numerator = torch.view_as_complex(held[..., :2].contiguous())
        return TileSums(numerator.numpy(), held[..., 2].numpy())

    def _add_sums(self, index: TileIndex, sums: TileSums) -> None:
        parts = (sums.numerator.real, sums.numerator.imag, sums.denominator)
        self._sums[self._row[index]] += on_device(np.stack(parts, -1), self._device)
