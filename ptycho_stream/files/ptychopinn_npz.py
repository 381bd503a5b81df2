"""A scan as PtychoPINN's data file, so that its trainer reads what ours simulated or converted.

Written by ``ptycho-stream simulate --format ptychopinn``. Its keys, of M frames of N x N pixels:

==================================  =============================================================
``diff3d``                          float32 (M, N, N), amplitude with zero frequency at the middle,
                                    scaled so that its largest value is 1; 0 where a pixel is bad
``xcoords``, ``ycoords``            float64 (M,), object pixels: the patch of a frame is columns
                                    x - N/2 to x + N/2 of ``objectGuess``, rows y - N/2 to y + N/2
``xcoords_start, ycoords_start``    the same
``scan_index``                      int64 (M,), the frames' numbers
``probeGuess``                      complex64 (N, N), the strongest mode, in units of ``diff3d``:
                                    |fftshift FFT_ortho(P O)| is the amplitude
``objectGuess``                     complex64 (H, W), where the truth is known
``_metadata``                       JSON text: ``nphotons`` and ``dose_photons`` (mean over frames
                                    of the photons counted in good pixels),
                                    ``measurement_domain`` "amplitude", ``amplitude_scale`` (diff3d
                                    = amplitude_scale * sqrt(counts)), and the scan's own metadata
==================================  =============================================================

PtychoPINN wants amplitudes below 10 and takes the photons from its configuration: give it
``nphotons`` from ``_metadata``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.npz import ScanFile, save_arrays


def save_ptychopinn(path: Path, scan: ScanFile) -> None:
    """Write ``scan`` to ``path``; a reader sees the old file or the whole new one.

    Raises:
        FileFormatError: the scan lacks the probe or the pixel size, its frames are not square or
            hold no photon, or the file cannot be written.
    """
    rows, columns = scan.frame_shape_yx
    if scan.probe is None or scan.pixel_yx_m is None:
        missing = "probe" if scan.probe is None else "pixel_yx_m"
        raise FileFormatError(f"{path}: PtychoPINN's format needs {missing}, the scan has none")
    if rows != columns:
        raise FileFormatError(f"{path}: PtychoPINN's frames are square, these are {rows}x{columns}")
    counts = scan.counts if scan.bad_pixels is None else np.where(scan.bad_pixels, 0, scan.counts)
    amplitude = np.sqrt(counts, dtype=np.float32)
    brightest = float(amplitude.max())
    if not brightest:
        raise FileFormatError(f"{path}: no frame holds a photon, nothing to write")
    amplitude /= np.float32(brightest)
    dose = float(counts.sum(dtype=np.float64)) / len(counts)
    # Their coordinates count from the edge of the first pixel, ours from its centre.
    origin_yx_m = scan.object_origin_yx_m or tuple(scan.positions_yx_m.min(0))
    y, x = ((scan.positions_yx_m - origin_yx_m) / scan.pixel_yx_m + 0.5).T
    metadata = {
        **scan.metadata,
        "nphotons": dose,
        "dose_photons": dose,
        "measurement_domain": "amplitude",
        "amplitude_scale": 1 / brightest,
        "probe_modes": len(scan.probe),
        "pixel_yx_m": scan.pixel_yx_m,
        "software": "ptycho-stream",
    }
    strongest = int(np.square(np.abs(scan.probe)).sum((-2, -1)).argmax())
    arrays = {
        "diff3d": amplitude,
        "xcoords": x,
        "ycoords": y,
        "xcoords_start": x,
        "ycoords_start": y,
        "scan_index": scan.frame_numbers,
        "probeGuess": (scan.probe[strongest] / np.float32(brightest)).astype(np.complex64),
        "_metadata": np.array(json.dumps(metadata)),
    }
    if scan.object is not None:
        arrays["objectGuess"] = scan.object
    save_arrays(path, arrays)
