"""Puts the samples of a stage together, several to a detector frame, by their absolute numbers.

Used by the PandA decoder.  Samples come in runs of any length that straddle frames, again, out of
order or not at all; a frame is ready when all of its samples are there, and its samples are given
out in their order, so that their mean does not depend on how they came.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_CHUNK_SAMPLES: Final = 4096
MAX_OPEN_BYTES: Final = 64_000_000
"""Of samples whose frames are not ready; beyond it the oldest are given up."""
_PARTLY: Final = 1
_WHOLLY: Final = 2


@dataclass(frozen=True, slots=True)
class FrameSamples:
    """Samples of some frames.

    Attributes:
        numbers: int64 (n,), of the frames.
        values: float64 (columns, n, samples of a frame).
        known: bool (n, samples of a frame); what is not known has no meaning in ``values``.
    """

    numbers: NDArray[np.int64]
    values: NDArray[np.float64]
    known: NDArray[np.bool_]

    def means(self) -> NDArray[np.float64]:
        """Of the known samples of each frame, (columns, n)."""
        # Contiguous: numpy adds up in an order that follows the layout, down to the last bit.
        held = np.ascontiguousarray(np.where(self.known, self.values, 0.0))
        return held.sum(axis=2) / np.count_nonzero(self.known, axis=1)


class _Chunk:
    """Consecutive frames; ``given`` (frames,) tells whether they were given out, and how."""

    def __init__(self, columns: int, frames: int, samples: int) -> None:
        self.values: NDArray[np.float64] = np.zeros((columns, frames * samples))
        self.known: NDArray[np.bool_] = np.zeros((columns, frames * samples), np.bool_)
        self.given: NDArray[np.uint8] = np.zeros(frames, np.uint8)

    def samples(self, number: int, which: NDArray[np.intp]) -> FrameSamples:
        """Of the frames ``which`` (n,) of this chunk, whose first frame is ``number``."""
        values = self.values.reshape(len(self.values), len(self.given), -1)[:, which]
        return FrameSamples((which + number).astype(np.int64), values, self.counts()[which])

    def counts(self) -> NDArray[np.bool_]:
        """Which samples are there in all columns, (frames, samples of a frame)."""
        return self.known.all(axis=0).reshape(len(self.given), -1)


class SampleFrames:
    """What has come of an epoch's samples.

    Args:
        columns: values that a sample has; a sample is there when all of them are.
        samples_per_frame: of each frame.
        max_open_bytes: of samples that wait for others of their frames.
    """

    def __init__(
        self, columns: int, samples_per_frame: int, max_open_bytes: int = MAX_OPEN_BYTES
    ) -> None:
        self._columns = columns
        self._per_frame = samples_per_frame
        self._frames = max(_CHUNK_SAMPLES // samples_per_frame, 1)
        size_bytes = self._frames * samples_per_frame * columns * 9
        self._max_open = max(max_open_bytes // size_bytes, 2)
        self._open: dict[int, _Chunk] = {}
        self._done: set[int] = set()
        self._done_below = 0
        self._newest = 0

    def add(self, column: int, first: int, values: NDArray[np.float64]) -> list[int]:
        """Take ``values`` (n,) of the samples from number ``first`` on.

        Returns:
            The chunks that they are in, for :meth:`ready`.
        """
        touched: list[int] = []
        size, done = self._frames * self._per_frame, 0
        if len(values):
            self._newest = max(self._newest, first + len(values))
        while done < len(values):
            index, at = divmod(first + done, size)
            count = min(size - at, len(values) - done)
            if not (index < self._done_below or index in self._done):
                chunk = self._open.get(index)
                if chunk is None:
                    chunk = _Chunk(self._columns, self._frames, self._per_frame)
                    self._open[index] = chunk
                new = ~chunk.known[column, at : at + count]
                np.copyto(
                    chunk.values[column, at : at + count], values[done : done + count], where=new
                )
                chunk.known[column, at : at + count] = True
                touched.append(index)
            done += count
        return touched

    def ready(self, touched: Iterable[int]) -> list[FrameSamples]:
        """Frames of these chunks that have all their samples by now, each given out once."""
        found: list[FrameSamples] = []
        for index in sorted(set(touched)):
            chunk = self._open[index]
            whole = chunk.counts().all(axis=1)
            which = np.flatnonzero(whole & (chunk.given < _WHOLLY))
            if not which.size:
                continue
            found.append(chunk.samples(index * self._frames, which))
            chunk.given[which] = _WHOLLY
            if chunk.given.min() == _WHOLLY:
                self._finish(index)
        return found

    @property
    def passed(self) -> int:
        """Number of the first frame that the newest sample has not left behind."""
        return self._newest // self._per_frame

    @property
    def left_behind(self) -> int:
        """The same, thousands of samples ago."""
        size = self._frames * self._per_frame
        return max(self._newest // size - 1, 0) * self._frames

    def partial(self, least: int, before: int | None) -> list[FrameSamples]:
        """Frames that have at least so many samples, each given out once before it is ready.

        Args:
            least: samples that a frame must have.
            before: only frames below this number; None: all.
        """
        found: list[FrameSamples] = []
        for index, chunk in self._open.items():
            if before is not None and index * self._frames >= before:
                continue
            enough = np.count_nonzero(chunk.counts(), axis=1) >= least
            which = self._below(before, index, enough & (chunk.given == 0))
            if which.size:
                found.append(chunk.samples(index * self._frames, which))
                chunk.given[which] = _PARTLY
        return found

    def surplus(self) -> list[tuple[int, int]]:
        """Give up what is beyond the memory allowed; as :meth:`lost`."""
        given_up: list[tuple[int, int]] = []
        while len(self._open) > self._max_open:
            index = min(self._open)
            given_up += self._incomplete(index, self._open.pop(index), None)
        return given_up

    def lost(self, before: int | None) -> list[tuple[int, int]]:
        """Frames that were never given out, (number, samples that are there), of some there are.

        Args:
            before: only frames below this number; None: all.
        """
        return [
            frame
            for index, chunk in self._open.items()
            for frame in self._incomplete(index, chunk, before)
        ]

    def _incomplete(self, index: int, chunk: _Chunk, before: int | None) -> list[tuple[int, int]]:
        counts = np.count_nonzero(chunk.counts(), axis=1)
        some = chunk.known.any(axis=0).reshape(len(chunk.given), -1).any(axis=1)
        which = self._below(before, index, some & (chunk.given == 0))
        return [(index * self._frames + int(at), int(counts[at])) for at in which]

    def _below(self, before: int | None, index: int, wanted: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Frames of a chunk that are wanted, as indices, below the number ``before``."""
        which = np.flatnonzero(wanted)
        return which if before is None else which[which < before - index * self._frames]

    def _finish(self, index: int) -> None:
        """A chunk needs no memory any more."""
        del self._open[index]
        self._done.add(index)
        while self._done_below in self._done:
            self._done.remove(self._done_below)
            self._done_below += 1
