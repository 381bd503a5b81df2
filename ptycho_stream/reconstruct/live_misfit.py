"""How badly the image of a running scan explains the frames that came last.

The reconstruct stage looks every few seconds, where the settings ask for fine-tuning when the
misfit stays high; refinement looks once, whether the network's image is a good start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.errors import ModelError
from ptycho_stream.geometry import patch_corners
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import Canvas, TileIndex
from ptycho_stream.reconstruct.generation import Generation
from ptycho_stream.reconstruct.misfit import Misfit, stitched_misfit
from ptycho_stream.reconstruct.patches import valid_pixels
from ptycho_stream.scans.reader import ScanReader

if TYPE_CHECKING:
    from ptycho_stream.reconstruct.scan_image import ScanImage

NEWEST = 32
"""So many frames are compared, as long as they are no larger than..."""
NEWEST_SIZE_PX = 128
"""...these; of larger ones so many that they have as many pixels together."""


def live_misfit(image: ScanImage, device: torch.device | str = "cpu") -> Misfit | None:
    """Misfit of the frames that are newest in what subscribers see.

    None before there is an image, and while another recipe or view is replacing the one that it
    was made with.

    Raises:
        ModelError: the device refuses, for want of memory for example.
        StoreError: the frames cannot be read.
    """
    generation, reader = image.current, image.reader
    if generation is None or not len(generation.ledger.added):
        return None
    view_version = reader.header.view.version
    if image.following is not None or generation.identity.view_version != view_version:
        return None
    return newest_misfit(reader, generation, device)


def newest_misfit(
    reader: ScanReader, generation: Generation, device: torch.device | str = "cpu"
) -> Misfit:
    """Misfit of the newest frames of a generation of the present view, of which it has some.

    Raises:
        ModelError: the device refuses, for want of memory for example.
        StoreError: the frames cannot be read.
    """
    view, probe = reader.header.view, Probe(generation.probe)
    size = probe.size_px
    newest = generation.ledger.added[-compared_frames(size) :]
    first = int(newest.min())
    pairs = reader.pairs(first, int(newest.max()) + 1)[newest - first]
    position_yx_m = np.stack([pairs["y_m"], pairs["x_m"]], axis=1)
    corner, shift = patch_corners(position_yx_m, generation.identity.pixel_yx_m, size)
    # One window below the other: as small as it can be, however far apart the frames lie.
    rows = np.arange(len(pairs)) * size
    try:
        return stitched_misfit(
            _windows(generation.canvas, corner, size),
            np.stack([rows, np.zeros_like(rows)], axis=1).astype(np.int64),
            shift,
            lambda part: view.apply(reader.frames(pairs["slot"][part])),
            probe,
            valid_pixels(reader, view),
            device=device,
        )
    except RuntimeError as error:  # torch's own, out of memory among them
        raise ModelError(
            f"{device} cannot simulate frames: {str(error).splitlines()[0]}"
        ) from error


def compared_frames(size_px: int) -> int:
    """How many frames of ``size_px`` a side are compared, so that a look takes no longer."""
    return max(1, min(NEWEST, NEWEST * NEWEST_SIZE_PX**2 // size_px**2))


def _windows(
    canvas: Canvas, corner_yx_px: NDArray[np.int64], size_px: int
) -> NDArray[np.complex64]:
    """The object in each window, (B * N, N), NaN where never seen."""
    t = canvas.tile_px
    windows = np.full((len(corner_yx_px) * size_px, size_px), complex(np.nan, np.nan), np.complex64)
    known: dict[TileIndex, NDArray[np.complex64]] = {}
    for number, (top, left) in enumerate(corner_yx_px.tolist()):
        window = windows[number * size_px : (number + 1) * size_px]
        for ty in range(top // t, (top + size_px - 1) // t + 1):
            for tx in range(left // t, (left + size_px - 1) // t + 1):
                if (ty, tx) not in canvas.tiles:
                    continue
                if (ty, tx) not in known:
                    known[ty, tx] = canvas.object_tile((ty, tx))[0]
                y0, y1 = max(top, ty * t), min(top + size_px, (ty + 1) * t)
                x0, x1 = max(left, tx * t), min(left + size_px, (tx + 1) * t)
                part = known[ty, tx][y0 - ty * t : y1 - ty * t, x0 - tx * t : x1 - tx * t]
                window[y0 - top : y1 - top, x0 - left : x1 - left] = part
    return windows
