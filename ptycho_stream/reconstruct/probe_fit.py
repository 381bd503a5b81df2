"""The probe that explains a few frames best, among those that differ from the one told in two ways.

What a guess of the beam gets wrong is how far the sample is out of focus, and how the light lies
over the aperture. A few dozen frames tell both before there is an image: the far field is what the
frames show on average, and of all distances from focus the right one leaves the least when the
frames are refined with it. What is found is then refined on more of them. Used while a scan runs,
where the network does not know the beam.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.geometry import View
from ptycho_stream.physics.probe import Probe, defocused
from ptycho_stream.reconstruct.neighbourhood import Neighbours, refining
from ptycho_stream.reconstruct.pattern import far_field_yx
from ptycho_stream.reconstruct.refine_settings import RefineSettings

CLEARLY = 0.7
"""A better probe must leave this share of what the one told leaves, at most: 0.23 on the siemens
star with the file's guess, 2.1 with its true probe."""
POOR = 0.05
"""One that leaves no more is kept: it is good, or something else is wrong, too."""
FITS = 0.02
"""A probe that leaves no more is as good as any from some dozens of frames: 0.01 on the siemens
star with its true probe, 0.006 to 0.02 on simulated scans with theirs."""
_COMPARING_SWEEPS = 1
"""Enough to tell which is best: on 32 frames of the siemens star excess R is then 0.055 at the
right distance and 0.075 at 2.5 rad to either side."""
_JUDGING_SWEEPS = 3
_COMPARED = 32
"""So many frames tell which is best."""
_POLISHING_SWEEPS = 6
"""Of all frames, with a probe that moves: a visit takes a twentieth of the time that the network
takes for a frame, and the network's excess goes from 0.065 to 0.047 with 32 frames of the siemens
star, to 0.039 with 64; 20 sweeps lead to 0.042 and 0.034."""
_NEAR_RAD = (0.0, -2.5, 2.5)
_FAR_RAD = (-10.0, -7.5, -5.0, 5.0, 7.5, 10.0)
_FAR_ABOVE = 0.5
"""Far ones are tried unless a near one leaves less than this share of what the one told does."""
_FINER_RAD = (1.25, 0.625)
"""Steps around the best so far, one after the other."""


@dataclass(frozen=True, slots=True, eq=False)
class FittedProbe:
    """What was found.

    Attributes:
        probe: with the photons of the one told, and modes of that or a single one.
        refined: the same, refined with all frames if it is ``better`` and not ``settled``.
        far_field: ``as told``, or ``as measured``, of one mode then.
        defocus_rad: phase that it has more than the one told, at its root mean square frequency.
        excess: R beyond that of noise, of the frames refined with ``probe``.
        told_excess: the same with the probe as told.
        rather_turned: whether a detector turned by 180 degrees explains the frames about as well
            with the probe as told: there a beam before its focus looks like one behind it.
    """

    probe: Probe
    refined: Probe
    far_field: str
    defocus_rad: float
    excess: float
    told_excess: float
    rather_turned: bool = False

    @property
    def needed(self) -> bool:
        """Whether the probe as told explains the frames badly."""
        return self.told_excess > POOR

    @property
    def clear(self) -> bool:
        """Whether this one explains them much better."""
        return self.excess < CLEARLY * self.told_excess

    @property
    def better(self) -> bool:
        """Whether it should be used instead of the probe as told."""
        return self.needed and self.clear and not self.rather_turned

    @property
    def settled(self) -> bool:
        """Whether it is so good that some dozens of frames would not refine it."""
        return self.excess <= FITS


def fitting(
    frames: Neighbours,
    told: Probe,
    pixel_yx_m: tuple[float, float],
    device: torch.device | str = "cpu",
    modes: int = 1,
) -> Generator[None, None, FittedProbe]:
    """Find the probe; yields after every step of a few frames.

    If the one told leaves no more than ``POOR``, no other is sought.

    Args:
        frames: some dozens near each other, with finite positions; the first ones, the nearest,
            tell which probe is best, and all refine it.
        told: in photons.
        pixel_yx_m: of the object.
        device: where to compute.
        modes: that a better probe is refined with, or more if the one told has more.

    Raises:
        GeometryError: the positions span more pixels than are refined.
        ProbeError: the steps have left the range of numbers.
    """
    few = frames.first(_COMPARED)
    told_excess = yield from _leaving(few, told, _JUDGING_SWEEPS, device)
    found = FittedProbe(told, told, "as told", 0.0, told_excess, told_excess)
    if not found.needed:
        return found
    beams = {
        "as told": told,
        "as measured": with_far_field(told, frames.counts, frames.valid),
    }
    tried: dict[tuple[str, float], float] = {}

    def compare(far_field: str, phases_rad: Iterable[float]) -> Generator[None, None, None]:
        for phase_rad in phases_rad:
            probe = defocused(beams[far_field], phase_rad, pixel_yx_m)
            excess = yield from _leaving(few, probe, _COMPARING_SWEEPS, device)
            tried[far_field, phase_rad] = excess

    for far_field in beams:
        yield from compare(far_field, _NEAR_RAD)
    far_field, phase_rad = _least(tried)
    if tried[far_field, phase_rad] > _FAR_ABOVE * tried["as told", 0.0]:
        yield from compare(far_field, _FAR_RAD)
    for step_rad in _FINER_RAD:
        _, phase_rad = _least(tried)
        yield from compare(far_field, (phase_rad - step_rad, phase_rad + step_rad))
    far_field, phase_rad = _least(tried)
    phase_rad += _beside(tried, far_field, phase_rad, _FINER_RAD[-1])
    probe = defocused(beams[far_field], phase_rad, pixel_yx_m)
    excess = yield from _leaving(few, probe, _JUDGING_SWEEPS, device)
    turned_excess = np.inf
    if far_field == "as told":
        turned_excess = yield from _leaving(_turned(few), told, _JUDGING_SWEEPS, device)
    rather_turned = excess > CLEARLY * turned_excess
    found = FittedProbe(probe, probe, far_field, phase_rad, excess, told_excess, rather_turned)
    if not found.better or found.settled:
        return found
    settings = RefineSettings(modes=max(modes, len(probe.modes)))
    done = yield from refining(frames, probe, settings, _POLISHING_SWEEPS, device)
    return replace(found, refined=done.probe)


def with_far_field(
    probe: Probe, counts: NDArray[Any], valid: NDArray[np.bool_] | None = None
) -> Probe:
    """The leading mode with the far field that frames show on average, and its own phases there.

    The mean over positions is the beam's far field, blurred by what the sample scatters. Pixels
    that do not measure keep the mode's own far field, scaled to the others.

    Args:
        probe: in photons, which are kept.
        counts: any real dtype (n, N, N), zero frequency at N // 2.
        valid: bool (N, N), of the counts; None: every pixel is.
    """
    good = np.ones(counts.shape[1:], bool) if valid is None else valid
    measured = np.isfinite(counts) & (counts >= 0)
    known = measured.sum(0)
    good = good & (known > 0)
    mean = np.where(measured, counts, 0).sum(0, dtype=np.float64) / np.maximum(known, 1)
    own = far_field_yx(probe.leading(1))
    lit = own[good].sum()
    scaled = own * (mean[good].sum() / lit if lit > 0 else 0.0)
    power = np.fft.ifftshift(np.where(good, mean, scaled))
    spectrum = np.fft.fft2(probe.modes[:1].astype(np.complex128))
    modes = np.fft.ifft2(np.sqrt(power) * np.exp(1j * np.angle(spectrum)))
    return Probe(modes.astype(np.complex64)).normalised(probe.photons)


def _leaving(
    frames: Neighbours, probe: Probe, sweeps: int, device: torch.device | str
) -> Generator[None, None, float]:
    """Excess R of the frames, refined with a probe that stays."""
    settings = RefineSettings(modes=len(probe.modes), probe_step=0.0)
    done = yield from refining(frames, probe, settings, sweeps, device)
    return done.excess


def _turned(frames: Neighbours) -> Neighbours:
    """The frames as a detector turned by 180 degrees would give them."""
    view = View(frames.counts.shape[-1], orientation="rotate180")
    valid = None if frames.valid is None else view.apply(frames.valid).astype(bool)
    return replace(frames, counts=view.apply(frames.counts), valid=valid)


def _least(tried: Mapping[tuple[str, float], float]) -> tuple[str, float]:
    return min(tried, key=lambda beam: tried[beam])


def _beside(
    tried: Mapping[tuple[str, float], float], far_field: str, phase_rad: float, step_rad: float
) -> float:
    """How far from the best phase tried the least of a parabola through it and its neighbours lies.

    0 where a neighbour, a step away, was not tried on the way, or there is no such parabola.
    """
    low, least, high = (
        tried.get((far_field, phase_rad + k * step_rad), np.inf) for k in (-1, 0, 1)
    )
    curvature = low - 2 * least + high
    return step_rad / 2 * (low - high) / curvature if 0 < curvature < np.inf else 0.0
