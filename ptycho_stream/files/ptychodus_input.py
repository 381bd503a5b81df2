"""ptychodus' own files as a scan: frames of a diffraction file, the rest of a product.

Both as HDF5 (``product.h5`` and ``diffraction.h5``) or NPZ, as version 1.7 and older ones write
them. Frames and positions are paired by their indexes. Used by
:mod:`ptycho_stream.files.measured`; ``docs/files.md`` lists the keys.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.assemble import EAGER_BYTES, Found, assembled
from ptycho_stream.files.counts import FrameSource, HeldFrames
from ptycho_stream.files.hdf5_input import Hdf5Frames, Hdf5Input, opened_for_frames
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.npz import Pair, ScanFile
from ptycho_stream.files.npz_members import npz_keys, read_npz
from ptycho_stream.files.plausible import real_number
from ptycho_stream.files.ptychodus_names import diffraction_path, product_path

PRODUCT_KEYS: Final = ("probe_position_indexes", "probe_position_x_m", "probe_position_y_m")
_ENERGIES: Final = ("photon_energy_eV", "probe_energy_eV")
_METADATA: Final = {
    "name": "sample",
    "comments": "comment",
    "exposure_time_s": "exposure_time_s",
    "tomography_angle_deg": "tomography_angle_deg",
    "tilt_angle_deg": "tilt_angle_deg",
}
"""Names in a product, and in the metadata of a scan."""


@dataclass(frozen=True)
class _Product:
    """What a product holds that a scan needs."""

    path: Path
    index: NDArray[np.int64]
    position_yx_m: NDArray[np.float64]
    told: Mapping[str, Any]
    probe: NDArray[np.complex64] | None
    object: NDArray[np.complex64] | None
    object_center_yx_m: Pair | None
    pixel_yx_m: Pair | None


@dataclass(frozen=True)
class _Diffraction:
    """What a diffraction file holds."""

    where: str
    frames: FrameSource
    index: NDArray[np.int64] | None
    bad_pixels: NDArray[np.bool_] | None
    detector_pixel_yx_m: Pair | None


def is_product(keys: Container[str]) -> bool:
    """Whether a file (or archive) with these members is a product."""
    return all(key in keys for key in PRODUCT_KEYS)


def is_diffraction(keys: Container[str]) -> bool:
    """Whether a file (or archive) with these members is a diffraction file."""
    return "patterns" in keys and not is_product(keys)


def load_ptychodus(path: Path, choice: MeasuredChoice, eager_bytes: int = EAGER_BYTES) -> ScanFile:
    """The scan of a product and a diffraction file, of which ``path`` is either.

    Raises:
        FileFormatError: the other one is missing, a key is, or they do not belong together.
    """
    named_product = is_product(_keys(path))
    derived = diffraction_path(path) if named_product else product_path(path)
    other = choice.product or derived
    if not other.is_file():
        have, lack = ("positions", "frames") if named_product else ("frames", "positions")
        raise FileFormatError(
            f"{path} is ptychodus' and has {have} only, and its {lack} are not in {other}: name "
            "that file with product"
        )
    product, frames = (path, other) if named_product else (other, path)
    if not is_product(_keys(product)) or not is_diffraction(_keys(frames)):
        raise FileFormatError(
            f"{path} and {other} are not a ptychodus product and its diffraction file: name the "
            "one that belongs to it with product"
        )
    if _is_npz(frames):
        return _joined(_read_product(product), _diffraction_of_npz(frames), choice, eager_bytes)
    with opened_for_frames(frames) as file:
        return _joined(_read_product(product), _read_diffraction(file), choice, eager_bytes)


def _keys(path: Path) -> list[str]:
    if _is_npz(path):
        return npz_keys(path)
    with Hdf5Input(path) as file:
        return file.root_names()


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _joined(
    product: _Product, held: _Diffraction, choice: MeasuredChoice, eager_bytes: int
) -> ScanFile:
    """Frames with the positions of their indexes; those that lack the other are left out."""
    index = np.arange(held.frames.shape[0]) if held.index is None else held.index
    if len(index) != held.frames.shape[0]:
        raise FileFormatError(
            f"{held.where} holds {held.frames.shape[0]} frames and {len(index)} indexes: write "
            "the file again"
        )
    if len(np.unique(index)) < len(index):
        raise FileFormatError(
            f"{held.where}: some frames have the same index, so that none can be told from "
            "another: give each its own"
        )
    positions = _mean_positions(product)
    rows = np.flatnonzero(np.isin(index, positions.index))
    if not len(rows):
        raise FileFormatError(
            f"{held.where}: no index of a frame is among the product's probe_position_indexes: "
            "name the product of these frames"
        )
    order = np.searchsorted(positions.index, index[rows])
    probe, obj = product.probe, product.object
    origin = product.object_center_yx_m
    if obj is not None and origin is not None and product.pixel_yx_m is not None:
        half = [(size - 1) / 2 for size in obj.shape]
        pixel = product.pixel_yx_m
        origin = (origin[0] - half[0] * pixel[0], origin[1] - half[1] * pixel[1])
    found = Found(
        held.where,
        held.frames,
        positions.position_yx_m[order],
        rows=rows.astype(np.int64),
        numbers=index[rows].astype(np.int64),
        detector_distance_m=_above_zero(product, "detector_object_distance_m"),
        photon_energy_eV=_above_zero(product, *_ENERGIES),
        detector_pixel_yx_m=held.detector_pixel_yx_m,
        pixel_yx_m=product.pixel_yx_m,
        probe=probe,
        object=obj,
        object_origin_yx=origin,
        bad_pixels=held.bad_pixels,
        metadata={
            name: _plain(product, key)
            for key, name in _METADATA.items()
            if _worth(product.told.get(key))
        },
    )
    return assembled(found, choice, eager_bytes)


@dataclass(frozen=True)
class _Positions:
    index: NDArray[np.int64]
    position_yx_m: NDArray[np.float64]


def _mean_positions(product: _Product) -> _Positions:
    """One position an index, ascending: a fly scan may have several, whose mean it is."""
    index, back = np.unique(product.index, return_inverse=True)
    count = np.bincount(back)
    mean = [np.bincount(back, product.position_yx_m[:, axis]) / count for axis in (0, 1)]
    return _Positions(index, np.stack(mean, 1))


def _worth(value: Any) -> bool:
    return value is not None and value not in ("", b"", 0, "Unnamed")


def _plain(product: _Product, name: str) -> str | float:
    value = product.told[name]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else real_number(f"{product.path}: {name}", value)


def _above_zero(product: _Product, *names: str) -> float | None:
    for name in names:
        if name in product.told:
            value = real_number(f"{product.path}: {name}", product.told[name])
            return value if 0 < value < np.inf else None
    return None


# ---- product ---------------------------------------------------------------------------------


def _read_product(path: Path) -> _Product:
    if _is_npz(path):
        return _product_of_npz(path, read_npz(path))
    with Hdf5Input(path) as file:
        index, x, y = (file.required(key, "iuf", what="position") for key in PRODUCT_KEYS)
        told = file.attributes("/")
        center = _pair(file.coordinate, "center_y_m", "center_x_m", "object")
        pixel = _pair(file.attribute_number, "pixel_height_m", "pixel_width_m", "object")
        if pixel is None:
            pixel = _pair(file.attribute_number, "pixel_height_m", "pixel_width_m", "probe")
        probe = file.array("probe", "c", what="complex probe")
        obj = file.array("object", "c", what="complex object")
    return _Product(
        path,
        *_positions(path, index, y, x),
        told,
        None if probe is None else _mean_probe(path, probe),
        None if obj is None else _layer(obj),
        center,
        pixel,
    )


def _product_of_npz(path: Path, held: Mapping[str, NDArray[Any]]) -> _Product:
    """The same keys, with those of probe and object prefixed."""
    told = {key: value[()] for key, value in held.items() if value.ndim == 0}

    def pair(y: str, x: str) -> Pair | None:
        if y not in told or x not in told:
            return None
        return real_number(f"{path}: {y}", told[y]), real_number(f"{path}: {x}", told[x])

    probe, obj = held.get("probe"), held.get("object")
    index, x, y = (held[key] for key in PRODUCT_KEYS)
    return _Product(
        path,
        *_positions(path, index, y, x),
        told,
        None if probe is None else _mean_probe(path, probe),
        None if obj is None else _layer(obj),
        pair("object_center_y_m", "object_center_x_m"),
        pair("object_pixel_height_m", "object_pixel_width_m"),
    )


def _pair(read: Any, y: str, x: str, path: str) -> Pair | None:
    values = read(y, path), read(x, path)
    return None if values[0] is None or values[1] is None else (values[0], values[1])


def _positions(
    path: Path, index: NDArray[Any], y: NDArray[Any], x: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    if y.dtype.kind not in "iuf" or x.dtype.kind not in "iuf":
        raise FileFormatError(f"{path}: positions are {y.dtype} and {x.dtype}, not numbers")
    if not index.shape == y.shape == x.shape:
        raise FileFormatError(
            f"{path}: there are {index.shape} indexes and {y.shape} and {x.shape} coordinates of "
            "positions: write the file again"
        )
    return _integers(path, index), np.stack([y, x], 1).astype(np.float64)


def _integers(path: Path, index: NDArray[Any]) -> NDArray[np.int64]:
    if index.ndim != 1 or index.dtype.kind not in "iu" or (len(index) and index.min() < 0):
        raise FileFormatError(
            f"{path}: indexes are {index.dtype} {index.shape}, not numbers from 0"
        )
    return index.astype(np.int64)


def _mean_probe(path: Path, probe: NDArray[Any]) -> NDArray[np.complex64] | None:
    """Modes (modes, N, N): of (opr, modes, h, w) the first of OPR, which is the mean probe."""
    modes = probe[0] if probe.ndim == 4 and len(probe) else probe
    modes = modes[None] if modes.ndim == 2 else modes
    if modes.ndim != 3 or 0 in modes.shape or modes.dtype.kind != "c":
        raise FileFormatError(f"{path}: probe is {probe.dtype} {probe.shape}, not complex modes")
    # One that is not square is of no use here; what there is else may be.
    return modes.astype(np.complex64) if modes.shape[1] == modes.shape[2] else None


def _layer(obj: NDArray[Any]) -> NDArray[np.complex64] | None:
    """The object if it is thin; of several layers there is no single image."""
    flat = obj[0] if obj.ndim == 3 and len(obj) == 1 else obj
    return flat.astype(np.complex64) if flat.ndim == 2 and flat.dtype.kind == "c" else None


# ---- diffraction -----------------------------------------------------------------------------


def _diffraction_of_npz(path: Path) -> _Diffraction:
    held = read_npz(path)
    patterns, index, mask = held["patterns"], held.get("indexes"), held.get("bad_pixels")
    if patterns.ndim != 3 or 0 in patterns.shape:
        raise FileFormatError(f"{path}: patterns has shape {patterns.shape}, not (M, h, w)")
    if mask is not None and mask.dtype.kind not in "biu":
        raise FileFormatError(f"{path}: bad_pixels is {mask.dtype}, not bool (h, w)")
    return _Diffraction(
        f"{path}: patterns",
        HeldFrames(patterns),
        None if index is None else _integers(path, index),
        None if mask is None else mask != 0,
        None,
    )


def _read_diffraction(file: Hdf5Input) -> _Diffraction:
    where = f"{file.path}: patterns"
    index = file.array("indexes", "iu", what="index")
    mask = file.array("bad_pixels", "biu", what="mask")
    return _Diffraction(
        where,
        Hdf5Frames([file.get("patterns")], where),
        None if index is None else _integers(file.path, index),
        None if mask is None else mask != 0,
        _pair(
            file.attribute_number, "detector_pixel_height_m", "detector_pixel_width_m", "patterns"
        ),
    )
