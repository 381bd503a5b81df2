"""From what a reader found in a file to a scan that the rest of the package can use.

The one place where answers of the user go before the file's, where domain and units are checked,
and where it is decided whether frames are read now or later. Used by the readers of all formats
but our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.counts import (
    Conversion,
    CountsArray,
    FrameSource,
    LazyCounts,
    marked_bad,
    sample_rows,
)
from ptycho_stream.files.measured_choice import Domain, MeasuredChoice
from ptycho_stream.files.npz import Pair, ScanFile
from ptycho_stream.files.plausible import check_amplitude, check_positions, check_range
from ptycho_stream.geometry import object_pixel_yx_m

EAGER_BYTES = 256 * 1024**2
"""Frames that take no more than this are read at once, others when they are asked for."""
_SAMPLED = 16
_SCALED_BY = 64


@dataclass(frozen=True)
class Found:
    """What a file holds, as its reader understands it.

    Attributes:
        where: file and dataset of the frames, for errors.
        frames: as the file has them.
        position_yx: float64 (M, 2), metres, or object pixels if ``in_pixels``.
        in_pixels: positions and ``object_origin_yx`` are in object pixels.
        rows: int64 (M,), which frame belongs to each position; None: all of them in order.
        numbers: int64 (M,) of the frames; None: 0 to M - 1.
        domain: what the file says that its frames are; None: counts, as its format has them.
        counts_per_unit: of the file's amplitudes, if it tells; squared amplitude times this are
            counts.
        photons: counts of a frame on average, if it tells that instead.
        bad_pixels: bool (h, w).
        object_origin_yx: of the centre of object[0, 0].
    """

    where: str
    frames: FrameSource
    position_yx: NDArray[np.float64]
    in_pixels: bool = False
    rows: NDArray[np.int64] | None = None
    numbers: NDArray[np.int64] | None = None
    domain: Domain | None = None
    counts_per_unit: float | None = None
    photons: float | None = None
    detector_distance_m: float | None = None
    photon_energy_eV: float | None = None
    detector_pixel_yx_m: Pair | None = None
    pixel_yx_m: Pair | None = None
    probe: NDArray[np.complex64] | None = None
    object: NDArray[np.complex64] | None = None
    object_origin_yx: Pair | None = None
    bad_pixels: NDArray[np.bool_] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


def assembled(found: Found, choice: MeasuredChoice, eager_bytes: int = EAGER_BYTES) -> ScanFile:
    """The scan of what was found.

    Args:
        found: by a reader.
        choice: goes before it.
        eager_bytes: decoded size up to which frames are read at once.

    Raises:
        FileFormatError: it contradicts itself or is not plausible; the text says what to do.
    """
    found = _answered(found, choice)
    _check_shape(found, choice)
    rows = np.arange(len(found.position_yx)) if found.rows is None else found.rows
    pixel_yx_m = _object_pixel(found)
    scale = _metres_per_unit(found, pixel_yx_m)
    position_yx_m = found.position_yx * scale
    check_positions(f"{found.where}: positions", position_yx_m, pixel_yx_m, _window(found))
    counts, bad_pixels = _counts(found, choice, rows, eager_bytes)
    return ScanFile(
        counts=counts,
        positions_yx_m=position_yx_m,
        frame_numbers=np.arange(len(rows)) if found.numbers is None else found.numbers,
        detector_distance_m=found.detector_distance_m,
        photon_energy_eV=found.photon_energy_eV,
        detector_pixel_yx_m=found.detector_pixel_yx_m,
        probe=found.probe,
        object=found.object,
        object_origin_yx_m=_scaled(found.object_origin_yx, scale),
        pixel_yx_m=pixel_yx_m,
        bad_pixels=bad_pixels,
        metadata=found.metadata,
    )


def _answered(found: Found, choice: MeasuredChoice) -> Found:
    """What was found, with what the user says instead; and a look at whether numbers can be."""
    answers = {
        "photon_energy_eV": choice.photon_energy_eV,
        "detector_distance_m": choice.detector_distance_m,
        "detector_pixel_yx_m": choice.detector_pixel_yx_m,
        "pixel_yx_m": choice.pixel_yx_m,
        "domain": choice.domain,
    }
    found = replace(found, **{name: value for name, value in answers.items() if value is not None})
    known = (found.photon_energy_eV, found.detector_distance_m, found.detector_pixel_yx_m)
    if choice.moves_pixel and None not in known:
        found = replace(found, pixel_yx_m=None)
    if choice.photons is not None or choice.counts_per_unit is not None:
        found = replace(found, photons=choice.photons, counts_per_unit=choice.counts_per_unit)
    for name in ("photon_energy_eV", "detector_distance_m"):
        if (value := getattr(found, name)) is not None:
            check_range(found.where, name, [value])
    for name in ("detector_pixel_yx_m", "pixel_yx_m"):
        if (pair := getattr(found, name)) is not None:
            check_range(found.where, name, pair)
    return found


def _check_shape(found: Found, choice: MeasuredChoice) -> None:
    count, h, w = found.frames.shape
    dtype, wanted = found.frames.dtype, len(found.position_yx)
    if not wanted:
        raise FileFormatError(
            f"{found.where}: no frame has a position; name positions of these frames"
        )
    if dtype.kind not in "uif":
        raise FileFormatError(f"{found.where} is {dtype}, not numbers: name another dataset")
    if found.rows is not None or count == wanted:
        return
    if choice.frames_axis == "first" and w == wanted and count == h:
        raise FileFormatError(
            f"{found.where} has shape ({count}, {h}, {w}) and there are {wanted} positions: frames "
            "are counted along its last axis; say frames_axis = 'last'"
        )
    if choice.frames_axis == "last" and h == wanted:
        raise FileFormatError(
            f"{found.where} counts {wanted} frames along its first axis: leave frames_axis out"
        )
    raise FileFormatError(
        f"{found.where} has {count} frames of {h} x {w} pixels, and there are {wanted} positions: "
        "each frame needs one; name other datasets, or cut the longer one"
    )


def _window(found: Found) -> int:
    """Side of the probe's window, or of the frames that it must fit."""
    return found.frames.shape[2] if found.probe is None else found.probe.shape[-1]


def _object_pixel(found: Found) -> Pair | None:
    """Of the file, else from the geometry for the probe's window (of square frames: for these)."""
    if found.pixel_yx_m is not None:
        return found.pixel_yx_m
    energy, distance = found.photon_energy_eV, found.detector_distance_m
    detector = found.detector_pixel_yx_m
    if energy is None or distance is None or detector is None:
        return None
    _, h, w = found.frames.shape
    if found.probe is None and h != w:
        return None
    return object_pixel_yx_m(energy, distance, detector, _window(found))


def _metres_per_unit(found: Found, pixel_yx_m: Pair | None) -> NDArray[np.float64]:
    if not found.in_pixels:
        return np.ones(2)
    if pixel_yx_m is None:
        raise FileFormatError(
            f"{found.where}: positions are in object pixels, whose size the file does not tell: "
            "give pixel_yx_m, or photon_energy_eV, detector_distance_m and detector_pixel_yx_m"
        )
    return np.array(pixel_yx_m)


def _scaled(origin_yx: Pair | None, scale: NDArray[np.float64]) -> Pair | None:
    if origin_yx is None:
        return None
    return float(origin_yx[0] * scale[0]), float(origin_yx[1] * scale[1])


def _counts(
    found: Found, choice: MeasuredChoice, rows: NDArray[np.int64], eager_bytes: int
) -> tuple[CountsArray, NDArray[np.bool_] | None]:
    """Frames as counts, and the pixels that measure nothing."""
    domain = found.domain or "counts"
    sample = found.frames.read(sample_rows(rows, _SAMPLED))
    bad = marked_bad(sample)
    if found.bad_pixels is not None:
        if found.bad_pixels.shape != bad.shape:
            raise FileFormatError(
                f"{found.where}: the mask has shape {found.bad_pixels.shape} and frames are "
                f"{bad.shape}: name one that fits"
            )
        bad |= found.bad_pixels
    if bad.all():
        raise FileFormatError(f"{found.where}: no pixel is good: give another mask")
    if domain == "amplitude" and found.counts_per_unit is None:
        check_amplitude(found.where, np.where(bad, 0, sample))
    bad_pixels = bad if bad.any() else None
    conversion = Conversion(
        found.where,
        domain,
        _counts_per_unit(found, domain, rows, bad),
        choice.negative,
        bad_pixels,
    )
    conversion.counts(sample)  # what is no count is said now, not in the middle of a series
    lazy = LazyCounts(found.frames, rows, conversion)
    size_bytes = int(np.prod(lazy.shape, dtype=np.int64)) * lazy.dtype.itemsize
    return (lazy[:] if size_bytes <= eager_bytes else lazy), bad_pixels


def _counts_per_unit(
    found: Found, domain: Domain, rows: NDArray[np.int64], bad: NDArray[np.bool_]
) -> float | None:
    if found.counts_per_unit is not None or found.photons is None:
        return found.counts_per_unit
    values = np.where(bad, 0, found.frames.read(sample_rows(rows, _SCALED_BY))).astype(np.float64)
    total = float((values * values if domain == "amplitude" else values).sum() / len(values))
    if not total > 0:
        raise FileFormatError(f"{found.where}: no frame holds anything to be scaled to photons")
    return found.photons / total
