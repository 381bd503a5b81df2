"""Live resolution: Fourier ring correlation of two images made from different frames.

Detail that both halves of the frames show is there; where they agree no better than noise would,
the image ends. Used with each published image, on the two halves of its frames, and to compare a
simulation with its truth.

The correlation of rings is that of van Heel & Schatz (2005, doi:10.1016/j.jsb.2005.05.009), who
relate it to the signal-to-noise ratio. The threshold 1/7 is Rosenthal & Henderson's (2003,
doi:10.1016/j.jmb.2003.07.013): where two halves with independent errors correlate by c, the image
of all frames correlates with the truth by sqrt(2 c / (1 + c)), which for 1/7 is exactly 1/2.

What both halves get wrong in the same way, as a network may, is not independent, and the
correlation of halves takes it for detail: halves are refined by physics on their own frames before
they are compared (docs/trust.md has the figures), and :func:`shown_correlation` tells with them
what an image is worth that was not refined.
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
"""Pixels with less than this share of the median weight are the ragged border of what was seen."""

_SMOOTHING = 0.03
"""Rings are averaged over this share of Nyquist, so that one ring does not decide."""

_WINDOW_RINGS = 3
_MIN_NYQUIST_SHARE = 0.04
"""What happens in the first rings, or below this share of Nyquist, is the window's doing."""

_RAMP_ROUNDS = 5

Complex = NDArray[np.complexfloating[Any, Any]]
Real = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class RingCorrelation:
    """The correlation of two images, ring by ring.

    Attributes:
        frequency_per_m: float64 (K,), the middle of each ring, cycles a metre; the last is below
            Nyquist of the coarser axis.
        correlation: float64 (K,), about -1 to 1, averaged over neighbouring rings.
        cutoff_per_m: where it first falls below the threshold; Nyquist if it never does; None
            where the common region is too small.
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
        """Half the period at the cutoff, nanometres: the smallest detail; one pixel at best."""
        return None if self.cutoff_per_m is None else 0.5e9 / self.cutoff_per_m

    @property
    def cutoff_of_nyquist(self) -> float | None:
        """The cutoff as a share of Nyquist."""
        return None if self.cutoff_per_m is None else self.cutoff_per_m / self.nyquist_per_m


@dataclass(frozen=True, slots=True, eq=False)
class HalfImages:
    """Images of one place, each made from one half of the frames.

    Attributes:
        object_yx: complex64 (2, H, W), NaN where a half has seen nothing.
        weight_yx: float32 (2, H, W), how much each has seen, 0 where nothing.
        corner_yx_px: canvas pixel of [0, 0].
    """

    object_yx: NDArray[np.complex64]
    weight_yx: NDArray[np.float32]
    corner_yx_px: tuple[int, int]


def half_correlation(halves: HalfImages, pixel_yx_m: tuple[float, float]) -> RingCorrelation:
    """Correlate two halves; the cutoff is where they fall below 1/7."""
    (first, second), (one, other) = halves.object_yx, halves.weight_yx
    return ring_correlation(first, second, one, other, pixel_yx_m)


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
    images = np.stack([first_yx, second_yx])
    common = common_region(images, np.stack([first_weight_yx, second_weight_yx]))
    if (missing := _too_small(common, pixel_yx_m)) is not None:
        return missing
    spectra, area = _spectra(images, common)
    rings = _Rings(spectra[0].shape, pixel_yx_m)
    cross = rings.sum(spectra[0], spectra[1])
    power = np.sqrt(rings.sum(spectra[0], spectra[0]) * rings.sum(spectra[1], spectra[1]))
    return _result(rings, cross / np.maximum(power, 1e-30), threshold, area)


def shown_correlation(
    shown_yx: Complex,
    halves: HalfImages,
    refined: HalfImages,
    pixel_yx_m: tuple[float, float],
) -> RingCorrelation:
    """How well a shown image correlates with the truth, told by physics and not by its own halves.

    The shown image is compared with halves that physics has refined on their own frames, each
    shown half with the refined half that has no frame in common with it. The error of a refined
    half then lowers the correlation as if it were the shown image's; it is divided out, as the two
    refined halves tell how much of them is truth (the correction for attenuation, Spearman 1904,
    doi:10.2307/1412159). The cutoff is where the result falls below :data:`TRUTH_THRESHOLD`.

    Args:
        shown_yx: complex (H, W), the image of all frames at the halves' place.
        halves: the two halves of the same image, as made.
        refined: the same halves refined, at the same place.
        pixel_yx_m: size of a pixel, metres.
    """
    images = np.concatenate([shown_yx[None], halves.object_yx, refined.object_yx])
    weights = np.concatenate([halves.weight_yx, refined.weight_yx])
    common = common_region(images, weights)
    if (missing := _too_small(common, pixel_yx_m)) is not None:
        return missing
    (shown, *parts), area = _spectra(images, common)
    rings = _Rings(shown.shape, pixel_yx_m)
    cross = (rings.sum(parts[0], parts[3]) + rings.sum(parts[1], parts[2])) / 2
    power = rings.sum(shown, shown)
    # Where the refined halves have nothing in common, neither has the shown image with the truth.
    true = np.maximum(rings.sum(parts[2], parts[3]), 1e-3 * power)
    return _result(rings, cross / np.maximum(np.sqrt(power * true), 1e-30), TRUTH_THRESHOLD, area)


def common_region(images_yx: Complex, weights_yx: Real) -> NDArray[np.bool_]:
    """Where all of (n, H, W) images were well seen, bool (H, W), without the ragged borders."""
    least = weights_yx.min(0)
    common = np.isfinite(images_yx).all(0) & (least > 0)
    return common & (least >= _WEIGHT_SHARE * np.median(least[common])) if common.any() else common


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
    columns = (y[:, None], x[None, :], np.ones((1, 1)))
    spectrum = np.abs(np.fft.fft2(product))
    at = np.unravel_index(int(spectrum.argmax()), spectrum.shape)
    slopes = [2 * np.pi * np.fft.fftfreq(n)[i] for n, i in zip(image_yx.shape, at, strict=True)]
    ramp = np.array([*slopes, 0.0])
    for _ in range(_RAMP_ROUNDS):
        turned = product * np.exp(-1j * sum(r * c for r, c in zip(ramp, columns, strict=True)))
        offset = float(np.angle(turned.sum()))
        turned = turned * np.exp(-1j * offset)
        strength, angle = np.abs(turned), np.angle(turned)
        left = [[float((strength * a * b).sum()) for b in columns] for a in columns]
        right = [float((strength * angle * a).sum()) for a in columns]
        step = np.linalg.lstsq(np.array(left), np.array(right), rcond=None)[0]
        ramp = ramp + step + np.array([0.0, 0.0, offset])
        if np.abs(step).max() < 1e-6:
            break
    return image_yx * np.exp(1j * sum(r * c for r, c in zip(ramp, columns, strict=True)))


def nothing_known(
    pixel_yx_m: tuple[float, float], reason: str, area_px: int = 0
) -> RingCorrelation:
    """The answer where there is none, for a reason."""
    return RingCorrelation(np.empty(0), np.empty(0), None, _nyquist(pixel_yx_m), area_px, reason)


def _too_small(
    common: NDArray[np.bool_], pixel_yx_m: tuple[float, float]
) -> RingCorrelation | None:
    area = int(np.count_nonzero(common))
    if area >= MIN_AREA_PX:
        return None
    reason = (
        f"both halves of the frames have well seen only {area} pixels in common, {MIN_AREA_PX} "
        "are needed"
    )
    return nothing_known(pixel_yx_m, reason, area)


def _nyquist(pixel_yx_m: tuple[float, float]) -> float:
    return 0.5 / max(pixel_yx_m)


def _spectra(
    images_yx: Complex, common: NDArray[np.bool_]
) -> tuple[list[NDArray[np.complexfloating[Any, Any]]], int]:
    """Spectra of images (n, H, W) in the common region, all with the first one's phase and ramp."""
    rows, columns = np.flatnonzero(common.any(1)), np.flatnonzero(common.any(0))
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    inside = common[box]
    window = soft_window(inside)
    first = np.where(inside, images_yx[0][box], 0)
    spectra: list[NDArray[np.complexfloating[Any, Any]]] = []
    for image in images_yx:
        cut = without_ramp(np.where(inside, image[box], 0), first, window)
        spectra.append(np.fft.fft2((cut - (cut * window).sum() / window.sum()) * window))
    return spectra, int(np.count_nonzero(common))


class _Rings:
    """Rings of equal width in the plane of spatial frequencies, from 0 to Nyquist."""

    def __init__(self, shape: tuple[int, ...], pixel_yx_m: tuple[float, float]) -> None:
        self.nyquist_per_m = _nyquist(pixel_yx_m)
        # A ring is as wide as the finest frequency step of the two axes.
        width = 1 / max(n * p for n, p in zip(shape, pixel_yx_m, strict=True))
        fy, fx = (np.fft.fftfreq(n, p) for n, p in zip(shape, pixel_yx_m, strict=True))
        self._ring = (np.hypot(fy[:, None], fx[None, :]) / width + 0.5).astype(np.int64).ravel()
        self.count = int(self.nyquist_per_m / width)
        self.frequency_per_m = np.arange(self.count, dtype=np.float64) * float(width)
        reach = max(1, round(_SMOOTHING * self.count))
        self._kernel = np.ones(2 * reach + 1)

    def sum(self, first: Complex, second: Complex) -> NDArray[np.float64]:
        """Re of first times second conjugated, summed over each ring and its neighbours (K,).

        Sums are averaged, never their ratio: rings without power have no say.
        """
        product = (first * second.conj()).real.ravel().astype(np.float64)
        rings = np.bincount(self._ring, weights=product)[: self.count]
        return np.convolve(rings, self._kernel, "same")[: self.count]


def _result(
    rings: _Rings, correlation: NDArray[np.float64], threshold: float, area: int
) -> RingCorrelation:
    start = max(_WINDOW_RINGS, round(_MIN_NYQUIST_SHARE * rings.count))
    below = np.flatnonzero(correlation[start:] < threshold) + start
    cutoff = rings.nyquist_per_m
    if len(below):
        at = int(below[0])
        cutoff = float(rings.frequency_per_m[at])
        if at > start:
            high, low = correlation[at - 1], correlation[at]
            share = float((high - threshold) / max(high - low, 1e-12))
            step = cutoff - float(rings.frequency_per_m[at - 1])
            cutoff += (share - 1) * step
    return RingCorrelation(rings.frequency_per_m, correlation, cutoff, rings.nyquist_per_m, area)
