"""What the frames themselves tell of the detector: where the beam hits it, and which pixels lie.

Part of the self-diagnosis on the first frames of a scan; needs no positions and no network. The
reconstruct stage suggests the findings, or opens a new view with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import GeometryError
from ptycho_stream.physics.probe import Probe

HOT_FACTOR = 4.0
"""A hot pixel counts so many times more than its bright neighbours."""

HOT_SPREADS = 8.0
"""And by so many standard deviations of its neighbours' counting noise."""

DEAD_COUNTS = 30.0
"""A dead pixel counts nothing where its dark neighbours count so many photons."""

_REACH = 2
_BRIGHT, _DARK = 0.8, 0.2
_STRIP_ROWS = 64


@dataclass(frozen=True, slots=True)
class PatternCentre:
    """Where zero frequency is.

    Attributes:
        center_yx_px: from the centre of pixel [0, 0], fractions of a pixel included; for
            ``View.center_yx_px``, which rounds.
        match: correlation of the mean frame with the probe's far field, 0 to 1; below about 0.5
            the frames do not look like this probe's.
    """

    center_yx_px: tuple[float, float]
    match: float


@dataclass(frozen=True, slots=True, eq=False)
class BadPixels:
    """Pixels that do not measure, bool (h, w).

    Attributes:
        hot: that count far more than their neighbours in the mean of the frames.
        dead: that count nothing where their neighbours do.
    """

    hot: NDArray[np.bool_]
    dead: NDArray[np.bool_]

    @property
    def bad(self) -> NDArray[np.bool_]:
        """Both."""
        return self.hot | self.dead


def far_field_yx(probe: Probe) -> NDArray[np.float64]:
    """Photons a pixel of the beam without a sample, (N, N), zero frequency at N // 2."""
    waves = np.fft.fft2(probe.modes.astype(np.complex128), norm="ortho")
    return np.fft.fftshift((np.abs(waves) ** 2).sum(0))


def find_centre(
    mean_frame_yx: NDArray[Any], probe: Probe, valid: NDArray[np.bool_] | None = None
) -> PatternCentre:
    """Lay the probe's far field where it matches the mean frame best.

    Compared are amplitudes, by least squares over the valid pixels with a free factor, so that
    gaps and beam stops do not pull. A sample scatters to all sides alike on average, so it blurs
    the pattern and leaves its centre.

    Args:
        mean_frame_yx: (h, w), mean of some frames as stored; at least as large as half the probe.
        probe: it.
        valid: bool (h, w); None: every pixel is. Mark hot pixels.

    Raises:
        GeometryError: the frame is empty everywhere.
    """
    frame = np.asarray(mean_frame_yx, np.float64)
    good = np.isfinite(frame) if valid is None else valid & np.isfinite(frame)
    amplitude = np.sqrt(np.where(good, np.maximum(frame, 0), 0))
    if not amplitude.any():
        raise GeometryError("the frames are dark: there is no pattern to centre; is the beam on?")
    template = np.sqrt(far_field_yx(probe))
    size = template.shape[0]
    shape = tuple(n + size for n in frame.shape)
    spectrum = np.fft.rfft2(template, shape).conj()
    match = np.fft.irfft2(np.fft.rfft2(amplitude, shape) * spectrum, shape)
    power = np.fft.irfft2(
        np.fft.rfft2(good.astype(np.float64), shape) * np.fft.rfft2(template**2, shape).conj(),
        shape,
    )
    whole = float((template**2).sum())
    # Where little of the far field would be on valid pixels, a good match means nothing.
    score = np.where(
        power > 0.3 * whole, np.maximum(match, 0) / np.sqrt(np.maximum(power, 1e-30)), 0
    )
    peak = np.unravel_index(int(score.argmax()), shape)
    center = [
        _whole(int(at), n, size) + _fraction(score, peak, axis) + size // 2
        for axis, (at, n) in enumerate(zip(peak, frame.shape, strict=True))
    ]
    norm = float(np.sqrt((amplitude**2).sum()))
    return PatternCentre((center[0], center[1]), min(float(score[peak]) / norm, 1.0))


def _whole(at: int, frame_px: int, size_px: int) -> int:
    """Offset of the template's first pixel from an index of the cyclic correlation."""
    return at if at < frame_px else at - frame_px - size_px


def _fraction(score: NDArray[np.float64], peak: tuple[Any, ...], axis: int) -> float:
    """Vertex of the parabola through the peak and its neighbours along an axis, -0.5 to 0.5."""
    line = np.moveaxis(score, axis, 0)[:, peak[1 - axis]]
    at = int(peak[axis])
    before, top, after = (float(line[(at + k) % len(line)]) for k in (-1, 0, 1))
    bend = before - 2 * top + after
    return float(np.clip((before - after) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0


def find_bad_pixels(
    frames: NDArray[Any],
    valid: NDArray[np.bool_] | None = None,
    expected_yx: NDArray[np.floating[Any]] | None = None,
) -> BadPixels:
    """Compare each pixel's mean over the frames with those of its 24 neighbours.

    Args:
        frames: counts (n, h, w), any real dtype; a few tens are enough.
        valid: bool (h, w), pixels known to be bad are False: they are neither judged nor taken
            for neighbours. None: all are valid.
        expected_yx: (h, w), the probe's far field where it lies on the detector: a beam that is
            sharp itself is not mistaken for a hot pixel. None: the beam is wider than a few pixels.
    """
    if not len(frames):
        nothing = np.zeros(frames.shape[1:], bool)
        return BadPixels(nothing, nothing)
    total = frames.sum(0, dtype=np.float64)
    good = np.isfinite(total) if valid is None else valid & np.isfinite(total)
    dark, bright = _neighbours(total, good)
    limit = HOT_FACTOR * bright + HOT_SPREADS * np.sqrt(np.maximum(bright, 0)) + HOT_SPREADS
    hot = good & (total > limit)
    if expected_yx is not None:
        _, around = _neighbours(expected_yx.astype(np.float64), np.ones(good.shape, bool))
        sharp = expected_yx > 0.5 * HOT_FACTOR * np.maximum(around, 1e-3 * expected_yx.max())
        hot &= ~_dilated(sharp)
    return BadPixels(hot, good & (total <= 0) & (dark > DEAD_COUNTS))


def _neighbours(
    values: NDArray[np.float64], good: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 20th and the 80th percentile of the good neighbours of each pixel, (h, w) each.

    0 where there is none. Percentiles, so that a cluster of a few hot pixels does not hide itself.
    """
    side = 2 * _REACH + 1
    padded = np.pad(np.where(good, values, np.nan), _REACH, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    low, high = np.empty(values.shape), np.empty(values.shape)
    own = side * side // 2
    for top in range(0, len(values), _STRIP_ROWS):
        part = windows[top : top + _STRIP_ROWS].reshape(-1, side * side)
        around = np.sort(np.delete(part, own, axis=1), axis=1)
        count = np.isfinite(around).sum(1)
        rows = np.arange(len(around))
        for share, out in ((_DARK, low), (_BRIGHT, high)):
            at = np.maximum(np.rint(share * (count - 1)), 0).astype(np.int64)
            found = np.where(count > 0, around[rows, at], 0.0)
            out[top : top + _STRIP_ROWS] = found.reshape(-1, values.shape[1])
    return low, high


def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    return np.asarray(np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).any((2, 3)))
