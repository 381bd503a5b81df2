"""The model that refinement fits, object and probe, and what a visit of frames does to it.

Knows nothing of which frames there are or when they are visited: that is
:class:`~ptycho_stream.reconstruct.refine.Refiner`, which alone uses this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import ProbeError
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import MIN_WEIGHT
from ptycho_stream.reconstruct.positions_fit import position_steps
from ptycho_stream.reconstruct.refine_beam import Beam, Shifts, with_modes
from ptycho_stream.reconstruct.refine_field import ObjectField, Windows
from ptycho_stream.reconstruct.refine_gauge import Drift, drift
from ptycho_stream.reconstruct.refine_prior import PriorWeights, with_prior
from ptycho_stream.reconstruct.refine_settings import RefineSettings
from ptycho_stream.reconstruct.refine_step import (
    Projection,
    Steps,
    back_to_object,
    best_length,
    best_lengths,
    damped,
    photons,
    probe_gradient,
    project,
)

_DIM = 0.6
"""Light below which a pixel is started anew from an image that is a good prior: what frames say of
it is mostly what they do not know of the pixels beyond. While the siemens star grows, visited three
times a frame, the image is a tenth better by it, and a third visited once."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames to compare the model with.

    Attributes:
        corner_yx_px: int64 (B, 2), canvas pixel of each window's [0, 0].
        fraction_yx: int64 (B, 2), the rest of the position in 1 / ``subpixel_steps`` of a pixel.
        roots: float32 (B, N, N), see :meth:`RootCache.get`.
        complete: every root was measured.
    """

    corner_yx_px: NDArray[np.int64]
    fraction_yx: NDArray[np.int64]
    roots: Tensor
    complete: bool


@dataclass(frozen=True, slots=True)
class Visited:
    """What a visit found: ``misfit`` float32 (B,), and ``position_step_yx_px`` float32 (B, 2)."""

    misfit: NDArray[np.float32]
    position_step_yx_px: NDArray[np.float32] | None


class Model:
    """Object and probe on a device.

    Args:
        probe: to start from.
        settings: how to go about it.
        device: where to compute.
    """

    def __init__(self, probe: Probe, settings: RefineSettings, device: torch.device) -> None:
        self._settings, self._device, self._size_px = settings, device, probe.size_px
        self.beam = Beam(with_modes(probe, settings.modes), device)
        self.field = ObjectField(device, settings.max_object_px)
        self._drift: Drift | None = None
        self.prior_weights = PriorWeights()
        """Of the image that holds the gauge, in the object that is given away."""
        self.repairs = 0
        """How often parts of the object had to be started anew; 0 in health."""

    def visit(
        self, batch: Batch, settled: NDArray[np.floating], *, probe: bool, positions: bool
    ) -> Visited:
        """Take one step with a batch.

        Args:
            batch: of frames.
            settled: (B,), what each frame's step is multiplied by.
            probe: the probe takes one too, if the settings let it.
            positions: say how far the frames should move.
        """
        scale = torch.as_tensor(settled.astype(np.float32)).to(self._device)
        windows, shifts, illumination = self._under(batch)
        patch = windows.gather(self.field.object)
        noise = self._settings.noise
        found = project(illumination, patch, batch.roots, noise, scale, batch.complete)
        back = back_to_object(illumination, found.change)
        steps = None
        if positions:
            # Settling lets noise average out, of which a position, found from all pixels of a
            # frame, has little: positions go on at full length.
            whole = back / scale[:, None, None]
            steps = position_steps(patch, whole, self.beam.power).cpu().numpy()
        object_step, light = self._object_step(windows, back)
        fits = probe and self._settings.probe_step > 0
        probe_back = self._probe_gradient(patch, found, shifts) if fits else None
        self._advance(windows, patch, back, object_step, light, probe_back)
        return Visited(found.misfit.cpu().numpy(), steps)

    def misfit(self, batch: Batch) -> NDArray[np.float32]:
        """Misfit (B,) of frames, without a step."""
        windows, _, illumination = self._under(batch)
        return self._misfit(illumination, windows.gather(self.field.object), batch).cpu().numpy()

    def _misfit(self, illumination: Tensor, patch: Tensor, batch: Batch) -> Tensor:
        """Misfit (B,) of frames whose windows of the object are ``patch`` (B, N, N)."""
        still = torch.zeros(len(batch.roots), device=self._device)
        noise = self._settings.noise
        return project(illumination, patch, batch.roots, noise, still, batch.complete).misfit

    def cover(self, corner_yx_px: NDArray[np.int64]) -> None:
        """Note the illumination by frames (B, 2) that are visited for the first time."""
        windows = self.field.windows(corner_yx_px, self._size_px)
        windows.add(self.field.weight, (self.beam.power / self.beam.peak)[None])

    def start_from(
        self, object_yx: NDArray[np.complex64], corner_yx_px: tuple[int, int], *, anew: bool
    ) -> None:
        """See :meth:`Refiner.start_from`; ``anew``: also where frames have been visited."""
        if self._drift is None:
            self._drift = self.drift()
        below = _DIM if self.prior_weights.coarse > 0 else MIN_WEIGHT
        if anew and self.field.anchored:
            below = math.inf
        self.field.start_from(object_yx, corner_yx_px, self._drift, below)

    def drift(self) -> Drift | None:
        """How the object has turned against the image that holds the gauge; None: unknown."""
        field = self.field
        if not field.anchored:
            return None
        return drift(field.mean, field.anchor, field.weight, field.corner_yx_px)

    def choose_prior(self, batch: Batch, common_misfit: float) -> None:
        """Find the :attr:`prior_weights` that explain a batch best, of frames never visited.

        Args:
            batch: of frames.
            common_misfit: those that have more are spoiled, and are not asked.
        """
        found, field = self.drift(), self.field
        if found is None:
            return
        windows, _, illumination = self._under(batch)
        each = zip(windows.gather(field.anchor), batch.corner_yx_px.tolist(), strict=True)
        prior = torch.stack([found.turned(part, (y, x), 1) for part, (y, x) in each])
        patch, weight = windows.gather(field.mean), windows.gather(field.weight)

        @cache
        def misfit(weights: PriorWeights) -> Tensor:
            return self._misfit(illumination, with_prior(patch, prior, weight, weights), batch)

        now = misfit(self.prior_weights)
        # A prior that is wrong makes every frame misfit: that does not make it spoiled.
        sound = torch.minimum(now, misfit(PriorWeights())) <= common_misfit

        def mean(weights: PriorWeights) -> float:
            ratio = float((misfit(weights) / now)[sound].mean())
            return ratio if math.isfinite(ratio) else math.inf

        self.prior_weights = (
            self.prior_weights.improved(mean) if bool(sound.any()) else PriorWeights()
        )

    def object_held(self) -> Tensor:
        """The object (H, W), turned back, with the image that holds the gauge as its prior."""
        found, field = self.drift(), self.field
        if found is None:
            return field.mean
        turned = found.turned(field.mean, field.corner_yx_px, -1)
        return with_prior(turned, field.anchor, field.weight, self.prior_weights)

    def probe_held(self) -> Probe:
        """The probe that belongs to :meth:`object_held`."""
        found, modes = self.drift(), self.beam.modes
        if found is not None:
            modes = Drift(0.0, found.ramp_yx).turned(modes, (0, 0), 1)
        return Probe(modes.cpu().numpy().copy())

    def finish_round(self) -> None:
        """What is done once for every frame visited: modes, and what is expected of an object."""
        self._repair()
        self.beam.orthogonalise()
        self._regularise(self._settings.phase_only, self._settings.smoothness)
        self._drift = None

    def _regularise(self, phase_only: float, smoothness: float) -> None:
        """Take the object, where frames have seen it, these shares of the way to what is expected.

        Unit modulus, and the mean of the four neighbours.
        """
        if not (phase_only or smoothness):
            return

        def expected(obj: Tensor) -> Tensor:
            wanted = obj * ((1 - phase_only) + phase_only / obj.abs().clamp_min(1e-6))
            mean = wanted.clone()
            mean[1:-1, 1:-1] = wanted[:-2, 1:-1] + wanted[2:, 1:-1] + wanted[1:-1, :-2]
            mean[1:-1, 1:-1] = (mean[1:-1, 1:-1] + wanted[1:-1, 2:]) / 4
            return torch.lerp(wanted, mean, smoothness)

        field = self.field
        seen = field.weight >= MIN_WEIGHT
        field.object = torch.where(seen, expected(field.object), field.object)
        field.mean = torch.where(seen, expected(field.mean), field.mean)

    def _under(self, batch: Batch) -> tuple[Windows, Shifts, Tensor]:
        """Windows, shifts and the probe (B|1, M, N, N) over them."""
        windows = self.field.windows(batch.corner_yx_px, self._size_px)
        shifts = Shifts.of(batch.fraction_yx, self._settings.subpixel_steps, self._device)
        return windows, shifts, shifts.spread(self.beam.moved(shifts.shift_yx_px))

    def _object_step(self, windows: Windows, back: Tensor) -> tuple[Tensor, Tensor]:
        """Damped step of the object under each frame, and the light on it.

        Both (B, N, N), summed over overlapping frames; light of 1 is that of the probe's peak.
        """
        field = self.field
        windows.add(field.numerator, back)
        windows.add(field.denominator, self.beam.power[None])
        intensity = windows.gather(field.denominator)
        step = damped(windows.gather(field.numerator), intensity, self._settings.damping)
        windows.clear(field.numerator)
        windows.clear(field.denominator)
        return step, intensity / self.beam.peak

    def _probe_gradient(self, patch: Tensor, found: Projection, shifts: Shifts) -> Tensor:
        """Sum over the frames of conj(O) change, (M, N, N)."""
        gradient = probe_gradient(patch, found.change, shifts.group, len(shifts.shift_yx_px))
        return self.beam.moved_back(gradient, shifts.shift_yx_px)

    def _advance(
        self,
        windows: Windows,
        patch: Tensor,
        back: Tensor,
        object_step: Tensor,
        light: Tensor,
        probe_back: Tensor | None,
    ) -> None:
        """Take the steps of object and probe, with momentum."""
        settings, field, beam = self._settings, self.field, self.beam
        a: Tensor | float = 1.0
        if probe_back is None:
            if settings.method == "lsqml":
                a = best_length(object_step, back, beam.power)
        else:
            b: Tensor | float = settings.probe_step
            probe_step = damped(probe_back, photons(patch[None])[0], settings.damping)
            if settings.method == "lsqml":
                steps = Steps(object_step, back, patch, probe_step, probe_back, beam.modes)
                a, best_b = best_lengths(steps, beam.power)
                b = b * best_b
            beam.advance(b * probe_step, settings.momentum)
        step = a * object_step + settings.momentum * windows.gather(field.velocity)
        windows.put(field.velocity, step)
        field.put(windows, patch + step, light)

    def _repair(self) -> None:
        """Start anew where a step has left the range of numbers, so that no NaN spreads."""
        field = self.field
        lost = ~torch.isfinite(field.object.abs() + field.mean.abs())
        if bool(lost.any()):
            self.repairs += 1
            known = field.anchor != 0
            start = torch.where(known, field.anchor, torch.ones_like(field.anchor))
            field.object = torch.where(lost, start, field.object)
            field.mean = torch.where(lost, start, field.mean)
            field.velocity.zero_()
        if not self.beam.is_finite:
            raise ProbeError(
                "refinement has lost the probe: its steps left the range of numbers. Start again "
                "from a probe nearer to the truth, or with a smaller refine.probe_step"
            )
