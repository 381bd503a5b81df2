"""Tiles of a picture as bytes, and what of them a page lacks: the numbers behind the viewer.

A tile's values lie between its own ``low`` and ``high`` in 254 steps; 0 is a pixel that was never
seen.  The range is kept as long as the values fit, so that a tile that has changed a little differs
a little, and its difference deflates well.  ``docs/viewer.md`` describes what travels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Quantity = Literal["phase", "amplitude", "coverage", "misfit"]
"""What of an image is shown."""

STEPS = 254
_ROOM = 0.15
"""A new range is wider than the values by this share on each side, for those that come."""
_CLIPPED = 0.1
"""Per cent of the values at each end that may lie outside of a tile's range."""
_LOOSE = 3.0
"""A range so many times as wide as its values is given up for a narrower one."""


@dataclass(frozen=True, slots=True, eq=False)
class ByteTile:
    """One tile.

    Attributes:
        low: value of level 1.
        high: value of level 255.
        levels: uint8 (T, T): 0 unseen, else 1 + the step from ``low`` to ``high``; what lies
            beyond has the nearest level.
    """

    low: float
    high: float
    levels: NDArray[np.uint8]

    @property
    def values(self) -> NDArray[np.float32]:
        """What a page makes of it, float32 (T, T), NaN where unseen."""
        step = (self.high - self.low) / STEPS
        values = self.low + (self.levels.astype(np.float32) - 1) * step
        return np.where(self.levels > 0, values, np.float32(np.nan)).astype(np.float32)


def quantised(values_yx: NDArray[np.float32], former: ByteTile | None = None) -> ByteTile:
    """Values as bytes, in the range of the former version of the tile if they fit into it.

    Args:
        values_yx: float32 (T, T), NaN where unseen.
        former: what the tile was before.
    """
    seen = np.isfinite(values_yx)
    if not seen.any():
        return ByteTile(0.0, 1.0, np.zeros(values_yx.shape, np.uint8))
    low, high = _range(values_yx[seen], former)
    scaled = (np.where(seen, values_yx, low) - low) * (STEPS / (high - low))
    levels = np.rint(np.clip(scaled, 0, STEPS)).astype(np.uint8) + np.uint8(1)
    return ByteTile(low, high, np.where(seen, levels, np.uint8(0)))


def _range(values: NDArray[np.float32], former: ByteTile | None) -> tuple[float, float]:
    least, most = (float(v) for v in np.percentile(values, (_CLIPPED, 100 - _CLIPPED)))
    if former is not None and former.levels.any():
        fits = former.low <= least and most <= former.high
        if fits and former.high - former.low <= _LOOSE * max(most - least, _least_span(most)):
            return former.low, former.high
    room = _ROOM * (most - least)
    span = most - least + 2 * room
    lacking = max(_least_span(most) - span, 0.0) / 2  # of a flat tile
    # As they are sent: as float32, so that both sides compute the same values.
    return (
        float(np.float32(least - room - lacking)),
        float(np.float32(most + room + lacking)),
    )


def _least_span(value: float) -> float:
    """Narrower ranges would show rounding of the numbers themselves."""
    return 1e-4 * max(abs(value), 1e-3)


def phase_about(object_yx: NDArray[np.complex64], middle: float | None) -> NDArray[np.float32]:
    """Phases in radians within pi of ``middle``, so that they do not wrap where they need not.

    Args:
        object_yx: complex64 (T, T), NaN where unseen.
        middle: None: the mean direction.
    """
    if middle is None:
        seen = object_yx[np.isfinite(object_yx)]
        total = complex(seen.sum(dtype=np.complex128)) if seen.size else 1.0
        middle = math.atan2(total.imag, total.real)
    turn = np.complex64(complex(math.cos(middle), -math.sin(middle)))
    return np.angle(object_yx * turn) + np.float32(middle)


def settled(new: ByteTile, sent: ByteTile) -> ByteTile:
    """What to send instead of ``new`` to a page that has ``sent``: steps of one are not made.

    They are mostly noise, and a quarter of a per cent of the tile's range; as it is always compared
    with what the page has, errors do not add up.
    """
    if (new.low, new.high) != (sent.low, sent.high):
        return new
    apart = np.abs(new.levels.astype(np.int16) - sent.levels)
    keep = (apart <= 1) & (new.levels > 0) & (sent.levels > 0)
    return ByteTile(new.low, new.high, np.where(keep, sent.levels, new.levels))


def encoded(new: ByteTile, sent: ByteTile | None) -> tuple[bool, bytes]:
    """A tile's levels, as differences that deflate well.

    Returns:
        Whether they are differences from ``sent`` (modulo 256), and T * T bytes, row by row;
        otherwise each byte is the difference from its left neighbour, the first of a row from the
        one above.
    """
    if sent is not None and (new.low, new.high) == (sent.low, sent.high):
        return True, (new.levels - sent.levels).tobytes()
    steps = new.levels.copy()
    steps[:, 1:] -= new.levels[:, :-1]
    steps[1:, 0] -= new.levels[:-1, 0]
    return False, steps.tobytes()
