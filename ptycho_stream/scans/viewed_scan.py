"""The frames of a scan as a view shows them: the one place where a view is applied to pixels.

Predicting, refining, judging and training all read through this, so that they see the same pixels.
Corrected counts are (counts - background) / flat field, times the scan's usual beam monitor reading
over the frame's own, and never below 0 (docs/corrections.md, decision 12). A scan that needs no
correction is shown as it is stored, in its own dtype and without a copy where that is possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.geometry import View
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.view_data import view_data

Slots = slice | Sequence[int] | NDArray[np.integer[Any]]


class ViewedScan:
    """A scan through one view.  Files of the view are read when they are first needed.

    Args:
        reader: of the scan; belongs to this one's thread.
        view: of it; None: the one in use as of the reader's last refresh.
    """

    def __init__(self, reader: ScanReader, view: View | None = None) -> None:
        self.reader = reader
        self.view = reader.header.view if view is None else view
        self._i0: NDArray[np.float64] = np.zeros(0)
        self._pairs_seen = 0
        self._records_seen = 0
        self._open_slots: list[int] = []

    @property
    def is_current(self) -> bool:
        """Whether this is still the view that the scan's header names."""
        return self.view == self.reader.header.view

    @property
    def corrects(self) -> bool:
        """Whether counts are changed: by a background, a flat field or the beam monitor."""
        view = self.view
        return (view.background, view.flat_field, view.i0_reference) != (None, None, None)

    def counts(self, slots: Slots) -> NDArray[Any]:
        """Counts (n, N, N) of stored frames, zero frequency at [N // 2, N // 2].

        In the stored dtype, or float32 where they are corrected. Pixels that measure nothing
        (:attr:`valid`) hold anything finite.

        Raises:
            StoreError: a frame, or a file of the view, cannot be read.
            GeometryError: the view shows nothing of the frames.
        """
        shown = self.view.apply(self.reader.frames(slots))
        background, gain = self._background, self._gain
        scale = self._scale(slots)
        if background is None and gain is None and scale is None:
            return shown
        counts = shown.astype(np.float32)
        if background is not None:
            counts -= background
        if gain is not None:
            counts *= gain
        if scale is not None:
            counts *= scale[:, None, None]
        return np.maximum(counts, 0, out=counts)

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """Pixels (N, N) that measure.

        Those that the stream's mask, the view's mask, flat field and background, and the values in
        the first frame that is not damaged do not call bad.

        Raises:
            StoreError: there is no such frame yet, or a file cannot be read.
        """
        masks = [self.reader.bad_pixels, self._file(self.view.bad_pixels)]
        flat, background = self._file(self.view.flat_field), self._file(self.view.background)
        if flat is not None:
            masks.append(~(np.isfinite(flat) & (flat > 0)))
        if background is not None:
            masks.append(~np.isfinite(background))
        bad = [mask for mask in masks if mask is not None]
        first = next(
            (slot for slot in range(self.reader.committed) if not self.reader.verify([slot])), 0
        )
        return self.view.valid(self.reader.frame(first), np.logical_or.reduce(bad) if bad else None)

    def usable(self, pairs: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of ``pairs`` (n,) may be in an image, as far as flags and bad frames go."""
        return (pairs["flags"] == 0) & ~self._is_bad_frame(pairs["number"])

    def first_open(self, limit: int) -> NDArray[np.int64]:
        """Slots of the first frames that are neither dark, gated, listed as bad, nor damaged.

        Args:
            limit: at most so many.

        Raises:
            StoreError: a file of the view cannot be read.
        """
        committed = self.reader.committed
        while len(self._open_slots) < limit and self._records_seen < committed:
            first, last = self._records_seen, min(self._records_seen + limit, committed)
            records = self.reader.whole_records(first, last)
            good = (records["flags"] == 0) & ~self._is_bad_frame(records["number"])
            slots = records["slot"][good]
            self._open_slots += slots[~np.isin(slots, self.reader.verify(slots))].tolist()
            self._records_seen = last
        return np.array(self._open_slots[:limit], np.int64)

    def _is_bad_frame(self, numbers: NDArray[Any]) -> NDArray[np.bool_]:
        ranges = self._file(self.view.bad_frames)
        if ranges is None or not len(ranges):
            return np.zeros(len(numbers), bool)
        numbers = numbers.astype(np.int64)
        at = np.searchsorted(ranges[:, 0], numbers, side="right") - 1
        return (at >= 0) & (numbers <= ranges[at, 1])

    @cached_property
    def _background(self) -> NDArray[np.float32] | None:
        return self._shown(self._file(self.view.background), 0.0)

    @cached_property
    def _gain(self) -> NDArray[np.float32] | None:
        flat = self._file(self.view.flat_field)
        if flat is None:
            return None
        good = np.isfinite(flat) & (flat > 0)
        return self._shown(np.divide(1.0, flat, out=np.ones_like(flat), where=good), 1.0)

    def _shown(self, values: NDArray[Any] | None, instead: float) -> NDArray[np.float32] | None:
        """A map of stored pixels (h, w) as the view shows it (N, N)."""
        if values is None:
            return None
        whole = np.where(np.isfinite(values), values, instead)
        return np.ascontiguousarray(self.view.apply(whole), np.float32)

    def _file(self, digest: str | None) -> NDArray[Any] | None:
        if digest is None:
            return None
        held = self._files.get(digest)
        if held is None:
            held = self._files[digest] = view_data(self.reader.directory, digest)
        return held

    @cached_property
    def _files(self) -> dict[str, NDArray[Any]]:
        return {}

    def _scale(self, slots: Slots) -> NDArray[np.float32] | None:
        """By what to multiply each frame; None: by nothing."""
        reference = self.view.i0_reference
        if reference is None:
            return None
        self._look_at_pairs()
        wanted = np.arange(len(self._i0))[slots] if isinstance(slots, slice) else np.asarray(slots)
        i0 = self._i0[wanted]
        known = i0 > 0
        return np.divide(reference, i0, out=np.ones_like(i0), where=known).astype(np.float32)

    def _look_at_pairs(self) -> None:
        """Take in monitor readings of pairs that have come since; the newest of a frame counts."""
        committed, count = self.reader.committed, self.reader.pair_count
        if committed > len(self._i0):
            self._i0 = np.concatenate([self._i0, np.zeros(committed - len(self._i0))])
        if count > self._pairs_seen:
            pairs = self.reader.pairs(self._pairs_seen, count)
            self._i0[pairs["slot"]] = pairs["i0"]
            self._pairs_seen = count
