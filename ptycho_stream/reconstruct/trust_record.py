"""The figures of all frames of an image, and what they say together.

Frames are judged a few at a time, and again when the image has changed; this remembers the latest
figures of each, says which to judge next, and finds those that stand out. Used by the watch over a
scan's image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.reconstruct.trust import (
    SUMS,
    FrameFigures,
    TotalFigures,
    held_out,
    total,
)

_OUTLIER_SPREADS = 6.0
_OUTLIER_EXCESS = 0.03
_OUTLIER_BRIGHTNESS = 0.2
"""A frame is bad when its excess is above the median by so many robust spreads and by so much, or
its photons per expected photon off the median by so many spreads and by so large a share."""

MOST_NAMED = 100
"""Bad frames are named, at most."""


@dataclass(frozen=True, slots=True)
class TrustSummary:
    """What the frames judged so far say together.

    Attributes:
        working: figures of the frames that made the image.
        free: figures of the held-out frames; its R is R_free.
        excess_median: of single frames, NaN without one.
        bad_share: of the frames, those that stand out from the rest (:func:`bad_frames`).
        bad_frames: their numbers, worst first, at most ``MOST_NAMED``.
        unseen: frames whose window leaves the seen part of the object.
    """

    working: TotalFigures
    free: TotalFigures
    excess_median: float
    bad_share: float
    bad_frames: tuple[int, ...]
    unseen: int


_COMPARED = 64
"""A frame is compared with so many that were judged just before, as long as the image changes."""
_STRIKES = 2


class TrustRecord:
    """The latest figures of each frame of an image.

    Frames are named by an index that never changes, their place in the order of :meth:`add`; each
    takes 80 bytes.
    """

    def __init__(self) -> None:
        self._sums = np.full((SUMS, 0), np.nan)
        self._number = np.empty(0, np.int64)
        self._judged_at = np.empty(0, np.int64)
        self._strikes = np.empty(0, np.int64)
        self._clock = 0
        self._changed_at = 0

    def __len__(self) -> int:
        return len(self._number)

    def add(self, frame_numbers: NDArray[np.integer[Any]]) -> None:
        """New frames, with the indices that follow those known."""
        count = len(frame_numbers)
        self._number = np.concatenate([self._number, frame_numbers.astype(np.int64)])
        self._sums = np.concatenate([self._sums, np.full((SUMS, count), np.nan)], axis=1)
        self._judged_at = np.concatenate([self._judged_at, np.full(count, -1, np.int64)])
        self._strikes = np.concatenate([self._strikes, np.zeros(count, np.int64)])

    def outdate(self) -> None:
        """The image has changed: figures up to now are of a former one."""
        self._changed_at = self._clock

    def unjudged(self, enough: int) -> int:
        """How many more frames should be judged against the image as it is, so that ``enough`` are.

        Frames that were never judged count whether there are enough or not.
        """
        fresh = int(np.count_nonzero(self._judged_at >= self._changed_at))
        never = int(np.count_nonzero(self._judged_at < 0))
        return max(min(len(self), enough) - fresh, never)

    def due(self, limit: int, enough: int) -> NDArray[np.int64]:
        """Indices of the frames to judge next: never judged and newest first, then longest ago.

        At most ``limit``, and no more than :meth:`unjudged` says.
        """
        newest_first = np.arange(len(self._number))[::-1]
        order = np.argsort(self._judged_at[::-1], kind="stable")
        return newest_first[order][: min(limit, self.unjudged(enough))]

    def take(self, indices: NDArray[np.integer[Any]], figures: FrameFigures) -> None:
        """The figures of some frames, in place of their former ones."""
        self._sums[:, indices] = [getattr(figures, field.name) for field in fields(figures)]
        self._judged_at[indices] = self._clock
        self._clock += 1
        latest = self._latest(_COMPARED)
        bad = np.zeros(len(self), bool)
        if len(latest) >= _COMPARED // 2:
            bad[latest] = bad_frames(FrameFigures(*self._sums[:, latest]))
        self._strikes[indices] = np.where(bad[indices], self._strikes[indices] + 1, 0)

    def skip(self, indices: NDArray[np.integer[Any]]) -> None:
        """Some frames cannot be judged: their positions are not known."""
        self._sums[:, indices] = np.nan
        self._judged_at[indices] = self._clock

    def summary(self, latest: int | None = None) -> TrustSummary:
        """All frames together, or the ``latest`` judged ones."""
        chosen = self._latest(latest)
        figures = FrameFigures(*self._sums[:, chosen])
        number = self._number[chosen]
        free = held_out(number)
        excess = figures.excess
        known = np.flatnonzero(figures.usable)
        bad = np.flatnonzero(self._bad(chosen, figures))
        worst = bad[np.argsort(-excess[bad], kind="stable")][:MOST_NAMED]
        return TrustSummary(
            working=total(figures.chosen(~free)),
            free=total(figures.chosen(free)),
            excess_median=float(np.median(excess[known])) if len(known) else math.nan,
            bad_share=len(bad) / len(known) if len(known) else 0.0,
            bad_frames=tuple(number[worst].tolist()),
            unseen=len(chosen) - len(known),
        )

    def _latest(self, most: int | None) -> NDArray[np.int64]:
        """Indices of the ``most`` frames that were judged last, ascending; None: of all judged."""
        judged = np.flatnonzero(self._judged_at >= 0)
        if most is None or len(judged) <= most:
            return judged
        order = np.argsort(-self._judged_at[judged], kind="stable")
        return np.sort(judged[order[:most]])

    def _bad(self, chosen: NDArray[np.int64], figures: FrameFigures) -> NDArray[np.bool_]:
        """Which of the chosen frames stand out.

        Against the image as it is, if most of them were compared with it. While it is still getting
        better, and old figures are worse than new ones, those that stood out from the frames judged
        just before each time, and more than once.
        """
        fresh = self._judged_at[chosen] >= self._changed_at
        if 2 * np.count_nonzero(fresh) < len(chosen):
            return (self._strikes[chosen] >= _STRIKES) & figures.usable
        bad = np.zeros(len(chosen), bool)
        bad[fresh] = bad_frames(figures.chosen(fresh))
        return bad


def bad_frames(figures: FrameFigures) -> NDArray[np.bool_]:
    """Frames that stand out from the rest, bool (n,): by their excess or by their brightness.

    Spreads are median absolute deviations times 1.4826, a Gaussian's standard deviation, so that
    the bad frames themselves do not widen them.
    """
    bad = np.zeros(len(figures.difference), bool)
    known = np.flatnonzero(figures.usable)
    if not len(known):
        return bad
    excess, brightness = figures.excess[known], figures.brightness[known]
    over, spread = _about_median(excess)
    bad[known] = over > max(_OUTLIER_SPREADS * spread, _OUTLIER_EXCESS)
    # Dark frames are as far off as bright ones, on a scale of factors.
    off, spread = _about_median(np.log(np.maximum(brightness, 1e-6)))
    limit = max(_OUTLIER_SPREADS * spread, math.log1p(_OUTLIER_BRIGHTNESS))
    bad[known] |= np.abs(off) > limit
    return bad


def _about_median(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Distances from the median, and the robust spread."""
    distance = values - np.median(values)
    return distance, 1.4826 * float(np.median(np.abs(distance)))
