"""How near an image is to the simulated sample that it shows.

Used by the demo and the tests; measured scans have no known truth.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import GeometryError
from ptycho_stream.results import Image


def nrmse_to_truth(
    image: Image,
    truth_yx: NDArray[np.complex64],
    truth_origin_yx_m: tuple[float, float],
    min_weight: float = 0.5,
) -> float:
    """||c a - t|| / ||t|| over the pixels that were well seen.

    c is the complex factor that ptychography cannot know, fitted.  Probe and positions are the
    simulation's own, so there is no shift to remove.

    Args:
        image: as published.
        truth_yx: complex64 (H, W), the sample.
        truth_origin_yx_m: world position of the centre of its first pixel.
        min_weight: pixels with less illumination (1 = one frame at the probe's peak) do not count.

    Raises:
        GeometryError: image and truth do not overlap.
    """
    pixel = np.asarray(image.pixel_yx_m)
    offset = (np.asarray(image.origin_yx_m) - np.asarray(truth_origin_yx_m)) / pixel
    top, left = (int(v) for v in np.rint(offset))
    placed = np.full(truth_yx.shape, complex(np.nan, np.nan), np.complex128)
    height, width = image.object_yx.shape
    rows = slice(max(top, 0), min(top + height, truth_yx.shape[0]))
    columns = slice(max(left, 0), min(left + width, truth_yx.shape[1]))
    source = np.where(image.weight_yx >= min_weight, image.object_yx, np.nan)
    placed[rows, columns] = source[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    seen = np.isfinite(placed)
    if not seen.any():
        raise GeometryError("the image shows nothing of the known sample: nothing to compare")
    a, t = placed[seen], truth_yx[seen]
    factor = np.vdot(a, t) / np.vdot(a, a)
    return float(np.linalg.norm(factor * a - t) / np.linalg.norm(t))
