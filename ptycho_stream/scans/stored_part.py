"""Which part of a detector's frames a scan stores: a window of it, and so many pixels in one.

Used by ingest for every frame that is binned, and by everything that has to bring a map of the
detector (mask, flat field, background) to the stored pixels, or a stored pixel's name back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import GeometryError
from ptycho_stream.scans.header import ScanHeader

Window = tuple[slice, slice]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """The stored part of a detector frame.

    Attributes:
        detector_shape_yx: of a whole frame.
        corner_yx_px: detector pixel of a stored frame's [0, 0].
        shape_yx: of a stored frame.
        bin_px: so many detector pixels a side are one stored pixel.
    """

    detector_shape_yx: tuple[int, int]
    corner_yx_px: tuple[int, int]
    shape_yx: tuple[int, int]
    bin_px: int

    @classmethod
    def of(cls, header: ScanHeader) -> StoredPart:
        """The part that a scan stores."""
        shape = header.frame_shape_yx
        whole = header.detector_shape_yx or shape
        return cls(whole, header.crop_corner_yx_px, shape, header.bin_px)

    @property
    def window(self) -> Window | None:
        """Rows and columns of the detector; None: all."""
        lengths = [self.bin_px * size for size in self.shape_yx]
        if tuple(lengths) == self.detector_shape_yx:
            return None
        y, x = self.corner_yx_px
        return slice(y, y + lengths[0]), slice(x, x + lengths[1])

    def any(self, marks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Stored pixels (h, w) of which a detector pixel is marked.

        Args:
            marks: bool, of the detector's shape or already of the stored one.

        Raises:
            GeometryError: it has another shape.
        """
        return np.any(self._stored(marks), axis=(1, 3)) if self._is_whole(marks) else marks

    def sum(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sums over the detector pixels of each stored one, float64 (h, w); arguments as above."""
        if not self._is_whole(values):
            return values.astype(np.float64)
        return self._stored(values).sum((1, 3), dtype=np.float64)

    def mean(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Means over the detector pixels of each stored one, float64 (h, w); likewise."""
        whole = self._is_whole(values)
        return self.sum(values) / (self.bin_px**2 if whole else 1)

    def detector_pixels(self, pixels_yx: NDArray[np.int64]) -> NDArray[np.int64]:
        """Detector pixels (n, 2), of each stored one (n, 2) that nearest to its [0, 0]."""
        return pixels_yx * self.bin_px + np.asarray(self.corner_yx_px)

    def _is_whole(self, values: NDArray[Any]) -> bool:
        if values.shape == self.detector_shape_yx:
            return True
        if values.shape == self.shape_yx:
            return False
        raise GeometryError(
            f"it has shape {values.shape}; the detector has {self.detector_shape_yx} and stored "
            f"frames are {self.shape_yx}: make it of one of these"
        )

    def _stored(self, values: NDArray[Any]) -> NDArray[Any]:
        """Of a map of the detector, each stored pixel's own pixels: (h, bin, w, bin)."""
        (h, w), n, window = self.shape_yx, self.bin_px, self.window
        inside = values if window is None else values[window]
        return inside.reshape(h, n, w, n)


class Binning:
    """Sums detector pixels into stored ones, exactly; of bad ones nothing is summed.

    Args:
        part: what is stored, with bins above 1.
        dtype: of the detector's counts.
        bad_value_from: counts from this one on mark a bad pixel; None: as :func:`bad_value`.
        bad_pixels: bool (h, w) of the stored frame, that hold a pixel known to be bad; None: none.
    """

    def __init__(
        self,
        part: StoredPart,
        dtype: str,
        bad_value_from: int | None,
        bad_pixels: NDArray[np.bool_] | None,
    ) -> None:
        self._bin_px = part.bin_px
        (h, w), n = part.shape_yx, part.bin_px
        self._shape = (h, n, w, n)
        self._limit = bad_value(dtype) if bad_value_from is None else bad_value_from
        self._known_bad = bad_pixels
        self._mark = mark_of(np.dtype(binned_dtype(dtype)))

    def into(self, window: NDArray[Any], out: NDArray[Any]) -> None:
        """Sum the stored part of a detector frame into ``out`` (h, w) of :func:`binned_dtype`.

        A stored pixel of which any detector pixel is bad becomes the largest value of its dtype
        (NaN where that is a float).
        """
        n = self._bin_px
        np.copyto(out, window[::n, ::n])
        for row in range(n):
            for column in range(n):
                if row or column:
                    np.add(out, window[row::n, column::n], out=out, casting="same_kind")
        if self._limit is not None:
            bad = window >= self._limit
            if bad.any():
                out[bad.reshape(self._shape).any((1, 3))] = self._mark
        if self._known_bad is not None:
            out[self._known_bad] = self._mark


def binned_dtype(dtype: str) -> str:
    """What holds the sum of up to 256 counts, and has room for a mark of bad ones.

    The next larger integer; float64 for what is 8 bytes long or a float.
    """
    kind = np.dtype(dtype)
    if kind.kind in "ui" and kind.itemsize < 8:
        return f"<{kind.kind}{2 * kind.itemsize}"
    return "<f8"


def bad_value(dtype: str) -> int | None:
    """Counts from this one on are no counts; None: any may be.

    The two largest of an unsigned integer, as DECTRIS marks gaps and dead pixels.
    """
    kind = np.dtype(dtype)
    return int(np.iinfo(kind).max) - 1 if kind.kind == "u" else None


def mark_of(dtype: np.dtype[Any]) -> Any:
    """What a bad stored pixel holds."""
    return np.iinfo(dtype).max if dtype.kind in "ui" else np.nan
