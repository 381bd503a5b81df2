"""What would explain a misfit: other positions, or another probe?

A few neighbouring frames are refined as told, and again with positions or probe set free; if
neither explains the misfit, with the positions stretched or shrunk, and with the probe defocused.
What takes most of the misfit away is suspected. Orientation is the diagnosis' affair. Used by the
verdict.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
import torch

from ptycho_stream.physics.probe import Probe, defocused
from ptycho_stream.reconstruct.neighbourhood import Neighbours, Refinement, refining
from ptycho_stream.reconstruct.refine_settings import RefineSettings

MAX_FRAMES = 32
"""More take longer and tell no more."""

MIN_FRAMES = 8

ENOUGH_EXCESS = 0.02
"""An excess below this, after refining as told, asks for no explanation."""

SWEEPS = 10
"""Of the frames as told; with more things free, refinement goes on for longer."""

_FREE_SWEEPS = 20
_POSITION_STEP = 3.0
_POSITION_LIMIT_PX = 8.0
_MODES = 3
"""That a free probe may have; a beam of partial coherence is the usual fault of a guess."""

STRETCHES = (0.85, 0.93, 1.07, 1.15)
DEFOCUS_RAD = (-10.0, -5.0, -2.5, -1.25, 1.25, 2.5, 5.0, 10.0)
"""Added phase at the root mean square frequency of the probe."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Excess R of some frames after refinement: as told, and with something changed.

    Attributes:
        frames: that were refined.
        excess: as told; NaN without enough frames.
        with_positions: the least with other positions; as told if that was not asked.
        with_probe: the least with another probe; as told if that was not asked.
        moved_px: root mean square by which free positions moved, apart from a common shift.
        stretch: of the positions that fits best; 1: as told.
        defocus_rad: phase added at the probe's root mean square frequency that fits best; 0: none.
        brightness: 90th percentile of the object's modulus where it is well lit; a sample cannot
            be brighter than 1, so another value means that the photons of the beam are wrong.
        contrast: standard deviation of the object over its mean, where it is well lit.
        problem: why nothing could be found out; empty if something was.
    """

    frames: int
    excess: float = np.nan
    with_positions: float = np.nan
    with_probe: float = np.nan
    moved_px: float = 0.0
    stretch: float = 1.0
    defocus_rad: float = 0.0
    brightness: float = 1.0
    contrast: float = 0.0
    problem: str = ""


def suspecting(
    frames: Neighbours,
    probe: Probe,
    device: torch.device | str = "cpu",
) -> Generator[None, None, Suspicion]:
    """Refine neighbouring frames as told and with changes.

    Yields after every step of a few frames, so that the work can be cut into slices.

    Args:
        frames: near each other, about ``MAX_FRAMES``, with finite positions.
        probe: in photons.
        device: where to compute.
    """
    count = len(frames.counts)
    if count < MIN_FRAMES:
        return Suspicion(count, problem=f"{count} frames are too few to refine by themselves")
    fixed = RefineSettings(modes=len(probe.modes), probe_step=0.0)
    told = yield from refining(frames, probe, fixed, SWEEPS, device)
    excess = told.excess
    brightness, contrast = _look(told)
    known = Suspicion(count, excess, excess, excess, brightness=brightness, contrast=contrast)
    if not excess > ENOUGH_EXCESS:
        return known
    moving = replace(fixed, position_step=_POSITION_STEP, position_limit_px=_POSITION_LIMIT_PX)
    free = yield from refining(frames, probe, moving, _FREE_SWEEPS, device)
    learning = replace(fixed, probe_step=1.0, modes=max(_MODES, len(probe.modes)))
    other = yield from refining(frames, probe, learning, _FREE_SWEEPS, device)
    stretched, refocused = {1.0: free.excess}, {0.0: other.excess}
    if min(stretched[1.0], refocused[0.0]) > ENOUGH_EXCESS:
        for stretch in STRETCHES:
            changed = _stretched(frames, stretch)
            done = yield from refining(changed, probe, fixed, SWEEPS, device)
            stretched[stretch] = done.excess
        for phase in DEFOCUS_RAD:
            changed = defocused(probe, phase)
            done = yield from refining(frames, changed, fixed, SWEEPS, device)
            refocused[phase] = done.excess
    stretch = min(stretched, key=lambda s: stretched[s])
    defocus = min(refocused, key=lambda d: refocused[d])
    return replace(
        known,
        with_positions=min(stretched[stretch], excess),
        with_probe=min(refocused[defocus], excess),
        moved_px=free.moved_px,
        stretch=stretch,
        defocus_rad=defocus,
    )


def _stretched(frames: Neighbours, factor: float) -> Neighbours:
    middle = frames.position_yx_px.mean(0)
    moved = middle + factor * (frames.position_yx_px - middle)
    return replace(frames, position_yx_px=moved)


def _look(refined: Refinement) -> tuple[float, float]:
    """Brightness and contrast of the object where at least one probe's peak has lit it."""
    image = refined.object_yx[refined.weight_yx >= 1.0]
    if not len(image):
        return 1.0, 0.0
    mean = max(abs(complex(image.mean())), 1e-12)
    return float(np.percentile(np.abs(image), 90)), float(image.std()) / mean
