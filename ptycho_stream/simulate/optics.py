"""Optics that make probes: an aperture and its aberrations, brought to the sample by one transform.

Used by :mod:`ptycho_stream.simulate.probes`. A wave in the plane of the optic is a function of
frequency, cycles a pixel of the sample, zero at [0, 0]; so its far field stays on the detector.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import factorial
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import ProbeError
from ptycho_stream.geometry import wavelength_m

Waves = NDArray[np.complexfloating[Any, Any]]
Real = NDArray[np.floating[Any]]

NOLL_TERMS: tuple[tuple[int, int], ...] = (
    *((2, 0), (2, -2), (2, 2), (3, -1), (3, 1), (3, -3), (3, 3)),
    *((4, 0), (4, 2), (4, -2), (4, 4), (4, -4)),
)
"""Zernike orders (n, m) of Noll's 4 to 15: defocus to quadrafoil."""


def frequencies(size_px: int) -> tuple[Real, Real]:
    """Frequencies of rows (N, 1) and columns (1, N), cycles a pixel, zero first."""
    f = np.fft.fftfreq(size_px)
    return f[:, None], f[None, :]


def to_sample(optic: Waves, centre_yx_px: Real) -> Waves:
    """The wave at the sample, complex (N, N), centred on ``centre_yx_px``."""
    ky, kx = frequencies(optic.shape[-1])
    row = np.exp(-2j * np.pi * ky * centre_yx_px[0])
    column = np.exp(-2j * np.pi * kx * centre_yx_px[1])
    return np.fft.ifft2(optic * row * column, norm="ortho")


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


@dataclass(frozen=True)
class ZonePlate:
    """A zone plate with a central stop, out of focus.

    Attributes:
        radius: of the aperture, cycles a pixel of the sample; below 0.5.
        stop: radius of the central stop, in the same unit; 0 for none.
        defocus_yx_px: radius that geometry gives the beam at the sample along each axis, pixels; 0
            in focus, negative before it.
    """

    radius: float
    stop: float
    defocus_yx_px: tuple[float, float]

    def __post_init__(self) -> None:
        if not 0 < self.radius < 0.5:
            raise ProbeError(
                f"the zone plate's aperture reaches {self.radius:.3g} cycles a pixel; it must stay "
                "below 0.5, the detector's edge: use a wider outermost zone, a shorter distance or "
                "larger frames"
            )
        if not 0 <= self.stop < self.radius:
            raise ProbeError("the central stop must be smaller than the zone plate")

    @classmethod
    def standard(cls, size_px: int) -> Self:
        """A ring about half as wide as a window of ``size_px``, a little astigmatic."""
        return cls(0.28, 0.09, (0.22 * size_px, 0.22 * 0.9 * size_px))

    @classmethod
    def of_optics(
        cls,
        *,
        diameter_m: float,
        outermost_zone_m: float,
        stop_diameter_m: float,
        defocus_m: float,
        photon_energy_eV: float,
        pixel_m: float,
    ) -> Self:
        """The zone plate of a beamline, first order.

        Its numerical aperture is wavelength / (2 outermost zone width) (Attwood and Sakdinawat,
        X-Rays and Extreme Ultraviolet Radiation, 2016, eq. 10.26), which frequency 1 / (2 outermost
        zone width) carries; at a distance z from focus the beam's radius is z times it.

        Raises:
            ProbeError: a length is not above 0, or the aperture does not fit onto the detector.
        """
        if not (min(diameter_m, outermost_zone_m, pixel_m) > 0 and stop_diameter_m >= 0):
            raise ProbeError("a zone plate's diameter and outermost zone width are above 0")
        aperture = wavelength_m(photon_energy_eV) / (2 * outermost_zone_m)
        reach_px = defocus_m * aperture / pixel_m
        radius = pixel_m / (2 * outermost_zone_m)
        return cls(radius, radius * stop_diameter_m / diameter_m, (reach_px, reach_px))

    def wave(self, size_px: int) -> Waves:
        """The wave behind the optic, for a window of ``size_px``.

        Raises:
            ProbeError: the defocused beam is wider than the window.
        """
        reach_px = max(abs(d) for d in self.defocus_yx_px)
        if reach_px > 0.45 * size_px:
            raise ProbeError(
                f"the defocused beam is {2 * reach_px:.0f} px wide, more than a window of "
                f"{size_px} px holds: come nearer to the focus or use larger frames"
            )
        ky, kx = frequencies(size_px)
        k = np.hypot(ky, kx)
        edge = 1.2 / size_px
        aperture = 0.5 * (1 - np.tanh((k - self.radius) / edge))
        if self.stop:
            aperture = aperture * 0.5 * (1 + np.tanh((k - self.stop) / edge))
        # A phase exp(i pi c k^2) moves the ray at frequency k by c k pixels.
        cy, cx = (d / self.radius for d in self.defocus_yx_px)
        return _wave(aperture, np.pi * (cy * ky**2 + cx * kx**2))


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
    return _wave(amplitude, _contained(phase + _defocus(rng, size_px, radius), amplitude))


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
    return _wave(amplitude, _contained(phase, amplitude))


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
    return np.fft.fft2(hole, norm="ortho").real * _wave(
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


def _wave(amplitude: Real, phase: Real) -> Waves:
    """Amplitude * exp(i phase), complex128; by parts, which takes half as long."""
    out = np.empty(phase.shape, np.complex128)
    np.multiply(amplitude, np.cos(phase), out=out.real)
    np.multiply(amplitude, np.sin(phase), out=out.imag)
    return out


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
    return _wave(amplitude, _phase(rng, size_px, radius))


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
