"""What the first frames of a scan advise to set: the pattern's centre, and pixels to be masked.

Used by whoever looks at a scan's images while it runs. Says nothing rather than something doubtful:
only where the mean frame looks like the probe's far field, and fits it clearly better elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.geometry import ORIENTATIONS, Orientation, View, orient
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.layouts import composed
from ptycho_stream.reconstruct.pattern import (
    DEAD_COUNTS,
    BadPixels,
    far_field_yx,
    find_bad_pixels,
    find_centre,
)
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.stored_part import StoredPart
from ptycho_stream.scans.viewed_scan import ViewedScan

FRAMES = 32
"""So many are looked at."""

MIN_EXTENT = 1 / 8
"""They must lie so far apart, in windows: what one spot scatters is not the beam's far field."""

MIN_MATCH = 0.8
"""Below, the frames do not look like this probe's, and nothing is advised."""

KNOWN_MATCH = 0.95
"""Below, the probe's far field is not known to the pixel: what only its neighbours call bad may be
a speckle. A pixel that always counts twice as much as all others ever do is hot all the same."""

MIN_OFF_PX = 0.75
"""The centre is off by a pixel if it is measured to be so far off."""

CLEARLY = 0.6
"""A centre must leave at most so much of the misfit (1 - match^2) that the one set leaves. A wrong
probe that fits elsewhere by chance leaves 0.77 and more, the siemens star's analytic guess 0.87."""

_AGREE_PX = 0.5
"""Both halves of the frames must find the centre within so much of it: a sample that refracts the
beam moves the pattern from frame to frame."""

_DIRECT_PX = 3
"""A sharp bright spot so near to the centre is the direct beam."""

_AT_ONCE = 8
_WIDE_PX = 512
_NAMED = 5


@dataclass(frozen=True, slots=True)
class PatternAdvice:
    """What to set; nothing of it if the frames are as they should be.

    Attributes:
        center_yx_px: for ``View.center_yx_px``; None: it is where it is set.
        hot: pixels (y, x) of the detector that count too much.
        dead: pixels (y, x) of the detector that count nothing.
        stored_bad: hot and dead ones as pixels (y, x) of stored frames.
        suggestions: the same for people, with the setting to change.
    """

    center_yx_px: tuple[float, float] | None = None
    hot: tuple[tuple[int, int], ...] = ()
    dead: tuple[tuple[int, int], ...] = ()
    stored_bad: tuple[tuple[int, int], ...] = ()
    suggestions: tuple[str, ...] = ()


def center_of(view: View, stored_yx: tuple[int, int]) -> tuple[int, int]:
    """The whole pixel of stored frames (h, w) that a view takes for zero frequency."""
    y, x = view.center_yx_px or (stored_yx[0] // 2, stored_yx[1] // 2)
    return round(y), round(x)


def chosen_frames(
    position_yx_m: NDArray[np.floating[Any]], pixel_yx_m: tuple[float, float], size_px: int
) -> NDArray[np.int64] | None:
    """Which frames to look at, of those so far.

    Args:
        position_yx_m: (n, 2), in the order in which they came.
        pixel_yx_m: of the object.
        size_px: N.

    Returns:
        FRAMES indices; None: there are too few frames yet, or too near to each other.
    """
    if len(position_yx_m) < FRAMES:
        return None
    extent_px = np.ptp(position_yx_m, axis=0) / np.asarray(pixel_yx_m)
    if extent_px.max() < MIN_EXTENT * size_px:
        return None
    return np.linspace(0, len(position_yx_m) - 1, FRAMES).round().astype(np.int64)


def pattern_advice(
    reader: ScanReader, slots: NDArray[np.integer[Any]], view: View, probe: Probe
) -> PatternAdvice:
    """Look at some frames.

    Args:
        reader: of the scan.
        slots: (n,), stored frames that are sound, from :func:`chosen_frames`.
        view: as they are looked at now.
        probe: as it is told, for frames in that view.

    Raises:
        StoreError: frames cannot be read.
        GeometryError: the view shows nothing of the frames.
    """
    stored_yx, size = reader.header.frame_shape_yx, probe.size_px
    # As stored, and further out where there is more: what is off may be far off.
    wider = max(stored_yx) > size and 2 * size <= _WIDE_PX
    window = replace(view, orientation="identity", size_px=2 * size if wider else size)
    scan = ViewedScan(reader, window)
    frames = _Frames.read(scan, slots)
    back: Orientation = next(o for o in ORIENTATIONS if composed(view.orientation, o) == "identity")
    turned = Probe(np.ascontiguousarray(orient(probe.modes, back)).astype(np.complex64))
    off, match, bad = _off_yx_px(frames, turned)
    if match < MIN_MATCH:
        return PatternAdvice()
    if match < KNOWN_MATCH:
        bad = BadPixels(frames.outstanding(bad.hot), np.zeros_like(bad.dead))
    center = None
    if off is not None:
        set_yx = center_of(view, stored_yx)
        center = (round(set_yx[0] + float(off[0]), 1), round(set_yx[1] + float(off[1]), 1))
    corner = tuple(c - window.size_px // 2 for c in center_of(view, stored_yx))
    part = StoredPart.of(reader.header)
    stored = [
        _stored_pixels(view, stored_yx, np.argwhere(pixels) + corner)
        for pixels in (bad.hot, bad.dead)
    ]
    hot, dead = (_tuples(part.detector_pixels(pixels)) for pixels in stored)
    said = [] if center is None else [_center_words(view, stored_yx, center, match)]
    if hot:
        # A limit is one of counts as they are stored.
        limit = None if scan.corrects or part.bin_px > 1 else frames.limit(bad.hot)
        said.append(_hot_words(hot, limit))
    if dead:
        said.append(f"{_pixels(dead)} nothing: {_MASK}")
    return PatternAdvice(center, hot, dead, _tuples(np.concatenate(stored)), tuple(said))


@dataclass(frozen=True, slots=True, eq=False)
class _Frames:
    """What is kept of frames: sums (h, w) of both halves, extremes, and which pixels measure."""

    halves: tuple[NDArray[np.float64], NDArray[np.float64]]
    least: NDArray[np.float64]
    most: NDArray[np.float64]
    valid: NDArray[np.bool_]

    @classmethod
    def read(cls, scan: ViewedScan, slots: NDArray[np.integer[Any]]) -> _Frames:
        shape = (scan.view.size_px, scan.view.size_px)
        halves = np.zeros(shape), np.zeros(shape)
        least, most = np.full(shape, np.inf), np.zeros(shape)
        for half, part in zip(halves, np.array_split(slots, 2), strict=True):
            for first in range(0, len(part), _AT_ONCE):
                counts = scan.counts(part[first : first + _AT_ONCE]).astype(np.float64)
                half += counts.sum(0)
                np.minimum(least, counts.min(0), out=least)
                np.maximum(most, counts.max(0), out=most)
        valid = scan.valid
        for half in halves:
            half[~valid] = 0
        return cls(halves, least, most, valid)

    @property
    def total(self) -> NDArray[np.float64]:
        return self.halves[0] + self.halves[1]

    def outstanding(self, hot: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Those of the hot pixels that always count twice as much as all others ever do."""
        return hot & (self.least > 2 * self.most[self.valid & ~hot].max(initial=0))

    def limit(self, hot: NDArray[np.bool_]) -> int | None:
        """A count that all hot pixels always reach, and no other nearly; None: there is none."""
        return int(self.least[hot].min()) if (self.outstanding(hot) == hot).all() else None


def _off_yx_px(
    frames: _Frames, probe: Probe
) -> tuple[NDArray[np.float64] | None, float, BadPixels]:
    """By how much the centre is off (None: it is not), the match there, and bad pixels."""
    middle = frames.total.shape[0] // 2
    far = far_field_yx(probe)
    bad = _bad_pixels(frames, far, (middle, middle))
    good = frames.valid & ~bad.bad
    if not frames.total[good].any():  # dark
        return None, 0.0, bad
    found = find_centre(frames.total, probe, good)
    off = np.asarray(found.center_yx_px) - middle
    if np.abs(off).max() < MIN_OFF_PX:
        return None, found.match, bad
    as_set = _match_at_middle(frames.total, far, good)
    if 1 - found.match**2 > CLEARLY * (1 - as_set**2):
        return None, max(as_set, 0.0), bad
    for half in frames.halves:
        own = find_centre(half, probe, good) if half[good].any() else found
        if np.abs(np.asarray(own.center_yx_px) - found.center_yx_px).max() > _AGREE_PX:
            return None, found.match, bad
    y, x = (round(c) for c in found.center_yx_px)
    return off, found.match, _bad_pixels(frames, far, (y, x))


def _bad_pixels(frames: _Frames, far_yx: NDArray[np.float64], center: tuple[int, int]) -> BadPixels:
    """Bad pixels where the far field lies so: not the direct beam, nor where it is dark itself."""
    expected = _laid_out(far_yx, frames.total.shape[0], center)
    bad = find_bad_pixels(frames.total[None], frames.valid, expected)
    y, x = (slice(max(c - _DIRECT_PX, 0), c + _DIRECT_PX + 1) for c in center)
    bad.hot[y, x] = False
    lit = float(expected[frames.valid].sum())
    scale = float(frames.total.sum()) / lit if lit else 0.0
    return BadPixels(bad.hot, bad.dead & (expected * scale >= DEAD_COUNTS))


def _laid_out(
    far_yx: NDArray[np.float64], side: int, center: tuple[int, int]
) -> NDArray[np.float64]:
    """A far field (N, N) in a window (side, side), zero frequency at ``center``."""
    size = len(far_yx)
    wide = np.zeros((side + 2 * size, side + 2 * size))
    y, x = (c + size - size // 2 for c in center)
    wide[y : y + size, x : x + size] = far_yx
    return wide[size:-size, size:-size]


def _match_at_middle(
    total: NDArray[np.float64], far_yx: NDArray[np.float64], good: NDArray[np.bool_]
) -> float:
    """As ``PatternCentre.match``, for zero frequency in the middle."""
    middle = len(total) // 2
    template = np.sqrt(_laid_out(far_yx, len(total), (middle, middle)))[good]
    amplitude = np.sqrt(np.maximum(total[good], 0))
    norm = float(np.linalg.norm(template) * np.linalg.norm(amplitude))
    return float(template @ amplitude) / norm if norm else 0.0


def _stored_pixels(
    view: View, stored_yx: tuple[int, int], pixels_yx: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Pixels (n, 2) of frames as they are looked at, in those of stored frames."""
    shape = np.asarray(stored_yx)
    return (pixels_yx - shape // 2) % shape if view.dc == "corner" else pixels_yx


def _tuples(pixels_yx: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    return tuple((int(y), int(x)) for y, x in pixels_yx)


_MASK = (
    "mask such pixels in the detector, whose mask the stream brings, or in the file that "
    "view.bad_pixels_path names; view.hot_pixels = 'auto' masks them by itself"
)


def _center_words(
    view: View, stored_yx: tuple[int, int], center: tuple[float, float], match: float
) -> str:
    y, x = center_of(view, stored_yx)
    return (
        f"the pattern's centre is not at ({y}, {x}): set view.center_yx_px = "
        f"[{center[0]}, {center[1]}] (it fits the probe's far field by {match:.3f} there)"
    )


def _hot_words(hot: tuple[tuple[int, int], ...], limit: int | None) -> str:
    how = _MASK if limit is None else f"set view.bad_value_from = {limit}"
    return f"{_pixels(hot)} far too much: {how}"


def _pixels(pixels: tuple[tuple[int, int], ...]) -> str:
    named = ", ".join(str(pixel) for pixel in pixels[:_NAMED])
    if len(pixels) == 1:
        return f"pixel {named} of the detector (y, x) counts"
    more = f" and {len(pixels) - _NAMED} more" if len(pixels) > _NAMED else ""
    return f"pixels {named}{more} of the detector (y, x) count"
