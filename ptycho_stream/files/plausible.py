"""Whether the numbers of somebody's file can be what they are said to be.

A wrong unit or a wrong domain reads without a fault and spoils everything after it, so that readers
of measured files ask here first. Limits are far outside of what any ptychography needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError

_RANGES: Final = {
    "photon_energy_eV": (0.1, 1e6),
    "detector_distance_m": (1e-4, 1e3),
    "detector_pixel_yx_m": (1e-7, 0.1),
    "pixel_yx_m": (1e-12, 1e-3),
}
_MAX_STAGE_M: Final = 1.0
"""No stage of a microscope moves further."""
_LOOKED_AT: Final = 32
_MAX_APART: Final = 3.0
"""Windows between neighbours: without any overlap it is no ptychography."""
MAX_AMPLITUDE: Final = 10.0
"""PtychoPINN's own check: the mean over frames of the largest amplitude lies below."""


def real_number(where: str, value: Any) -> float:
    """One number, as an attribute or an array of one element has it.

    Raises:
        FileFormatError: it is text, complex, or several.
    """
    held = np.asarray(value)
    if held.size != 1 or held.dtype.kind not in "buif":
        raise FileFormatError(f"{where} is {value!r}, not a number")
    return float(held.reshape(-1)[0])


def check_range(where: str, name: str, values: Sequence[float]) -> None:
    """Refuse an energy, distance or pixel size that no instrument has.

    Raises:
        FileFormatError: a value is out of range; the text names what to give instead.
    """
    low, high = _RANGES[name]
    for value in values:
        if not low <= abs(value) <= high:
            raise FileFormatError(
                f"{where} tells {name} = {value:g}, which is out of {low:g} to {high:g}: its unit "
                f"is another than the name says; give {name} yourself"
            )


def check_positions(
    where: str,
    position_yx_m: NDArray[np.float64],
    pixel_yx_m: tuple[float, float] | None,
    size_px: int,
) -> None:
    """Refuse positions (M, 2) that are no numbers, or whose unit cannot be right.

    Args:
        where: file and datasets, for errors.
        position_yx_m: of the probe's centre.
        pixel_yx_m: of the object; None: it is not known.
        size_px: side of the probe's window.

    Raises:
        FileFormatError: as above.
    """
    if not np.isfinite(position_yx_m).all():
        bad = np.flatnonzero(~np.isfinite(position_yx_m).all(1))
        raise FileFormatError(
            f"{where} has no number for {len(bad)} positions, the first of them {bad[0]}: leave "
            "these frames out of the file"
        )
    extent = np.ptp(position_yx_m, axis=0)
    if extent.max() > _MAX_STAGE_M:
        raise FileFormatError(
            f"{where} spans {extent.max():g} m: that is another unit; say position_unit (um, nm "
            "...)"
        )
    if pixel_yx_m is None or len(position_yx_m) < 9:
        return
    position_px = position_yx_m / np.asarray(pixel_yx_m)
    if np.ptp(position_px, axis=0).max() < 1:
        raise FileFormatError(
            f"{where}: all {len(position_px)} positions lie within one object pixel of "
            f"{pixel_yx_m[1]:g} m: that is another unit; say position_unit (m, um, px ...), or "
            "correct energy, distance and detector pixel"
        )
    apart = _distance_of_neighbours(position_px)
    if apart > _MAX_APART * size_px:
        raise FileFormatError(
            f"{where}: neighbours are {apart:.0f} object pixels of {pixel_yx_m[1]:g} m apart and "
            f"the probe's window has {size_px}: that is another unit; say position_unit (um, nm "
            "...), or correct energy, distance and detector pixel"
        )


def _distance_of_neighbours(position_px: NDArray[np.float64]) -> float:
    """Median distance of some positions (M, 2) to their nearest neighbour, pixels."""
    picked = np.linspace(0, len(position_px) - 1, _LOOKED_AT).astype(int)
    nearest: list[float] = []
    for index in picked:
        distance = np.hypot(*(position_px - position_px[index]).T)
        distance[index] = np.inf
        nearest.append(float(distance.min()))
    return float(np.median(nearest))


def check_amplitude(where: str, sample: NDArray[Any]) -> None:
    """Refuse frames (n, h, w) that are said to be amplitudes and look like counts.

    Raises:
        FileFormatError: their maxima are above 10 on average.
    """
    mean = float(np.nanmean(np.nanmax(sample, axis=(1, 2)))) if sample.size else 0.0
    if mean >= MAX_AMPLITUDE:
        raise FileFormatError(
            f"{where} is said to hold amplitudes, and the frames' largest is {mean:.4g} on "
            f"average, where PtychoPINN's are below {MAX_AMPLITUDE:g}: if these are counts say "
            "domain = 'counts'; if they are amplitudes give counts_per_unit (1 where their squares "
            "are counts)"
        )
