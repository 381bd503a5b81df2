"""Means over square bins of those pixels that were seen: smaller pictures of large images.

Used where stored images are read and where the viewer shows them.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", np.complex64, np.float32)

SAMPLES = 4
"""Along each side of a bin: of larger ones not every pixel is looked at."""


def bin_means(values_yx: NDArray[Scalar], bin_px: int) -> NDArray[Scalar]:
    """The mean of the finite values in each bin, NaN in a bin without any.

    Args:
        values_yx: (h * bin_px, w * bin_px).
        bin_px: pixels a side of a bin, a power of two.

    Returns:
        (h, w), of the same dtype.
    """
    step = max(1, bin_px // SAMPLES)
    side = bin_px // step
    sampled = values_yx[::step, ::step]
    if side == 1:
        return np.ascontiguousarray(sampled)
    height, width = sampled.shape[0] // side, sampled.shape[1] // side
    bins = sampled.reshape(height, side, width, side)
    seen = np.isfinite(bins)
    total = np.where(seen, bins, 0).sum((1, 3))
    count = seen.sum((1, 3))
    mean = np.full((height, width), np.nan, values_yx.dtype)
    np.divide(total, count, out=mean, where=count > 0, casting="same_kind")
    return mean


def binned_window(
    values_yx: NDArray[Scalar],
    corner_yx_px: tuple[int, int],
    window_corner_yx_px: tuple[int, int],
    shape_yx: tuple[int, int],
    bin_px: int,
) -> NDArray[Scalar]:
    """Bin means of a part of a canvas, of which an array holds a rectangle.

    Args:
        values_yx: (H, W), the rectangle; only what is needed of it is read.
        corner_yx_px: canvas pixel of its [0, 0].
        window_corner_yx_px: canvas pixel at which the first bin begins, multiples of ``bin_px``.
        shape_yx: bins in the window.
        bin_px: canvas pixels a side of a bin, a power of two.

    Returns:
        (h, w) = ``shape_yx``, NaN outside of the rectangle.
    """
    step = max(1, bin_px // SAMPLES)
    side = bin_px // step
    sampled = np.full((shape_yx[0] * side, shape_yx[1] * side), np.nan, values_yx.dtype)
    places: list[slice] = []
    sources: list[slice] = []
    for axis in (0, 1):
        offset = corner_yx_px[axis] - window_corner_yx_px[axis]  # of the rectangle in the window
        first = max(-(-offset // step), 0)
        last = min(-(-(offset + values_yx.shape[axis]) // step), sampled.shape[axis])
        places.append(slice(first, max(first, last)))
        sources.append(slice(first * step - offset, max(first, last) * step - offset, step))
    if all(place.stop > place.start for place in places):
        sampled[places[0], places[1]] = values_yx[sources[0], sources[1]]
    return bin_means(sampled, side)
