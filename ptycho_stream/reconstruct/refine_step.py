"""The physics of one step of refinement: what a batch's frames say is wrong with object and probe.

Pure functions on tensors, the same on CPU and GPU, for
:class:`~ptycho_stream.reconstruct.refine.Refiner`. B frames, M modes, N x N pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ptycho_stream.physics.fourier import fft2_ortho, ifft2_ortho
from ptycho_stream.reconstruct.refine_frames import COUNT_OFFSET
from ptycho_stream.reconstruct.refine_settings import Noise

_MOST_POISSON = 10.0
"""Largest relative change that one bright pixel over a dark estimate may ask for."""


@dataclass(frozen=True, slots=True)
class Projection:
    """Outcome of comparing a batch with its frames.

    Attributes:
        change: complex (B, M, N, N), by which the exit waves should change.
        misfit: real (B,), squared differences of the stabilised roots in units of their variance,
            1/4, averaged over the measured pixels; about 1 where counts are many and the model is
            right, less where they are few.
    """

    change: Tensor
    misfit: Tensor


def project(
    illumination: Tensor, patch: Tensor, roots: Tensor, noise: Noise, scale: Tensor, complete: bool
) -> Projection:
    """Compare exit waves with the measured roots.

    All modes of a pixel are scaled by one real factor (Thibault & Menzel 2013,
    doi:10.1038/nature11806). Gaussian noise of stabilised roots: sqrt((n + c) / (I + c)) - 1.
    Poisson: ((n + c) / (I + c) - 1) / 2, half of the likelihood's gradient, damped by I / (I + c)
    where the model is dark; both agree for small differences at many counts.

    Args:
        illumination: complex (B|1, M, N, N), the moved probe.
        patch: complex (B, N, N), the object.
        roots: real (B, N, N), sqrt(counts + COUNT_OFFSET), negative where not measured.
        noise: the model of it.
        scale: real (B,), multiplies the change.
        complete: no root is negative; saves a pass.
    """
    waves = fft2_ortho(illumination * patch.unsqueeze(1))
    expected = photons(waves).add_(COUNT_OFFSET)
    ratio = roots * torch.rsqrt(expected)
    if not complete:
        ratio = torch.where(roots < 0, torch.ones_like(ratio), ratio)
    error = ratio - 1
    squared = error.square().mul_(expected).sum((1, 2))
    pixels = roots.shape[1] * roots.shape[2]
    measured = pixels if complete else (roots >= 0).sum((1, 2)).clamp_min(1)
    if noise == "poisson":
        error = (0.5 * (ratio.square() - 1)).clamp_max_(_MOST_POISSON)
    waves.mul_((error * scale[:, None, None]).unsqueeze(1))
    return Projection(ifft2_ortho(waves), 4 * squared / measured)


def back_to_object(illumination: Tensor, change: Tensor) -> Tensor:
    """Sum over modes of conj(P) change, complex (B, N, N)."""
    conjugate = illumination.conj().resolve_conj()
    total = conjugate[:, 0] * change[:, 0]
    for mode in range(1, change.shape[1]):
        total.addcmul_(conjugate[:, mode], change[:, mode])
    return total


def photons(waves: Tensor) -> Tensor:
    """Sum of |psi|^2 over the modes, (B, M, N, N) to real (B, N, N).

    The same as ``mode_sum``, without its complex product: 5 instead of 12 us a frame and mode.
    """
    parts = torch.view_as_real(waves)
    total = parts[:, 0] * parts[:, 0]
    for mode in range(1, waves.shape[1]):
        total.addcmul_(parts[:, mode], parts[:, mode])
    return total[..., 0] + total[..., 1]


def probe_gradient(patch: Tensor, change: Tensor, group: Tensor | None, groups: int) -> Tensor:
    """Sum over the frames of a group of conj(O) change, complex (groups, M, N, N).

    Args:
        patch: complex (B, N, N).
        change: complex (B, M, N, N).
        group: int64 (B,), below ``groups``; None: all are of one.
        groups: how many there are.
    """
    each = patch.conj().resolve_conj().unsqueeze(1) * change
    if group is None:
        return each.sum(0, keepdim=True)
    sums = each.new_zeros((groups, *each.shape[1:]))
    return sums.index_add_(0, group, each)


def damped(gradient: Tensor, intensity: Tensor, damping: float) -> Tensor:
    """Step of rPIE: gradient / ((1 - damping) intensity + damping max intensity)."""
    floor = torch.lerp(intensity, intensity.max(), damping).clamp_min(1e-20)
    return gradient * floor.reciprocal()  # torch divides complex by real six times slower


@dataclass(frozen=True, slots=True)
class Steps:
    """Whole steps of a batch and the gradients that they follow.

    ``object_step``, ``back`` and ``patch`` are complex (B, N, N): step, gradient and value of the
    object under each frame; ``probe_step``, ``probe_back`` and ``modes`` complex (M, N, N).
    """

    object_step: Tensor
    back: Tensor
    patch: Tensor
    probe_step: Tensor
    probe_back: Tensor
    modes: Tensor


def best_lengths(steps: Steps, power: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of the object's and the probe's step that come nearest to the change asked for.

    Minimises |change - a P dO - b O dP|^2 over the batch's exit waves, both lengths in [0, 2]
    (Odstrcil et al. 2018, eqs. 22-25, with one pair a batch). The sums over exit waves are
    exchanged with those over frames and modes, so that none of them is formed; for this the probe
    is taken as not moved by fractions of a pixel.

    Args:
        steps: of the batch.
        power: real (N, N), sum over modes of |P|^2.

    Returns:
        (a, b), real scalars.
    """
    light = photons(steps.patch[None])[0]
    oc = _dot(steps.object_step, steps.back)
    pc = _dot(steps.probe_step, steps.probe_back)
    oo = (photons(steps.object_step[None])[0] * power).sum()
    pp = (photons(steps.probe_step[None])[0] * light).sum()
    by_object = (steps.object_step.conj() * steps.patch).sum(0)
    by_probe = (steps.modes.conj() * steps.probe_step).sum(0)
    op = (by_object * by_probe).real.sum()
    # Nearly parallel steps have no lengths of their own: a little more than rounding is added.
    oo, pp = oo * 1.001 + 1e-20, pp * 1.001 + 1e-20
    determinant = (oo * pp - op * op).clamp_min(1e-38)
    a = (pp * oc - op * pc) / determinant
    b = (oo * pc - op * oc) / determinant
    return a.clamp(0, 2), b.clamp(0, 2)


def best_length(object_step: Tensor, back: Tensor, power: Tensor) -> Tensor:
    """Length of the object's step where the probe is kept; see :func:`best_lengths`."""
    own = (photons(object_step[None])[0] * power).sum()
    return (_dot(object_step, back) / own.clamp_min(1e-20)).clamp(0, 2)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return cast("Any", torch).vdot(a.reshape(-1), b.reshape(-1)).real
