"""Finds where a series begins in a stream of frames that does not say so.

Used by the decoders of dialects without a start message (PSI, Odin, slsReceiver, PV Access).  A
series begins with the first frame, when the sender names another one, when frame numbers start
again, and, where a counter never does, after a silence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Literal

from ptycho_stream.errors import LimitExceeded, WireError
from ptycho_stream.messages import Frame, Message, ScanEnd, ScanStart, Undecodable

WINDOW: Final = 1024
"""So far behind the highest number a frame may come and still belong to the series."""
RESTART_RUN: Final = 3
"""So many numbers behind the highest, the first of which has come before, and rising, are a new
series."""
MAX_PAST: Final = 64


class SeriesTracker:
    """Puts series starts and ends between frames.

    A number that has come before is a doubled frame or the first of a new series.  It is held until
    what follows tells: with :data:`RESTART_RUN` in a row, some of which may fall on holes of the
    series, the numbers have started again.

    Args:
        source: the dialect, for ``ScanStart.source``.
        first_number: of a series' first frame as the sender counts; ``any``: the first that comes.
        silence_ns: so long without a frame, and nothing that came before counts.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        source: str,
        first_number: int | Literal["any"] = 0,
        silence_ns: int = 60_000_000_000,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._source = source
        self._first = None if first_number == "any" else first_number
        self._silence_ns = silence_ns
        self._clock = clock
        self._series: str | None = None
        self._base = 0
        self._highest = -1
        self._last = -1
        self._seen: set[int] = set()
        self._held: list[Frame] = []
        self._past: dict[str, None] = {}
        self._last_ns = 0

    @property
    def series(self) -> str | None:
        """The name of the series that is going on."""
        return self._series

    def take(self, frame: Frame) -> list[Message]:
        """``frame``, named and numbered as the sender does, with what belongs before it.

        It may be held back (nothing comes out), and others that were held may come out first.
        """
        now_ns = self._clock()
        silent = bool(self._seen) and now_ns - self._last_ns > self._silence_ns
        self._last_ns = now_ns
        number = frame.number
        if self._series is None:
            ended = frame.series in self._past and self._first is not None
            if ended and not silent and self._is_new(number):
                return [self._placed(frame)]  # late, of the one that was ended
            # The first series of all has no start if its first frames are missing: it may be one
            # that a former process has recorded a part of.
            told = bool(self._past) or self._first in (None, number)
            return self._begin([frame], told=told)
        if frame.series != self._series:
            if frame.series in self._past and number != self._first:
                return [self._placed(frame)]  # late, of the one before
            return self._next([frame])
        if silent and (self._first is None or number <= self._highest):
            return self._next([frame])
        if self._held and self._held[-1].number < number <= self._highest:
            return self._suspect(frame)
        if self._is_new(number):
            out = self._release()
            self._note(number)
            return [*out, self._placed(frame)]
        if number <= self._highest - WINDOW or (self._first is None and number < self._base):
            return self._next([frame])
        if number == self._last or number < self._base:
            return [self._placed(frame)]
        return self._suspect(frame)

    def start(
        self, series: str, shape_yx: tuple[int, int] | None = None, dtype: str | None = None
    ) -> list[Message]:
        """Begin a series of which something else than a frame tells; ends the one before.

        Frames that are held have come before the news: they are its first ones.
        """
        held, self._held = self._held, []
        out = [*self.end(), self._opened(series, shape_yx, dtype)]
        return [*out, *self._taken(held)]

    def end(self) -> list[Message]:
        """End the series that is going on, if there is one."""
        if self._series is None:
            return []
        out = self._release()
        ended, self._series = self._series, None
        self._past[ended] = None
        if len(self._past) > MAX_PAST:
            del self._past[next(iter(self._past))]
        return [*out, ScanEnd(ended)]

    def _next(self, frames: list[Frame]) -> list[Message]:
        return [*self.end(), *self._begin(frames, told=True)]

    def _begin(self, frames: list[Frame], *, told: bool) -> list[Message]:
        """Go on with the series of ``frames``; ``told``: it begins here."""
        image = frames[0].image
        opened = self._opened(frames[0].series, image.shape_yx, image.dtype)
        return [*([opened] if told else []), *self._taken(frames)]

    def _opened(
        self, series: str, shape_yx: tuple[int, int] | None, dtype: str | None
    ) -> ScanStart:
        self._series = series
        self._past.pop(series, None)
        self._base = 0 if self._first is None else self._first
        self._seen.clear()
        self._highest = self._last = -1
        return ScanStart(self._source, series, None, shape_yx, dtype)

    def _taken(self, frames: list[Frame]) -> list[Message]:
        for frame in frames:
            self._note(frame.number)
        return [self._placed(frame) for frame in frames]

    def _is_new(self, number: int) -> bool:
        return number > max(self._highest - WINDOW, self._base - 1) and number not in self._seen

    def _suspect(self, frame: Frame) -> list[Message]:
        out: list[Message] = []
        if self._held and frame.number <= self._held[-1].number:
            out = self._release()
        self._held.append(frame)
        if len(self._held) < min(RESTART_RUN, len(self._seen)):
            return out
        frames, self._held = self._held, []
        return [*out, *self._next(frames)]

    def _release(self) -> list[Message]:
        """Frames that were doubled or late after all; who records them counts them."""
        held, self._held = self._held, []
        self._seen.update(frame.number for frame in held)
        return [self._placed(frame) for frame in held]

    def _note(self, number: int) -> None:
        if self._first is None and not self._seen:
            self._base = number
        self._last = number
        self._seen.add(number)
        if number > self._highest:
            self._highest = number
            if len(self._seen) > 2 * WINDOW:
                self._seen = {seen for seen in self._seen if seen > number - WINDOW}

    def _placed(self, frame: Frame) -> Message:
        """``frame`` with its number counted from 0."""
        if not self._base:
            return frame
        number = frame.number - self._base
        if number < 0:
            error: WireError = LimitExceeded(
                f"frame {frame.number} came and a series begins with {self._base}: correct "
                "first_number, or set it to 'any'"
            )
            return Undecodable(error.reason, str(error), frame.series)
        return replace(frame, number=number)
