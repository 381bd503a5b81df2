"""What PtychoPINN computes, once more in plain numpy and double precision, to compare with.

Written from its published conventions, for reading rather than for speed: matrices where the
package adds patches, numpy's FFT where it uses torch. Its TensorFlow program does the same within
5e-5. Used by the tests and by anyone who wants to check numbers of either program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from ptycho_stream.errors import PtychoPinnError

TOLERANCE = 5e-5
"""Of the largest absolute value."""

_Complex = NDArray[np.complexfloating[Any, Any]]
_Real = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far two arrays are apart.

    Attributes:
        largest: absolute difference.
        relative: the same over the largest absolute value of the reference.
    """

    largest: float
    relative: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.relative <= TOLERANCE


def compare(found: _Complex | _Real, reference: _Complex | _Real) -> Comparison:
    """Compare two real or complex arrays of one shape.

    Raises:
        PtychoPinnError: their shapes differ, or one is not finite.
    """
    if found.shape != reference.shape:
        raise PtychoPinnError(f"cannot compare {found.shape} with {reference.shape}")
    if not (np.isfinite(found).all() and np.isfinite(reference).all()):
        raise PtychoPinnError("cannot compare what holds NaN or infinity")
    largest = float(np.abs(found - reference).max())
    return Comparison(largest, largest / max(float(np.abs(reference).max()), 1e-300))


def shift_and_sum(
    obj: _Complex,
    global_offsets: _Real,
    M: int,
    *,
    corner_yx_px: tuple[int, int],
    shape_yx: tuple[int, int],
) -> NDArray[np.complex128]:
    """Move the central M x M of each patch to its place and add them up.

    Args:
        obj: complex (B, C, N, N).
        global_offsets: (B, 1, 2, C), [x, y].
        M: side of the part in use.
        corner_yx_px: where the result begins.
        shape_yx: its size; what lies outside is lost.

    Returns:
        complex128 (H, W).
    """
    margin = (obj.shape[-1] - M) // 2
    total = np.zeros(shape_yx, np.complex128)
    for group, places in zip(obj, global_offsets[:, 0], strict=True):
        for patch, (x, y) in zip(group, places.T, strict=True):
            rows = _hats(shape_yx[0], y - M / 2 - corner_yx_px[0], M)
            columns = _hats(shape_yx[1], x - M / 2 - corner_yx_px[1], M)
            total += rows @ patch[margin : margin + M, margin : margin + M] @ columns.T
    return total


def reassemble_position(obj: _Complex, global_offsets: _Real, M: int = 20) -> NDArray[np.complex64]:
    """What :func:`ptycho_stream.ptychopinn.reassembly.reassemble_position` gives."""
    x, y = global_offsets[:, 0].transpose(1, 0, 2).reshape(2, -1)
    top, left = y.min() - M / 2, x.min() - M / 2
    corner = (int(np.floor(top)), int(np.floor(left)))
    shape = (
        int(np.ceil(y.max() - M / 2)) + M - corner[0],
        int(np.ceil(x.max() - M / 2)) + M - corner[1],
    )
    place: dict[str, Any] = {"corner_yx_px": corner, "shape_yx": shape}
    total = shift_and_sum(obj, global_offsets, M, **place)
    weight = shift_and_sum(np.ones_like(obj), global_offsets, M, **place).real
    found = np.zeros(shape, np.complex128)
    np.divide(total, weight, out=found, where=weight > 1e-9)
    return found.astype(np.complex64)


def _hats(length: int, start: float, M: int) -> NDArray[np.float64]:
    """How much pixel j of a row of M that begins at ``start`` gives to pixel i, (length, M)."""
    distance = np.arange(length)[:, None] - (start + np.arange(M))
    return np.maximum(0, 1 - np.abs(distance))


def expected_intensity(
    obj: _Complex, probe: _Complex, scale: _Real | float = 1.0
) -> NDArray[np.float64]:
    """What :func:`ptycho_stream.ptychopinn.forward.expected_intensity` gives."""
    modes = np.asarray(probe, np.complex128).reshape(-1, *probe.shape[-2:])
    factor = np.broadcast_to(np.asarray(scale, np.float64), len(obj))[:, None, None, None, None]
    waves = np.fft.fft2(factor * modes * obj[:, :, None], norm="ortho")
    return np.fft.fftshift(np.square(np.abs(waves)).sum(2), axes=(-2, -1))


def poisson_nll(expected: _Real, counts: _Real) -> float:
    """Sum of lambda - k ln lambda + ln Gamma(k + 1)."""
    rate, k = np.asarray(expected, np.float64), np.asarray(counts, np.float64)
    return float((rate - k * np.log(rate) + gammaln(k + 1)).sum())
