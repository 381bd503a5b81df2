"""How a scan is laid out in the store: crop, geometry, pixel size, view and mask, decided once.

Pure: from a detector's header and the settings to a scan header.  Ingest calls it for every new
scan; what is None in one source is taken from the other.
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
from ptycho_stream.settings import GeometrySettings, Settings

MAX_EXPECTED = 2**40
"""A stored header that announces more frames is not believed."""


@dataclass(frozen=True, slots=True)
class ScanLayout:
    """A new scan: its header, the stored part of a detector frame, its bad pixels (h, w).

    ``crop`` is None where whole frames are stored; ``warning`` says what was not believed.
    """

    header: ScanHeader
    crop: tuple[slice, slice] | None
    bad_pixels: NDArray[np.bool_] | None
    warning: str = ""


def lay_out(opening: OpenScan, settings: Settings, created_ns: int) -> ScanLayout:
    """Lay out the scan that ``opening`` asks for."""
    start = opening.start
    assert start.frame_shape_yx is not None and start.dtype is not None
    shape_yx = start.frame_shape_yx
    geometry = resolve_geometry(start.geometry, settings.geometry)
    size_px = settings.reconstruct.size_px
    crop = crop_of(start, geometry, settings)
    corner_yx = (crop[0].start, crop[1].start) if crop else (0, 0)
    stored_yx = (crop[0].stop - crop[0].start, crop[1].stop - crop[1].start) if crop else shape_yx
    pixel_yx_m, warning = _pixel(geometry, size_px)
    header = ScanHeader(
        scan_id=opening.scan_id,
        source=settings.detector.endpoint,
        series=start.series,
        state=opening.state,
        created_ns=created_ns,
        expected_frames=start.expected_frames,
        frame_shape_yx=stored_yx,
        dtype=np.dtype(start.dtype).str,
        detector_shape_yx=shape_yx if crop else None,
        crop_corner_yx_px=corner_yx,
        geometry=geometry,
        size_px=size_px,
        pixel_yx_m=pixel_yx_m,
        views=(make_view(settings, geometry, stored_yx, corner_yx),),
        metadata={**settings.metadata, **start.metadata},
        joined_late=opening.joined_late,
    )
    bad = start.pixel_mask
    if bad is not None and bad.shape != shape_yx:
        warning = f"the pixel mask is {bad.shape} and frames are {shape_yx}: not used"
        bad = None
    return ScanLayout(header, crop, bad[crop] if bad is not None and crop else bad, warning)


def crop_of_header(header: ScanHeader) -> tuple[slice, slice] | None:
    """The stored part of a detector frame, of a scan that is there already."""
    if header.detector_shape_yx is None:
        return None
    (y, x), (h, w) = header.crop_corner_yx_px, header.frame_shape_yx
    return slice(y, y + h), slice(x, x + w)


def start_of_header(header: ScanHeader) -> ScanStart:
    """The series header of a scan that is there already."""
    expected = header.expected_frames
    return ScanStart(
        source=header.source,
        series=header.series,
        expected_frames=expected if expected is not None and expected < MAX_EXPECTED else None,
        frame_shape_yx=header.detector_shape_yx or header.frame_shape_yx,
        dtype=header.dtype,
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


def crop_of(
    start: ScanStart, geometry: DetectorGeometry, settings: Settings
) -> tuple[slice, slice] | None:
    """The part of a frame to store, about the beam centre and inside the frame; None: all."""
    wanted, shape_yx = settings.detector.crop_yx_px, start.frame_shape_yx
    assert shape_yx is not None
    if wanted is None or all(w >= s for w, s in zip(wanted, shape_yx, strict=True)):
        return None
    center = geometry.beam_center_yx_px
    if center is None or not all(0 <= c < s for c, s in zip(center, shape_yx, strict=True)):
        center = (shape_yx[0] // 2, shape_yx[1] // 2)
    edges: list[slice] = []
    for want, size, at in zip(wanted, shape_yx, center, strict=True):
        length = min(want, size)
        first = min(max(round(at) - length // 2, 0), size - length)
        edges.append(slice(first, first + length))
    return edges[0], edges[1]


def make_view(
    settings: Settings,
    geometry: DetectorGeometry,
    stored_yx: tuple[int, int],
    corner_yx: tuple[int, int],
) -> View:
    """The first view of a scan.

    The header's beam centre is believed only if a window of ``size_px`` about it fits the frame:
    many detectors are never told theirs and send 0.
    """
    size_px = settings.reconstruct.size_px
    center = settings.view.center_yx_px
    beam = geometry.beam_center_yx_px
    if center is None and beam is not None and settings.view.dc == "center":
        stored = (beam[0] - corner_yx[0], beam[1] - corner_yx[1])
        tops = [round(c) - size_px // 2 for c in stored]
        if all(t >= 0 and t + size_px <= s for t, s in zip(tops, stored_yx, strict=True)):
            center = stored
    return View(
        size_px=size_px,
        center_yx_px=center,
        dc=settings.view.dc,
        orientation=settings.view.orientation,
        bad_value_from=settings.view.bad_value_from,
    )


def _pixel(geometry: DetectorGeometry, size_px: int) -> tuple[tuple[float, float] | None, str]:
    energy, distance = geometry.photon_energy_eV, geometry.detector_distance_m
    pixel = geometry.detector_pixel_yx_m
    if energy is None or distance is None or pixel is None:
        return None, (
            "neither the stream nor the settings tell energy, distance and detector pixel: frames "
            "are recorded and not reconstructed; set them under [geometry]"
        )
    try:
        return object_pixel_yx_m(energy, distance, pixel, size_px), ""
    except GeometryError as error:
        return None, f"{error}; frames are recorded and not reconstructed"
