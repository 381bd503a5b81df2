"""Puts a measured scan into a scan store, without a daemon and without any socket.

For networks that are trained on it (``benchmarks/``, tests), and for ``ptycho-stream reconstruct``;
``ptycho-stream replay`` is the way through the detector's protocol.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.view_files import view_of_settings
from ptycho_stream.geometry import View
from ptycho_stream.messages import DetectorGeometry, ScanStart
from ptycho_stream.scans import PAIR_RECORD, ScanHeader, ScanWriter, new_scan_id
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.scan_events import OpenScan
from ptycho_stream.scans.scan_layout import lay_out
from ptycho_stream.scans.stored_part import Binning, StoredPart
from ptycho_stream.settings import Settings

_FRAMES_PER_FILE = 256
_SOURCE, _SERIES = "file", "1"
_AT_ONCE = 64

Progress = Callable[[int, int], None]
"""Called with the frames stored so far and all of them."""


def store_scan(root: Path, scan: ScanFile, size_px: int | None = None) -> str:
    """Write all frames of ``scan``, in their order, as a complete scan of the store ``root``.

    Args:
        root: the data directory.
        scan: frames, positions and geometry.
        size_px: N of a patch; None: the frames' height.

    Returns:
        Id of the new scan.

    Raises:
        GeometryError: the scan tells no pixel size, nor what it follows from.
        StoreError: the store cannot be written.
    """
    size = size_px or scan.frame_shape_yx[0]
    header = ScanHeader(
        scan_id=new_scan_id(),
        source=_SOURCE,
        series=_SERIES,
        state="running",
        created_ns=time.time_ns(),
        frame_shape_yx=scan.frame_shape_yx,
        dtype=scan.counts.dtype.str,
        size_px=size,
        pixel_yx_m=scan.pixel_for(size),
        geometry=_geometry(scan),
        views=(View(size),),
        metadata=scan.metadata,
    )
    with ScanWriter.create(root, header, _FRAMES_PER_FILE, scan.bad_pixels) as writer:
        _write_frames(writer, scan, lambda frame, buffer: np.copyto(buffer, frame))
        writer.seal("complete", {"frames": len(scan)})
    return header.scan_id


def store_as_settings_say(
    root: Path, scan: ScanFile, settings: Settings, progress: Progress | None = None
) -> str:
    """Write a scan as the daemon of these settings would have recorded it: crop, bins, view, mask.

    Args:
        root: the data directory.
        scan: frames, positions and geometry.
        settings: of the daemon.
        progress: told of the frames that are stored.

    Returns:
        Id of the new scan.

    Raises:
        FileFormatError: neither the scan nor the settings tell the size of an object pixel.
        StoreError: the store cannot be written.
    """
    start = ScanStart(
        source=_SOURCE,
        series=_SERIES,
        expected_frames=len(scan),
        frame_shape_yx=scan.frame_shape_yx,
        dtype=scan.counts.dtype.str,
        geometry=_geometry(scan),
        metadata=scan.metadata,
        pixel_mask=scan.bad_pixels,
    )
    opening = OpenScan(new_scan_id(), start, "running", joined_late=False)
    layout = lay_out(opening, settings, time.time_ns())
    pixel_yx_m = _told_pixel(scan, layout.header, settings) or layout.header.pixel_yx_m
    if pixel_yx_m is None:
        raise FileFormatError(
            "neither the file nor the settings tell energy, distance and detector pixel: give "
            "photon_energy_eV, detector_distance_m and detector_pixel_yx_m, or pixel_yx_m"
        )
    header = replace(layout.header, source=_SOURCE, pixel_yx_m=pixel_yx_m)
    directory = scan_directory(root, header.scan_id)
    part = StoredPart.of(header)
    with ScanWriter.create(root, header, _FRAMES_PER_FILE, layout.bad_pixels) as writer:
        view = view_of_settings(header.view, settings.view, header, directory)
        if view != header.view:
            writer.update_header(views=(view,))
        limit = settings.view.bad_value_from
        _write_frames(writer, scan, _storing(part, scan, limit, layout.bad_pixels), progress)
        writer.seal("complete", {"frames": len(scan)})
    return header.scan_id


Store = Callable[[NDArray[Any], NDArray[Any]], None]
"""Puts what is stored of a detector frame (H, W) into a buffer (h, w)."""


def _storing(
    part: StoredPart,
    scan: ScanFile,
    bad_value_from: int | None,
    bad_pixels: NDArray[np.bool_] | None,
) -> Store:
    window = part.window or (slice(None), slice(None))
    if part.bin_px == 1:
        return lambda frame, buffer: np.copyto(buffer, frame[window])
    binning = Binning(part, scan.counts.dtype.str, bad_value_from, bad_pixels)
    return lambda frame, buffer: binning.into(frame[window], buffer)


def _write_frames(
    writer: ScanWriter, scan: ScanFile, store: Store, progress: Progress | None = None
) -> None:
    """Append all frames of ``scan`` and their pairs."""
    pairs = np.zeros(len(scan), PAIR_RECORD)
    pairs["number"] = scan.frame_numbers
    pairs["y_m"], pairs["x_m"] = scan.positions_yx_m.T
    now_ns = time.time_ns()
    for first in range(0, len(scan), _AT_ONCE):
        block = scan.counts[first : first + _AT_ONCE]
        for row, frame in enumerate(block, first):
            store(frame, writer.next_buffer())
            number = int(scan.frame_numbers[row])
            pairs["slot"][row] = writer.append_buffered(number, now_ns, time.monotonic_ns())
        if progress is not None:
            progress(first + len(block), len(scan))
    writer.append_pairs(pairs)


def _geometry(scan: ScanFile) -> DetectorGeometry:
    h, w = scan.frame_shape_yx
    return DetectorGeometry(
        detector_distance_m=scan.detector_distance_m,
        photon_energy_eV=scan.photon_energy_eV,
        detector_pixel_yx_m=scan.detector_pixel_yx_m,
        beam_center_yx_px=(h // 2, w // 2),
    )


def _told_pixel(
    scan: ScanFile, header: ScanHeader, settings: Settings
) -> tuple[float, float] | None:
    """The object pixel that the file tells for its own window, for the window of the scan."""
    if scan.pixel_yx_m is None or settings.geometry.override_stream:
        return None
    window = min(scan.frame_shape_yx) if scan.probe is None else scan.probe.shape[-1]
    factor = window / (header.size_px * header.bin_px)
    return scan.pixel_yx_m[0] * factor, scan.pixel_yx_m[1] * factor
