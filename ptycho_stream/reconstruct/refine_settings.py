"""How refinement goes about it: method, noise model, step sizes, limits.

One frozen value, checked when it is made; used by
:class:`~ptycho_stream.reconstruct.refine.Refiner` and by whoever offers its options to people.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ptycho_stream.errors import SettingsError

Method = Literal["rpie", "lsqml"]
Noise = Literal["gaussian", "poisson"]


@dataclass(frozen=True, slots=True)
class RefineSettings:
    """The defaults were tuned on the measured siemens star (docs/refinement.md).

    Attributes:
        method: ``rpie``, a fixed fraction of regularised steps (Maiden et al. 2017,
            doi:10.1364/OPTICA.4.000736), or ``lsqml``, the same directions with the lengths that
            fit a batch best (Odstrcil et al. 2018, doi:10.1364/OE.26.003108).
        noise: ``gaussian`` fits roots of the counts, stabilised at few counts as Anscombe (1948)
            did; ``poisson`` follows the Poisson likelihood.
        modes: incoherent probe modes; missing ones are added to a probe that has fewer.
        batch_frames: frames in one step. More fill a GPU; fewer converge in fewer sweeps.
        probe_step: length of the probe's steps, of 1; 0 keeps the probe.
        damping: share of the peak intensity in the steps' denominators, rPIE's alpha; 1 is ePIE.
        momentum: of the last step at the same place that is added to the next one.
        settle_visits: a frame's steps shrink as 1 / (1 + visits / this), so that noise averages
            out; a new frame starts with whole steps.
        position_step: length of the positions' steps; 0 keeps them, 3 is a good length (the fit
            of exit waves sees a part of a displacement, the object has taken on the rest).
        position_start_visits: of a frame before its position moves.
        position_limit_px: most that a position may leave where it was measured.
        phase_only: share of the way that the modulus is taken to 1 in each sweep.
        smoothness: share of the way that a pixel is taken to its neighbours' mean in each sweep.
        subpixel_steps: the probe is moved by multiples of 1 / this of a pixel. Frames of equal
            fraction share the moved probe, which saves a third of the time.
        saturation: counts from this on are not constrained; None: no such limit.
        cache_bytes: of roots of counts; frames beyond are read again at each visit.
        max_object_px: refuse an object array of more pixels than this (48 bytes each).
    """

    method: Method = "lsqml"
    noise: Noise = "gaussian"
    modes: int = 3
    batch_frames: int = 12
    probe_step: float = 1.0
    damping: float = 0.5
    momentum: float = 0.5
    settle_visits: float = 1.5
    position_step: float = 0.0
    position_start_visits: int = 2
    position_limit_px: float = 6.0
    phase_only: float = 0.0
    smoothness: float = 0.0
    subpixel_steps: int = 8
    saturation: float | None = None
    cache_bytes: int = 1 << 29
    max_object_px: int = 1 << 26

    def __post_init__(self) -> None:
        _choice("method", self.method, get_args(Method))
        _choice("noise", self.noise, get_args(Noise))
        _range("modes", self.modes, 1, 32)
        _range("batch_frames", self.batch_frames, 1, 4096)
        _range("probe_step", self.probe_step, 0, 2)
        _range("damping", self.damping, 1e-3, 1)
        _range("momentum", self.momentum, 0, 0.95)
        _range("settle_visits", self.settle_visits, 1e-3, math.inf)
        _range("position_step", self.position_step, 0, 4)
        _range("position_start_visits", self.position_start_visits, 0, 1 << 30)
        _range("position_limit_px", self.position_limit_px, 0, 1e3)
        _range("phase_only", self.phase_only, 0, 1)
        _range("smoothness", self.smoothness, 0, 1)
        _range("subpixel_steps", self.subpixel_steps, 1, 64)
        _range("cache_bytes", self.cache_bytes, 0, math.inf)
        _range("max_object_px", self.max_object_px, 1, math.inf)
        if self.saturation is not None:
            _range("saturation", self.saturation, 1, math.inf)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"refine.{name} is {value!r}; choose one of {', '.join(allowed)}")


def _range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise SettingsError(f"refine.{name} is {value}; it must be {low} to {high}")
