"""From stored pairs to patches on the canvas' grid, with one recipe and one view.

The scan image holds one maker for each generation that it can still extend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import GeometryError
from ptycho_stream.geometry import patch_corners
from ptycho_stream.reconstruct.collapse import Verdicts
from ptycho_stream.reconstruct.devices import on_device
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.scans.records import positions_of
from ptycho_stream.scans.viewed_scan import ViewedScan

PHOTON_FRAMES = 8
"""So many frames, the first of the scan that may be in an image, give the photons of the
unattenuated beam."""


@dataclass(frozen=True, slots=True)
class Patches:
    """Predicted patches of a batch, on the device that made them.

    ``object_yx`` complex64 (B, N, N), ``weight_yx`` float32 (B, N, N) the probe's intensity in
    units of its peak times the network's confidence, ``corner_yx_px`` int64 (B, 2) the canvas pixel
    of patch[0, 0], ``verdicts`` whether they can be true.
    """

    object_yx: Tensor
    weight_yx: Tensor
    corner_yx_px: NDArray[np.int64]
    verdicts: Verdicts

    def only(self, rows: NDArray[np.bool_]) -> Patches:
        """Those patches where ``rows`` (B,) is True."""
        kept = on_device(np.flatnonzero(rows), self.object_yx.device)
        return Patches(
            self.object_yx[kept],
            self.weight_yx[kept],
            self.corner_yx_px[rows],
            self.verdicts[rows],
        )


class PatchMaker:
    """Predicts the patches of a scan's pairs.

    Args:
        scan: as its frames are looked at.
        recipe: network, probe, device.
        photons: of the unattenuated beam, a frame; the probe is scaled to it.
    """

    def __init__(self, scan: ViewedScan, recipe: Recipe, photons: float) -> None:
        size_px = scan.reader.header.size_px
        if recipe.probe.size_px != size_px:
            raise GeometryError(
                f"scan {scan.reader.scan_id} was taken for patches of {size_px} pixels, the "
                f"probe has {recipe.probe.size_px}: use a probe of {size_px} pixels"
            )
        self._scan = scan
        self._valid = scan.valid
        self.predictor = Predictor(
            recipe.network, recipe.probe.normalised(photons), recipe.device, recipe.batch_frames
        )

    @property
    def group_frames(self) -> int:
        """So many pairs go through the network together."""
        return self.predictor.group_frames

    @property
    def probe(self) -> NDArray[np.complex64]:
        """Probe modes (modes, N, N), scaled to the scan's photons."""
        return self.predictor.probe.modes

    def make(self, pairs: NDArray[Any], pixel_yx_m: tuple[float, float]) -> Patches:
        """Patches of ``pairs`` (B,), records of the scan's log of pairs; groups lie in a row."""
        position_yx_m = positions_of(pairs)
        corner, shift = patch_corners(position_yx_m, pixel_yx_m, self._scan.view.size_px)
        counts = self._scan.counts(pairs["slot"])
        found = self.predictor.predict_judged(counts, shift, self._valid)
        return Patches(found.patches, found.weights, corner, found.verdicts)


def measured_photons(scan: ViewedScan, frames: int) -> float:
    """Photons of the unattenuated beam, from the first ``frames`` frames that may be in an image.

    A high percentile of their sums: what passes where the sample is thin.
    """
    slots = scan.first_open(frames)
    if not len(slots):
        return 1.0
    counts = np.where(scan.valid, scan.counts(slots), 0)
    return max(float(np.percentile(counts.sum((-2, -1), dtype=np.float64), 90)), 1.0)
