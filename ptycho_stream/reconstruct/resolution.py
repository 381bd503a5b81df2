"""Live resolution: Fourier ring correlation of two images made from different frames.

Detail that both halves of the frames show is there; where they agree no better than noise would,
the image ends. Used with each published image, on the two halves of its canvas, and to compare a
simulation with its truth.

The correlation of rings is van Heel's (van Heel, Keegstra, Schutter & van Bruggen 1982; van Heel &
Schatz 2005, doi:10.1016/j.jsb.2005.05.009, who relate it to the signal-to-noise ratio). The
threshold 1/7 is Rosenthal & Henderson's (2003, doi:10.1016/j.jmb.2003.07.013): where two halves
with independent errors correlate by c, the image of all frames correlates with the truth by
sqrt(2 c / (1 + c)), which for 1/7 is exactly 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 1 / 7
"""Between two halves; against a truth it is :data:`TRUTH_THRESHOLD`."""

TRUTH_THRESHOLD = 1 / 2

MIN_AREA_PX = 2048
"""A smaller common region says nothing: its rings hold too few independent values."""

_WEIGHT_SHARE = 0.25
"""Pixels with less than this share of the median weight of a half are its ragged border."""

_SMOOTHING = 0.03
"""Rings are averaged over this share of Nyquist, so that one ring does not decide."""

_MIN_NYQUIST_SHARE = 0.04
"""Crossings below this share of Nyquist are the window's doing."""

Complex = NDArray[np.complexfloating[Any, Any]]
Real = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class RingCorrelation:
    """The correlation of two images, ring by ring.

    Attributes:
        frequency_per_m: float64 (K,), the middle of each ring, cycles a metre; the last is below
            Nyquist of the coarser axis.
        correlation: float64 (K,), -1 to 1, not smoothed.
        cutoff_per_m: where the smoothed curve first falls below the threshold; Nyquist if it never
            does; None where the common region is too small.
        nyquist_per_m: of the coarser axis.
        area_px: pixels of the common region.
        reason: why there is no cutoff; empty if there is one.
    """

    frequency_per_m: NDArray[np.float64]
    correlation: NDArray[np.float64]
    cutoff_per_m: float | None
    nyquist_per_m: float
    area_px: int
    reason: str = ""

    @property
    def resolution_nm(self) -> float | None:
        """Half the period at the cutoff, in nanometres: the smallest detail; a pixel at best."""
        return None if self.cutoff_per_m is None else 0.5e9 / self.cutoff_per_m

    @property
    def cutoff_of_nyquist(self) -> float | None:
        """The cutoff as a share of Nyquist."""
        return None if self.cutoff_per_m is None else self.cutoff_per_m / self.nyquist_per_m


def ring_correlation(
    first_yx: Complex,
    second_yx: Complex,
    first_weight_yx: Real,
    second_weight_yx: Real,
    pixel_yx_m: tuple[float, float],
    threshold: float = THRESHOLD,
) -> RingCorrelation:
    """Correlate two images of the same place.

    Compared is what both have seen, under a window with soft edges that follows the region's
    outline; a phase and a phase ramp between the two, which no ptychography knows, are removed.

    Args:
        first_yx: complex (H, W), anything finite or not where its weight is 0.
        second_yx: the same of the other.
        first_weight_yx: float (H, W), how much was seen where; 0 or less: nothing.
        second_weight_yx: the same of the other.
        pixel_yx_m: size of a pixel, metres.
        threshold: below which the images are taken to disagree.
    """
    common = common_region(first_yx, second_yx, first_weight_yx, second_weight_yx)
    nyquist = 0.5 / max(pixel_yx_m)
    area = int(np.count_nonzero(common))
    if area < MIN_AREA_PX:
        reason = (
            f"both halves of the frames have seen only {area} pixels in common, {MIN_AREA_PX} are "
            "needed"
        )
        empty = np.empty(0)
        return RingCorrelation(empty, empty, None, nyquist, area, reason)
    box = _bounding_box(common)
    window = soft_window(common[box])
    first = np.where(common[box], first_yx[box], 0).astype(np.complex64)
    second = np.where(common[box], second_yx[box], 0).astype(np.complex64)
    second = without_ramp(second, first, window)
    cross, power, frequency = _rings(first, second, window, pixel_yx_m)
    correlation = cross / np.maximum(power, 1e-30)
    cutoff = _crossing(cross, power, frequency, nyquist, threshold)
    return RingCorrelation(frequency, correlation, cutoff, nyquist, area)


def common_region(
    first_yx: Complex, second_yx: Complex, first_weight_yx: Real, second_weight_yx: Real
) -> NDArray[np.bool_]:
    """Where both images were well seen, bool (H, W): their ragged borders do not count."""
    common = np.isfinite(first_yx) & np.isfinite(second_yx)
    common &= (first_weight_yx > 0) & (second_weight_yx > 0)
    if not common.any():
        return common
    least = np.minimum(first_weight_yx, second_weight_yx)
    return common & (least >= _WEIGHT_SHARE * np.median(least[common]))


def soft_window(region: NDArray[np.bool_]) -> NDArray[np.float32]:
    """A window float32 (H, W) that is 0 outside ``region`` and rises to 1 within a few pixels."""
    width = max(2.0, 0.04 * float(np.sqrt(np.count_nonzero(region))))
    pad = int(np.ceil(3 * width))
    padded = np.pad(region.astype(np.float32), pad)
    fy, fx = np.fft.fftfreq(padded.shape[0])[:, None], np.fft.rfftfreq(padded.shape[1])
    blur = np.exp(-2 * (np.pi * width) ** 2 * (fy**2 + fx**2))
    blurred = np.fft.irfft2(np.fft.rfft2(padded) * blur, padded.shape)
    inner = blurred[pad : pad + region.shape[0], pad : pad + region.shape[1]]
    # Half of a straight border's blur lies inside: from there on it rises.
    rise = np.clip(2 * inner - 1, 0, 1) * region
    return (np.sin(np.pi / 2 * rise) ** 2).astype(np.float32)


def without_ramp(image_yx: Complex, onto_yx: Complex, weight_yx: Real) -> Complex:
    """``image_yx`` (H, W) times the phase ramp that takes it nearest to ``onto_yx``.

    The peak of the transform of their product gives the ramp to a fraction of a period over the
    image, least squares on the phases the rest.
    """
    product = onto_yx * image_yx.conj() * weight_yx
    y, x = (np.arange(n) - (n - 1) / 2 for n in image_yx.shape)
    y, x = y[:, None], x[None, :]
    spectrum = np.abs(np.fft.fft2(product))
    iy, ix = np.unravel_index(int(spectrum.argmax()), spectrum.shape)
    ky = 2 * np.pi * float(np.fft.fftfreq(image_yx.shape[0])[iy])
    kx = 2 * np.pi * float(np.fft.fftfreq(image_yx.shape[1])[ix])
    offset = 0.0
    for _ in range(5):
        turned = product * np.exp(-1j * (ky * y + kx * x))
        offset = float(np.angle(turned.sum()))
        turned = turned * np.exp(-1j * offset)
        strength = np.abs(turned)
        angle = np.angle(turned) * strength
        # Normal equations of angle = dy y + dx x + d, weighted.
        columns = (y, x, np.ones((1, 1)))
        left = [[float((strength * a * b).sum()) for b in columns] for a in columns]
        step = np.linalg.lstsq(
            np.array(left), np.array([float((angle * a).sum()) for a in columns]), rcond=None
        )[0]
        ky, kx, offset = ky + float(step[0]), kx + float(step[1]), offset + float(step[2])
        if abs(step[0]) + abs(step[1]) < 1e-7:
            break
    return image_yx * np.exp(1j * (ky * y + kx * x + offset))


def _bounding_box(region: NDArray[np.bool_]) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _rings(
    first_yx: Complex, second_yx: Complex, window_yx: Real, pixel_yx_m: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of each ring up to Nyquist: cross power, root of the product of powers, frequency (1/m)."""
    spectra = [
        np.fft.fft2((image - (image * window_yx).sum() / window_yx.sum()) * window_yx)
        for image in (first_yx, second_yx)
    ]
    fy, fx = (np.fft.fftfreq(n, p) for n, p in zip(first_yx.shape, pixel_yx_m, strict=True))
    # A ring is as wide as the finest frequency step of the two axes.
    width = 1 / max(n * p for n, p in zip(first_yx.shape, pixel_yx_m, strict=True))
    ring = (np.hypot(fy[:, None], fx[None, :]) / width + 0.5).astype(np.int64).ravel()
    count = int(0.5 / max(pixel_yx_m) / width)
    sums = [
        np.bincount(ring, weights=values.ravel().astype(np.float64))[:count]
        for values in (
            (spectra[0] * spectra[1].conj()).real,
            np.abs(spectra[0]) ** 2,
            np.abs(spectra[1]) ** 2,
        )
    ]
    return sums[0], np.sqrt(sums[1] * sums[2]), np.arange(count) * width


def _crossing(
    cross: NDArray[np.float64],
    power: NDArray[np.float64],
    frequency: NDArray[np.float64],
    nyquist: float,
    threshold: float,
) -> float:
    """The first frequency where the smoothed correlation is below ``threshold``."""
    reach = max(1, round(_SMOOTHING * len(cross)))
    kernel = np.ones(2 * reach + 1)
    # Sums are averaged, not their ratio: rings without power have no say.
    smooth = np.convolve(cross, kernel, "same") / np.maximum(
        np.convolve(power, kernel, "same"), 1e-30
    )
    start = max(1, int(_MIN_NYQUIST_SHARE * len(cross)))
    below = np.flatnonzero(smooth[start:] < threshold) + start
    if not len(below):
        return nyquist
    at = int(below[0])
    if at == start:
        return float(frequency[at])
    high, low = smooth[at - 1], smooth[at]
    share = (high - threshold) / max(high - low, 1e-12)
    return float(frequency[at - 1] + share * (frequency[at] - frequency[at - 1]))
