"""What a scan has covered, and how densely: area, share of its rectangle, overlap of the probes.

Needs positions and the probe only. Published with each image, and what the verdict on sampling
stands on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.physics.probe import Probe

_CELLS_ACROSS = 8
"""The probe's diameter in cells of the raster on which probes are counted."""

_MOST_CELLS = 1 << 22


@dataclass(frozen=True, slots=True)
class Coverage:
    """Of all positions so far.

    Attributes:
        area_um2: covered by at least one probe's disc, square micrometres.
        share: of the rectangle that holds all discs.
        overlap: mean number of discs over a covered spot; below 2 neighbours hardly meet.
        step_m: median distance of a position from its nearest neighbour.
        linear_overlap: 1 - step / diameter; negative if the discs do not touch.
        diameter_m: of the disc.
    """

    area_um2: float
    share: float
    overlap: float
    step_m: float
    linear_overlap: float
    diameter_m: float


def probe_diameter_px(probe: Probe) -> float:
    """Diameter of the circle about its centre of mass that holds half of the photons.

    For a Gaussian that is the full width at half maximum; unlike that, it has a meaning for rings
    and speckled probes too.
    """
    power = probe.power_yx.astype(np.float64)
    index = np.arange(probe.size_px)
    y, x = (power.sum(axis) @ index / power.sum() for axis in (1, 0))
    radius = np.hypot(index[:, None] - y, index[None, :] - x).ravel()
    order = np.argsort(radius, kind="stable")
    inside = np.cumsum(power.ravel()[order])
    half = int(np.searchsorted(inside, 0.5 * inside[-1]))
    return max(2 * float(radius[order[half]]), 1.0)


def coverage(
    position_yx_m: NDArray[np.floating[Any]], probe: Probe, pixel_yx_m: tuple[float, float]
) -> Coverage | None:
    """Cover the plane with the probe's disc at each position; None without a finite position.

    Args:
        position_yx_m: (n, 2), world positions of the probe's centre.
        probe: it; its disc holds half of the photons.
        pixel_yx_m: of the object.
    """
    places = np.asarray(position_yx_m, np.float64)
    places = places[np.isfinite(places).all(1)]
    if not len(places):
        return None
    diameter = probe_diameter_px(probe) * math.sqrt(pixel_yx_m[0] * pixel_yx_m[1])
    low, high = places.min(0) - diameter / 2, places.max(0) + diameter / 2
    cell = diameter / _CELLS_ACROSS
    # A scan of a huge area is counted on a coarser raster, rather than in gigabytes.
    cell = max(cell, math.sqrt(float(np.prod(high - low)) / _MOST_CELLS))
    count = _discs(places, low, high, cell, diameter)
    covered = int(np.count_nonzero(count))
    area = covered * cell**2
    step = _nearest(places)
    return Coverage(
        area_um2=area * 1e12,
        share=min(area / float(np.prod(high - low)), 1.0),
        overlap=float(count.sum()) / max(covered, 1),
        step_m=step,
        linear_overlap=1 - step / diameter,
        diameter_m=diameter,
    )


def _discs(
    places: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    cell: float,
    diameter: float,
) -> NDArray[np.float64]:
    """How many discs cover each cell, by a convolution of the positions with one disc."""
    shape = tuple((np.ceil((high - low) / cell)).astype(int) + 1)
    where = np.minimum(((places - low) / cell).astype(np.int64), np.array(shape) - 1)
    flat = np.ravel_multi_index((where[:, 0], where[:, 1]), shape)
    hits = np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
    reach = int(diameter / 2 / cell)
    along = np.arange(-reach, reach + 1)
    disc = (np.hypot(along[:, None], along[None, :]) * cell <= diameter / 2).astype(np.float64)
    padded = (shape[0] + 2 * reach, shape[1] + 2 * reach)
    spectrum = np.fft.rfft2(hits, padded) * np.fft.rfft2(disc, padded)
    laid = np.fft.irfft2(spectrum, padded)
    return np.rint(laid[reach : reach + shape[0], reach : reach + shape[1]])


def _nearest(places: NDArray[np.float64], sample: int = 256) -> float:
    """Median distance of positions from their nearest neighbour; infinite for a single one."""
    if len(places) < 2:
        return math.inf
    chosen = np.unique(np.linspace(0, len(places) - 1, min(sample, len(places))).astype(np.int64))
    nearest: list[float] = []
    for index in chosen.tolist():
        distance = np.hypot(*(places - places[index]).T)
        distance[index] = np.inf
        nearest.append(float(distance.min()))
    return float(np.median(nearest))
