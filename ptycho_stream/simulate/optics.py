"""Optics drawn at random: an aperture and its aberrations, brought to the sample by one transform.

Used by :mod:`ptycho_stream.simulate.probes`. Waves are as :mod:`ptycho_stream.physics.optics` has
them.
"""

from collections.abc import Callable, Mapping
from math import factorial
from types import MappingProxyType

import numpy as np

from ptycho_stream.physics.optics import Real, Waves, frequencies, wave_of

NOLL_TERMS: tuple[tuple[int, int], ...] = (
    *((2, 0), (2, -2), (2, 2), (3, -1), (3, 1), (3, -3), (3, 3)),
    *((4, 0), (4, 2), (4, -2), (4, 4), (4, -4)),
)
"""Zernike orders (n, m) of Noll's 4 to 15: defocus to quadrafoil."""


def smooth(rng: np.random.Generator, size_px: int, detail: float) -> Real:
    """Unit-variance random field (N, N): white noise with a Gaussian window on its spectrum.

    ``detail`` is the window's width in periods a field, halved.
    """
    f = np.arange(size_px // 2 + 1) / (2 * detail)
    rows, columns = frequencies(size_px)[0] * (size_px / (2 * detail)), f[None, :]
    spectrum = np.fft.rfft2(rng.standard_normal((size_px, size_px)))
    spectrum *= np.exp(-(rows * rows)) * np.exp(-(columns * columns))
    field = np.fft.irfft2(spectrum, (size_px, size_px))
    # Turned by pi, as the seeds that trained unrolled-v2 had it.
    field = np.roll(field[::-1, ::-1], 1, (0, 1))
    return field / field.std()


def zernike_phase(coefficients_rad: Real, size_px: int, radius: float) -> Real:
    """Sum of Zernike polynomials over an aperture, radians, (N, N).

    Args:
        coefficients_rad: of NOLL_TERMS, in this order, each of unit root mean square over the
            aperture (Noll 1976, doi:10.1364/JOSA.66.000207).
        size_px: window size N.
        radius: of the aperture, cycles a pixel; the phase is held at its rim's value outside.
    """
    ky, kx = frequencies(size_px)
    rho = np.minimum(np.hypot(ky, kx) / radius, 1)
    theta = np.arctan2(ky, kx)
    phase = np.zeros((size_px, size_px))
    for coefficient, (n, m) in zip(coefficients_rad.tolist(), NOLL_TERMS, strict=True):
        radial = np.zeros_like(phase)
        for s in range((n - abs(m)) // 2 + 1):
            below = (
                factorial(s) * factorial((n + abs(m)) // 2 - s) * factorial((n - abs(m)) // 2 - s)
            )
            radial += (-1) ** s * factorial(n - s) / below * rho ** (n - 2 * s)
        turn = np.cos(m * theta) if m >= 0 else np.sin(-m * theta)
        norm = np.sqrt((2 if m else 1) * (n + 1))
        phase += coefficient * norm * radial * turn
    return phase


def _zone_plate(rng: np.random.Generator, size_px: int, radius: float) -> Waves:
    """A round aperture, mostly with a central stop, brighter towards its rim."""
    ky, kx = frequencies(size_px)
    k = np.hypot(ky, kx)
    edge = 1 / size_px * rng.uniform(0.5, 2.5)
    amplitude = 0.5 - 0.5 * np.tanh((k - radius) / edge)
    if rng.random() < 0.75:
        stop = radius * rng.uniform(0.1, 0.55)
        amplitude = amplitude * (0.5 + 0.5 * np.tanh((k - stop) / edge))
    amplitude = amplitude * (1 + rng.uniform(0, 0.6) * (k / radius) ** 2)
    return _aberrated(rng, amplitude, radius)


def _gaussian(rng: np.random.Generator, size_px: int, radius: float) -> Waves:
    ky, kx = frequencies(size_px)
    width = 0.6 * radius
    return _aberrated(rng, np.exp(-((ky / width) ** 2)) * np.exp(-((kx / width) ** 2)), radius)


def _mirrors(rng: np.random.Generator, size_px: int, radius: float) -> Waves:
    """Crossed mirrors or slits: a rectangle, softened."""
    ky, kx = frequencies(size_px)
    aspect, edge = rng.uniform(0.6, 1.0), 1.5 / size_px
    amplitude = 0.25 * (1 - np.tanh((np.abs(ky) - radius) / edge))
    amplitude = amplitude * (1 - np.tanh((np.abs(kx) - radius * aspect) / edge))
    return _aberrated(rng, amplitude, radius)


def _zernike(rng: np.random.Generator, size_px: int, radius: float) -> Waves:
    """A round aperture with aberrations of every low order, some of them strong."""
    amplitude = _disc(size_px, radius, 1.2 / size_px)
    orders = np.array([n for n, _ in NOLL_TERMS])
    strength = rng.uniform(0.3, 1.5) * np.where(orders == 2, 1.0, 0.6)
    phase = zernike_phase(strength * rng.standard_normal(len(NOLL_TERMS)), size_px, radius)
    return wave_of(amplitude, _contained(phase + _defocus(rng, size_px, radius), amplitude))


def _coded(rng: np.random.Generator, size_px: int, radius: float) -> Waves:
    """A diffuser or a binary mask in the aperture: a speckled beam."""
    amplitude = _disc(size_px, radius, 1.2 / size_px)
    pattern = smooth(rng, size_px, rng.uniform(3, 10))
    if rng.random() < 0.5:
        phase = rng.uniform(1.0, np.pi) * pattern
    else:
        amplitude = amplitude * (0.5 + 0.5 * np.tanh(4 * pattern))
        phase = np.zeros_like(pattern)
    phase = phase + 0.5 * _defocus(rng, size_px, radius)
    return wave_of(amplitude, _contained(phase, amplitude))


def _pinhole(rng: np.random.Generator, size_px: int, radius: float) -> Waves:
    """The near field of a round hole: a disc at a small distance from the sample.

    ``radius`` sets the disc's: wide apertures make small beams here as everywhere.
    """
    index = np.fft.fftfreq(size_px) * size_px
    hole_px = size_px * np.clip(0.03 / radius, 0.1, 0.3)
    distance = np.hypot(index[:, None], index[None, :])
    hole = 0.5 - 0.5 * np.tanh((distance - hole_px) / rng.uniform(0.7, 2.0))
    ky, kx = frequencies(size_px)
    # c up to the Fresnel number 2 of the hole: its rings are seen, its width hardly grows.
    c = hole_px**2 * 2 * rng.uniform(0.02, 0.25)
    return np.fft.fft2(hole, norm="ortho").real * wave_of(
        np.ones_like(hole), np.pi * c * (ky**2 + kx**2)
    )


OPTICS: Mapping[str, Callable[[np.random.Generator, int, float], Waves]] = MappingProxyType(
    {
        "zone-plate": _zone_plate,
        "gaussian": _gaussian,
        "mirrors": _mirrors,
        "zernike": _zernike,
        "coded": _coded,
        "pinhole": _pinhole,
    }
)
"""What draws the wave of each kind, given the size of the window and the aperture's radius."""


def _disc(size_px: int, radius: float, edge: float) -> Real:
    ky, kx = frequencies(size_px)
    return 0.5 - 0.5 * np.tanh((np.hypot(ky, kx) - radius) / edge)


def _contained(phase: Real, amplitude: Real) -> Real:
    """``phase``, weakened where it would throw the beam out of the window.

    A phase that rises by 2 pi over 1 / N cycles a pixel moves its ray by N pixels.
    """
    turns = np.hypot(phase - np.roll(phase, 1, 0), phase - np.roll(phase, 1, 1)) / (2 * np.pi)
    reach = float(np.quantile(turns[amplitude > 0.5 * amplitude.max()], 0.95))
    return phase * min(1.0, 0.28 / max(reach, 1e-9))


def _aberrated(rng: np.random.Generator, amplitude: Real, radius: float) -> Waves:
    size_px = len(amplitude)
    amplitude = amplitude * (1 + rng.uniform(0, 0.25) * smooth(rng, size_px, rng.uniform(1, 4)))
    return wave_of(amplitude, _phase(rng, size_px, radius))


def _curvature(rng: np.random.Generator, size_px: int, radius: float) -> float:
    """A signed c for exp(i pi c k^2), which moves the ray at frequency k by c k pixels."""
    beam_radius_px = size_px * rng.uniform(0.07, 0.32)
    if rng.random() < 0.12:
        beam_radius_px *= rng.uniform(0, 0.5)
    return float(rng.choice([-1, 1]) * beam_radius_px / radius)


def _defocus(rng: np.random.Generator, size_px: int, radius: float) -> Real:
    ky, kx = frequencies(size_px)
    return np.pi * _curvature(rng, size_px, radius) * (ky**2 + kx**2)


def _phase(rng: np.random.Generator, size_px: int, radius: float) -> Real:
    """Defocus, astigmatism, coma, trefoil and roughness over an aperture of ``radius``."""
    ky, kx = frequencies(size_px)
    c = _curvature(rng, size_px, radius)
    turn = rng.uniform(0, 2 * np.pi)
    u, v = np.cos(turn) * ky - np.sin(turn) * kx, np.sin(turn) * ky + np.cos(turn) * kx
    uu, vv = u * u, v * v
    phase = np.pi * c * (uu + vv)
    if rng.random() < 0.5:
        phase += np.pi * c * rng.uniform(0, 0.4) * (uu - vv)
    if rng.random() < 0.4:
        phase += rng.uniform(0, 3) / radius**3 * (uu + vv) * u
    if rng.random() < 0.3:
        phase += rng.uniform(0, 2) / radius**3 * (uu - 3 * vv) * u
    if rng.random() < 0.5:
        phase += rng.uniform(0, 0.6) * smooth(rng, size_px, rng.uniform(1, 4))
    if rng.random() < 0.08:
        phase += rng.uniform(1, 4) * smooth(rng, size_px, rng.uniform(2, 8))
    return phase
