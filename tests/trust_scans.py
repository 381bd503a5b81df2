"""Simulated scans with their truth, faults put into them, and the image a network makes of them.

Used by the tests of trust and by ``benchmarks/trust.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.geometry import patch_corners
from ptycho_stream.networks.network import Network
from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.probe import Probe, defocused
from ptycho_stream.reconstruct.canvas import Canvas, divide, half_of
from ptycho_stream.reconstruct.halves import CanvasHalves, frames_of_halves, refining_halves
from ptycho_stream.reconstruct.misfit_map import MisfitMap
from ptycho_stream.reconstruct.neighbourhood import finished
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.refine import Refiner
from ptycho_stream.reconstruct.refine_settings import RefineSettings
from ptycho_stream.reconstruct.resolution import (
    TRUTH_THRESHOLD,
    RingCorrelation,
    half_correlation,
    ring_correlation,
    shown_correlation,
)
from ptycho_stream.reconstruct.trust import FrameFigures, FrameJudge, held_out, object_windows
from ptycho_stream.simulate.experiment import SimulatedExperiment, simulate_experiment


@dataclass
class Scan:
    """What a beamline told: counts, positions, a probe; any of them may be wrong."""

    truth: SimulatedExperiment
    network: Network
    counts: NDArray[Any] = field(default_factory=lambda: np.empty(0))
    position_yx_m: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    probe: Probe | None = None

    def __post_init__(self) -> None:
        self.counts = self.counts if self.counts.size else self.truth.counts
        if not self.position_yx_m.size:
            self.position_yx_m = self.truth.positions_yx_m
        self.beam = self.probe or self.truth.probe
        self.size_px = self.beam.size_px
        self.half = half_of(np.arange(len(self.counts)))
        self.corner_yx_px, self.shift_yx_px = patch_corners(
            self.position_yx_m, self.truth.pixel_yx_m, self.size_px
        )

    def told(self, **changes: Any) -> Scan:
        """The same truth, told otherwise."""
        kept = {"counts": self.counts, "position_yx_m": self.position_yx_m, "probe": self.probe}
        return Scan(self.truth, self.network, **(kept | changes))

    @cached_property
    def patches(self) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
        return Predictor(self.network, self.beam).predict(self.counts, self.shift_yx_px)

    @cached_property
    def canvas(self) -> Canvas:
        canvas = Canvas(64)
        canvas.add(*self.patches, self.corner_yx_px, self.half)
        return canvas

    @property
    def low_yx_px(self) -> NDArray[np.int64]:
        return self.corner_yx_px.min(0)

    @cached_property
    def stitched(self) -> NDArray[np.complex64]:
        """The image of all frames, its [0, 0] at ``low_yx_px``."""
        patches, weights = self.patches
        extent = self.corner_yx_px.max(0) - self.low_yx_px + self.size_px
        numerator, denominator = np.zeros(extent, np.complex64), np.zeros(extent, np.float32)
        for patch, weight, (y, x) in zip(
            patches, weights, self.corner_yx_px - self.low_yx_px, strict=True
        ):
            place = slice(y, y + self.size_px), slice(x, x + self.size_px)
            numerator[place] += patch * weight
            denominator[place] += weight
        return divide(numerator, denominator)[0]

    def windows(self, image: NDArray[np.complex64]) -> NDArray[np.complex64]:
        return object_windows(image, self.corner_yx_px - self.low_yx_px, self.size_px)

    def refined(self, sweeps: float = 8) -> NDArray[np.complex64]:
        """The image as a daemon shows it after some sweeps, what was predicted beyond."""
        settings = RefineSettings(modes=len(self.beam.modes), probe_step=0.0)
        refiner = Refiner(self.counts, self.beam, settings)
        low = (int(self.low_yx_px[0]), int(self.low_yx_px[1]))
        refiner.start_from(self.stitched, low)
        pixel = np.asarray(self.truth.pixel_yx_m)
        numbers, position_yx_px = np.arange(len(self.counts)), self.position_yx_m / pixel
        held = held_out(numbers)
        refiner.hold_out(numbers[held], position_yx_px[held])
        refiner.add(numbers[~held], position_yx_px[~held])
        while refiner.sweeps < sweeps and refiner.step():
            pass
        found = refiner.image()
        image = self.stitched.copy()
        place = object_windows(
            found.object_yx, self.low_yx_px[None] - found.corner_yx_px, max(image.shape)
        )[0, : image.shape[0], : image.shape[1]]
        return np.where(np.isfinite(place), place, image)

    @property
    def true_image(self) -> NDArray[np.complex64]:
        """The sample where :attr:`stitched` is."""
        y, x = self.low_yx_px.tolist()
        return self.truth_at((y, x), self.stitched.shape)

    def judged(self, image: NDArray[np.complex64]) -> FrameFigures:
        judge = FrameJudge(self.beam)
        return judge.judge(self.windows(image), self.shift_yx_px, self.counts)

    def truth_at(
        self, corner_yx_px: tuple[int, int], shape: tuple[int, ...]
    ) -> NDArray[np.complex64]:
        """The sample on a piece of the canvas, NaN where it ends."""
        pixel = np.asarray(self.truth.pixel_yx_m)
        origin = np.rint(np.asarray(self.truth.origin_yx_m) / pixel).astype(int)
        piece = np.full(shape, complex(np.nan, np.nan), np.complex64)
        low = np.asarray(corner_yx_px) - origin
        whole = np.asarray(self.truth.object.shape)
        first, last = np.maximum(-low, 0), np.minimum(whole - low, shape)
        source = tuple(slice(a + o, b + o) for a, b, o in zip(first, last, low, strict=True))
        target = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
        piece[target] = self.truth.object[source]
        return piece


def scan_of(network: Network, seed: int = 1, frames: int = 196, **options: Any) -> Scan:
    """A scan of 64 x 64 frames as it should be."""
    options = {"size_px": 64, "photons": 2e5, "step_px": 5.5} | options
    return Scan(simulate_experiment(seed=seed, frames=frames, **options), network)


def area_under_curve(score: NDArray[Any], label: NDArray[np.bool_]) -> float:
    """How often a labelled item scores above another (ROC AUC); without ties."""
    known = np.isfinite(score)
    score, label = score[known], label[known]
    rank = np.argsort(np.argsort(score))
    ones = int(label.sum())
    return float((rank[label].sum() - ones * (ones - 1) / 2) / (ones * (len(label) - ones)))


def block_of(scan: Scan, share: float = 0.05) -> np.ndarray:
    """The frames of one neighbourhood."""
    offset = scan.position_yx_m - scan.position_yx_m[len(scan.counts) // 3]
    return np.argsort(np.hypot(*offset.T))[: int(share * len(scan.counts))]


def spoiled(scan: Scan, fault: str, which: np.ndarray) -> Scan:
    """The scan with a fault in some frames."""
    rng = np.random.default_rng(3)
    counts = scan.counts.astype(np.float32)
    position = scan.position_yx_m.copy()
    pixel = np.asarray(scan.truth.pixel_yx_m)
    if fault == "other frames":
        others = np.setdiff1d(np.arange(len(counts)), which)
        counts[which] = counts[rng.choice(others, len(which), replace=False)]
    if fault == "shutter":
        counts[which] = rng.poisson(0.4 * counts[which])
    if fault == "positions":
        angle = rng.uniform(0, 2 * np.pi, len(which))
        position[which] += 5 * pixel * np.stack([np.sin(angle), np.cos(angle)], 1)
    if fault == "probe":
        windows = torch.as_tensor(scan.windows(scan.true_image)[which])
        wrong = torch.as_tensor(defocused(scan.beam, 4.0).modes)[None]
        expected = intensity(wrong, windows).double().numpy()
        counts[which] = np.fft.fftshift(rng.poisson(expected), axes=(-2, -1))
    return scan.told(counts=counts, position_yx_m=position)


def map_auc(scan: Scan, figures: FrameFigures, which: NDArray[np.int64]) -> float:
    """Area under the ROC curve of the misfit map, for the spots lit mostly by the frames named.

    Of the frames that could be judged.
    """
    judged = np.flatnonzero(figures.usable)
    found, true = (MisfitMap(64, scan.beam.power_yx) for _ in range(2))
    corner = scan.corner_yx_px[judged]
    found.put(judged, corner, figures.excess[judged])
    true.put(judged, corner, np.isin(judged, which).astype(float))
    score, label = found.picture(0.3)[0], true.picture(0.3)[0]
    known = np.isfinite(label) & np.isfinite(score)
    return area_under_curve(score[known], label[known] > 0.5)


def cutoffs(scan: Scan) -> dict[str, float]:
    """Where correlations end, as shares of Nyquist: live ones and those with the truth."""
    pixel = scan.truth.pixel_yx_m
    halves = CanvasHalves(scan.canvas).images()
    assert halves is not None
    use = frames_of_halves(halves, scan.corner_yx_px, scan.half, scan.size_px)
    position = scan.position_yx_m[use] / np.asarray(pixel)
    work = refining_halves(halves, scan.counts[use], position, scan.half[use], scan.beam)
    refined = finished(work)
    shape, weight = halves.object_yx.shape[1:], refined.weight_yx.min(0)
    truth = scan.truth_at(halves.corner_yx_px, shape)
    low = np.array([halves.corner_yx_px]) - scan.low_yx_px
    predicted, polished = (
        object_windows(image, low, shape[0])[0] for image in (scan.stitched, scan.refined(12))
    )

    def true(image: NDArray[np.complex64]) -> RingCorrelation:
        return ring_correlation(image, truth, weight, weight, pixel, TRUTH_THRESHOLD)

    found = {
        "network's halves": half_correlation(halves, pixel),
        "predicted": shown_correlation(predicted, halves, refined, pixel),
        "predicted, true": true(predicted),
        "refined": half_correlation(refined, pixel),
        "refined, true": true(polished),
    }
    return {name: found[name].cutoff_of_nyquist or np.nan for name in found}
