"""Frames taken without beam, averaged into a background; and the last series of nothing but these.

The recorder adds up a scan's own dark frames as they come. A whole series of them is kept as
``dark.npz`` in the data directory, for the scans after it.
"""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import FileFormatError, StoreError
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import FRAME_FLAG_DARK
from ptycho_stream.scans.stored_part import bad_value

FILE_NAME: Final = "dark.npz"
SERIES_KEY: Final = "dark"
"""Metadata of a series: true (or the word, from the command line) says that all of its frames are
dark."""

_AT_ONCE = 64

log = logging.getLogger(__name__)


class DarkFrames:
    """The sum of some frames.

    Args:
        header: of their scan.
    """

    def __init__(self, header: ScanHeader) -> None:
        self._sum: NDArray[np.float64] = np.zeros(header.frame_shape_yx)
        self._limit = bad_value(header.dtype)
        self.count = 0
        self._used = 0

    def add(self, frames: NDArray[Any]) -> None:
        """Add frames (n, h, w), as stored; bad pixels count as 0."""
        limit = self._limit
        good = np.isfinite(frames) if limit is None else frames < limit
        self._sum += np.sum(frames, 0, dtype=np.float64, where=good)
        self.count += len(frames)

    @property
    def mean(self) -> NDArray[np.float64] | None:
        """Counts (h, w) a frame; None without a frame."""
        return self._sum / self.count if self.count else None

    def due(self, *, finally_: bool = False) -> bool:
        """Whether the mean should be used (anew): when there are twice as many, and at the end."""
        return self.count > self._used if finally_ else self.count >= max(2 * self._used, 1)

    def used(self) -> None:
        """The mean as it is now is in use."""
        self._used = self.count


def dark_frames_of(reader: ScanReader) -> DarkFrames:
    """The dark frames of a scan that are committed; damaged ones are left out.

    Raises:
        StoreError: they cannot be read.
    """
    darks = DarkFrames(reader.header)
    dark = np.flatnonzero(reader.records()["flags"] & FRAME_FLAG_DARK)
    dark = np.setdiff1d(dark, reader.verify(dark))
    for first in range(0, len(dark), _AT_ONCE):
        darks.add(reader.frames(dark[first : first + _AT_ONCE]))
    return darks


def is_dark_series(header: ScanHeader) -> bool:
    """Whether a series says of itself that it was taken without beam."""
    said = header.metadata.get(SERIES_KEY)
    return said is True or (isinstance(said, str) and said.lower() == "true")


def keep_dark_series(root: Path, header: ScanHeader, mean: NDArray[np.float64]) -> None:
    """Keep the mean of a dark series as the background of the scans after it.

    Raises:
        StoreError: it cannot be written.
    """
    arrays: dict[str, Any] = {"mean": mean, "scan_id": header.scan_id, **_layout(header)}
    try:
        with atomic_file(root / FILE_NAME) as file:
            np.savez(file, **arrays)
    except FileFormatError as error:
        raise StoreError(str(error)) from error


def last_dark_series(root: Path, header: ScanHeader) -> NDArray[np.float64] | None:
    """Mean (h, w) of the last dark series, if it was stored as the scan of ``header`` is.

    What cannot be used is logged: the scan goes on without.
    """
    path = root / FILE_NAME
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            arrays: dict[str, NDArray[Any]] = {name: held[name] for name in held.files}
        mean = arrays["mean"]
        told = {name: arrays[name] for name in _layout(header)}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.error("the last dark series, %s, cannot be read and is not used: %s", path, error)
        return None
    other = [
        name for name, value in _layout(header).items() if not np.array_equal(told[name], value)
    ]
    if other or mean.shape != header.frame_shape_yx:
        log.warning(
            "scan %s: the last dark series, %s, has another %s and is not used: record a new one",
            header.scan_id,
            arrays.get("scan_id", ""),
            ", ".join(other) or "shape",
        )
        return None
    return mean.astype(np.float64)


def _layout(header: ScanHeader) -> dict[str, Any]:
    """What two scans must have in common for one's background to be the other's."""
    return {
        "frame_shape_yx": header.frame_shape_yx,
        "detector_shape_yx": header.detector_shape_yx or header.frame_shape_yx,
        "crop_corner_yx_px": header.crop_corner_yx_px,
        "bin_px": header.bin_px,
        "count_time_s": header.geometry.count_time_s or 0.0,
    }
