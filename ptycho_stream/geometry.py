"""Detector, sample and canvas: the one owner of pixel sizes, orientation, crop and pixel positions.

World coordinates are the stage's: metres, y down the rows, x along the columns, origin at stage
(0, 0).  The centre of canvas pixel (0, 0) is that origin.  Used by ingest (pixel size of a scan),
the reconstruct stage (views, patch corners) and the simulators (the same, backwards).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import GeometryError

PLANCK_TIMES_LIGHT_EV_M = 1.239841984e-6  # h*c, CODATA 2018

METRES: Final[Mapping[str, float]] = {
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1.0),
    **dict.fromkeys(("cm",), 1e-2),
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1e-3),
    **dict.fromkeys(("um", "\N{MICRO SIGN}m", "\N{GREEK SMALL LETTER MU}m"), 1e-6),
    **dict.fromkeys(("micron", "microns", "micrometer", "micrometers"), 1e-6),
    **dict.fromkeys(("micrometre", "micrometres"), 1e-6),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-9),
    **dict.fromkeys(("pm", "picometer", "picometers", "picometre", "picometres"), 1e-12),
}
"""Of units of length as streams and files name them, in lower case."""

Orientation = Literal[
    "identity",
    "rotate90",
    "rotate180",
    "rotate270",
    "flip_y",
    "flip_x",
    "transpose",
    "antitranspose",
]
ORIENTATIONS: tuple[Orientation, ...] = get_args(Orientation)


def wavelength_m(photon_energy_eV: float) -> float:
    """Wavelength in metres of photons of ``photon_energy_eV`` (lambda = h c / E)."""
    if not photon_energy_eV > 0:
        raise GeometryError(
            f"photon energy is {photon_energy_eV} eV: set geometry.photon_energy_eV above 0"
        )
    return PLANCK_TIMES_LIGHT_EV_M / photon_energy_eV


def object_pixel_yx_m(
    photon_energy_eV: float,
    detector_distance_m: float,
    detector_pixel_yx_m: tuple[float, float],
    size_px: int,
) -> tuple[float, float]:
    """Pixel size (y, x) in metres of a patch of ``size_px`` squared.

    Far field: dx = lambda z / (N p) (Rodenburg and Maiden, Springer Handbook of Microscopy, 2019,
    ch. 17, eq. 17.11).

    Raises:
        GeometryError: a distance or pixel size is not above 0.
    """
    if not detector_distance_m > 0:
        raise GeometryError(
            f"detector distance is {detector_distance_m} m: set geometry.detector_distance_m"
        )
    if not min(detector_pixel_yx_m) > 0:
        raise GeometryError(
            f"detector pixel is {detector_pixel_yx_m} m: set geometry.detector_pixel_yx_m"
        )
    scale = wavelength_m(photon_energy_eV) * detector_distance_m / size_px
    return scale / detector_pixel_yx_m[0], scale / detector_pixel_yx_m[1]


def orient(frames: NDArray[np.generic], orientation: Orientation) -> NDArray[np.generic]:
    """Turn or mirror the last two axes (y, x) of ``frames``; a view, not a copy."""
    match orientation:
        case "identity":
            return frames
        case "rotate90":
            return np.rot90(frames, 1, axes=(-2, -1))
        case "rotate180":
            return frames[..., ::-1, ::-1]
        case "rotate270":
            return np.rot90(frames, 3, axes=(-2, -1))
        case "flip_y":
            return frames[..., ::-1, :]
        case "flip_x":
            return frames[..., ::-1]
        case "transpose":
            return np.swapaxes(frames, -1, -2)
        case "antitranspose":
            return np.swapaxes(frames[..., ::-1, ::-1], -1, -2)


@dataclass(frozen=True, slots=True)
class View:
    """How stored frames are looked at; versioned, so that a wrong one is corrected by a new one.

    Attributes:
        size_px: N; the view of a frame is N x N.
        center_yx_px: zero frequency in stored pixels, from the centre of pixel [0, 0]; rounded to
            whole pixels on reading.  None: ``size // 2`` of the stored frame (``dc="center"``).
        dc: ``center`` where the beam hits the middle of the detector, ``corner`` for frames that
            were stored with zero frequency at [0, 0].
        orientation: applied after the crop, about the zero frequency.
        bad_value_from: stored values from this one on mark a bad pixel.  None: the two largest of
            an unsigned integer dtype, as DECTRIS marks gaps and dead pixels; none for others.
        version: counts the views of a scan from 1.
        bad_pixels: digest of a mask (h, w) of stored pixels, in a file of the scan's folder
            (``ptycho_stream.scans.view_data``); so are the next three. None: there is none.
        flat_field: of the response (h, w) of stored pixels.
        background: of counts (h, w) a frame that are there without a sample.
        bad_frames: of ranges (n, 2) of frame numbers, first and last, that are left out.
        i0_reference: reading of the beam monitor that frames are scaled to; None: they are not.
    """

    size_px: int
    center_yx_px: tuple[float, float] | None = None
    dc: Literal["center", "corner"] = "center"
    orientation: Orientation = "identity"
    bad_value_from: int | None = None
    version: int = 1
    bad_pixels: str | None = None
    flat_field: str | None = None
    background: str | None = None
    bad_frames: str | None = None
    i0_reference: float | None = None

    def apply(self, frames: NDArray[np.generic], outside: int = 0) -> NDArray[np.generic]:
        """View of ``frames`` (..., h, w) as (..., N, N) with zero frequency at index N // 2.

        Where the window leaves the frame the result holds ``outside``.
        """
        if self.dc == "corner":
            frames = np.fft.fftshift(frames, axes=(-2, -1))
        shape_yx = frames.shape[-2:]
        center = self.center_yx_px or (shape_yx[0] // 2, shape_yx[1] // 2)
        n = self.size_px
        top = [round(c) - n // 2 for c in center]
        if all(t >= 0 and t + n <= s for t, s in zip(top, shape_yx, strict=True)):
            window = frames[..., top[0] : top[0] + n, top[1] : top[1] + n]
        else:
            window = _window_with_border(frames, top, n, outside)
        return _orient_about_dc(window, self.orientation)

    def valid(self, frame: NDArray[Any], bad: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        """Pixels (N, N) of the view that hold a measurement, judged by one stored ``frame`` (h, w).

        ``bad`` (h, w) marks stored pixels that the detector declared bad; None: none.
        """
        good = self.is_measured(frame)
        if bad is not None:
            good = good & ~bad
        return np.ascontiguousarray(self.apply(good, outside=0).astype(bool))

    def is_measured(self, frame: NDArray[Any]) -> NDArray[np.bool_]:
        """Pixels (h, w) of one stored ``frame`` (h, w) whose values do not mark them as bad."""
        limit = self.bad_value_from
        if limit is None and frame.dtype.kind == "u":
            limit = int(np.iinfo(frame.dtype).max) - 1
        return np.isfinite(frame) if limit is None else frame < limit

    def next(self, **changes: object) -> View:
        """The following version of this view, with ``changes``."""
        return replace(self, version=self.version + 1, **changes)  # type: ignore[arg-type]


def _window_with_border(
    frames: NDArray[np.generic], top: list[int], n: int, outside: int
) -> NDArray[np.generic]:
    window = np.full((*frames.shape[:-2], n, n), outside, dtype=frames.dtype)
    source, target = [], []
    for t, size in zip(top, frames.shape[-2:], strict=True):
        low, high = max(t, 0), min(t + n, size)
        if low >= high:
            raise GeometryError(
                f"the view's centre lies so far outside the {frames.shape[-2:]} frame that nothing "
                "is left: correct view.center_yx_px"
            )
        source.append(slice(low, high))
        target.append(slice(low - t, high - t))
    window[..., target[0], target[1]] = frames[..., source[0], source[1]]
    return window


def _orient_about_dc(window: NDArray[np.generic], orientation: Orientation) -> NDArray[np.generic]:
    """Orient an even window whose zero frequency is at N // 2, keeping it there.

    Mirroring an even-sized axis moves index N // 2 to N // 2 - 1; a roll by one puts it back.
    """
    turned = orient(window, orientation)
    n = window.shape[-1]
    marker = np.zeros((n, n), bool)
    marker[n // 2, n // 2] = True
    at_y, at_x = np.argwhere(orient(marker, orientation))[0]
    shift = (n // 2 - int(at_y), n // 2 - int(at_x))
    return np.roll(turned, shift, axis=(-2, -1)) if any(shift) else turned


def patch_corners(
    position_yx_m: NDArray[np.float64], pixel_yx_m: tuple[float, float], size_px: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Where the patches of probe centres lie on the canvas' whole-pixel grid.

    The probe's window has its centre at index (N - 1) / 2.

    Args:
        position_yx_m: (n, 2) world positions of the probe's centre, metres.
        pixel_yx_m: object pixel size, metres.
        size_px: N.

    Returns:
        ``corner_yx_px`` (n, 2) int64, canvas pixel of patch[0, 0]; ``shift_yx_px`` (n, 2) float32
        in [-0.5, 0.5], by which the probe lies off that grid (towards larger indices if positive).
    """
    top = position_yx_m / np.asarray(pixel_yx_m) - (size_px - 1) / 2
    corner = np.rint(top)
    return corner.astype(np.int64), (top - corner).astype(np.float32)
