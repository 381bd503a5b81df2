"""A detector's flat configuration, in the words of the SIMPLON interface.

Used for the headers of the DECTRIS and STINS dialects.  All of it is from outside: what makes no
sense is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from ptycho_stream.errors import LimitExceeded, MalformedMessage, WireError
from ptycho_stream.geometry import PLANCK_TIMES_LIGHT_EV_M
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.wire.limits import WireLimits, checked_name

_T = TypeVar("_T")


def series_name(series: object, kind: str) -> str:
    """A detector's number of a series, or its name, as text.

    Raises:
        MalformedMessage: a message of this ``kind`` came without one, or it is absurdly long or not
            printable.
    """
    if isinstance(series, int) and not isinstance(series, bool) and abs(series) < 2**64:
        return str(series)
    if isinstance(series, str):
        return checked_name(series)
    raise MalformedMessage(f"a {kind!r:.40} message names no series")


def unless_refused(make: Callable[[], _T], problems: list[WireError]) -> _T | None:
    """What ``make`` makes; None, and a problem more, where it refuses what came."""
    try:
        return make()
    except WireError as error:
        problems.append(error)
        return None


def is_count(value: object) -> bool:
    """Whether ``value`` is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def expected_frames(config: Mapping[str, Any], limits: WireLimits) -> int | None:
    """``nimages`` a trigger where the detector times them (ints, exts), one with a gate.

    Raises:
        LimitExceeded: more are announced than any scan has.
    """
    images, triggers = config.get("nimages"), config.get("ntrigger")
    if config.get("trigger_mode") in ("inte", "exte"):
        images, triggers = 1, triggers if is_count(triggers) else None
    elif not is_count(triggers):
        triggers = 1
    if not is_count(images) or triggers is None:
        return None
    expected = cast("int", images) * cast("int", triggers)
    if expected > limits.max_frame_number:
        raise LimitExceeded(
            f"a header announces more than {limits.max_frame_number} frames (nimages x ntrigger)"
        )
    return expected


def geometry_of(config: Mapping[str, Any]) -> DetectorGeometry:
    """Energy, distance, pixel size, beam centre and times, as far as they are told."""

    def positive(key: str) -> float | None:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if 0 < value <= sys.float_info.max else None

    def pair(y_key: str, x_key: str) -> tuple[float, float] | None:
        y, x = positive(y_key), positive(x_key)
        return None if y is None or x is None else (y, x)

    energy, wavelength_angstrom = positive("photon_energy"), positive("wavelength")
    if energy is None and wavelength_angstrom is not None and wavelength_angstrom > 1e-200:
        energy = PLANCK_TIMES_LIGHT_EV_M / (wavelength_angstrom * 1e-10)  # below it overflows
    return DetectorGeometry(
        detector_distance_m=positive("detector_distance"),
        photon_energy_eV=energy,
        detector_pixel_yx_m=pair("y_pixel_size", "x_pixel_size"),
        beam_center_yx_px=pair("beam_center_y", "beam_center_x"),
        count_time_s=positive("count_time"),
        frame_time_s=positive("frame_time"),
    )
