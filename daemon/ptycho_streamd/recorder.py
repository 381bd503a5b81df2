"""One open scan as ingest writes it: decoder, store writer and the join with positions.

Made by ingest for every ``OpenScan`` or recovered scan; it holds no decision about the scan's life,
that is the state machine's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.geometry import View
from ptycho_stream.messages import Frame, Positions
from ptycho_stream.scans.header import ScanHeader, ScanState
from ptycho_stream.scans.join import Join, PositionLimits
from ptycho_stream.scans.records import positions_of
from ptycho_stream.scans.scan_events import OpenScan
from ptycho_stream.scans.writer import ScanWriter
from ptycho_stream.settings import Settings
from ptycho_stream.wire.compression import decode
from ptycho_streamd.scan_layout import crop_of_header, lay_out

EPOCH_KEY = "position_epoch"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PositionCounts:
    """Positions of one scan; a difference of two is what came in between.

    Attributes:
        inline: came with their frames.
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

    def __init__(self, writer: ScanWriter, limits: PositionLimits) -> None:
        self.writer = writer
        self.join = Join(limits)
        self.first_pending_ns = 0
        self.position_count = 0
        self._crop = crop_of_header(writer.header)
        self._reported = 0
        self._inline = 0
        self._counted = PositionCounts()

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
        return cls(writer, position_limits(settings))

    @classmethod
    def resume(cls, writer: ScanWriter, settings: Settings) -> Recorder:
        """Go on with a scan that was recovered."""
        recorder = cls(writer, position_limits(settings))
        positions = writer.positions()
        recorder.position_count = len(positions)
        lost = recorder.join.restore(writer.records(), positions, writer.pairs())
        if len(lost):
            lost["paired_monotonic_ns"] = time.monotonic_ns()
            writer.append_pairs(lost)
            writer.commit()
        recorder.new_positions()  # the former incarnation has counted them
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
        buffer = writer.next_buffer()
        if self._crop is None:
            decode(frame.image, buffer)
        else:
            buffer[...] = decode(frame.image)[self._crop]
        start_ns, stop_ns = frame.start_ns, frame.stop_ns
        number = frame.number
        slot = writer.append_buffered(
            number,
            received_ns,
            received_monotonic_ns,
            -1 if start_ns is None else start_ns,
            -1 if stop_ns is None else stop_ns,
        )
        position = frame.position_yx_m
        if position is None:
            pair = self.join.frame(number, slot)
        else:
            # In the log of positions too: a crash between frame and pair must not lose it.
            writer.append_position(number, position[0], position[1], received_ns)
            self._inline += 1
            self.position_count += 1
            pair = self.join.frame_with_position(number, slot, position[0], position[1])
        if pair is not None:
            writer.append_pair(
                number,
                slot,
                pair.y_m,
                pair.x_m,
                received_monotonic_ns,
                pair.revision,
                pair.flags,
            )
        if not self.first_pending_ns:
            self.first_pending_ns = received_monotonic_ns

    def add_positions(self, positions: Positions) -> None:
        """Store positions as received and pair the frames that waited for them."""
        now_ns = time.monotonic_ns()
        numbers, position_yx_m = positions.numbers, positions.position_yx_m
        self.position_count += len(numbers)
        self.writer.append_positions(numbers, position_yx_m, time.time_ns())
        self.writer.append_pairs(self.join.positions(numbers, position_yx_m, now_ns))
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
            self.add_positions(Positions("", None, numbers, position_yx_m))

    def commit(self) -> None:
        """Show readers all that was taken.

        Raises:
            DiskFull: there is no room; what was not written stays pending.
        """
        self.first_pending_ns = 0
        self.writer.commit()

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

    def newly_positioned(self) -> int | None:
        """How many frames have a position now, if that has changed since the last call."""
        if self.join.positioned == self._reported:
            return None
        self._reported = self.join.positioned
        return self._reported

    def set_state(self, state: ScanState, reason: str) -> None:
        """Write state and reason into the header."""
        self.writer.update_header(state=state, reason=reason)

    def bind_epoch(self, epoch: str) -> None:
        """Note the epoch in the metadata, where the next incarnation of ingest finds it."""
        metadata = {**self.header.metadata, EPOCH_KEY: epoch}
        self.writer.update_header(metadata=metadata)

    def change_view(self, settings: Settings) -> bool:
        """Add a view if the settings now ask for another one; whether it did."""
        view = self.header.view
        wanted = replace(
            view,
            orientation=settings.view.orientation,
            dc=settings.view.dc,
            center_yx_px=settings.view.center_yx_px or view.center_yx_px,
            bad_value_from=settings.view.bad_value_from,
        )
        if wanted == view:
            return False
        self.set_view(replace(wanted, version=view.version + 1))
        return True

    def set_view(self, view: View) -> None:
        """Look at the frames that way from now on, if that is not how it is done already.

        Raises:
            StoreError: the header cannot be written.
        """
        if view != self.header.view:
            self.writer.update_header(views=(*self.header.views, view))

    def final_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """``counts`` of the scan's life, with what is known here of its positions."""
        return {
            **counts,
            "positions": self.position_count,
            "positions_invalid": self.join.invalid,
            "positions_out_of_extent": self.join.out_of_extent,
            "position_jumps": self.join.jumps,
        }


def position_limits(settings: Settings) -> PositionLimits:
    """Beyond what positions are flagged."""
    return PositionLimits(settings.reconstruct.max_extent_m, settings.reconstruct.max_step_m)
