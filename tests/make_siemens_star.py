"""Convert the measured siemens-star scan to a scan file of ours, once a test session.

``siemens_star(path)`` is for tests; as a program:
``python tests/make_siemens_star.py FOLDER_WITH_THE_DATA scan.npz probe.npz``.
The scan comes without energy, distance and pixel size; those chosen here give an object pixel of
10 nm, and only their combination matters.
"""

from __future__ import annotations

import bz2
import io
import sys
from pathlib import Path

import numpy as np

from ptycho_stream.files.npz import ScanFile, save_arrays, save_scan
from ptycho_stream.geometry import wavelength_m

SOURCE = "siemens-star-small.npz.bz2"
REFERENCE = "siemens-star-reference.npz"
OBJECT_PIXEL_M = 10e-9
ENERGY_EV = 8800.0
DETECTOR_PIXEL_M = 75e-6


def siemens_star(data: Path, modes: int = 1) -> ScanFile:
    """The 516 frames with zero frequency in the middle, and the reference's first probe modes.

    The probe is scaled to the ortho convention (P_ortho = N P_reference).
    """
    with np.load(io.BytesIO(bz2.decompress((data / SOURCE).read_bytes()))) as held:
        frames = held["data"][0]
        corner_yx_px = held["scan"][0].astype(np.float64)
    with np.load(data / REFERENCE) as held:
        probe = held["probe"][0, :modes]
    size = frames.shape[-1]
    distance_m = OBJECT_PIXEL_M * size * DETECTOR_PIXEL_M / wavelength_m(ENERGY_EV)
    centre_yx_px = corner_yx_px + (size - 1) / 2
    return ScanFile(
        counts=np.fft.fftshift(np.rint(frames), axes=(-2, -1)).astype(np.uint16),
        positions_yx_m=centre_yx_px * OBJECT_PIXEL_M,
        frame_numbers=np.arange(len(frames), dtype=np.int64),
        detector_distance_m=distance_m,
        photon_energy_eV=ENERGY_EV,
        detector_pixel_yx_m=(DETECTOR_PIXEL_M, DETECTOR_PIXEL_M),
        probe=(probe * size).astype(np.complex64),
        pixel_yx_m=(OBJECT_PIXEL_M, OBJECT_PIXEL_M),
        metadata={"sample": "siemens star", "beamline": "APS Velociprobe"},
    )


def main() -> None:
    """Write the scan and its probe where the command line says."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    data, scan_path, probe_path = map(Path, sys.argv[1:])
    scan = siemens_star(data)
    save_scan(scan_path, scan)
    save_arrays(probe_path, {"probe": scan.probe})


if __name__ == "__main__":
    main()
