"""The ways round that detector and positions may be, and which of them look alike.

There are 8 orientations of the detector and 8 of the positions (axes swapped or not, either sign).
Turning or mirroring frames, positions, probe and object together changes nothing, so of the 64
combinations the probe alone tells 8 from each other. Where the probe looks the same turned or
mirrored (G P = c P), or so conjugated (G P* = c P, as a conjugated exit wave gives the frame turned
by 180 degrees), combinations are equivalent: the image comes out mirrored, and nothing in the data
says which is right. Of those only one is tried, the one nearest to what is set.
Used by the diagnosis, which tries one of each kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.geometry import ORIENTATIONS, Orientation, orient
from ptycho_stream.physics.probe import Probe

SYMMETRIC = 0.999
"""A probe is symmetric if it has this share of its power in common with its turned self."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A way round, relative to what is set.

    Attributes:
        detector: to be applied to the frames, about zero frequency.
        positions: to be applied to the positions (y, x) as to the points of an image: ``flip_y``
            negates y, ``transpose`` swaps the axes, ``antitranspose`` swaps and negates both.
    """

    detector: Orientation = "identity"
    positions: Orientation = "identity"

    @property
    def changes(self) -> int:
        """How many of the two differ from what is set."""
        return (self.detector != "identity") + (self.positions != "identity")

    def __str__(self) -> str:
        return f"detector {self.detector}, positions {self.positions}"


def matrix_of(orientation: Orientation) -> NDArray[np.float64]:
    """The 2 x 2 matrix that moves points (y, x) as :func:`geometry.orient` moves pixels."""
    marks = np.zeros((3, 3), bool)
    columns: list[NDArray[np.float64]] = []
    for y, x in ((2, 1), (1, 2)):
        marks[:] = False
        marks[y, x] = True
        columns.append((np.argwhere(orient(marks, orientation))[0] - 1).astype(np.float64))
    return np.stack(columns, axis=1)


def composed(first: Orientation, then: Orientation) -> Orientation:
    """The orientation that does ``first`` and ``then`` one after the other."""
    wanted = matrix_of(then) @ matrix_of(first)
    return next(name for name in ORIENTATIONS if np.array_equal(matrix_of(name), wanted))


def probe_symmetries(probe: Probe) -> tuple[tuple[Orientation, bool], ...]:
    """What leaves the probe as it is, apart from a phase: orientations, and if conjugated after.

    Of several modes what counts is the space that they span, with their strengths. The probe may
    be off the middle of its window: that moves the whole image only.
    """
    told = probe.modes.astype(np.complex128)
    modes = _centred(told)
    strength = _overlap(modes, modes)
    found: list[tuple[Orientation, bool]] = []
    for orientation in ORIENTATIONS:
        turned = _centred(np.array(orient(told, orientation), np.complex128))
        for conjugated in (False, True):
            other = turned.conj() if conjugated else turned
            if _overlap(modes, other) >= SYMMETRIC * strength:
                found.append((orientation, conjugated))
    return tuple(found)


def _overlap(first: NDArray[np.complexfloating[Any, Any]], second: Any) -> float:
    """Tr(A A+ B B+) of two sets of modes (m, N, N): for one mode each, |<a, b>|^2."""
    a, b = (m.reshape(len(m), -1) for m in (first, second))
    return float((np.abs(a.conj() @ b.T) ** 2).sum())


def _centred(modes: NDArray[np.complexfloating[Any, Any]]) -> NDArray[np.complex128]:
    """The modes moved so that their power is centred on the window, to a fraction of a pixel."""
    power = (np.abs(modes) ** 2).sum(0)
    size = modes.shape[-1]
    index = np.arange(size) - (size - 1) / 2
    dy, dx = (power.sum(axis) @ index / power.sum() for axis in (1, 0))
    frequency = np.fft.fftfreq(size)
    ramp = np.exp(2j * np.pi * (frequency[:, None] * dy + frequency * dx))
    return np.fft.ifft2(np.fft.fft2(modes) * ramp)


def layout_classes(probe: Probe, swaps: bool = True) -> list[tuple[Layout, ...]]:
    """All ways round, those together that the probe cannot tell from each other.

    Args:
        probe: it.
        swaps: whether swapping the axes makes sense (square pixels).

    Returns:
        Tuples of layouts, in each the one with the fewest changes first.
    """
    symmetries = probe_symmetries(probe)
    rest = [Layout(d, p) for d in ORIENTATIONS for p in ORIENTATIONS if swaps or _keeps_axes(d, p)]
    rest.sort(key=lambda layout: layout.changes)
    classes: list[tuple[Layout, ...]] = []
    while rest:
        head = rest[0]
        members = {head}
        for orientation, conjugated in symmetries:
            detector = composed(head.detector, orientation)
            if conjugated:
                detector = composed(detector, "rotate180")
            members.add(Layout(detector, composed(head.positions, orientation)))
        known = [layout for layout in rest if layout in members]
        classes.append(tuple(known))
        rest = [layout for layout in rest if layout not in members]
    return classes


def _keeps_axes(detector: Orientation, positions: Orientation) -> bool:
    return all(matrix_of(name)[0, 0] != 0 for name in (detector, positions))
