"""The frames that a writer has taken and not yet committed: pixels and records, side by side.

Allocated once and used again for every batch, so that a frame costs ingest its checksum and the
packing of one record.  Used by the writer only.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from ptycho_stream.scans.records import FRAME_RECORD, FRAME_RECORD_FORMAT

BATCH_FRAMES: Final = 64
_MAX_BYTES: Final = 64 * 2**20


class FrameBuffer:
    """Room for up to 64 frames (fewer large ones); ``pending`` of them are taken."""

    def __init__(self, frame_shape_yx: tuple[int, int], dtype: str) -> None:
        self._frame_bytes = frame_shape_yx[0] * frame_shape_yx[1] * np.dtype(dtype).itemsize
        self.capacity = max(1, min(BATCH_FRAMES, _MAX_BYTES // self._frame_bytes))
        self.pending = 0
        self._pixels: NDArray[Any] = np.zeros((self.capacity, *frame_shape_yx), dtype)
        self._pixel_bytes = self._pixels.reshape(-1).view(np.uint8).data
        self._frames = list(self._pixels)
        self._records = np.zeros(self.capacity, FRAME_RECORD)
        self._record_bytes = self._records.view(np.uint8).data
        self._pack = struct.Struct(FRAME_RECORD_FORMAT).pack_into

    def next(self) -> NDArray[Any]:
        """Where the next frame (h, w) goes; there must be room."""
        return self._frames[self.pending]

    def take(
        self,
        slot: int,
        number: int,
        received_ns: int,
        received_monotonic_ns: int,
        start_ns: int,
        stop_ns: int,
        flags: int,
        i0: float,
    ) -> None:
        """Take what :meth:`next` now holds, with its checksum, as the frame of ``slot``."""
        index = self.pending
        self._pack(
            self._record_bytes,
            index * FRAME_RECORD.itemsize,
            number,
            start_ns,
            stop_ns,
            received_ns,
            received_monotonic_ns,
            xxhash.xxh3_64_intdigest(self._frames[index]),
            flags,
            slot,
            i0,
        )
        self.pending = index + 1

    def first_pixels(self, count: int) -> memoryview:
        """The bytes of the first ``count`` pending frames."""
        return self._pixel_bytes[: count * self._frame_bytes]

    def first_records(self, count: int) -> NDArray[np.void]:
        """The records of the first ``count`` pending frames, without their check words."""
        return self._records[:count]

    def drop_first(self, count: int) -> None:
        """Forget the first ``count`` pending frames; the others move up."""
        rest = self.pending - count
        if rest:
            self._pixels[:rest] = self._pixels[count : self.pending]
            self._records[:rest] = self._records[count : self.pending]
        self.pending = rest
