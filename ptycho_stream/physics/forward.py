"""The far-field forward model, its modulus projection, and the two likelihoods of counts.

Normalisation: I = sum over modes of |FFT_ortho(P O)|^2 in photons, zero frequency at index [0, 0].
Used by the networks, training, refinement, trust and the simulators.
"""

import torch
from torch import Tensor

from ptycho_stream.physics.fourier import fft2_ortho, ifft2_ortho


def far_field(probe: Tensor, obj: Tensor) -> Tensor:
    """Propagate the exit waves of every mode to the detector.

    Args:
        probe: complex (B|1, modes, N, N), in sqrt(photons).
        obj: complex (B, N, N) transmission of the patch.

    Returns:
        Complex (B, modes, N, N), zero frequency at [0, 0], in sqrt(photons).
    """
    return fft2_ortho(probe * obj.unsqueeze(1))


def mode_sum(waves: Tensor) -> Tensor:
    """Add the incoherent modes: complex (B, modes, N, N) to real intensity (B, N, N)."""
    # On a CPU eight times faster than the sum of the squared real view.
    power = (waves * waves.conj()).real
    return power[:, 0] if power.shape[1] == 1 else power.sum(1)


def intensity(probe: Tensor, obj: Tensor) -> Tensor:
    """Expected photons a pixel, real (B, N, N), zero frequency at [0, 0].

    Args:
        probe: complex (B|1, modes, N, N), in sqrt(photons).
        obj: complex (B, N, N) transmission of the patch.
    """
    return mode_sum(far_field(probe, obj))


def modulus_correction(
    probe: Tensor,
    probe_conj: Tensor,
    obj: Tensor,
    amplitude: Tensor,
    valid: Tensor,
    floor: float,
) -> Tensor:
    """Back-propagate what the measured modulus says is wrong with an object estimate.

    The projection scales all modes of a pixel by one real factor (Thibault & Menzel 2013,
    doi:10.1038/nature11806): psi' - psi = FFT^-1[FFT(psi) (A / sqrt(I) - 1)]. Invalid pixels keep
    the estimate. The return value is sum over modes of P* (psi' - psi), to be divided by a
    regularised probe intensity.

    Args:
        probe: complex (B|1, modes, N, N).
        probe_conj: its conjugate, made once by the caller because this runs many times a frame.
        obj: complex (B, N, N).
        amplitude: real (B, N, N), square root of the counts, zero frequency at [0, 0].
        valid: bool (B|1, N, N), False where the detector has no answer.
        floor: added to the intensity under the root, in the units of ``probe`` squared; bounds the
            gradient where the estimate is dark.

    Returns:
        Complex (B, N, N).
    """
    waves = far_field(probe, obj)
    ratio = amplitude * torch.rsqrt(mode_sum(waves) + floor) - 1
    ratio = torch.where(valid, ratio, ratio.new_zeros(()))
    change = probe_conj * ifft2_ortho(waves * ratio.unsqueeze(1))
    return change[:, 0] if change.shape[1] == 1 else change.sum(1)


def poisson_nll(expected: Tensor, counts: Tensor, valid: Tensor | None = None) -> Tensor:
    """Poisson negative log-likelihood, sum of (lambda - k ln lambda + ln Gamma(k + 1)).

    Args:
        expected: real (..., N, N), photons predicted by the model; floored at 1e-12.
        counts: real (..., N, N), photons measured.
        valid: bool, broadcastable; pixels that are False do not count.

    Returns:
        A scalar in the dtype of ``expected``.
    """
    rate = expected.clamp_min(1e-12)
    terms = rate - counts * rate.log() + torch.lgamma(counts + 1)
    if valid is not None:
        terms = torch.where(valid, terms, terms.new_zeros(()))
    return terms.sum()


def amplitude_nll(
    expected: Tensor, counts: Tensor, valid: Tensor | None = None, floor: float = 1e-9
) -> Tensor:
    """Gaussian negative log-likelihood of the counts' square roots, without its constant.

    The root of a Poisson count has a variance of about 1/4 whatever its mean (Bartlett 1936), so
    this is the sum of 2 (sqrt(k) - sqrt(lambda))^2. It is blunter than the Poisson likelihood where
    pixels are dark and more forgiving where they are wrong. Its gradient by an object is -4 times
    :func:`modulus_correction` (with torch's convention for complex gradients).

    Args:
        expected: real (..., N, N), photons predicted by the model.
        counts: real (..., N, N), photons measured, not negative where valid.
        valid: bool, broadcastable; pixels that are False do not count.
        floor: photons added to ``expected`` under the root, which bounds its gradient.

    Returns:
        A scalar in the dtype of ``expected``.
    """
    terms = 2 * (counts.clamp_min(0).sqrt() - (expected + floor).sqrt()).square()
    if valid is not None:
        terms = torch.where(valid, terms, terms.new_zeros(()))
    return terms.sum()
