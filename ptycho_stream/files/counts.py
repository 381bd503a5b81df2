"""The frames of other people's files as unsigned counts, read when they are asked for.

:class:`Conversion` owns the step from whatever numbers a file holds (signed, floating, amplitudes)
to the counts of a :class:`~ptycho_stream.files.npz.ScanFile`; :class:`LazyCounts` is such an array
over frames that stay in their file. Used by all readers of this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.measured_choice import Domain, Negative

Counts = NDArray[np.unsignedinteger[Any]]

_MOST = 2**32 - 1
# Counts that went through float32, or a square root and back, are whole to this share of theirs.
_WHOLE_ABSOLUTE, _WHOLE_RELATIVE = 1e-2, 1e-6


class CountsArray(Protocol):
    """What ``ScanFile.counts`` can do: an array (M, h, w), or one that reads as it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, h, w)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Unsigned, native byte order."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any:
        """Frame (h, w) of an index, frames (n, h, w) of a slice or of indices (n,)."""
        ...

    def __array__(self) -> NDArray[Any]:
        """All frames at once."""
        ...


class FrameSource(Protocol):
    """Frames as a file holds them."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, h, w)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the file."""
        ...

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Frames (n, h, w).

        Raises:
            FileFormatError: the file cannot be read there.
        """
        ...


class HeldFrames:
    """Frames that are in memory as their file has them."""

    def __init__(self, frames: NDArray[Any]) -> None:
        self._frames = frames

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, h, w)."""
        return cast("tuple[int, int, int]", self._frames.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the file."""
        return self._frames.dtype

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Frames (n, h, w)."""
        return self._frames[rows]


@dataclass(frozen=True)
class Conversion:
    """How the numbers of a file become counts.

    Attributes:
        where: file and dataset, for errors.
        domain: what the numbers are.
        counts_per_unit: counts = value, or its square, times this, rounded; None: 1, and what is
            no whole number is refused.
        negative: what becomes of values below 0.
        bad_pixels: bool (h, w); whatever stands there becomes 0. None: none.
    """

    where: str
    domain: Domain = "counts"
    counts_per_unit: float | None = None
    negative: Negative = "refuse"
    bad_pixels: NDArray[np.bool_] | None = None

    def dtype(self, of: np.dtype[Any]) -> np.dtype[Any]:
        """Of the counts made from numbers of dtype ``of``."""
        plain = self.domain == "counts" and self.counts_per_unit is None
        size = of.itemsize if plain and of.kind in "ui" else 4
        return np.dtype(f"u{min(size, 4)}")

    def counts(self, values: NDArray[Any], first: int = 0) -> Counts:
        """Counts (n, h, w) from the numbers that the file holds of frames ``first`` on.

        Raises:
            FileFormatError: they cannot be counts; the text says what to say of the file.
        """
        good = values if self.bad_pixels is None else np.where(self.bad_pixels, 0, values)
        plain = self.domain == "counts" and self.counts_per_unit is None
        if plain and good.dtype.kind == "u" and good.dtype.itemsize <= 4:
            return np.ascontiguousarray(good, self.dtype(values.dtype))
        whole = good if plain and good.dtype.kind in "ui" else self._whole(good, first)
        low, high = (whole.min(), whole.max()) if whole.size else (0, 0)
        if low < 0:
            if self.negative == "refuse":
                raise FileFormatError(
                    f"{self.where} holds {low} in frames {first} to {first + len(whole) - 1}: "
                    "counts are not negative. If a background was subtracted, negative = 'zero' "
                    "takes them for 0; better, give the frames as measured"
                )
            whole = np.maximum(whole, 0)
        if high > _MOST:
            # What marks a bad pixel in 64 bits (DECTRIS) does so in 32 bits too.
            if values.dtype.kind != "u" or high < np.iinfo(values.dtype).max - 1:
                raise FileFormatError(f"{self.where} holds {high}: counts are below 2**32")
            whole = np.minimum(whole, _MOST)
        return np.ascontiguousarray(whole, self.dtype(values.dtype))

    def _whole(self, values: NDArray[Any], first: int) -> NDArray[np.float64]:
        """Values as whole numbers of counts."""
        scaled = values.astype(np.float64)
        if not np.isfinite(scaled).all():
            raise FileFormatError(
                f"{self.where} holds NaN or infinity in frames {first} to "
                f"{first + len(values) - 1}: mark such pixels in the mask"
            )
        if self.domain == "amplitude":
            if scaled.min(initial=0) < 0:
                raise FileFormatError(f"{self.where} holds negative numbers: no amplitudes")
            scaled *= scaled
        if self.counts_per_unit is not None:
            return np.rint(scaled * self.counts_per_unit)
        rounded = np.rint(scaled)
        tolerance = _WHOLE_ABSOLUTE + _WHOLE_RELATIVE * np.abs(rounded)
        if (np.abs(scaled - rounded) > tolerance).any():
            raise FileFormatError(self._not_whole(first))
        return rounded

    def _not_whole(self, first: int) -> str:
        squared = "squares of " if self.domain == "amplitude" else ""
        advice = (
            "give photons, the mean counts of a frame, or counts_per_unit"
            if self.domain == "amplitude"
            else "if these are amplitudes say domain = 'amplitude'; if they are in units of the "
            "detector's own give counts_per_unit"
        )
        return f"{squared}{self.where} hold fractions from frame {first} on: {advice}"


class LazyCounts:
    """Counts (M, h, w) of frames that stay in their file."""

    def __init__(
        self, source: FrameSource, rows: NDArray[np.int64], conversion: Conversion
    ) -> None:
        self._source, self._rows, self._conversion = source, rows, conversion

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, h, w)."""
        return (len(self._rows), *self._source.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Unsigned."""
        return self._conversion.dtype(self._source.dtype)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Any, /) -> Any:
        """Frame (h, w) of an index, frames (n, h, w) of a slice or of indices (n,).

        Raises:
            FileFormatError: the file cannot be read there, or holds what cannot be counts.
        """
        rows = self._rows[key]
        wanted = np.atleast_1d(rows)
        first = int(wanted[0]) if wanted.size else 0
        counts = self._conversion.counts(self._source.read(wanted), first)
        return counts[0] if np.ndim(rows) == 0 else counts

    def __iter__(self) -> Iterator[Counts]:
        for index in range(len(self)):
            yield self[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All frames at once, for numpy's functions."""
        return np.asarray(self[:], dtype)


def sample_rows(rows: NDArray[np.int64], most: int = 16) -> NDArray[np.int64]:
    """Up to ``most`` of ``rows``, spread evenly from the first to the last."""
    picked = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64)
    return rows[np.unique(picked)]


def marked_bad(sample: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels (h, w) that hold the mark of a bad one in all frames of ``sample`` (n, h, w).

    Marks are the two largest values of an unsigned dtype (DECTRIS), a negative number that is
    always the same (what becomes of these in signed files), NaN and infinity.
    """
    if sample.dtype.kind == "u":
        return np.asarray((sample >= np.iinfo(sample.dtype).max - 1).all(0))
    constant = np.asarray(((sample < 0) & (sample == sample[:1])).all(0))
    if sample.dtype.kind == "f":
        return constant | ~np.isfinite(sample).any(0)
    return constant
