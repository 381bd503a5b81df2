"""Which way round the detector and the positions are: found on the first frames by their misfit.

Mirrored detectors, swapped axes and wrong signs are the usual faults of a new experiment, and they
look alike: an image that does not come together. Used by the reconstruct stage, which suggests the
finding or opens a new view with it, and by anyone with frames, positions, a probe and a network.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.geometry import Orientation, View, patch_corners
from ptycho_stream.reconstruct.layouts import Layout, layout_classes, matrix_of
from ptycho_stream.reconstruct.neighbourhood import Neighbours, finished, nearest_frames, refining
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.refine_settings import RefineSettings
from ptycho_stream.reconstruct.trust import FrameJudge

MAX_FRAMES = 64
"""More frames are not looked at; positions should spread in two directions within them."""

MIN_FRAMES = 8

DECIDED_SPREADS = 4.0
"""The best must beat the next by so many standard errors of the frames' differences."""

_SHORTLIST = 8
_SWEEPS = 6
_LEAST_SPREAD = 0.15
"""Positions that spread less across than so much of along lie on a line."""

_LEAST_OTHERS = 0.05
"""Where the other frames weigh less than this (1: one at its peak) they say nothing of a pixel."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What one way round came to.

    Attributes:
        layout: it.
        equivalent: others that the probe cannot tell from it; they give a mirrored image.
        misfit: relative error of the amplitudes against the object of the other frames.
        excess: R beyond that of noise after some sweeps of physics; None: it was not on the
            shortlist.
        behind: by how much the excess of single frames lies above the best's, in standard errors;
            0 for the best itself.
    """

    layout: Layout
    equivalent: tuple[Layout, ...]
    misfit: float
    excess: float | None = None
    behind: float = 0.0


@dataclass(frozen=True, slots=True)
class Finding:
    """Which way round fits.

    Attributes:
        trials: best first.
        frames: that were looked at.
        decided: whether the best beats all others that are not equivalent to it.
        reason: in words.
    """

    trials: tuple[Trial, ...]
    frames: int
    decided: bool
    reason: str

    @property
    def best(self) -> Trial | None:
        """The one that fits best; None where nothing could be tried."""
        return self.trials[0] if self.trials else None

    @property
    def fits_as_set(self) -> bool:
        """Whether what is set is the best, equivalent to it, or not to be told from it."""
        return not self.decided or any(
            Layout() in (trial.layout, *trial.equivalent) for trial in self.trials[:1]
        )

    @property
    def as_set(self) -> Trial | None:
        """The trial of what is set, or of its equivalent."""
        for trial in self.trials:
            if Layout() in (trial.layout, *trial.equivalent):
                return trial
        return None


def choose_frames(position_yx_m: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """Which of the frames so far to look at; None: wait for more.

    The first ``MAX_FRAMES`` if they spread in two directions, else those around the middle of all:
    in a raster the first may lie on one line.

    Args:
        position_yx_m: (n, 2), in the order of arrival; those that are not finite are left out.
    """
    known = np.flatnonzero(np.isfinite(position_yx_m).all(1))
    if len(known) < MIN_FRAMES:
        return None
    around = nearest_frames(position_yx_m, MAX_FRAMES)
    for chosen in (known[:MAX_FRAMES], np.sort(around)):
        if not _on_a_line(position_yx_m[chosen] - position_yx_m[chosen].mean(0)):
            return chosen
    return None


def diagnose(
    counts: NDArray[Any],
    position_yx_m: NDArray[np.float64],
    pixel_yx_m: tuple[float, float],
    predictor: Predictor,
    valid: NDArray[np.bool_] | None = None,
) -> Finding:
    """Try all ways round and say which fits: :func:`diagnosing` in one go."""
    return finished(diagnosing(counts, position_yx_m, pixel_yx_m, predictor, valid))


def diagnosing(
    counts: NDArray[Any],
    position_yx_m: NDArray[np.float64],
    pixel_yx_m: tuple[float, float],
    predictor: Predictor,
    valid: NDArray[np.bool_] | None = None,
) -> Generator[None, None, Finding]:
    """Try all ways round and say which fits; yields now and then, so that it can be cut in slices.

    First the network's patches of every orientation are stitched at the positions of every
    orientation, and each frame is compared with what the others' patches show there; then the
    best few are refined by physics and compared by what is left.

    Args:
        counts: any real dtype (n, N, N), photons, as the present view shows them; the first
            ``MAX_FRAMES`` that can be used are.
        position_yx_m: (n, 2), world positions of the probe's centre.
        pixel_yx_m: of the object; swapping axes of unequal pixels is not tried.
        predictor: network and probe, the probe in the photons of the counts.
        valid: bool (N, N), as the present view shows it; None: every pixel is.
    """
    mask = np.ones(counts.shape[1:], bool) if valid is None else valid
    lit = (np.isfinite(counts) & (counts > 0) & mask).any((1, 2))
    usable = np.flatnonzero(lit & np.isfinite(position_yx_m).all(1))[:MAX_FRAMES]
    usable = usable[: len(usable) // predictor.group_frames * predictor.group_frames]
    if len(usable) < MIN_FRAMES:
        return Finding((), len(usable), False, f"{len(usable)} frames are too few to tell")
    relative = position_yx_m[usable] - position_yx_m[usable].mean(0)
    if _on_a_line(relative):
        reason = f"the {len(usable)} positions lie on a line: wait for more"
        return Finding((), len(usable), False, reason)
    swaps = bool(np.isclose(pixel_yx_m[0], pixel_yx_m[1], rtol=1e-3))
    bench = _Bench(counts[usable], relative, pixel_yx_m, predictor, mask)
    rough: list[Trial] = []
    for members in layout_classes(predictor.probe, swaps):
        yield from bench.preparing(members[0].detector)
        rough.append(Trial(members[0], members[1:], bench.misfit(members[0])))
        yield
    rough.sort(key=lambda trial: trial.misfit)
    return (yield from _deciding(bench, rough))


def _deciding(bench: _Bench, rough: Sequence[Trial]) -> Generator[None, None, Finding]:
    """Refine the best and what is set, and compare them frame by frame."""
    short = list(rough[:_SHORTLIST])
    short += [t for t in rough[_SHORTLIST:] if Layout() in (t.layout, *t.equivalent)]
    excess: dict[Layout, NDArray[np.float64]] = {}
    for trial in short:
        excess[trial.layout] = yield from bench.refining(trial.layout)
    short.sort(key=lambda trial: _mean(excess[trial.layout]))
    best = excess[short[0].layout]
    trials = [
        replace(t, excess=_mean(excess[t.layout]), behind=_behind(excess[t.layout], best))
        for t in short
    ]
    held = {t.layout for t in short}
    rest = [t for t in rough if t.layout not in held]
    frames = len(best)
    tied = [t for t in trials if t.behind < DECIDED_SPREADS]
    if len(tied) > 1:
        names = "; ".join(str(t.layout) for t in tied[:4])
        reason = f"{len(tied)} ways round fit alike after {frames} frames: {names}"
        return Finding((*trials, *rest), frames, False, reason)
    reason = f"{trials[0].layout} fits: excess R {trials[0].excess:.3f}"
    if len(trials) > 1:
        reason += f", the next ({trials[1].layout}) {trials[1].excess:.3f}"
    return Finding((*trials, *rest), frames, True, reason)


def _mean(excess: NDArray[np.float64]) -> float:
    known = excess[np.isfinite(excess)]
    return float(known.mean()) if len(known) else np.inf


def _behind(excess: NDArray[np.float64], best: NDArray[np.float64]) -> float:
    difference = excess - best
    difference = difference[np.isfinite(difference)]
    if len(difference) < 2 or not difference.any():
        return 0.0
    error = float(difference.std(ddof=1)) / np.sqrt(len(difference))
    return float(difference.mean()) / max(error, 1e-12)


_Turned = tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.complex64], NDArray[np.float32]]
"""Counts, mask, patches and weights of the patches."""


class _Bench:
    """The frames and their patches in every orientation of the detector, made when needed."""

    def __init__(
        self,
        counts: NDArray[Any],
        relative_yx_m: NDArray[np.float64],
        pixel_yx_m: tuple[float, float],
        predictor: Predictor,
        valid: NDArray[np.bool_],
    ) -> None:
        self._counts, self._valid = counts, valid
        self._relative, self._pixel = relative_yx_m, pixel_yx_m
        self._predictor = predictor
        self._still = np.zeros((len(counts), 2), np.float32)
        self._turned: dict[Orientation, _Turned] = {}

    def preparing(self, detector: Orientation) -> Generator[None, None, None]:
        """Predict the patches of one orientation of the detector, if that was not done yet."""
        if detector in self._turned:
            return
        view = View(self._counts.shape[-1], orientation=detector)
        counts, valid = view.apply(self._counts), view.apply(self._valid).astype(bool)
        patches = np.empty(counts.shape, np.complex64)
        weights = np.empty(counts.shape, np.float32)
        for start in range(0, len(counts), self._predictor.batch_size):
            part = slice(start, start + self._predictor.batch_size)
            # The same patches serve all positions, so the probe stays on the pixel grid here.
            found = self._predictor.predict(counts[part], self._still[part], valid)
            patches[part], weights[part] = found
            yield
        self._turned[detector] = (counts, valid, patches, weights)

    def _of(self, detector: Orientation) -> _Turned:
        """Counts, mask, patches and weights (n, N, N) in one orientation that was prepared."""
        return self._turned[detector]

    def _corners(self, positions: Orientation) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        moved = self._relative @ matrix_of(positions).T
        return patch_corners(moved, self._pixel, self._counts.shape[-1])

    def misfit(self, layout: Layout) -> float:
        """Relative amplitude error of the frames against the object of the others' patches."""
        counts, valid, patches, weights = self._of(layout.detector)
        corner, _ = self._corners(layout.positions)
        windows, usable = _others(patches, weights, corner - corner.min(0))
        judge = FrameJudge(self._predictor.probe, valid, self._predictor.device)
        figures = judge.judge(windows[usable], self._still[usable], counts[usable])
        return _mean(figures.r_factor)

    def refining(self, layout: Layout) -> Generator[None, None, NDArray[np.float64]]:
        """Excess (n,) of the frames after some sweeps of physics from the network's patches."""
        counts, valid, patches, _ = self._of(layout.detector)
        moved = self._relative @ matrix_of(layout.positions).T / np.asarray(self._pixel)
        probe = self._predictor.probe
        frames = Neighbours(counts, moved, patches, valid)
        settings = RefineSettings(modes=len(probe.modes), probe_step=0.0)
        done = yield from refining(frames, probe, settings, _SWEEPS, self._predictor.device)
        return done.figures.excess


def _others(
    patches: NDArray[np.complex64], weights: NDArray[np.floating[Any]], corner: NDArray[np.int64]
) -> tuple[NDArray[np.complex64], NDArray[np.bool_]]:
    """What the other frames' patches show in each window, (n, N, N), and where they show enough.

    A pixel that no other frame lit keeps the frame's own patch. Usable are windows of which the
    others lit at least half of what the frame itself did.
    """
    size = patches.shape[-1]
    extent = corner.max(0) + size
    numerator, denominator = np.zeros(extent, np.complex64), np.zeros(extent, np.float32)
    places = [(slice(y, y + size), slice(x, x + size)) for y, x in corner.tolist()]
    weighted = patches * weights
    for place, patch, weight in zip(places, weighted, weights, strict=True):
        numerator[place] += patch
        denominator[place] += weight
    windows, usable = patches.copy(), np.zeros(len(patches), bool)
    for index, place in enumerate(places):
        rest = denominator[place] - weights[index]
        lit = rest > _LEAST_OTHERS
        windows[index][lit] = (numerator[place] - weighted[index])[lit] / rest[lit]
        usable[index] = (weights[index] * lit).sum() > 0.5 * weights[index].sum()
    return windows, usable


def _on_a_line(relative_yx_m: NDArray[np.float64]) -> bool:
    spread = np.linalg.svd(relative_yx_m, compute_uv=False)
    return bool(spread[0] <= 0 or spread[1] < _LEAST_SPREAD * spread[0])
