"""Random probes as beamlines make them: zone plates, mirrors, pinholes, diffusers, many modes.

A probe is drawn in the plane of the optic (amplitude and aberrated phase) and brought to the
sample by one Fourier transform, so its far field stays inside the detector. Used by the scan
simulator and, through it, by training.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.physics.probe import Probe

Waves = NDArray[np.complexfloating[Any, Any]]
Real = NDArray[np.floating[Any]]


def random_probe(
    rng: np.random.Generator, size_px: int, *, modes: int = 1, photons: float = 1e6
) -> Probe:
    """Draw a probe that fills 15 to 65 per cent of the window's width.

    Args:
        rng: the only source of randomness.
        size_px: window size N.
        modes: incoherent modes; those after the first share 2 to 30 per cent of the photons.
        photons: of the unattenuated beam, all modes together.

    Returns:
        The probe, centred on (N - 1) / 2 give or take 3 per cent of the window.
    """
    optic = _optic(rng, size_px)
    centre_yx_px = (size_px - 1) / 2 + rng.uniform(-0.03, 0.03, 2) * size_px
    first = _to_sample(optic, centre_yx_px)
    waves = [first]
    shares = [1.0]
    if modes > 1:
        rest = rng.uniform(0.02, 0.3)
        parts = np.sort(rng.dirichlet(np.full(modes - 1, 2.0)))[::-1]
        waves += [_partner(rng, first, optic, centre_yx_px) for _ in parts]
        shares = [1 - rest, *(rest * parts)]
    powers = [float((np.abs(w) ** 2).sum()) for w in waves]
    scaled = [w * np.sqrt(photons * s / p) for w, s, p in zip(waves, shares, powers, strict=True)]
    return Probe(_orthogonal(np.stack(scaled)))


def zone_plate_probe(size_px: int, photons: float = 1e6) -> Probe:
    """A defocused zone plate with a central stop: a ring about half as wide as the window.

    Args:
        size_px: window size N.
        photons: of the unattenuated beam.

    Returns:
        One mode, centred on (N - 1) / 2; the same for every call.
    """
    ky, kx = _frequencies(size_px)
    k = np.hypot(ky, kx)
    radius, stop, edge = 0.28, 0.09, 1.2 / size_px
    aperture = 0.25 * (1 - np.tanh((k - radius) / edge)) * (1 + np.tanh((k - stop) / edge))
    defocus = np.exp(1j * np.pi * 0.22 * size_px / radius * (ky**2 + 0.9 * kx**2))
    optic = (aperture * defocus).astype(np.complex128)
    wave = _to_sample(optic, np.full(2, (size_px - 1) / 2))
    return Probe(wave[None].astype(np.complex64)).normalised(photons)


def _frequencies(size_px: int) -> tuple[Real, Real]:
    f = np.fft.fftfreq(size_px)
    return f[:, None], f[None, :]


def _optic(rng: np.random.Generator, size_px: int) -> Waves:
    """Aperture times aberrated phase, zero frequency at [0, 0]."""
    ky, kx = _frequencies(size_px)
    radius = rng.uniform(0.12, 0.36)
    k = np.hypot(ky, kx)
    kind = rng.random()
    if kind < 0.55:
        edge = 1 / size_px * rng.uniform(0.5, 2.5)
        amplitude = 0.5 - 0.5 * np.tanh((k - radius) / edge)
        if rng.random() < 0.75:
            stop = radius * rng.uniform(0.1, 0.55)
            amplitude = amplitude * (0.5 + 0.5 * np.tanh((k - stop) / edge))
        amplitude = amplitude * (1 + rng.uniform(0, 0.6) * (k / radius) ** 2)
    elif kind < 0.8:
        amplitude = np.exp(-((k / (0.6 * radius)) ** 2))
    else:
        # Crossed mirrors or slits: a rectangle, softened.
        aspect, edge = rng.uniform(0.6, 1.0), 1.5 / size_px
        amplitude = 0.25 * (1 - np.tanh((np.abs(ky) - radius) / edge))
        amplitude = amplitude * (1 - np.tanh((np.abs(kx) - radius * aspect) / edge))
    amplitude = amplitude * (1 + rng.uniform(0, 0.25) * _smooth(rng, size_px, rng.uniform(1, 4)))
    wave = amplitude * np.exp(1j * _phase(rng, size_px, radius))
    return wave.astype(np.complex128)


def _phase(rng: np.random.Generator, size_px: int, radius: float) -> Real:
    """Defocus, astigmatism, coma, trefoil and roughness over an aperture of ``radius`` cycles/px.

    A phase exp(i pi c k^2) moves the ray at frequency k by c k pixels: c is chosen for the radius
    that the beam shall have at the sample.
    """
    ky, kx = _frequencies(size_px)
    beam_radius_px = size_px * rng.uniform(0.07, 0.32)
    if rng.random() < 0.12:
        beam_radius_px *= rng.uniform(0, 0.5)
    c = rng.choice([-1, 1]) * beam_radius_px / radius
    turn = rng.uniform(0, 2 * np.pi)
    u, v = np.cos(turn) * ky - np.sin(turn) * kx, np.sin(turn) * ky + np.cos(turn) * kx
    phase = np.pi * c * (u**2 + v**2)
    if rng.random() < 0.5:
        phase = phase + np.pi * c * rng.uniform(0, 0.4) * (u**2 - v**2)
    if rng.random() < 0.4:
        phase = phase + rng.uniform(0, 3) * (u**2 + v**2) * u / radius**3
    if rng.random() < 0.3:
        phase = phase + rng.uniform(0, 2) * (u**3 - 3 * u * v**2) / radius**3
    if rng.random() < 0.5:
        phase = phase + rng.uniform(0, 0.6) * _smooth(rng, size_px, rng.uniform(1, 4))
    if rng.random() < 0.08:
        phase = phase + rng.uniform(1, 4) * _smooth(rng, size_px, rng.uniform(2, 8))
    return phase


def _smooth(rng: np.random.Generator, size_px: int, detail: float) -> Real:
    """Unit-variance random field with about ``detail`` features across an aperture."""
    y, x = _frequencies(size_px)
    window = np.exp(-((np.hypot(y, x) * size_px / (2 * detail)) ** 2))
    field = np.fft.fft2(np.fft.fft2(rng.standard_normal((size_px, size_px))) * window).real
    return field / field.std()


def _to_sample(optic: Waves, centre_yx_px: Real) -> Waves:
    ky, kx = _frequencies(optic.shape[-1])
    ramp = np.exp(-2j * np.pi * (ky * centre_yx_px[0] + kx * centre_yx_px[1]))
    return np.fft.ifft2(optic * ramp, norm="ortho")


def _partner(
    rng: np.random.Generator,
    first: Waves,
    optic: Waves,
    centre_yx_px: Real,
) -> Waves:
    """A weaker mode: a vibrating or partly coherent beam, or one whose optic is speckled."""
    size_px = optic.shape[-1]
    ky, kx = _frequencies(size_px)
    turn = rng.uniform(0, 2 * np.pi)
    axis = np.cos(turn) * ky + np.sin(turn) * kx
    kind = rng.random()
    if kind < 0.4:
        return _to_sample(optic * axis, centre_yx_px)
    if kind < 0.6:
        index = np.arange(size_px, dtype=np.float64)
        y, x = index[:, None] - centre_yx_px[0], index[None, :] - centre_yx_px[1]
        return first * (np.cos(turn) * y + np.sin(turn) * x)
    speckle = _smooth(rng, size_px, rng.uniform(2, 12)) + 1j * _smooth(
        rng, size_px, rng.uniform(2, 12)
    )
    return _to_sample(optic * speckle, centre_yx_px)


def _orthogonal(waves: Waves) -> Waves:
    """Mix the modes so that they are orthogonal, strongest first; incoherent sums do not change."""
    flat = waves.reshape(waves.shape[0], -1)
    _, mixing = np.linalg.eigh(flat.conj() @ flat.T)
    mixed = mixing[:, ::-1].T @ flat
    return mixed.reshape(waves.shape).astype(np.complex64)
