"""How badly the image of a running scan explains the frames that came last.

The reconstruct stage looks every few seconds, where the settings ask for fine-tuning when the
misfit stays high; refinement looks whether the network's image is a good start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.errors import ModelError
from ptycho_stream.geometry import patch_corners
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import Canvas
from ptycho_stream.reconstruct.generation import Generation
from ptycho_stream.reconstruct.misfit import Misfit, compared_frames, stitched_misfit
from ptycho_stream.reconstruct.trust import tile_windows
from ptycho_stream.results import Tile
from ptycho_stream.scans.records import positions_of
from ptycho_stream.scans.viewed_scan import ViewedScan

if TYPE_CHECKING:
    from ptycho_stream.reconstruct.scan_image import ScanImage

NEWEST = 32
"""So many frames are compared, or fewer large ones."""
MAX_START_EXCESS = 0.1
"""The network's image must explain the newest frames so well, or refinement does without it: made
with a wrong probe it costs more sweeps than it saves, and puts a wall of phase where it begins."""
GOOD_PROBE_EXCESS = 0.03
"""Below it the probe is good: on the siemens star 0.015 to 0.025 with the probe of the scan before,
0.04 with one that is defocused a little, 0.24 with a guess."""


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
    return newest_misfit(image.viewed, generation, device)


def newest_misfit(
    scan: ViewedScan, generation: Generation, device: torch.device | str = "cpu"
) -> Misfit:
    """Misfit of the newest frames of a generation of the present view, of which it has some.

    Raises:
        ModelError: the device refuses, for want of memory for example.
        StoreError: the frames cannot be read.
    """
    probe, reader = Probe(generation.probe), scan.reader
    size = probe.size_px
    newest = generation.ledger.added[-compared_frames(size, NEWEST) :]
    first = int(newest.min())
    pairs = reader.pairs(first, int(newest.max()) + 1)[newest - first]
    position_yx_m = positions_of(pairs)
    corner, shift = patch_corners(position_yx_m, generation.identity.pixel_yx_m, size)
    # One window below the other: as small as it can be, however far apart the frames lie.
    rows = np.arange(len(pairs)) * size
    try:
        return stitched_misfit(
            _windows(generation.canvas, corner, size),
            np.stack([rows, np.zeros_like(rows)], axis=1).astype(np.int64),
            shift,
            lambda part: scan.counts(pairs["slot"][part]),
            probe,
            scan.valid,
            device=device,
        )
    except RuntimeError as error:  # torch's own, out of memory among them
        raise ModelError(
            f"{device} cannot simulate frames: {str(error).splitlines()[0]}"
        ) from error


def _windows(
    canvas: Canvas, corner_yx_px: NDArray[np.int64], size_px: int
) -> NDArray[np.complex64]:
    """The object in each window, (B * N, N), NaN where never seen."""
    t = canvas.tile_px
    last = corner_yx_px + size_px - 1
    under = {
        (ty, tx)
        for low, high in zip((corner_yx_px // t).tolist(), (last // t).tolist(), strict=True)
        for ty in range(low[0], high[0] + 1)
        for tx in range(low[1], high[1] + 1)
    }
    tiles = {
        index: Tile(canvas.versions[index], *canvas.object_tile(index))
        for index in under & canvas.versions.keys()
    }
    return tile_windows(tiles, t, corner_yx_px, size_px).reshape(-1, size_px)
