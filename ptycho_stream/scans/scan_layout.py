"""How a scan is laid out in the store: crop, bins, geometry, pixel size, view and mask.

Decided once.  Pure: from a detector's header and the settings to a scan header.  Ingest calls it
for every new scan; what is None in one source is taken from the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import GeometryError
from ptycho_stream.geometry import View, object_pixel_yx_m
from ptycho_stream.messages import DetectorGeometry, ScanStart
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.scan_events import OpenScan
from ptycho_stream.scans.stored_part import StoredPart, binned_dtype
from ptycho_stream.settings import GeometrySettings, Settings

MAX_EXPECTED = 2**40
"""A stored header that announces more frames is not believed."""


@dataclass(frozen=True, slots=True)
class ScanLayout:
    """A new scan: its header and its bad pixels (h, w); ``warning`` says what was not believed."""

    header: ScanHeader
    bad_pixels: NDArray[np.bool_] | None
    warning: str = ""


def lay_out(opening: OpenScan, settings: Settings, created_ns: int) -> ScanLayout:
    """Lay out the scan that ``opening`` asks for."""
    start = opening.start
    assert start.frame_shape_yx is not None and start.dtype is not None
    shape_yx = start.frame_shape_yx
    geometry = resolve_geometry(start.geometry, settings.geometry)
    size_px = settings.reconstruct.size_px
    part, warning = stored_part(start, geometry, settings)
    whole = part.window is None and part.bin_px == 1
    dtype = np.dtype(start.dtype).str
    header = ScanHeader(
        scan_id=opening.scan_id,
        source=settings.detector.endpoint,
        series=start.series,
        state=opening.state,
        created_ns=created_ns,
        expected_frames=start.expected_frames,
        frame_shape_yx=part.shape_yx,
        dtype=dtype if part.bin_px == 1 else binned_dtype(dtype),
        detector_shape_yx=None if whole else shape_yx,
        crop_corner_yx_px=part.corner_yx_px,
        bin_px=part.bin_px,
        detector_dtype=None if part.bin_px == 1 else dtype,
        geometry=geometry,
        size_px=size_px,
        views=(make_view(settings, geometry, part),),
        metadata={**settings.metadata, **start.metadata},
        joined_late=opening.joined_late,
        detector=settings.detector.stored_as,
    )
    pixel_yx_m, problem = (None, "") if header.detector else _pixel(header, size_px)
    header, warning = replace(header, pixel_yx_m=pixel_yx_m), problem or warning
    bad = start.pixel_mask
    if bad is not None and bad.shape != shape_yx:
        warning = f"the pixel mask is {bad.shape} and frames are {shape_yx}: not used"
        bad = None
    return ScanLayout(header, None if bad is None else part.any(bad), warning)


def start_of_header(header: ScanHeader) -> ScanStart:
    """The series header of a scan that is there already."""
    expected = header.expected_frames
    return ScanStart(
        source=header.source,
        series=header.series,
        expected_frames=expected if expected is not None and expected < MAX_EXPECTED else None,
        frame_shape_yx=header.detector_shape_yx or header.frame_shape_yx,
        dtype=header.detector_dtype or header.dtype,
        geometry=header.geometry,
        metadata=header.metadata,
    )


def resolve_geometry(stream: DetectorGeometry, settings: GeometrySettings) -> DetectorGeometry:
    """The stream's word, completed by the settings, or the other way round if they say so."""
    ours = {
        "photon_energy_eV": settings.photon_energy_eV,
        "detector_distance_m": settings.detector_distance_m,
        "detector_pixel_yx_m": settings.detector_pixel_yx_m,
    }
    return replace(
        stream,
        **{
            name: value
            for name, value in ours.items()
            if value is not None and (settings.override_stream or getattr(stream, name) is None)
        },
    )


def stored_part(
    start: ScanStart, geometry: DetectorGeometry, settings: Settings
) -> tuple[StoredPart, str]:
    """The part of a frame to store, about the beam centre and inside the frame; and a warning.

    A frame smaller than one bin is stored as it is.
    """
    shape_yx, detector = start.frame_shape_yx, settings.detector
    assert shape_yx is not None
    bin_px = detector.bin_px if detector.bin_px <= min(shape_yx) else 1
    margin = 2 * detector.crop_margin_px
    wanted = shape_yx
    if detector.crop_yx_px is not None:
        wanted = (detector.crop_yx_px[0] + margin, detector.crop_yx_px[1] + margin)
    center = geometry.beam_center_yx_px
    if center is None or not all(0 <= c < s for c, s in zip(center, shape_yx, strict=True)):
        center = (shape_yx[0] // 2, shape_yx[1] // 2)
    edges = [
        _edge(want, size, at, bin_px)
        for want, size, at in zip(wanted, shape_yx, center, strict=True)
    ]
    (top, height), (left, width) = edges
    warning = ""
    if bin_px < detector.bin_px:
        warning = f"frames of {shape_yx} are smaller than a bin of {detector.bin_px}: not binned"
    elif height * bin_px < min(wanted[0], shape_yx[0]) or width * bin_px < min(
        wanted[1], shape_yx[1]
    ):
        warning = (
            f"frames of {shape_yx} are no whole number of bins of {bin_px}: only "
            f"{height * bin_px} x {width * bin_px} pixels are stored; set detector.crop_yx_px to "
            "multiples of detector.bin_px that lie inside the frame"
        )
    return StoredPart(shape_yx, (top, left), (height, width), bin_px), warning


def _edge(wanted: int, size: int, center: float, bin_px: int) -> tuple[int, int]:
    """First detector pixel and number of stored pixels along an axis."""
    count = min(wanted, size) // bin_px
    first = round(center) - bin_px * (count // 2) - bin_px // 2
    return min(max(first, 0), size - count * bin_px), count


def make_view(
    settings: Settings,
    geometry: DetectorGeometry,
    part: StoredPart,
) -> View:
    """The first view of a scan.

    The header's beam centre is believed only if a window of ``size_px`` about it fits the frame:
    many detectors are never told theirs and send 0. Bad counts of binned frames were found before
    the bins were summed, whose marks are the dtype's own.
    """
    size_px = settings.reconstruct.size_px
    center = settings.view.center_yx_px
    beam = geometry.beam_center_yx_px
    if center is None and beam is not None and settings.view.dc == "center":
        n, corner = part.bin_px, part.corner_yx_px
        # Of a bin's n pixels the first has its centre (n - 1) / 2 before that of the bin.
        stored = tuple((b - c - (n - 1) / 2) / n for b, c in zip(beam, corner, strict=True))
        tops = [round(c) - size_px // 2 for c in stored]
        if all(t >= 0 and t + size_px <= s for t, s in zip(tops, part.shape_yx, strict=True)):
            center = (stored[0], stored[1])
    return View(
        size_px=size_px,
        center_yx_px=center,
        dc=settings.view.dc,
        orientation=settings.view.orientation,
        bad_value_from=settings.view.bad_value_from if part.bin_px == 1 else None,
    )


def _pixel(header: ScanHeader, size_px: int) -> tuple[tuple[float, float] | None, str]:
    geometry, pixel = header.geometry, header.stored_pixel_yx_m
    energy, distance = geometry.photon_energy_eV, geometry.detector_distance_m
    if energy is None or distance is None or pixel is None:
        return None, (
            "neither the stream nor the settings tell energy, distance and detector pixel: frames "
            "are recorded and not reconstructed; set them under [geometry]"
        )
    try:
        return object_pixel_yx_m(energy, distance, pixel, size_px), ""
    except GeometryError as error:
        return None, f"{error}; frames are recorded and not reconstructed"
