"""A scan of our own store as a scan file: its frames as the present view shows them, uncorrected.

What a view leaves out (gated and dark frames, listed ones) is left out here too. Used by
:mod:`ptycho_stream.files.measured`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.assemble import Found, assembled
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.npz_members import read_npz
from ptycho_stream.geometry import View
from ptycho_stream.scans.header import HEADER_NAME
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import positions_of
from ptycho_stream.scans.viewed_scan import ViewedScan

_PROBE = "probe.npz"


def is_stored_scan(path: Path) -> bool:
    """Whether a folder is that of a scan."""
    return (path / HEADER_NAME).is_file()


class _StoredFrames:
    """Frames of a scan, turned and cut out as a view says."""

    def __init__(self, reader: ScanReader, view: View) -> None:
        self._reader, self._view = reader, view
        self.shape = (reader.committed, view.size_px, view.size_px)
        self.dtype: np.dtype[Any] = np.dtype(reader.header.dtype)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Frames (n, N, N) of slots (n,)."""
        return np.asarray(self._view.apply(self._reader.frames(rows)))


def load_stored(directory: Path, choice: MeasuredChoice, eager_bytes: int) -> ScanFile:
    """The scan in a folder of the store.

    Raises:
        FileFormatError: none of its frames has a position.
        StoreError: it cannot be read.
    """
    reader = ScanReader(directory)
    header, scan = reader.header, ViewedScan(reader)
    pairs = newest_pairs(reader.pairs())
    pairs = pairs[scan.usable(pairs)]
    if not len(pairs):
        raise FileFormatError(
            f"scan {header.scan_id} has no frame with a position that may be in an image"
        )
    pairs = pairs[np.argsort(pairs["number"])]
    geometry = header.geometry
    probe = directory / _PROBE
    found = Found(
        f"scan {header.scan_id}",
        _StoredFrames(reader, header.view),
        positions_of(pairs),
        rows=pairs["slot"].astype(np.int64),
        numbers=pairs["number"].astype(np.int64),
        detector_distance_m=geometry.detector_distance_m,
        photon_energy_eV=geometry.photon_energy_eV,
        detector_pixel_yx_m=header.stored_pixel_yx_m,
        pixel_yx_m=header.pixel_yx_m,
        probe=read_npz(probe).get("probe") if probe.is_file() else None,
        bad_pixels=~scan.valid,
        metadata=header.metadata,
    )
    return assembled(found, choice, eager_bytes)


def newest_pairs(pairs: NDArray[Any]) -> NDArray[Any]:
    """The last record of each slot among ``pairs``, which are in the log's order."""
    _, last = np.unique(pairs["slot"][::-1], return_index=True)
    return pairs[len(pairs) - 1 - last]
