"""Scans and images for the tests of files: nothing about them is symmetric.

Frames are not numbered in order, pixels are not square, nor is the canvas; the sample has no
symmetry, and some detector pixels are bad.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from ptycho_stream.files.image_npz import TILE_PX, cut
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.results import Image, ImageState
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.simulate.sensor import SensorSettings

SIZE = 32
FRAMES = 18
NUMBERS = 3 + 2 * np.arange(FRAMES)


@cache
def asymmetric_scan() -> ScanFile:
    """A simulated scan with the truth behind it."""
    experiment = simulate_experiment(
        seed=2,
        frames=FRAMES,
        size_px=SIZE,
        photons=1e6,
        detector_pixel_yx_m=(75e-6, 55e-6),
        sensor=SensorSettings(gap_px=2),
    )
    return replace(scan_file_of(experiment), frame_numbers=NUMBERS)


def image_of(scan: ScanFile, scan_id: str = "01JBQ3N8Z5T0V6W7X8Y9ZABCDE") -> Image:
    """The truth of a simulated scan as the final image of it; a corner was never seen."""
    assert scan.object is not None and scan.probe is not None
    assert scan.object_origin_yx_m is not None and scan.pixel_yx_m is not None
    corner = np.rint(np.divide(scan.object_origin_yx_m, scan.pixel_yx_m)).astype(int)
    obj = scan.object.copy()
    weight = np.ones(obj.shape, np.float32)
    obj[:3, :5], weight[:3, :5] = np.nan, 0
    return Image(
        ImageState(
            scan_id=scan_id,
            state="complete",
            generation=1,
            pixel_yx_m=scan.pixel_yx_m,
            tile_px=TILE_PX,
            tiles=cut(obj, weight, (int(corner[0]), int(corner[1]))),
            frame_numbers=scan.frame_numbers,
            position_yx_m=scan.positions_yx_m,
            probe=scan.probe,
            model="unrolled-v2",
            counts={"reconstructed": len(scan)},
            metadata={"sample": "star", "comment": "a trial", "angle_deg": 12.5},
            final=True,
            verdict="good",
        )
    )


def good_counts(scan: ScanFile) -> np.ndarray:
    """Counts of a scan, 0 where a pixel is bad."""
    counts = np.asarray(scan.counts)
    return counts if scan.bad_pixels is None else np.where(scan.bad_pixels, 0, counts)
