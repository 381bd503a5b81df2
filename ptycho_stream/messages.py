"""The vocabulary: what every detector or positioner dialect decodes into.

Codecs in :mod:`ptycho_stream.wire` make these, the scan state machine and ingest consume them, and
nothing else crosses that border.  They are plain values: no I/O, no behaviour beyond their fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

BytesLike = bytes | bytearray | memoryview

Gate = Literal["open", "dark", "skip"]
"""Whether a frame is to be reconstructed: ``open`` is; ``dark`` was taken without beam, for the
background; ``skip`` is kept and left out (shutter closed, top-up)."""


@dataclass(frozen=True, slots=True)
class DetectorGeometry:
    """What a stream's header says of the experiment; None where it says nothing.

    ``beam_center_yx_px`` counts detector pixels from the centre of pixel [0, 0].
    """

    detector_distance_m: float | None = None
    photon_energy_eV: float | None = None
    detector_pixel_yx_m: tuple[float, float] | None = None
    beam_center_yx_px: tuple[float, float] | None = None
    count_time_s: float | None = None
    frame_time_s: float | None = None


@dataclass(frozen=True, slots=True)
class ScanStart:
    """A detector begins a series.

    ``series`` is the sender's own identity of it, unique only among the series now open.
    ``frame_shape_yx`` and ``dtype`` are None where the header does not tell (the first frame does).
    ``pixel_mask`` is bool (y, x), True where a pixel is bad.
    """

    source: str
    series: str
    expected_frames: int | None = None
    frame_shape_yx: tuple[int, int] | None = None
    dtype: str | None = None
    geometry: DetectorGeometry = field(default_factory=DetectorGeometry)
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    pixel_mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One detector image as it came: decoded by :func:`ptycho_stream.wire.compression.decode`.

    ``encoding`` is one of ``raw``, ``lz4``, ``bslz4`` (the DECTRIS ``bs<BIT>-lz4<`` framing) or
    ``lz4-hdf5``; ``dtype`` is a numpy name with byte order (``<u2``); the blob is row-major.
    ``shuffle_bits`` is the width of bit-shuffled elements where it differs from the dtype's.
    """

    blob: BytesLike
    encoding: str
    dtype: str
    shape_yx: tuple[int, int]
    shuffle_bits: int | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a series.  ``number`` is absolute, from 0; times are UTC nanoseconds.

    ``i0`` is the reading of a beam monitor, in any unit that stays the same within a scan.
    """

    series: str
    number: int
    image: EncodedImage
    position_yx_m: tuple[float, float] | None = None
    start_ns: int | None = None
    stop_ns: int | None = None
    i0: float | None = None
    gate: Gate = "open"


@dataclass(frozen=True, slots=True)
class ScanEnd:
    """A detector ends a series."""

    series: str


@dataclass(frozen=True, slots=True)
class PositionsStart:
    """A positioner begins an epoch, which belongs to exactly one scan.

    ``epoch`` is unique to the sender; ``series`` names the detector's series where it is known.
    ``joined``: its real start was some time ago and not heard, so that ``epoch`` is a name of the
    decoder's making.  ``metadata`` (sample, operator, motors ...) go into the header of its scan.
    A start that is heard late comes again, with the metadata.
    """

    epoch: str
    series: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Positions:
    """Scan positions keyed by absolute frame number.

    ``numbers`` is int64 (n,), ``position_yx_m`` float64 (n, 2): stage coordinates of the probe's
    centre in metres.  An ``epoch`` that was never started starts with its first positions.
    ``i0`` float64 (n,) are readings of a beam monitor, NaN where there is none; ``skip`` bool (n,)
    is True where a frame is to be left out of the image (``Gate``).  None: nothing is said.
    """

    epoch: str
    series: str | None
    numbers: NDArray[np.int64]
    position_yx_m: NDArray[np.float64]
    i0: NDArray[np.float64] | None = None
    skip: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class PositionsEnd:
    """A positioner ends an epoch; no more positions will come for it."""

    epoch: str


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Something arrived that no codec understands; it is counted, logged and left behind.

    ``reason`` is the ``reason`` of the :class:`~ptycho_stream.errors.WireError` that was met
    (``malformed``, ``torn``, ``undecodable``, ``limit``), ``detail`` a sentence for the log; of
    which series or epoch it is where that is known, and for how many it stands.
    """

    reason: str
    detail: str
    series: str | None = None
    epoch: str | None = None
    count: int = 1


Message = ScanStart | Frame | ScanEnd | PositionsStart | Positions | PositionsEnd | Undecodable
