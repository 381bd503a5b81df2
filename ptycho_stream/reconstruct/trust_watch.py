"""The watch over one scan's image: every figure of trust and the verdict, in slices of time.

The reconstruct stage keeps one for the generation that subscribers see, tells it of new frames and
lets it look every second or two. Frames are judged at every look; what takes seconds (resolution,
suspicion, diagnosis) is done bit by bit over many looks, and again when the image has changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.errors import GeometryError, ProbeError
from ptycho_stream.geometry import patch_corners
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import Canvas, TileIndex, half_of
from ptycho_stream.reconstruct.coverage import Coverage, coverage
from ptycho_stream.reconstruct.diagnosis import Finding, choose_frames, diagnosing
from ptycho_stream.reconstruct.halves import CanvasHalves, frames_of_halves, refining_halves
from ptycho_stream.reconstruct.misfit_map import MisfitMap
from ptycho_stream.reconstruct.neighbourhood import Neighbours, nearest_frames
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.resolution import (
    RingCorrelation,
    half_correlation,
    nothing_known,
    shown_correlation,
)
from ptycho_stream.reconstruct.suspicion import MAX_FRAMES, Suspicion, suspecting
from ptycho_stream.reconstruct.trust import FrameJudge, tile_windows
from ptycho_stream.reconstruct.trust_record import TrustRecord, TrustSummary
from ptycho_stream.reconstruct.verdict import Figures, Limits, verdict
from ptycho_stream.results import MisfitTile, Tile

_JUDGED_AT_ONCE = 16
"""Frames; at least so many at each look."""

_ENOUGH_FRAMES = 1024
"""The figures are of so many frames, those that were judged last."""

_COVER_GROWTH = 1.02
"""What is covered is counted anew when there are so many times the frames."""

_SWEPT = 2.0
_GROWTH = 1.25
"""What takes seconds is done again when the image has so many times the frames, or sweeps."""

Read = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Counts (n, N, N) of slots (n,), zero frequency at N // 2."""

_Work = Generator[None, None, None]


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """What subscribers see at the moment.

    Attributes:
        tiles: of the published image.
        probe: the newest, in photons.
        canvas: the predicted layer's sums, for its two halves.
        layer: ``predicted`` or ``refined``.
        sweeps: how often refinement has visited a frame on average.
    """

    tiles: Mapping[TileIndex, Tile]
    probe: Probe
    canvas: Canvas
    layer: str
    sweeps: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class TrustReport:
    """What is known of an image.

    Attributes:
        figures: by name (docs/trust.md), finite numbers only.
        verdict: one of VERDICTS.
        reasons: of the verdict, in words.
        bad_frames: numbers of frames that stand out, worst first, at most 100.
        finding: which way round detector and positions are; None: not looked at yet.
    """

    figures: dict[str, float]
    verdict: str
    reasons: tuple[str, ...]
    bad_frames: tuple[int, ...]
    finding: Finding | None


@dataclass(frozen=True, slots=True)
class _Basis:
    """What an answer that took seconds stands on."""

    frames: int
    layer: str
    sweeps: float


class TrustWatch:
    """Figures of trust of one generation of a scan's image.

    Args:
        read: counts of frames by slot, as the present view shows them; asked for 64 or fewer, twice
            as many for the resolution.
        pixel_yx_m: of the object.
        tile_px: of the canvas.
        valid: bool (N, N), zero frequency at N // 2; None: every pixel is.
        device: where to compute.
        predictor: for the diagnosis of orientation; None: it is left out.
    """

    def __init__(
        self,
        read: Read,
        pixel_yx_m: tuple[float, float],
        tile_px: int,
        *,
        valid: NDArray[np.bool_] | None = None,
        device: torch.device | str = "cpu",
        predictor: Predictor | None = None,
    ) -> None:
        self._read, self._pixel, self._tile_px = read, pixel_yx_m, tile_px
        self._valid, self._device, self._predictor = valid, torch.device(device), predictor
        self._record = TrustRecord()
        self._slot = np.zeros(0, np.int64)
        self._number = np.zeros(0, np.int64)
        self._position_yx_m: NDArray[np.float64] = np.zeros((0, 2))
        self._place: dict[int, int] = {}
        self._map: MisfitMap | None = None
        self._halves: CanvasHalves | None = None
        self._mark: tuple[str, int, int] | None = None
        self._work: _Work | None = None
        self._coverage: tuple[int, Coverage | None] = (0, None)
        self._resolution: tuple[_Basis, RingCorrelation] | None = None
        self._suspicion: tuple[_Basis, Suspicion] | None = None
        self._finding: Finding | None = None
        self._diagnosing = False
        self._sweeps = 0.0

    def add(
        self,
        slots: NDArray[np.integer[Any]],
        frame_numbers: NDArray[np.integer[Any]],
        position_yx_m: NDArray[np.floating[Any]],
    ) -> None:
        """Tell of frames (n,) that are in the image from now on, and of their positions (n, 2)."""
        first = len(self._slot)
        self._record.add(frame_numbers)
        self._slot = np.concatenate([self._slot, slots.astype(np.int64)])
        self._number = np.concatenate([self._number, frame_numbers.astype(np.int64)])
        self._position_yx_m = np.concatenate(
            [self._position_yx_m, np.asarray(position_yx_m, np.float64)]
        )
        self._place.update(zip(slots.tolist(), range(first, first + len(slots)), strict=True))

    def move(
        self, slots: NDArray[np.integer[Any]], position_yx_m: NDArray[np.floating[Any]]
    ) -> None:
        """Correct the positions (n, 2) of frames that were added."""
        at = np.array([self._place[slot] for slot in slots.tolist()], np.int64)
        self._position_yx_m[at] = position_yx_m

    @property
    def has_work(self) -> bool:
        """Whether another look at the same image would tell more."""
        unjudged = self._record.unjudged(_ENOUGH_FRAMES)
        return bool(len(self._slot)) and (
            unjudged > 0 or self._work is not None or self._next_question() is not None
        )

    def look(self, shown: Shown, budget_s: float) -> TrustReport:
        """Judge some frames, go on with what takes longer, and report.

        Args:
            shown: the image as it is published now.
            budget_s: of time; overrun by a step of some 0.1 s at most.

        Raises:
            StoreError: frames cannot be read.
            RuntimeError: the device refuses, for want of memory for example.
        """
        until = time.monotonic() + budget_s
        self._sweeps = shown.sweeps
        mark = (shown.layer, len(shown.tiles), sum(t.version for t in shown.tiles.values()))
        if mark != self._mark:
            self._mark = mark
            self._record.outdate()
        self._cover(shown.probe)
        while True:
            # Turn by turn, so that neither keeps the other waiting.
            started = time.monotonic()
            judged = self._judge(shown)
            worked = self._go_on(shown, 2 * time.monotonic() - started)
            if not (judged or worked) or time.monotonic() >= until:
                return self._report(shown.layer)

    def close(self) -> None:
        """Give up the work at hand: it holds this watch and the image that it looks at."""
        self._work = None

    def misfit_tiles(self) -> dict[TileIndex, MisfitTile]:
        """Mean excess R where frames were judged."""
        return {} if self._map is None else self._map.snapshots()

    def _cover(self, probe: Probe) -> None:
        """Count anew what is covered, when there are a few frames more."""
        if len(self._slot) >= max(1, _COVER_GROWTH * self._coverage[0]):
            found = coverage(self._position_yx_m, probe, self._pixel)
            self._coverage = (len(self._slot), found)

    def _judge(self, shown: Shown) -> bool:
        """Compare the frames that are due with the image; False: all have been."""
        which = self._record.due(_JUDGED_AT_ONCE, _ENOUGH_FRAMES)
        if not len(which):
            return False
        size = shown.probe.size_px
        known = np.isfinite(self._position_yx_m[which]).all(1)
        self._record.skip(which[~known])
        which = which[known]
        if len(which):
            corner, shift = patch_corners(self._position_yx_m[which], self._pixel, size)
            windows = self._windows(shown, corner)
            judge = FrameJudge(shown.probe, self._valid, self._device)
            figures = judge.judge(windows, shift, self._read(self._slot[which]))
            self._record.take(which, figures)
            if self._map is None:
                self._map = MisfitMap(self._tile_px, shown.probe.power_yx)
            self._map.put(which, corner, figures.excess)
        return True

    def _windows(self, shown: Shown, corner_yx_px: NDArray[np.int64]) -> NDArray[np.complex64]:
        """The published object in windows (n, N, N), NaN where never seen."""
        return tile_windows(shown.tiles, self._tile_px, corner_yx_px, shown.probe.size_px)

    def _go_on(self, shown: Shown, until_s: float) -> bool:
        """Do a part of what takes longer, at least a step; False: there is nothing to do."""
        asked = self._suspicion
        if self._diagnosing and asked is not None and self._swept(asked[0]):
            self._work = None  # what was suspected may have been mended by refinement
        while True:
            if self._work is None:
                question = self._next_question()
                if question is None:
                    return False
                self._work = question(shown)
                self._diagnosing = question == self._diagnose
            if not self._step():
                self._work = None
            if time.monotonic() >= until_s:
                return True

    def _step(self) -> bool:
        """One step of the work at hand; False: it is done."""
        assert self._work is not None
        try:
            next(self._work)
        except StopIteration:
            return False
        return True

    def _next_question(self) -> Callable[[Shown], _Work] | None:
        """What should be found out (again), the most urgent first."""
        basis = self._basis()
        if basis.frames < 1:
            return None
        if self._suspicion is None or self._outdated(self._suspicion[0]):
            return self._suspect
        # Ten times dearer, and for nothing where the frames can be explained as they are.
        explained = self._suspicion[1].excess <= Limits().excess
        if self._finding is None and not explained and self._diagnosable():
            return self._diagnose
        if self._resolution is None or self._outdated(self._resolution[0]):
            return self._resolve
        return None

    def _basis(self) -> _Basis:
        layer = "" if self._mark is None else self._mark[0]
        return _Basis(len(self._slot), layer, self._sweeps)

    def _outdated(self, basis: _Basis) -> bool:
        now = self._basis()
        grown = now.frames >= _GROWTH * basis.frames
        return now.layer != basis.layer or grown or self._swept(basis)

    def _swept(self, basis: _Basis) -> bool:
        """Whether refinement has changed the image, and the probe, much since."""
        return self._sweeps >= _SWEPT * (basis.sweeps + 1)

    def _diagnosable(self) -> bool:
        return self._predictor is not None and choose_frames(self._position_yx_m) is not None

    def _diagnose(self, shown: Shown) -> _Work:
        chosen = choose_frames(self._position_yx_m)
        if chosen is None or self._predictor is None:
            return
        counts = self._read(self._slot[chosen])
        position = self._position_yx_m[chosen]
        try:
            self._finding = yield from diagnosing(
                counts, position, self._pixel, self._predictor, self._valid
            )
        except (GeometryError, ProbeError) as error:
            self._finding = Finding((), len(chosen), False, str(error))

    def _suspect(self, shown: Shown) -> _Work:
        basis = self._basis()
        near = nearest_frames(self._position_yx_m, MAX_FRAMES)
        found = Suspicion(len(near), problem="no position is known")
        if len(near):
            position = self._position_yx_m[near] / np.asarray(self._pixel)
            corner, _ = patch_corners(position, (1.0, 1.0), shown.probe.size_px)
            start = np.nan_to_num(self._windows(shown, corner), nan=1.0)
            frames = Neighbours(self._read(self._slot[near]), position, start, self._valid)
            try:
                found = yield from suspecting(frames, shown.probe, self._device)
            except (GeometryError, ProbeError) as error:
                found = Suspicion(len(near), problem=str(error))
        self._suspicion = (basis, found)

    def _resolve(self, shown: Shown) -> _Work:
        basis = self._basis()
        try:
            found = yield from self._resolving(shown)
        except (GeometryError, ProbeError) as error:
            found = nothing_known(self._pixel, str(error))
        self._resolution = (basis, found)

    def _resolving(self, shown: Shown) -> Generator[None, None, RingCorrelation]:
        """Refine the two halves of the best covered region and correlate them."""
        if self._halves is None or self._halves.canvas is not shown.canvas:
            self._halves = CanvasHalves(shown.canvas)
        halves = self._halves.images()
        if halves is None:
            return nothing_known(self._pixel, "the halves of the frames have nothing in common")
        known = np.flatnonzero(np.isfinite(self._position_yx_m).all(1))
        position = self._position_yx_m[known] / np.asarray(self._pixel)
        corner, _ = patch_corners(position, (1.0, 1.0), shown.probe.size_px)
        half = half_of(self._number[known])
        use = frames_of_halves(halves, corner, half, shown.probe.size_px)
        if not len(use):
            return nothing_known(self._pixel, "one half of the frames has none in the region")
        side = halves.object_yx.shape[-1]
        image = tile_windows(shown.tiles, self._tile_px, np.array([halves.corner_yx_px]), side)[0]
        refined = yield from refining_halves(
            halves,
            self._read(self._slot[known[use]]),
            position[use],
            half[use],
            shown.probe,
            self._valid,
            device=self._device,
        )
        if shown.layer == "refined":
            return half_correlation(refined, self._pixel)
        return shown_correlation(image, halves, refined, self._pixel)

    def _report(self, layer: str) -> TrustReport:
        covered = self._coverage[1]
        summary = self._record.summary(_ENOUGH_FRAMES)
        suspicion = None if self._suspicion is None else self._suspicion[1]
        found = verdict(Figures(summary, covered, self._finding, suspicion))
        figures = _of_frames(summary, layer) | _of_coverage(covered)
        if self._resolution is not None and self._resolution[1].resolution_nm is not None:
            figures["resolution_nm"] = self._resolution[1].resolution_nm
            figures["resolution_frames"] = float(self._resolution[0].frames)
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        return TrustReport(finite, found.name, found.reasons, summary.bad_frames, self._finding)


def _of_frames(summary: TrustSummary, layer: str) -> dict[str, float]:
    working, free = summary.working, summary.free
    figures = {
        "r_factor": working.r_factor,
        "r_poisson": working.r_poisson,
        "excess": working.excess,
        "deviance": working.deviance,
        "frames_judged": float(working.frames + free.frames),
        "frames_unseen": float(summary.unseen),
        "bad_share": summary.bad_share,
    }
    if layer == "refined":
        # Only refinement leaves the held-out frames out.
        figures |= {"r_free": free.r_factor, "excess_free": free.excess}
    return figures


def _of_coverage(covered: Coverage | None) -> dict[str, float]:
    if covered is None:
        return {}
    return {
        "coverage_um2": covered.area_um2,
        "coverage_share": covered.share,
        "overlap": covered.overlap,
        "step_nm": covered.step_m * 1e9,
    }
