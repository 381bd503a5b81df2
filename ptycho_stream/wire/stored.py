"""What the control commands ``frame`` and ``image`` answer, as typed values.

Sans-IO: :mod:`ptycho_stream.remote` sends the requests and hands these out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import MalformedMessage
from ptycho_stream.wire.results import array


@dataclass(frozen=True, slots=True, eq=False)
class StoredFrame:
    """A frame of a scan.

    Attributes:
        scan_id: of the scan.
        frame: the detector's number of it.
        slot: its place in the order of arrival, from 0.
        frames: in the scan by now.
        received_ns: UTC.
        dark: it was taken without beam.
        position_yx_m: where the probe's centre was; None: not known.
        look: ``view``: as the network sees it, zero frequency at N // 2; ``stored``: as it lies
            in the store.
        bin_px: pixels a side that were summed into one of ``counts_yx``.
        counts_yx: float32 (h, w), 0 where nothing was measured.
        valid_yx: bool (h, w), whether something was measured.
    """

    scan_id: str
    frame: int
    slot: int
    frames: int
    received_ns: int
    dark: bool
    position_yx_m: tuple[float, float] | None
    look: str
    bin_px: int
    counts_yx: NDArray[np.float32]
    valid_yx: NDArray[np.bool_]


def frame_of(told: dict[str, Any]) -> StoredFrame:
    """The frame in a daemon's answer.

    Raises:
        MalformedMessage: it is none.
    """
    try:
        height, width = told["shape_yx"]
        position = told["position_yx_m"]
        return StoredFrame(
            scan_id=told["scan_id"],
            frame=told["frame"],
            slot=told["slot"],
            frames=told["frames"],
            received_ns=told["received_ns"],
            dark=told["dark"],
            position_yx_m=None if position is None else (position[0], position[1]),
            look=told["look"],
            bin_px=told["bin_px"],
            counts_yx=array(told["counts"], "<f4", (height, width), "frame"),
            valid_yx=array(told["valid"], "|u1", (height, width), "mask").astype(bool),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedMessage(f"not a stored frame: {error!r}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A rectangle of a canvas, in bins of ``bin_px`` squared of its pixels.

    Attributes:
        corner_yx_px: canvas pixel (y, x) at which the first bin begins.
        bin_px: canvas pixels along each side of a bin.
        values_yx: (h, w), NaN where nothing is known: complex64 of an object, float32 of a misfit.
        weight_yx: float32 (h, w), the light that each bin of an object got; None of a misfit.
    """

    corner_yx_px: tuple[int, int]
    bin_px: int
    values_yx: NDArray[Any]
    weight_yx: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, eq=False)
class StoredImage:
    """An image that is kept with its scan, as far as it was asked for.

    Attributes:
        words: all that is not an array: ``scan_id``, ``state``, ``generation``, ``layer``,
            ``model``, ``trust``, ``verdict``, ``frames``, ``pixel_yx_m``, ``corner_yx_px``,
            ``shape_yx`` ... (docs/protocol.md).
        object: a piece of it; None: not asked for.
        misfit: the whole map; None: not asked for, or there is none.
        probe: complex64 (modes, N, N), as many modes as fit into an answer.
        frame_numbers: int64 (n,) of frames in the image, evenly spread ones of very many.
        position_yx_m: float64 (n, 2), theirs.
    """

    words: dict[str, Any]
    object: Piece | None = None
    misfit: Piece | None = None
    probe: NDArray[np.complex64] | None = None
    frame_numbers: NDArray[np.int64] | None = None
    position_yx_m: NDArray[np.float64] | None = None


def image_of(told: dict[str, Any]) -> StoredImage:
    """The image in a daemon's answer.

    Raises:
        MalformedMessage: it is none.
    """
    words = dict(told)
    missing = {"scan_id", "generation", "pixel_yx_m", "corner_yx_px", "shape_yx"} - words.keys()
    if missing:
        raise MalformedMessage(f"not a stored image: it lacks {', '.join(sorted(missing))}")
    try:
        obj, misfit = words.pop("object", None), words.pop("misfit", None)
        probe, positions = words.pop("probe", None), words.pop("positions", None)
        return StoredImage(
            words=words,
            object=None if obj is None else _piece(obj, "object", "<c8"),
            misfit=None if misfit is None else _piece(misfit, "excess", "<f4"),
            probe=None if probe is None else array(probe["probe"], "<c8", _shape3(probe), "probe"),
            **({} if positions is None else _positions(positions)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedMessage(f"not a stored image: {error!r}") from error


def _piece(told: dict[str, Any], name: str, dtype: str) -> Piece:
    height, width = told["shape_yx"]
    top, left = told["corner_yx_px"]
    weight = told.get("weight")
    return Piece(
        corner_yx_px=(top, left),
        bin_px=told["bin_px"],
        values_yx=array(told[name], dtype, (height, width), name),
        weight_yx=None if weight is None else array(weight, "<f4", (height, width), "weight"),
    )


def _positions(told: dict[str, Any]) -> dict[str, NDArray[Any]]:
    numbers = np.frombuffer(told["frame_numbers"], "<i8")
    places = array(told["position_yx_m"], "<f8", (len(numbers), 2), "positions")
    return {"frame_numbers": numbers, "position_yx_m": places}


def _shape3(told: dict[str, Any]) -> tuple[int, int, int]:
    modes, height, width = told["shape"]
    return modes, height, width
