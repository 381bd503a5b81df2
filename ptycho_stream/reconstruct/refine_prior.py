"""The network's image as a prior of what refinement shows: how both are mixed, and by what weights.

The errors of the two are different ones. An object that was fitted to frames has their noise, which
lies in its finest details and is least where it got most light; a network's image has none of it,
and is wrong in other ways, on all scales. So the weights of details and of the rest are two. Used
by :class:`~ptycho_stream.reconstruct.refine_model.Model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""That are tried. On the siemens star a half for the coarse part and 32 or more for the fine one is
best, whether a quarter or all of the frames are there; at fewer photons it is more."""


@dataclass(frozen=True, slots=True)
class PriorWeights:
    """How much the prior counts, as light: 1 = a frame at the probe's peak; each of ``WEIGHTS``.

    Attributes:
        coarse: of what is left when the details are taken away.
        fine: of the details, of up to about two pixels.
    """

    coarse: float = 0.0
    fine: float = 0.0

    def __post_init__(self) -> None:
        """Refuse others.

        Raises:
            ValueError: a weight is none of ``WEIGHTS``.
        """
        for weight in (self.coarse, self.fine):
            if weight not in WEIGHTS:
                raise ValueError(f"a prior's weight is {weight}; it must be one of {WEIGHTS}")

    def neighbours(self) -> Iterator[PriorWeights]:
        """Those that differ by one step in one of the two, or in both the same way."""
        coarse, fine = WEIGHTS.index(self.coarse), WEIGHTS.index(self.fine)
        for down, across in ((0, 1), (1, 0), (1, 1)):
            for sign in (-1, 1):
                at = coarse + sign * down, fine + sign * across
                if min(at) >= 0 and max(at) < len(WEIGHTS):
                    yield PriorWeights(WEIGHTS[at[0]], WEIGHTS[at[1]])

    def improved(self, misfit: Callable[[PriorWeights], float]) -> PriorWeights:
        """Step to the best neighbour, as long as there is one of less misfit.

        ``misfit`` is asked for the same weights several times.
        """
        chosen = self
        while misfit(best := min(chosen.neighbours(), key=misfit)) < misfit(chosen):
            chosen = best
        return chosen


def with_prior(obj: Tensor, prior: Tensor, weight: Tensor, weights: PriorWeights) -> Tensor:
    """Mean of an object and a prior estimate of it, weighted by the light that each stands for.

    Args:
        obj: complex (..., H, W).
        prior: the same, 0 where there is none.
        weight: real (..., H, W), light that ``obj`` was made from, 1 = a frame at the probe's peak.
        weights: light that the prior is worth.
    """
    if weights == PriorWeights():
        return obj
    known = prior != 0
    difference = torch.where(known, prior - obj, 0)
    coarse = torch.where(known, _smooth(difference) / _smooth(known.to(weight.dtype)), 0)
    mixed = obj + _share(weights.coarse, weight) * coarse
    return mixed + _share(weights.fine, weight) * (difference - coarse)


def _share(prior: float, weight: Tensor) -> Tensor | float:
    return prior / (weight + prior) if prior else 0.0


def _smooth(values: Tensor) -> Tensor:
    """Binomial mean over 3 x 3 pixels of (..., H, W), nearly a Gaussian of 0.7 pixels rms."""
    padded = torch.nn.functional.pad(values, (1, 1, 1, 1))
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16
