"""One stored frame as it is asked for over the control socket: as it lies there, or as it is seen.

Used by the supervisor, in the thread of its :class:`~ptycho_streamd.store_desk.StoreDesk`.  The
scan asked for last stays open, so that who looks at the newest frame each second costs little.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import ControlError, StoreError
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.records import FRAME_FLAG_DARK
from ptycho_stream.scans.viewed_scan import ViewedScan

MAX_FRAME_PX = 1024
"""Larger frames are summed into bins until neither side is longer, so that a reply is bounded."""
_AT_ONCE = 65_536
_ROWS_AT_ONCE = 1 << 22


class StoredFrames:
    """Answers the command ``frame``.  Belongs to one thread."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._open: _OpenFrames | None = None

    def frame(self, scan_id: str, number: int | None, look: str) -> dict[str, Any]:
        """A frame and what is known of it, as plain values; ``docs/protocol.md`` lists them.

        Args:
            scan_id: of the scan.
            number: the detector's own of the frame; None: the newest frame.
            look: ``view`` or ``stored``.

        Raises:
            StoreError: the scan or the frame cannot be read.
            ControlError: ``not_found``: the scan has no frame, or none of that number.
            GeometryError: the view shows nothing of the frame.
        """
        if self._open is None or self._open.scan_id != scan_id:
            self.close()
            self._open = _OpenFrames(self._catalogue, scan_id)
        try:
            return self._open.frame(number, look)
        except StoreError:
            self.close()  # it may have been deleted, or recovered by another writer
            raise

    def close(self) -> None:
        """Let go of the scan that was asked for last."""
        if self._open is not None:
            self._open.close()
            self._open = None


class _OpenFrames:
    """The frames of one scan, with what is known of where they were taken."""

    def __init__(self, catalogue: Catalogue, scan_id: str) -> None:
        self.scan_id = scan_id
        self._reader = catalogue.open(scan_id)
        self._viewed = ViewedScan(self._reader)
        self._pairs_seen = 0
        self._position_yx_m: NDArray[np.float64] = np.zeros((0, 2))

    def close(self) -> None:
        self._reader.close()

    def frame(self, number: int | None, look: str) -> dict[str, Any]:
        reader = self._reader
        reader.refresh()
        if not self._viewed.is_current:
            self._viewed = ViewedScan(reader)
        slot = self._slot(number)
        counts, valid = self._pixels(slot, look)
        counts, bin_px = _bounded(np.where(valid, counts, 0))
        valid, _ = _bounded(valid)
        record = reader.records(slot, slot + 1)[0]
        return {
            "scan_id": self.scan_id,
            "frame": int(record["number"]),
            "slot": slot,
            "frames": reader.committed,
            "received_ns": int(record["received_ns"]),
            "dark": bool(record["flags"] & FRAME_FLAG_DARK),
            "position_yx_m": self._position(slot),
            "look": look,
            "bin_px": bin_px,
            "shape_yx": list(counts.shape),
            "counts": counts.astype("<f4").tobytes(),
            "valid": (valid > 0).astype(np.uint8).tobytes(),
        }

    def _slot(self, number: int | None) -> int:
        committed = self._reader.committed
        if not committed:
            raise ControlError("not_found", f"scan {self.scan_id} has no frame yet")
        if number is None:
            return committed - 1
        # Most scans count from 0 and lose nothing: look there first.
        likely = min(number, committed - 1)
        if int(self._reader.records(likely, likely + 1)["number"][0]) == number:
            return likely
        for first in range(0, committed, _AT_ONCE):
            records = self._reader.records(first, min(first + _AT_ONCE, committed))
            found = np.flatnonzero(records["number"] == number)
            if len(found):
                return first + int(found[0])
        raise ControlError("not_found", f"scan {self.scan_id} has no frame {number}")

    def _pixels(self, slot: int, look: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        if look == "view":
            return self._viewed.counts([slot])[0], self._viewed.valid
        stored = self._reader.frame(slot)
        bad = self._reader.bad_pixels
        good = self._viewed.view.is_measured(stored)
        return stored, good if bad is None else good & ~bad

    def _position(self, slot: int) -> list[float] | None:
        """Where a frame was taken, [y, x] in metres, as far as that is known."""
        reader = self._reader
        count, committed = reader.pair_count, reader.committed  # pairs come after their frames
        if committed > len(self._position_yx_m):
            more = np.full((committed - len(self._position_yx_m), 2), np.nan)
            self._position_yx_m = np.concatenate([self._position_yx_m, more])
        while self._pairs_seen < count:
            last = min(self._pairs_seen + _AT_ONCE, count)
            pairs = reader.pairs(self._pairs_seen, last)
            self._position_yx_m[pairs["slot"], 0] = pairs["y_m"]
            self._position_yx_m[pairs["slot"], 1] = pairs["x_m"]
            self._pairs_seen = last
        position = self._position_yx_m[slot]
        return position.tolist() if np.isfinite(position).all() else None


def _bounded(pixels: NDArray[Any]) -> tuple[NDArray[np.float64], int]:
    """Sums over bins, of at most ``MAX_FRAME_PX`` a side, and how many pixels a side of a bin."""
    bin_px = -(-max(pixels.shape) // MAX_FRAME_PX)
    height, width = pixels.shape
    rows = range(0, height, bin_px * max(1, _ROWS_AT_ONCE // (width * bin_px)))
    binned: list[NDArray[np.float64]] = []
    for first in rows:
        part = pixels[first : first + rows.step].astype(np.float64)
        part = np.add.reduceat(part, np.arange(0, len(part), bin_px), axis=0)
        binned.append(np.add.reduceat(part, np.arange(0, width, bin_px), axis=1))
    return np.concatenate(binned), bin_px
