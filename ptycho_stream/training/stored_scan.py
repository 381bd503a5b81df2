"""Puts a scan file into a scan store, so that a network can be trained on it without a daemon.

Used by ``benchmarks/`` and by tests; ``ptycho-stream replay`` is the way through the detector's
protocol.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.geometry import View, object_pixel_yx_m
from ptycho_stream.scans import PAIR_RECORD, ScanHeader, ScanWriter, new_scan_id

_FRAMES_PER_FILE = 256


def store_scan(root: Path, scan: ScanFile, size_px: int | None = None) -> str:
    """Write all frames of ``scan``, in their order, as a complete scan of the store ``root``.

    Args:
        root: the data directory.
        scan: frames, positions and geometry.
        size_px: N of a patch; None: the frames' height.

    Returns:
        Id of the new scan.

    Raises:
        FileFormatError: the scan tells no pixel size, nor what it follows from.
        StoreError: the store cannot be written.
    """
    size = size_px or scan.frame_shape_yx[0]
    now_ns = time.time_ns()
    header = ScanHeader(
        scan_id=new_scan_id(),
        source="file",
        series="1",
        state="running",
        created_ns=now_ns,
        frame_shape_yx=scan.frame_shape_yx,
        dtype=scan.counts.dtype.str,
        size_px=size,
        pixel_yx_m=_pixel_yx_m(scan, size),
        views=(View(size),),
        metadata=scan.metadata,
    )
    with ScanWriter.create(root, header, _FRAMES_PER_FILE, scan.bad_pixels) as writer:
        pairs = np.zeros(len(scan), PAIR_RECORD)
        for row, number in enumerate(scan.frame_numbers.tolist()):
            slot = writer.append(number, scan.counts[row], now_ns, time.monotonic_ns())
            pairs["number"][row], pairs["slot"][row] = number, slot
        pairs["y_m"], pairs["x_m"] = scan.positions_yx_m.T
        writer.append_pairs(pairs)
        writer.seal("complete", {"frames": len(scan)})
    return header.scan_id


def _pixel_yx_m(scan: ScanFile, size_px: int) -> tuple[float, float]:
    if scan.pixel_yx_m is not None:
        return scan.pixel_yx_m
    energy, distance = scan.photon_energy_eV, scan.detector_distance_m
    if energy is None or distance is None or scan.detector_pixel_yx_m is None:
        raise FileFormatError(
            "the scan tells neither pixel_yx_m nor energy, distance and detector pixel: add one"
        )
    return object_pixel_yx_m(energy, distance, scan.detector_pixel_yx_m, size_px)
