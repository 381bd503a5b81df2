"""Which frames refinement visits next: new ones first, bad ones more often, every one in its turn.

Numbers only; used by :class:`~ptycho_stream.reconstruct.refine.Refiner`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_AHEAD_BATCHES = 64
"""So many batches are planned at once; a new frame throws the plan away."""

_WORST_SHARE = 0.1
"""This share of the frames, the worst fitting ones, is visited twice as often."""

_LEAST_STEPS = 16
"""A sweep has at least so many steps: fewer frames than that times a batch make smaller batches.

Of 80 frames, 12 a batch leave a third more error than 5 a batch after as many sweeps.
"""

_STIR = 4.0
"""Frames that grow the scan by a share take so many times this share of the others' settling away.

Otherwise steps shrink while probe and object still change much.
"""

_OUTLIER = 8.0
"""Misfits further than this many robust deviations above the median are not a matter of visits.

A corrupted frame never fits; visiting it more often would only spread its damage.
"""


class Schedule:
    """Visits of frames and the order of the next ones.

    New frames (newest first) come before all others, once; then those visited least, so that in a
    scan that outruns the machine every frame is still visited as often as any other, in batches at
    random: visits of the newest frames alone, one after the other, before those beside them have
    come, make the image of a siemens star that is streamed a tenth worse.

    Attributes:
        visits: int64 (n,), how often each frame was used; negative if it is unusable.
        settled: float64 (n,), visits that still count: new frames stir the others up.
        misfit: float32 (n,), at the last visit; NaN before the first.
    """

    def __init__(self, batch_frames: int, seed: int = 0) -> None:
        self._batch_frames = batch_frames
        self._rng = np.random.default_rng(seed)
        self._planned: list[NDArray[np.int64]] = []
        self.visits: NDArray[np.int64] = np.zeros(0, np.int64)
        self.settled: NDArray[np.float64] = np.zeros(0)
        self.misfit: NDArray[np.float32] = np.zeros(0, np.float32)

    def add(self, count: int) -> None:
        """Put ``count`` more frames before all others."""
        have = len(self.visits)
        if have:
            self.settled *= max(0.0, 1 - _STIR * count / have)
        self.settled = np.concatenate([self.settled, np.zeros(count)])
        self.visits = np.concatenate([self.visits, np.zeros(count, np.int64)])
        self.misfit = np.concatenate([self.misfit, np.full(count, np.nan, np.float32)])
        self._planned.clear()

    def exclude(self, indices: NDArray[np.int64]) -> None:
        """Never visit these frames again."""
        self.visits[indices] = -1

    def note(self, indices: NDArray[np.int64], misfit: NDArray[np.float32]) -> None:
        """Count a visit of each frame, and its misfit before it."""
        self.visits[indices] += 1
        self.settled[indices] += 1
        self.misfit[indices] = misfit

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Frames (n,) that may be visited."""
        return self.visits >= 0

    def next(self, group: NDArray[np.int64]) -> NDArray[np.int64]:
        """The next batch of indices; empty if no frame is usable.

        Args:
            group: (n,) frames of equal value are put into the same batch where possible.
        """
        while True:
            if not self._planned:
                self._plan(group)
            if not self._planned:
                return np.zeros(0, np.int64)
            batch = self._planned.pop()
            batch = batch[self.visits[batch] >= 0]  # some were excluded since they were planned
            if len(batch):
                return batch

    def _plan(self, group: NDArray[np.int64]) -> None:
        worst = self._worst()
        count, usable = len(self.visits), int(self.usable.sum())
        # Visits of the worst count half, because they get two at a time.
        key = self.visits / np.where(worst, 2.0, 1.0) + self._rng.random(count)
        fresh = self.visits == 0
        key = np.where(fresh, -np.arange(count) / max(count, 1), key)
        key = np.where(self.usable, key, np.inf)
        wanted = min(usable, _AHEAD_BATCHES * self._batch_frames)
        if not wanted:
            return
        chosen = np.argpartition(key, wanted - 1)[:wanted]
        new, old = chosen[fresh[chosen]], chosen[~fresh[chosen]]
        bad = old[worst[old]]
        size = max(1, min(self._batch_frames, usable // _LEAST_STEPS))
        parts = [self._batches(part, group, size) for part in (old, bad, new)]
        planned = parts[0] + parts[1]
        planned = [planned[i] for i in self._rng.permutation(len(planned))]
        # Taken from the end: fresh frames do not wait for a full plan of older ones.
        self._planned = planned + parts[2]

    def _worst(self) -> NDArray[np.bool_]:
        seen = self.usable & np.isfinite(self.misfit)
        if seen.sum() < 1 / _WORST_SHARE:
            return np.zeros(len(seen), bool)
        limit = float(np.quantile(self.misfit[seen], 1 - _WORST_SHARE))
        return seen & (self.misfit > limit) & ~self.outliers(_OUTLIER)

    def outliers(self, deviations: float) -> NDArray[np.bool_]:
        """Frames (n,) whose misfit is so many robust deviations above the median."""
        seen = self.usable & np.isfinite(self.misfit)
        return seen & (self.misfit > self.common_misfit(deviations))

    def common_misfit(self, deviations: float = _OUTLIER) -> float:
        """The median of the misfits plus so many robust deviations; infinite before any visit."""
        known = self.misfit[self.usable & np.isfinite(self.misfit)]
        if not len(known):
            return float("inf")
        median = float(np.median(known))
        return median + deviations * 1.4826 * float(np.median(np.abs(known - median)))

    def _batches(
        self, indices: NDArray[np.int64], group: NDArray[np.int64], size: int
    ) -> list[NDArray[np.int64]]:
        """Cut into batches of one group each and at most ``size``, and join what is left over.

        Frames of one group lie anywhere in the sample, so a batch has few overlaps.
        """
        indices = indices[self._rng.permutation(len(indices))]
        indices = indices[np.argsort(group[indices], kind="stable")]
        edges = np.flatnonzero(np.diff(group[indices])) + 1
        batches: list[NDArray[np.int64]] = []
        rest: list[NDArray[np.int64]] = []
        for members in np.split(indices, edges):
            for start in range(0, len(members), size):
                piece = members[start : start + size]
                (batches if 2 * len(piece) > size else rest).append(piece)
        held = 0
        joined: list[NDArray[np.int64]] = []
        for piece in rest:
            if held + len(piece) > size:
                batches.append(np.concatenate(joined))
                joined, held = [], 0
            joined.append(piece)
            held += len(piece)
        if held:
            batches.append(np.concatenate(joined))
        return batches
