"""The frames of an image from the store, as its view shows them: corrected, turned, masked.

What exports write beside the image. Frames are read as they are asked for; no scan is held in
memory. Used by :mod:`ptycho_stream.files.products`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.result_values import whole_object
from ptycho_stream.files.store_input import newest_pairs
from ptycho_stream.results import Image
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.viewed_scan import ViewedScan


def frames_of_image(image: Image, reader: ScanReader) -> ScanFile:
    """Frames, probe and object of an image, in the order of its ``frame_numbers``.

    Args:
        image: the result.
        reader: of its scan, open as long as frames are read.

    Raises:
        FileFormatError: the image has no frame, or one that the scan has not.
        StoreError: the scan cannot be read.
    """
    if not image.frame_numbers.size:
        raise FileFormatError(f"scan {image.scan_id} has no frame in its image yet")
    scan, header = ViewedScan(reader), reader.header
    bad = ~scan.valid
    return ScanFile(
        counts=_ViewedCounts(scan, _slots(image, reader), bad),
        positions_yx_m=image.positions_yx_m,
        frame_numbers=image.frame_numbers,
        detector_distance_m=header.geometry.detector_distance_m,
        photon_energy_eV=header.geometry.photon_energy_eV,
        detector_pixel_yx_m=_shown_pixel(scan),
        probe=image.probe,
        object=whole_object(image),
        object_origin_yx_m=image.origin_yx_m,
        pixel_yx_m=image.pixel_yx_m,
        bad_pixels=bad if bad.any() else None,
        metadata=image.metadata,
    )


def _slots(image: Image, reader: ScanReader) -> NDArray[np.int64]:
    pairs = newest_pairs(reader.pairs())
    number = pairs["number"].astype(np.int64)
    order = np.argsort(number)
    at = np.searchsorted(number[order], image.frame_numbers)
    found = order[np.minimum(at, len(order) - 1)] if len(order) else order
    if not len(order) or not np.array_equal(number[found], image.frame_numbers):
        raise FileFormatError(
            f"the image of scan {image.scan_id} has frames that the scan in {reader.directory} has "
            "not: name the folder of its scan"
        )
    return pairs["slot"][found].astype(np.int64)


def _shown_pixel(scan: ViewedScan) -> tuple[float, float] | None:
    """Size of a detector pixel along the axes of the frames as they are shown."""
    pixel = scan.reader.header.stored_pixel_yx_m
    turned = scan.view.orientation in ("rotate90", "rotate270", "transpose", "antitranspose")
    return pixel if pixel is None or not turned else (pixel[1], pixel[0])


class _ViewedCounts:
    """Counts (M, N, N) that are read and corrected as they are indexed; 0 where a pixel is bad."""

    def __init__(
        self, scan: ViewedScan, slots: NDArray[np.int64], bad_pixels: NDArray[np.bool_]
    ) -> None:
        self._scan, self._slots, self._bad = scan, slots, bad_pixels
        stored = np.dtype(scan.reader.header.dtype)
        whole = stored.kind in "ui" and not scan.corrects
        self.dtype = np.dtype(f"u{min(stored.itemsize, 4)}" if whole else "f4")

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, N, N)."""
        return (len(self._slots), *self._bad.shape)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, key: Any, /) -> NDArray[Any]:
        """Frame (N, N) of an index, frames (n, N, N) of a slice or of indices (n,)."""
        slots = self._slots[key]
        counts = np.where(self._bad, 0, self._scan.counts(np.atleast_1d(slots)))
        if self.dtype.kind == "u":
            counts = np.clip(counts, 0, np.iinfo(self.dtype.str).max)
        counts = counts.astype(self.dtype)
        return counts[0] if np.ndim(slots) == 0 else counts

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All frames at once."""
        return np.asarray(self[:], dtype)
