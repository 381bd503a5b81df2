"""Whether predicted patches can be true at all: collapsed and non-finite output of a network.

A plain network can collapse: it answers every frame with the same patch, or with a constant, and
no loss shows it. The predictor judges every batch with this; the image publishes what it finds.

**The rule.** A sample may really be flat, so flatness alone is no alarm; the diffraction decides.
For the exit waves of two objects under one probe, Parseval and the triangle inequality give
``|| |F P O1| - |F P O2| || <= || P O1 - P O2 ||``, summed over modes too. With O2 a constant this
says: the frame's amplitude differs from that of the empty beam (scaled to fit) by no more than the
patch varies about its mean, weighted by |P|^2. So the share of the frame's amplitude that the empty
beam and photon noise do not explain, the *demand*, is a lower bound for the relative spread of a
true patch. A patch with less than a quarter of it is collapsed. The same holds among the frames of
a batch: where their amplitudes, scaled to one flux, differ, their patches have to. Demands below
5 % are not looked at, there a probe that is known roughly, and noise, weigh as much. A probe that
does not fit the beam demands a spread by itself; that, too, deserves a look.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST_DEMAND = 0.05
"""Relative spread; what demands less may be flat."""

LEAST_SHARE = 0.25
"""A patch with a smaller part than this of the spread that its frame demands is collapsed."""

WATCHED_PATCHES = 64
"""So many, the newest, are what an image says of its network."""

_ENOUGH_PATCHES = 4


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What was found of the patches of a batch, (B,) each.

    Attributes:
        finite: the patch and its weights are numbers.
        spread: relative standard deviation of the patch, weighted by the probe; NaN if not finite.
        demand: lower bound for a true patch's spread, from the frame.
        collapsed: the spread, or that among the patches of the batch, is far below the demand.
    """

    finite: NDArray[np.bool_]
    spread: NDArray[np.float32]
    demand: NDArray[np.float32]
    collapsed: NDArray[np.bool_]

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Verdicts:
        """Those of some patches."""
        return Verdicts(
            self.finite[rows], self.spread[rows], self.demand[rows], self.collapsed[rows]
        )


def judge(
    patches: Tensor,
    power: Tensor,
    amplitude: Tensor,
    empty: Tensor,
    real: Tensor | None = None,
) -> Tensor:
    """Judge the patches of one batch, on the device where they are; see the rule above.

    Args:
        patches: complex64 (B, N, N), of the phase that they are stitched with.
        power: float32 (B, N, N), the probes' intensity in any unit.
        amplitude: float32 (B, N, N), square root of the counts, 0 where masked.
        empty: float32 (N, N), that of the beam without a sample, 0 where masked.
        real: bool (B,), False for those that only fill up the batch; None: all are real.

    Returns:
        float32 (4, B), for :func:`verdicts`.
    """
    weight = power.sum((-2, -1))
    mean = (patches * power).sum((-2, -1)) / weight
    square = (power * (patches * patches.conj()).real).sum((-2, -1)) / weight
    finite = torch.isfinite(square)
    level = (mean * mean.conj()).real.clamp_min(1e-12)
    spread = (square / level - 1).clamp_min(0).sqrt()
    demand = _demand_of_frames(amplitude, empty)
    collapsed = (demand > LEAST_DEMAND) & (spread < LEAST_SHARE * demand)
    alike = _alike(patches, power, amplitude, finite if real is None else finite & real)
    return torch.stack([finite.float(), spread, demand, (collapsed | alike).float()])


def verdicts(judged: NDArray[np.float32]) -> Verdicts:
    """What :func:`judge` found (4, B), by name."""
    finite = judged[0] > 0
    return Verdicts(finite, judged[1], judged[2], finite & (judged[3] > 0))


def _demand_of_frames(amplitude: Tensor, empty: Tensor) -> Tensor:
    """The share (B,) of the frames' amplitude that a constant object and noise do not explain."""
    total = amplitude.square().sum((-2, -1))
    overlap = (amplitude * empty).sum((-2, -1))
    beam = empty.square()
    photons = beam.sum().clamp_min(1e-12)
    rest = total - overlap.square() / photons
    noise = _noise(beam * (total / photons)[:, None, None]).sum((-2, -1))
    return ((rest - noise).clamp_min(0) / total.clamp_min(1)).sqrt()


def _alike(patches: Tensor, power: Tensor, amplitude: Tensor, counted: Tensor) -> Tensor:
    """Whether the patches are so much alike as the frames do not allow; a bool tensor ().

    Only those that are ``counted`` (B,). Shapes do not hang on which these are, so that a GPU can
    go through it without asking.
    """
    number, counted = counted.sum().clamp_min(1), counted[:, None, None]
    nothing = power.new_zeros(())
    patches = torch.where(counted, patches, nothing)
    level = patches.sum(0) / number
    off = torch.where(counted, patches - level, nothing)
    power = torch.where(counted, power, nothing)
    # The beam's flux varies from frame to frame, and says nothing of the sample.
    amplitude = torch.where(counted, amplitude, nothing)
    photons = amplitude.square().sum((-2, -1), keepdim=True)
    flux = torch.where(counted, photons.sum() / number / photons.clamp_min(1), nothing)
    amplitude = amplitude * flux.sqrt()
    apart = (power * (off * off.conj()).real).sum()
    spread = (apart / (power * (level * level.conj()).real).sum().clamp_min(1e-12)).sqrt()
    square = amplitude.square()
    differ = torch.where(counted, amplitude - amplitude.sum(0) / number, nothing).square().sum()
    noise = (flux * _noise(square.sum(0) / number / flux.clamp_min(1e-12))).sum()
    demand = ((differ - noise).clamp_min(0) / square.sum().clamp_min(1)).sqrt()
    return (number > 1) & (demand > LEAST_DEMAND) & (spread < LEAST_SHARE * demand)


def _noise(photons: Tensor) -> Tensor:
    """No less than the mean of (sqrt(n) - sqrt(photons))^2 for Poisson n; 1/4 for many photons."""
    return (2 * photons).clamp_max(0.5)


class SpreadWatch:
    """The verdicts on the newest patches of an image.

    Args:
        history: float32 (n, 3), what :attr:`history` was when the image was saved.
    """

    def __init__(self, history: NDArray[np.float32] | None = None) -> None:
        rows: list[tuple[float, float, float]] = []
        if history is not None:
            rows = [(float(row[0]), float(row[1]), float(row[2])) for row in history]
        self._newest = deque(rows, maxlen=WATCHED_PATCHES)

    def add(self, found: Verdicts) -> None:
        """Take in the verdicts on patches."""
        columns = (found.spread.tolist(), found.demand.tolist(), found.collapsed.tolist())
        self._newest.extend(zip(*columns, strict=True))

    def merge(self, other: SpreadWatch) -> None:
        """Take in what another one watched."""
        self._newest.extend(other._newest)

    @property
    def history(self) -> NDArray[np.float32]:
        """Spread, demand and collapse (0 or 1) of the newest patches, (n, 3)."""
        return np.array(self._newest, np.float32).reshape(-1, 3)

    @property
    def spread(self) -> float | None:
        """Median relative spread of the newest patches; None before the first one."""
        spread = self.history[:, 0]
        spread = spread[np.isfinite(spread)]
        return float(np.median(spread)) if len(spread) else None

    @property
    def collapsed(self) -> bool:
        """Whether most of the newest patches that must vary do not, or are no numbers at all."""
        spread, demand, collapsed = self.history.T
        faulty = (collapsed > 0) | ~np.isfinite(spread)
        telling = faulty | (demand > LEAST_DEMAND)
        return bool(telling.sum() >= _ENOUGH_PATCHES and 2 * faulty.sum() > telling.sum())
