"""Optics that shape a beam: zone plates, pinholes, Gaussian beams, and their waves at the sample.

Used by :mod:`ptycho_stream.physics.optics_probe`, the simulators and ``config check``; numpy only.
A wave in the plane of the optic is a function of frequency, cycles a pixel of the sample, zero at
[0, 0]; so its far field stays on the detector. Of a wave exp(2 pi i k x) the light arrives at
frequency k of the detector, and over a distance z downstream its phase changes by -pi wavelength z
k^2 (Fresnel's transfer function; Goodman, Introduction to Fourier Optics, 3rd ed. 2005, eq. 4-21).
"""

from dataclasses import dataclass
from math import hypot, log, pi, sqrt
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import ProbeError
from ptycho_stream.geometry import wavelength_m
from ptycho_stream.settings import GaussianSettings, OpticsSettings, ZonePlateSettings

Waves = NDArray[np.complexfloating[Any, Any]]
Real = NDArray[np.floating[Any]]

_WIDEST = 0.45
"""A beam's radius reaches so far at most, in windows."""
_SOFT = 1.2
"""Edges are so soft: one step of frequency or one pixel, as a scale of tanh."""


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


def wave_of(amplitude: Real, phase: Real) -> Waves:
    """Amplitude * exp(i phase), complex128; by parts, which takes half as long."""
    out = np.empty(phase.shape, np.complex128)
    np.multiply(amplitude, np.cos(phase), out=out.real)
    np.multiply(amplitude, np.sin(phase), out=out.imag)
    return out


class Optic(Protocol):
    """What has a wave."""

    def wave(self, size_px: int) -> Waves:
        """The wave in the plane of the optic, for a window of ``size_px``.

        Raises:
            ProbeError: the beam does not fit into the window, or is finer than its pixels.
        """
        ...


@dataclass(frozen=True)
class ZonePlate:
    """A zone plate with a central stop, out of focus.

    Attributes:
        radius: of the aperture, cycles a pixel of the sample; below 0.5.
        stop: radius of the central stop, in the same unit; 0 for none.
        defocus_yx_px: radius that geometry gives the beam at the sample along each axis, pixels; 0
            in focus, positive before it (the beam converges), negative behind it.
        aspect: height of a pixel over its width; lengths are counted in heights, along x too.
    """

    radius: float
    stop: float
    defocus_yx_px: tuple[float, float]
    aspect: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.radius < 0.5 * min(1.0, self.aspect):
            raise ProbeError(
                f"the zone plate's aperture reaches {self.radius / min(1.0, self.aspect):.3g} "
                "cycles a pixel; it must stay below 0.5, the detector's edge: use a wider "
                "outermost zone, a shorter distance or larger frames"
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
        aspect: float = 1.0,
    ) -> Self:
        """The zone plate of a beamline, first order.

        Its numerical aperture is wavelength / (2 outermost zone width) (Attwood and Sakdinawat,
        X-Rays and Extreme Ultraviolet Radiation, 2016, eq. 10.26), which frequency 1 / (2 outermost
        zone width) carries; at a distance z from focus the beam's radius is z times it.

        Args:
            diameter_m: of the zone plate.
            outermost_zone_m: width of the outermost zone.
            stop_diameter_m: of the central stop; 0 for none.
            defocus_m: how far before the focus the sample is.
            photon_energy_eV: of the beam.
            pixel_m: height of an object pixel.
            aspect: height of a pixel over its width.

        Raises:
            ProbeError: a length is not above 0, or the aperture does not fit onto the detector.
        """
        if not (min(diameter_m, outermost_zone_m, pixel_m) > 0 and stop_diameter_m >= 0):
            raise ProbeError("a zone plate's diameter and outermost zone width are above 0")
        aperture = wavelength_m(photon_energy_eV) / (2 * outermost_zone_m)
        reach_px = defocus_m * aperture / pixel_m
        radius = pixel_m / (2 * outermost_zone_m)
        stop = radius * stop_diameter_m / diameter_m
        return cls(radius, stop, (reach_px, reach_px), aspect)

    def wave(self, size_px: int) -> Waves:
        """The wave behind the optic, for a window of ``size_px``.

        Raises:
            ProbeError: the defocused beam is wider than the window.
        """
        reach_y_px, reach_x_px = (abs(d) for d in self.defocus_yx_px)
        reach_px = max(reach_y_px, reach_x_px * self.aspect)
        _check_fits(reach_px, size_px, "come nearer to the focus or use larger frames")
        ky, kx = frequencies(size_px)
        kx = kx * self.aspect
        k = np.hypot(ky, kx)
        edge = _SOFT / size_px
        aperture = 0.5 * (1 - np.tanh((k - self.radius) / edge))
        if self.stop:
            aperture = aperture * 0.5 * (1 + np.tanh((k - self.stop) / edge))
        # A phase exp(i pi c k^2) moves the ray at frequency k by -c k pixels.
        cy, cx = (d / self.radius for d in self.defocus_yx_px)
        return wave_of(aperture, np.pi * (cy * ky**2 + cx * kx**2))


@dataclass(frozen=True)
class Pinhole:
    """A round hole at a distance before the sample, in a plane wave.

    Attributes:
        radius_px: of the hole.
        fresnel_px2: wavelength times the distance, square pixels.
        aspect: height of a pixel over its width; lengths are counted in heights, along x too.
    """

    radius_px: float
    fresnel_px2: float
    aspect: float = 1.0

    def wave(self, size_px: int) -> Waves:
        """The far field of the hole with the phase of the distance.

        Frequencies whose phase turns by more than pi from one to the next are left out: their
        light leaves the window (Matsushima and Shimobaba 2009, doi:10.1364/OE.17.019662).

        Raises:
            ProbeError: the first minimum of the hole's far field, at 1.22 wavelength distance /
                diameter (Goodman, eq. 4-32), is outside the window, or the hole below 3 pixels.
        """
        if self.radius_px < 1.5:
            raise ProbeError(
                f"the pinhole is {2 * self.radius_px:.2g} px wide, and at least 3 are needed: use "
                "a wider pinhole, or a larger distance or shorter wavelength for smaller pixels"
            )
        reach_px = self.radius_px + 0.61 * self.fresnel_px2 / self.radius_px
        widest_px = reach_px * max(1.0, self.aspect)
        _check_fits(widest_px, size_px, "bring the pinhole nearer or use larger frames")
        index = np.fft.fftfreq(size_px) * size_px
        distance_px = np.hypot(index[:, None], index[None, :] / self.aspect)
        hole = 0.5 - 0.5 * np.tanh((distance_px - self.radius_px) / (0.5 * _SOFT))
        ky, kx = frequencies(size_px)
        kx = kx * self.aspect
        limit = size_px / (2 * max(self.fresnel_px2, 1e-9) * max(1.0, self.aspect))
        kept = 0.5 - 0.5 * np.tanh((np.hypot(ky, kx) - limit) * size_px / _SOFT)
        spectrum = np.fft.fft2(hole, norm="ortho").real  # the hole is the same from all sides
        return spectrum * wave_of(kept, -np.pi * self.fresnel_px2 * (ky**2 + kx**2))


@dataclass(frozen=True)
class GaussianBeam:
    """A Gaussian beam, out of its waist or in it.

    Attributes:
        waist_px: radius at the waist where the intensity is 1 / e^2.
        fresnel_px2: wavelength times the sample's distance behind the waist, square pixels.
        aspect: height of a pixel over its width; lengths are counted in heights, along x too.
    """

    waist_px: float
    fresnel_px2: float
    aspect: float = 1.0

    @property
    def radius_px(self) -> float:
        """At the sample, where the intensity is 1 / e^2.

        waist * sqrt(1 + (z / z_R)^2), z_R = pi waist^2 / wavelength (Saleh and Teich, Fundamentals
        of Photonics, 2nd ed. 2007, eq. 3.1-8 and 3.1-11).
        """
        return self.waist_px * hypot(1, self.fresnel_px2 / (pi * self.waist_px**2))

    def wave(self, size_px: int) -> Waves:
        """The far field of the waist, with the phase of the distance.

        Raises:
            ProbeError: the beam at the sample, or its far field, does not fit.
        """
        widest_px = 1.8 * self.radius_px * max(1.0, self.aspect)
        _check_fits(widest_px, size_px, "come nearer to the waist or use larger frames")
        if self.waist_px * min(1.0, self.aspect) < 1.2:
            raise ProbeError(
                f"the Gaussian beam's waist is {1.1774 * self.waist_px:.2g} px wide at half "
                "maximum, and at least 1.4 are needed for its far field to fit onto the detector: "
                "use a wider beam, a shorter distance or larger frames"
            )
        ky, kx = frequencies(size_px)
        square = ky**2 + (kx * self.aspect) ** 2
        far = np.exp(-((np.pi * self.waist_px) ** 2) * square)
        return wave_of(far, -np.pi * self.fresnel_px2 * square)


def optic_of(
    optics: OpticsSettings, photon_energy_eV: float, pixel_yx_m: tuple[float, float]
) -> Optic:
    """The optic of the settings, for a beam and the pixels that its images have.

    Distances are positive where the sample is behind focus, waist or pinhole. Of a Gaussian beam of
    intensity exp(-2 r^2 / w^2) the full width at half maximum is w sqrt(2 ln 2).

    Raises:
        ProbeError: a zone plate's aperture does not fit onto the detector.
    """
    pixel_m, aspect = pixel_yx_m[0], pixel_yx_m[0] / pixel_yx_m[1]
    if isinstance(optics, ZonePlateSettings):
        return ZonePlate.of_optics(
            diameter_m=optics.diameter_m,
            outermost_zone_m=optics.outer_zone_width_m,
            stop_diameter_m=optics.central_stop_m,
            defocus_m=-optics.defocus_m,
            photon_energy_eV=photon_energy_eV,
            pixel_m=pixel_m,
            aspect=aspect,
        )
    scale = wavelength_m(photon_energy_eV) / pixel_m**2
    if isinstance(optics, GaussianSettings):
        waist_px = optics.fwhm_m / sqrt(2 * log(2)) / pixel_m
        return GaussianBeam(waist_px, scale * optics.defocus_m, aspect)
    return Pinhole(optics.diameter_m / 2 / pixel_m, scale * optics.distance_m, aspect)


def _check_fits(reach_px: float, size_px: int, advice: str) -> None:
    if reach_px > _WIDEST * size_px:
        raise ProbeError(
            f"the beam is {2 * reach_px:.0f} px wide at the sample, more than a window of "
            f"{size_px} px holds: {advice}"
        )
