"""One open scan as ingest writes it: decoder, store writer, join with positions, and its view.

Made by ingest for every ``OpenScan`` or recovered scan; it holds no decision about the scan's life,
that is the state machine's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.files.view_change import changed_view
from ptycho_stream.geometry import View
from ptycho_stream.messages import Frame, Positions
from ptycho_stream.scans.dark_frames import SERIES_KEY, is_dark_series
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.header import ScanHeader, ScanState
from ptycho_stream.scans.join import FramesAlone, Join, PositionLimits
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import (
    FRAME_FLAG_DARK,
    FRAME_FLAG_SKIP,
    POSITION_GATE_OPEN,
    POSITION_GATE_SKIP,
    positions_of,
)
from ptycho_stream.scans.scan_events import OpenScan
from ptycho_stream.scans.scan_layout import lay_out
from ptycho_stream.scans.stored_part import Binning, StoredPart
from ptycho_stream.scans.writer import ScanWriter
from ptycho_stream.settings import Settings
from ptycho_stream.wire.compression import decode, decode_window
from ptycho_stream.wire.generated_positions import GeneratedPositions
from ptycho_streamd.scan_view import ScanView

EPOCH_KEY = "position_epoch"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PositionCounts:
    """Positions of one scan; a difference of two is what came in between.

    Attributes:
        inline: came with their frames, or were made for them.
        invalid: NaN, infinite or without hope of a frame.
        out_of_extent: further out than ``reconstruct.max_extent_m``.
        jumps: further from the one before than ``reconstruct.max_step_m``.
    """

    inline: int = 0
    invalid: int = 0
    out_of_extent: int = 0
    jumps: int = 0


class Recorder:
    """Writes one scan.

    Attributes:
        writer: of the store, which a housekeeping thread syncs.
        join: counts positions that are invalid, out of extent or jump.
        first_pending_ns: monotonic time of the oldest frame or position not committed, or 0.
    """

    def __init__(self, root: Path, writer: ScanWriter, settings: Settings) -> None:
        header = writer.header
        self.writer = writer
        join = FramesAlone if header.detector else Join
        self.join = join(position_limits(settings))
        self.first_pending_ns = 0
        self.position_count = 0
        self._root = root
        self._directory = scan_directory(root, header.scan_id)
        part = StoredPart.of(header)
        self._crop = part.window
        self._binning = self._made_binning(part, settings) if part.bin_px > 1 else None
        self._view = ScanView(root, writer, self.join, settings.view)
        self._all_dark = is_dark_series(header)
        path = settings.positions.generated
        self._path = None if path is None else GeneratedPositions(path)
        self._reported = (0, 0)
        self._inline = 0
        self._counted = PositionCounts()

    def _made_binning(self, part: StoredPart, settings: Settings) -> Binning:
        header = self.writer.header
        with ScanReader(self._directory) as reader:
            bad_pixels = reader.bad_pixels
        dtype = header.detector_dtype or header.dtype
        return Binning(part, dtype, settings.view.bad_value_from, bad_pixels)

    @classmethod
    def create(cls, root: Path, opening: OpenScan, settings: Settings) -> Recorder:
        """Create the scan in the store.

        Raises:
            DiskFull: there is no room even for an empty scan.
            StoreError: it cannot be created.
        """
        layout = lay_out(opening, settings, time.time_ns())
        if layout.warning:
            log.warning("scan %s: %s", opening.scan_id, layout.warning)
        writer = ScanWriter.create(
            root, layout.header, settings.data.frames_per_file, layout.bad_pixels
        )
        recorder = cls(root, writer, settings)
        recorder._view.begin()
        return recorder

    @classmethod
    def resume(cls, root: Path, writer: ScanWriter, settings: Settings) -> Recorder:
        """Go on with a scan that was recovered."""
        recorder = cls(root, writer, settings)
        positions = writer.positions()
        recorder.position_count = len(positions)
        lost = recorder.join.restore(writer.records(), positions, writer.pairs())
        if len(lost):
            lost["paired_monotonic_ns"] = time.monotonic_ns()
            writer.append_pairs(lost)
            writer.commit()
        recorder.new_positions()  # the former incarnation has counted them
        recorder._view.resume()
        return recorder

    @property
    def header(self) -> ScanHeader:
        """Of the scan, as last written."""
        return self.writer.header

    def store(self, frame: Frame, received_ns: int, received_monotonic_ns: int) -> None:
        """Decode a frame into the scan and join it with its position, if that is known.

        Raises:
            DecodeError: the blob is damaged; nothing was stored.
            LimitExceeded: likewise.
            DiskFull: the frames before it cannot be committed; it was not taken.
        """
        writer = self.writer
        flags = 0
        if frame.gate != "open" or self._all_dark:
            skip = frame.gate == "skip" and not self._all_dark
            flags = FRAME_FLAG_SKIP if skip else FRAME_FLAG_DARK
        elif self._view.darks_due:
            self._view.use_darks()
        buffer = writer.next_buffer()
        self._decode(frame, buffer)
        start_ns, stop_ns = frame.start_ns, frame.stop_ns
        number = frame.number
        i0 = _reading(frame.i0) if frame.i0 is not None else 0.0
        slot = writer.append_buffered(
            number,
            received_ns,
            received_monotonic_ns,
            -1 if start_ns is None else start_ns,
            -1 if stop_ns is None else stop_ns,
            flags,
            i0,
        )
        if not self.first_pending_ns:
            self.first_pending_ns = received_monotonic_ns
        if flags == FRAME_FLAG_DARK:
            self.join.dark_frame()
            self._view.add_dark(buffer)
            return
        if i0:
            self._view.readings += 1
        position = frame.position_yx_m if self._path is None else self._path.of(number)
        if position is None:
            pair = self.join.frame(number, slot, i0, skip=flags != 0)
        else:
            # In the log of positions too: a crash between frame and pair must not lose it.
            writer.append_position(number, position[0], position[1], received_ns)
            self._inline += 1
            self.position_count += 1
            pair = self.join.frame_with_position(
                number, slot, position[0], position[1], i0, skip=flags != 0
            )
        if pair is not None:
            writer.append_pair(
                number,
                slot,
                pair.y_m,
                pair.x_m,
                received_monotonic_ns,
                pair.revision,
                pair.flags,
                pair.i0,
            )

    def _decode(self, frame: Frame, buffer: NDArray[Any]) -> None:
        """What is stored of a frame, into ``buffer`` (h, w)."""
        image = frame.image
        if self._binning is not None:
            window = decode(image) if self._crop is None else decode_window(image, self._crop)
            self._binning.into(window, buffer)
        elif self._crop is None:
            decode(image, buffer)
        else:
            decode_window(image, self._crop, buffer)

    def add_positions(self, positions: Positions) -> None:
        """Store positions as received and pair the frames that waited for them."""
        now_ns = time.monotonic_ns()
        numbers, position_yx_m = positions.numbers, positions.position_yx_m
        self.position_count += len(numbers)
        i0, gate = _readings(positions), _gates(positions)
        self.writer.append_positions(numbers, position_yx_m, time.time_ns(), i0, gate)
        self.writer.append_pairs(self.join.positions(numbers, position_yx_m, now_ns, i0, gate))
        if i0 is not None:
            self._view.readings += int(np.count_nonzero(i0))
        if not self.first_pending_ns:
            self.first_pending_ns = now_ns

    def take_over_positions(self, other: Recorder) -> None:
        """Take the positions of a scan without frames, which this one replaces.

        Raises:
            StoreError: those that are pending cannot be written.
        """
        other.commit()
        held = other.writer.positions()
        if len(held):
            position_yx_m = positions_of(held)
            numbers: NDArray[np.int64] = held["number"].astype(np.int64)
            skip = held["gate"] == POSITION_GATE_SKIP
            self.add_positions(Positions("", None, numbers, position_yx_m, held["i0"], skip))

    def commit(self) -> None:
        """Show readers all that was taken.

        Raises:
            DiskFull: there is no room; what was not written stays pending.
        """
        self.first_pending_ns = 0
        self.writer.commit()
        if self._view.reference_due:
            self._view.use_readings()

    def new_positions(self) -> PositionCounts | None:
        """Positions that are worth counting and came since the last call; None: there are none."""
        join, before = self.join, self._counted
        now = PositionCounts(self._inline, join.invalid, join.out_of_extent, join.jumps)
        if now == before:
            return None
        self._counted = now
        return PositionCounts(
            now.inline - before.inline,
            now.invalid - before.invalid,
            now.out_of_extent - before.out_of_extent,
            now.jumps - before.jumps,
        )

    def newly_positioned(self) -> tuple[int, int] | None:
        """How many frames have a position now, and how many others need none.

        None if neither has changed since the last call.
        """
        now = (self.join.positioned, self.join.spared)
        if now == self._reported:
            return None
        self._reported = now
        return now

    def set_state(self, state: ScanState, reason: str) -> None:
        """Write state and reason into the header."""
        self.writer.update_header(state=state, reason=reason)

    def bind_epoch(self, epoch: str, told: Mapping[str, Any]) -> None:
        """Note the epoch in the metadata, where the next incarnation of ingest finds it.

        Args:
            epoch: its name.
            told: what it says of itself, but for whether frames are dark: those that were stored
                before it came have been looked at already.
        """
        told = {key: held for key, held in told.items() if key != SERIES_KEY}
        metadata = {**self.header.metadata, **told, EPOCH_KEY: epoch}
        self.writer.update_header(metadata=metadata)

    def change_view(self, settings: Settings) -> bool:
        """Add a view if the settings now ask for another one; whether it did.

        Raises:
            StoreError: the header, or a file of the view, cannot be written.
        """
        return self._view.change(settings.view)

    def request_view(self, arguments: Mapping[str, Any]) -> View:
        """Look at the frames as a request asks for; the view that the scan has now.

        Raises:
            GeometryError: what is asked for does not fit the scan.
            FileFormatError: a file that it names cannot be used.
            StoreError: the header, or a file of the view, cannot be written.
        """
        self._view.set(changed_view(self.header, self._directory, arguments))
        return self.header.view

    def finish_view(self) -> None:
        """Bring background and monitor scale up to date with all frames of the scan.

        Raises:
            StoreError: the header, or a file of the view, cannot be written.
        """
        self._view.finish()

    def final_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """``counts`` of the scan's life, with what is known here of its positions."""
        return {
            **counts,
            "positions": self.position_count,
            "positions_invalid": self.join.invalid,
            "positions_out_of_extent": self.join.out_of_extent,
            "position_jumps": self.join.jumps,
            "gated": self.join.gated,
            "dark": self.join.dark,
        }


def _reading(i0: float) -> float:
    """A reading of the beam monitor as it is stored; one that cannot be is none."""
    return i0 if 0 < i0 < math.inf else 0.0


def _readings(positions: Positions) -> NDArray[np.float64] | None:
    i0 = positions.i0
    if i0 is None:
        return None
    return np.where((i0 > 0) & (i0 < np.inf), i0, 0.0)


def _gates(positions: Positions) -> NDArray[np.uint64] | None:
    if positions.skip is None:
        return None
    gates = np.where(positions.skip, POSITION_GATE_SKIP, POSITION_GATE_OPEN)
    return gates.astype(np.uint64)


def position_limits(settings: Settings) -> PositionLimits:
    """Beyond what positions are flagged."""
    return PositionLimits(settings.reconstruct.max_extent_m, settings.reconstruct.max_step_m)
