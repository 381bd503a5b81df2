"""The probe while it is refined: modes, their momentum, their sub-pixel shifts, their gauge.

Total photons stay what they were at the start. :class:`~ptycho_stream.reconstruct.refine.Refiner`
uses :class:`Beam`; :func:`with_modes` is for everyone whose probe has too few modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.physics.fourier import fft2_ortho
from ptycho_stream.physics.probe import Probe, shifted_modes
from ptycho_stream.reconstruct.refine_step import photons

_ADDED_SHARE = 0.03
"""Of the photons, in each mode that is added."""

_POWERS = ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (2, 1), (1, 2), (2, 2))

# torch.linalg has no type stubs.
_LINALG = cast("Any", torch.linalg)


def with_modes(probe: Probe, count: int) -> Probe:
    """The probe with at least ``count`` modes and the same photons.

    Added are the first mode times powers of y and x about its centre, made orthogonal to all
    before (the Hermite-like modes of a partly coherent beam: Starikov & Wolf 1982,
    doi:10.1364/JOSA.72.000923; any orthogonal start converges to the same modes, these sooner).
    """
    have = len(probe.modes)
    if have >= count:
        return probe
    first = probe.modes[0].astype(np.complex128)
    size = probe.size_px
    grid = np.arange(size) - (size - 1) / 2
    power = np.abs(first) ** 2 / (np.abs(first) ** 2).sum()
    y = ((grid - (power.sum(1) * grid).sum()) / size)[:, None]
    x = ((grid - (power.sum(0) * grid).sum()) / size)[None, :]
    modes = [mode.astype(np.complex128) for mode in probe.modes]
    rng = np.random.default_rng(0)
    for number in range(count - have):
        at = _POWERS[number] if number < len(_POWERS) else (0, 0)
        made = first * y ** at[0] * x ** at[1]
        if number >= len(_POWERS):
            made = made * np.exp(2j * np.pi * rng.random((size, size)))
        modes.append(_orthogonal(made, modes) * np.sqrt(_ADDED_SHARE * probe.photons))
    return Probe(np.stack(modes).astype(np.complex64)).normalised(probe.photons)


def _orthogonal(made: NDArray[Any], others: list[NDArray[Any]]) -> NDArray[Any]:
    for other in others:
        made = made - other * (np.vdot(other, made) / max(float(np.vdot(other, other).real), 1e-30))
    return made / max(float(np.linalg.norm(made)), 1e-30)


@dataclass(frozen=True, slots=True)
class Shifts:
    """The sub-pixel shifts of a batch, each one once.

    ``shift_yx_px`` float32 (U, 2); ``group`` int64 (B,) says which is a frame's, None if U is 1.
    """

    shift_yx_px: Tensor
    group: Tensor | None

    @classmethod
    def of(cls, fraction_yx: NDArray[np.int64], steps: int, device: torch.device) -> Shifts:
        """From (B, 2) multiples of 1 / ``steps`` of a pixel."""
        unique, inverse = np.unique(fraction_yx, axis=0, return_inverse=True)
        shift = torch.as_tensor((unique / steps).astype(np.float32)).to(device)
        if len(unique) == 1:
            return cls(shift, None)
        return cls(shift, torch.as_tensor(inverse.reshape(-1)).to(device))

    def spread(self, moved: Tensor) -> Tensor:
        """(U, ...) to (B, ...), or (1, ...) where all are equal."""
        return moved if self.group is None else moved[self.group]


class Beam:
    """Probe modes (M, N, N) complex64 on a device, in sqrt(photons)."""

    def __init__(self, probe: Probe, device: torch.device) -> None:
        self.modes = torch.as_tensor(probe.modes).to(device)
        self.velocity = torch.zeros_like(self.modes)
        self._photons = probe.photons
        self._renew()

    def _renew(self) -> None:
        self.spectrum = fft2_ortho(self.modes)
        self.power = photons(self.modes[None])[0]

    @property
    def peak(self) -> Tensor:
        """Highest intensity of a pixel, a scalar."""
        return self.power.max()

    def moved(self, shift_yx_px: Tensor) -> Tensor:
        """The modes moved by each of (U, 2) shifts, complex64 (U, M, N, N)."""
        return shifted_modes(self.spectrum, shift_yx_px)

    def moved_back(self, waves: Tensor, shift_yx_px: Tensor) -> Tensor:
        """Undo :meth:`moved` for gradients (U, M, N, N) and add them: (M, N, N)."""
        return shifted_modes(fft2_ortho(waves), -shift_yx_px).sum(0)

    def advance(self, step: Tensor, momentum: float) -> None:
        """Take a step (M, N, N), then make the photons what they were."""
        self.velocity = momentum * self.velocity + step
        self.modes = self.modes + self.velocity
        total = photons(self.modes[None]).sum()
        self.modes = self.modes * torch.sqrt(self._photons / total.clamp_min(1e-30))
        self._renew()

    def orthogonalise(self) -> None:
        """Mix the modes so that they are orthogonal, brightest first; intensities do not change."""
        flat = self.modes.flatten(1)
        gram = flat @ flat.conj().T
        _, vectors = _LINALG.eigh(gram)
        mix = vectors.flip(1).conj().T.contiguous()
        # The brightest mode keeps its phase: it is half of the gauge that the object is held to.
        turn = ((mix @ flat) * flat.conj()).sum(1)
        mix = mix * torch.polar(torch.ones_like(turn.real), -turn.angle())[:, None]
        self.modes = (mix @ flat).view_as(self.modes)
        self.velocity = (mix @ self.velocity.flatten(1)).view_as(self.velocity)
        self._renew()

    @property
    def is_finite(self) -> bool:
        """Whether the modes are numbers, and not all zero."""
        return 0 < float(self.power.sum()) < float("inf")
