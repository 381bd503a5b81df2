"""Refine a few frames of one neighbourhood by themselves, and say how well they fit then.

For questions that need an image of one's own: does another orientation fit better, would another
probe or other positions explain the misfit? Used by diagnosis, suspicion and the probe's fit.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.geometry import patch_corners
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import divide
from ptycho_stream.reconstruct.refine import Refiner
from ptycho_stream.reconstruct.refine_settings import RefineSettings
from ptycho_stream.reconstruct.trust import FrameFigures, FrameJudge, object_windows, total

_Result = TypeVar("_Result")


def nearest_frames(position_yx_m: NDArray[np.floating[Any]], limit: int) -> NDArray[np.int64]:
    """Indices of the ``limit`` frames nearest to the middle one, those with finite positions."""
    known = np.flatnonzero(np.isfinite(position_yx_m).all(1)).astype(np.int64)
    if not len(known):
        return known
    middle = np.median(position_yx_m[known], axis=0)
    distance = np.hypot(*(position_yx_m[known] - middle).T)
    return known[np.argsort(distance, kind="stable")[:limit]]


def finished(work: Generator[None, None, _Result]) -> _Result:
    """The result of work that is cut into slices, done in one go."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """Frames near each other.

    Attributes:
        counts: any real dtype (n, N, N), photons, zero frequency at N // 2.
        position_yx_px: float64 (n, 2), of the probe's centre, canvas pixels.
        start: complex64 (n, N, N), what each frame's window shows at first, finite.
        valid: bool (N, N), zero frequency at N // 2; None: every pixel is.
    """

    counts: NDArray[Any]
    position_yx_px: NDArray[np.float64]
    start: NDArray[np.complex64]
    valid: NDArray[np.bool_] | None = None

    def first(self, limit: int) -> Neighbours:
        """Those at the start of the arrays."""
        k = slice(limit)
        return Neighbours(self.counts[k], self.position_yx_px[k], self.start[k], self.valid)


@dataclass(frozen=True, slots=True, eq=False)
class Refinement:
    """What refinement came to.

    Attributes:
        figures: of the frames against their object.
        object_yx: complex64 (H, W), NaN where unseen.
        weight_yx: float32 (H, W), illumination, 1 = one frame at the probe's peak.
        moved_px: root mean square by which positions moved, apart from a common shift.
        probe: as it is then, in photons.
    """

    figures: FrameFigures
    object_yx: NDArray[np.complex64]
    weight_yx: NDArray[np.float32]
    moved_px: float
    probe: Probe

    @property
    def excess(self) -> float:
        """R beyond that of noise, of all frames together; infinite where nothing can be told."""
        found = total(self.figures).excess
        return found if np.isfinite(found) else np.inf


def refining(
    frames: Neighbours,
    probe: Probe,
    settings: RefineSettings,
    sweeps: float,
    device: torch.device | str = "cpu",
) -> Generator[None, None, Refinement]:
    """Refine frames on an object of their own; yields after every step of a few frames.

    Raises:
        GeometryError: positions are not finite, or span more pixels than ``settings`` allow.
        ProbeError: the steps have left the range of numbers.
    """
    size = probe.size_px
    corner, _ = patch_corners(frames.position_yx_px, (1.0, 1.0), size)
    refiner = Refiner(frames.counts, probe, settings, valid=frames.valid, device=device)
    refiner.start_from(*_laid(frames.start, corner, probe.power_yx))
    refiner.add(np.arange(len(frames.counts)), frames.position_yx_px)
    while refiner.sweeps < sweeps and refiner.step():
        yield
    image, refined = refiner.image(), refiner.probe
    moved = refiner.position_yx_px - frames.position_yx_px
    corner, shift = patch_corners(refiner.position_yx_px, (1.0, 1.0), size)
    windows = object_windows(image.object_yx, corner - np.asarray(image.corner_yx_px), size)
    figures = FrameJudge(refined, frames.valid, device).judge(windows, shift, frames.counts)
    apart = float(np.sqrt(np.square(moved - moved.mean(0)).sum(1).mean()))
    return Refinement(figures, image.object_yx, image.weight_yx, apart, refined)


def _laid(
    windows: NDArray[np.complex64], corner_yx_px: NDArray[np.int64], power_yx: NDArray[np.float32]
) -> tuple[NDArray[np.complex64], tuple[int, int]]:
    """The mean of windows weighted by the probe, NaN where unseen, and the pixel of its [0, 0]."""
    size, low = len(power_yx), corner_yx_px.min(0)
    extent = tuple((corner_yx_px.max(0) - low + size).tolist())
    weight = (power_yx / power_yx.max()).astype(np.float32)
    numerator, denominator = np.zeros(extent, np.complex64), np.zeros(extent, np.float32)
    for window, (y, x) in zip(windows, (corner_yx_px - low).tolist(), strict=True):
        numerator[y : y + size, x : x + size] += window * weight
        denominator[y : y + size, x : x + size] += weight
    return divide(numerator, denominator)[0], (int(low[0]), int(low[1]))
