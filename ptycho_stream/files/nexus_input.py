"""Frames and positions at named paths of an HDF5 file (NeXus, or any other) as a scan.

Paths of frames that are widely used are found by themselves; positions are named by the user,
in the same file or another one. Used by :mod:`ptycho_stream.files.measured`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.assemble import Found, assembled
from ptycho_stream.files.hdf5_input import (
    UNITS_EV,
    Hdf5Frames,
    Hdf5Input,
    units_of,
)
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.npz import Pair, ScanFile
from ptycho_stream.geometry import METRES
from ptycho_stream.wire.positions_file import load_positions

FRAME_PATHS: Final = (
    "/entry/data/data",
    "/entry/data/data_*",
    "/exchange/data",
    "/dp",
    "/entry/measurement/Eiger/data",
    "/entry/instrument/detector/data",
)
"""Where frames are looked for, in this order; the first that is there is taken. ``data_*`` are the
files that a DECTRIS file writer links to, one after another."""
POSITION_PATHS: Final = (("/entry/measurement/pseudo/y", "/entry/measurement/pseudo/x"),)
_ENERGIES: Final = (
    "/entry/instrument/beam/incident_energy",
    "/entry/instrument/monochromator/energy",
    "/entry/instrument/source/energy",
)
_DETECTOR: Final = "/entry/instrument/detector"
_DISTANCES: Final = (f"{_DETECTOR}/detector_distance", f"{_DETECTOR}/distance")
_MASKS: Final = (f"{_DETECTOR}/pixel_mask", f"{_DETECTOR}/detectorSpecific/pixel_mask")
_TEXTS: Final = {
    "sample": ("/entry/sample/name",),
    "comment": ("/entry/title",),
    "proposal": ("/entry/experiment_identifier",),
    "start_time": ("/entry/start_time",),
}


def load_nexus(file: Hdf5Input, choice: MeasuredChoice, eager_bytes: int) -> ScanFile:
    """The scan in an HDF5 file.

    Raises:
        FileFormatError: frames or positions are not there; the text names what is.
    """
    datasets = _datasets(file, choice)
    where = f"{file.path}: {datasets[0].name}" + ("" if len(datasets) == 1 else " ...")
    frames = Hdf5Frames(datasets, where, frames_last=choice.frames_axis == "last")
    positions, in_pixels, numbers = _positions(file, choice, datasets, frames.shape[0])
    found = Found(
        where,
        frames,
        positions,
        in_pixels=in_pixels,
        numbers=numbers,
        rows=numbers,
        photon_energy_eV=choice.photon_energy_eV or file.measure(UNITS_EV, *_ENERGIES),
        detector_distance_m=choice.detector_distance_m or file.measure(METRES, *_DISTANCES),
        detector_pixel_yx_m=choice.detector_pixel_yx_m or _detector_pixel(file),
        bad_pixels=_mask(file, choice),
        metadata={key: text for key, paths in _TEXTS.items() if (text := file.text(*paths))},
    )
    return assembled(found, choice, eager_bytes)


def _datasets(file: Hdf5Input, choice: MeasuredChoice) -> list[Any]:
    if choice.data is not None:
        found = file.matching(choice.data)
        if found:
            return found
        raise FileFormatError(f"{file.path} has no dataset {choice.data}; {file.names()}")
    for path in FRAME_PATHS:
        if found := file.matching(path):
            return found
    raise FileFormatError(
        f"{file.path} has frames at none of {', '.join(FRAME_PATHS)}: name their path with data; "
        f"{file.names()}"
    )


def _positions(
    file: Hdf5Input, choice: MeasuredChoice, datasets: Sequence[Any], count: int
) -> tuple[NDArray[np.float64], bool, NDArray[np.int64] | None]:
    """Positions (M, 2), whether they are in pixels, and of which frames; None: of all, in order."""
    source = choice.positions_file
    if source is not None and source.suffix.lower() in (".csv", ".npz"):
        _check_table(f"{file.path}: {source}", choice)
        told = load_positions(source)
        known = np.isfinite(told.position_yx_m).all(1)
        inside = known & (told.numbers >= 0) & (told.numbers < count)
        order = np.argsort(told.numbers[inside], kind="stable")
        return told.position_yx_m[inside][order], False, told.numbers[inside][order]
    if source is None:
        position, in_pixels = _named_positions(file, choice, datasets)
    else:
        with Hdf5Input(source) as other:
            position, in_pixels = _named_positions(other, choice, datasets)
    return position, in_pixels, None


def _check_table(where: str, choice: MeasuredChoice) -> None:
    """Refuse answers that a table of positions leaves no room for."""
    idle = [name for name in ("y", "x", "xy", "position_unit") if getattr(choice, name) is not None]
    if idle:
        raise FileFormatError(
            f"{where} has its positions by frame and in metres, and no use for "
            f"{', '.join(idle)}: leave out"
        )


def _named_positions(
    file: Hdf5Input, choice: MeasuredChoice, datasets: Sequence[Any]
) -> tuple[NDArray[np.float64], bool]:
    if choice.xy is not None:
        held, unit = _column(file, choice.xy, choice)
        if held.ndim == 2 and held.shape[0] in (2, 3) and held.shape[1] > 3:
            held = held.T
        if held.ndim != 2 or held.shape[1] not in (2, 3):
            raise FileFormatError(
                f"{file.path}: {choice.xy} has shape {held.shape}; positions are (N, 2) or "
                "(N, 3), columns x, y"
            )
        return held[:, 1::-1] * unit, choice.position_unit == "px"
    paths = (choice.y, choice.x)
    if choice.y is None:
        paths = next(
            (pair for pair in POSITION_PATHS if all(file.find(path) for path in pair)), (None, None)
        )
    if paths[0] is None or paths[1] is None:
        raise FileFormatError(
            f"{file.path}: where the positions are is not known: name their paths with y and x (or "
            f"xy), or another file with positions_file; {file.names()}"
        )
    (y, y_unit), (x, x_unit) = (_column(file, path, choice) for path in paths if path)
    y, x = _on_raster(y * y_unit, x * x_unit, datasets)
    if y.shape != x.shape:
        raise FileFormatError(
            f"{file.path}: {paths[0]} has shape {y.shape} and {paths[1]} {x.shape}: name two that "
            "belong together"
        )
    return np.stack([y.ravel(), x.ravel()], 1), choice.position_unit == "px"


def _column(
    file: Hdf5Input, path: str, choice: MeasuredChoice
) -> tuple[NDArray[np.float64], float]:
    """A dataset of positions, and what its unit is in metres (1 for pixels)."""
    dataset, held = file.get(path), file.required(path, "iuf", what="position")
    if choice.position_unit is not None:
        return held.astype(np.float64), METRES.get(choice.position_unit, 1.0)
    unit = units_of(dataset)
    if unit is None or unit.lower() not in METRES:
        told = "no unit" if unit is None else f"the unit {unit!r}"
        raise FileFormatError(
            f"{file.path}: {path} tells {told}: say position_unit (m, mm, um, nm or px)"
        )
    return held.astype(np.float64), METRES[unit.lower()]


def _on_raster(
    y: NDArray[np.float64], x: NDArray[np.float64], datasets: Sequence[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions of every point, where rows and columns of a raster have one each."""
    shape = datasets[0].shape
    if len(shape) == 4 and (y.shape, x.shape) == ((shape[0],), (shape[1],)):
        rows, columns = np.meshgrid(y, x, indexing="ij")
        return rows, columns
    return y, x


def _detector_pixel(file: Hdf5Input) -> Pair | None:
    y, x = (file.measure(METRES, f"{_DETECTOR}/{axis}_pixel_size") for axis in "yx")
    return None if y is None or x is None else (y, x)


def _mask(file: Hdf5Input, choice: MeasuredChoice) -> NDArray[np.bool_] | None:
    if choice.mask is not None:
        file.get(choice.mask)
    dataset = file.find(choice.mask) if choice.mask is not None else file.find(*_MASKS)
    if dataset is None:
        return None
    mask = file.array(dataset.name, "biu", what="mask")
    return None if mask is None or mask.ndim != 2 else mask != 0
