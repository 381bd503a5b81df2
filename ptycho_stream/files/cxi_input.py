"""CXI files (version 1.60 and before) as a scan: frames, translations, geometry, mask, images.

Translations are x, y, z in metres, y along the rows of the object and x along its columns, as
ptychodus writes and cdtools reads them. Used by :mod:`ptycho_stream.files.measured`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files import cxi_names as names
from ptycho_stream.files.assemble import Found, assembled
from ptycho_stream.files.hdf5_input import Hdf5Frames, Hdf5Input
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.npz import Pair, ScanFile

_TEXTS = {
    "sample": ("/entry_1/sample_1/name", "/entry_1/title"),
    "comment": ("/entry_1/experiment_description",),
    "proposal": ("/entry_1/experiment_identifier",),
    "start_time": ("/entry_1/start_time",),
}
_MAX_ENERGY_J = 1e-10


def load_cxi(file: Hdf5Input, choice: MeasuredChoice, eager_bytes: int) -> ScanFile:
    """The scan in a CXI file.

    Raises:
        FileFormatError: its version is not known, it holds no frames or translations, or what it
            holds contradicts itself or is not plausible.
    """
    version = file.number(names.VERSION)
    if version is None or not 100 <= version <= names.NEWEST_VERSION:
        told = "none" if version is None else f"{version:g}"
        raise FileFormatError(
            f"{file.path}: cxi_version is {told}, and {names.NEWEST_VERSION} and before are known: "
            "name its datasets (data, xy ...) instead"
        )
    data = file.find(names.DATA, f"{names.DETECTOR}/data")
    if data is None:
        raise FileFormatError(
            f"{file.path} has no frames at {names.DATA}, it holds an image only: name the file "
            f"that was measured; {file.names()}"
        )
    where = f"{file.path}: {data.name}"
    frames = Hdf5Frames([data], where, frames_last=choice.frames_axis == "last")
    pixel = _pair(file, "object_pixel_height_m", "object_pixel_width_m")
    obj = _image(file, names.OBJECT, axes=2)
    center = _center(file)
    found = Found(
        where,
        frames,
        _positions(file),
        numbers=_numbers(file, frames.shape[0]),
        detector_distance_m=file.number(f"{names.DETECTOR}/distance"),
        photon_energy_eV=_energy(file),
        detector_pixel_yx_m=_detector_pixel(file),
        pixel_yx_m=pixel,
        probe=_image(file, names.PROBE, axes=3),
        object=obj,
        object_origin_yx=_origin(obj, center, pixel),
        bad_pixels=_mask(file),
        metadata={key: text for key, paths in _TEXTS.items() if (text := file.text(*paths))},
    )
    return assembled(found, choice, eager_bytes)


def _energy(file: Hdf5Input) -> float | None:
    joules = file.number(names.ENERGY)
    if joules is None:
        return None
    if joules > _MAX_ENERGY_J:
        raise FileFormatError(
            f"{file.path}: {names.ENERGY} is {joules:g}, and CXI has joules there (8 keV are "
            "1.28e-15): give photon_energy_eV yourself"
        )
    return joules / names.JOULES_PER_EV


def _detector_pixel(file: Hdf5Input) -> Pair | None:
    y, x = (file.number(f"{names.DETECTOR}/{axis}_pixel_size") for axis in "yx")
    y, x = y or x, x or y  # some writers have one of them only
    return None if y is None or x is None else (y, x)


def _positions(file: Hdf5Input) -> NDArray[np.float64]:
    dataset = file.find(names.TRANSLATION, names.TRANSLATION_LINK)
    held = None if dataset is None else file.array(dataset.name, "iuf", what="translation")
    if held is None:
        raise FileFormatError(
            f"{file.path} has no {names.TRANSLATION}: name its positions (xy, or y and x)"
        )
    if held.ndim != 2 or held.shape[1] not in (2, 3):
        raise FileFormatError(
            f"{file.path}: {names.TRANSLATION} has shape {held.shape}, not (N, 3): x, y, z"
        )
    return held[:, 1::-1].astype(np.float64)


def _numbers(file: Hdf5Input, count: int) -> NDArray[np.int64] | None:
    held = file.array(f"{names.EXTRAS}/probe_position_indexes", "iu", what="index")
    if held is None or held.shape != (count,) or len(np.unique(held)) < count:
        return None
    return held.astype(np.int64)


def _mask(file: Hdf5Input) -> NDArray[np.bool_] | None:
    mask = file.array(f"{names.DETECTOR}/mask", "biu", what="mask")
    return None if mask is None else (mask.astype(np.int64) & ~names.HAS_SIGNAL) != 0


def _image(file: Hdf5Input, group: str, axes: int) -> NDArray[np.complex64] | None:
    """A complex image of so many axes; longer ones in front are of length 1 or left out."""
    held = file.array(f"{group}/data", "c", what="complex image")
    if held is None or held.ndim < 2 or 0 in held.shape:
        return None
    if axes == 3:
        held = held[0] if held.ndim == 4 else held
        held = held[None] if held.ndim == 2 else held
        square = held.ndim == 3 and held.shape[1] == held.shape[2]
        return held.astype(np.complex64) if square else None
    held = held[0] if held.ndim == 3 and len(held) == 1 else held
    return held.astype(np.complex64) if held.ndim == 2 else None


def _pair(file: Hdf5Input, y: str, x: str) -> Pair | None:
    values = [file.number(f"{names.EXTRAS}/{name}") for name in (y, x)]
    return None if values[0] is None or values[1] is None else (values[0], values[1])


def _center(file: Hdf5Input) -> Pair | None:
    """Of the object, which may be negative."""
    values: list[Any] = [
        file.array(f"{names.EXTRAS}/object_center_{axis}_m", "iuf", what="centre") for axis in "yx"
    ]
    if any(value is None or value.size != 1 for value in values):
        return None
    return float(values[0].reshape(-1)[0]), float(values[1].reshape(-1)[0])


def _origin(
    obj: NDArray[np.complex64] | None, center: Pair | None, pixel: Pair | None
) -> Pair | None:
    if obj is None or center is None or pixel is None:
        return None
    y, x = (c - (n - 1) / 2 * p for c, n, p in zip(center, obj.shape, pixel, strict=True))
    return y, x
