"""Our scan file, an NPZ: measured or simulated frames with positions and geometry.

Written by ``ptycho-stream simulate`` and by scripts that convert other people's data, read by
``ptycho-stream replay`` and ``reconstruct``, the demo and the tests. :class:`ScanFile` is also what
the readers of all other formats make (:mod:`ptycho_stream.files.measured`).  The keys:

=========================  ======================================================================
``diffraction``            integer counts (M, h, w), detector orientation, zero frequency at the
                           centre [h // 2, w // 2]
``measurement_domain``     the text ``counts``
``positions_yx_m``         float64 (M, 2), world position of the probe's centre, metres
``frame_numbers``          optional integers (M,); 0 to M - 1 if absent
``detector_distance_m``    optional; so are ``photon_energy_eV`` and ``detector_pixel_yx_m`` (2,)
``probe``                  optional complex (modes, N, N)
``object``                 optional complex (H, W), the truth, with ``object_origin_yx_m`` (2,) of
                           the centre of object[0, 0] and ``pixel_yx_m`` (2,)
``bad_pixels``             optional bool (h, w), True where the counts say nothing of the sample
``metadata``               optional JSON text
=========================  ======================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import FileFormatError, GeometryError
from ptycho_stream.files.counts import CountsArray
from ptycho_stream.files.npz_members import read_npz
from ptycho_stream.geometry import object_pixel_yx_m

Pair = tuple[float, float]
_DTYPES = (np.uint8, np.uint16, np.uint32)
_CORRECTED = np.float32


@dataclass(frozen=True)
class ScanFile:
    """The contents of a scan file; the fields are those of the table at the top of the module.

    Attributes:
        counts: uint8, uint16 or uint32 (M, h, w), or float32 where a view has corrected them; of a
            large file an array-like that reads frames as it is indexed.
        positions_yx_m: float64 (M, 2).
        frame_numbers: int64 (M,).
        probe: complex64 (modes, N, N), None if the file has none.
        object: complex64 (H, W), None if the truth is unknown.
        bad_pixels: bool (h, w), None if all are good or nobody knows.
    """

    counts: CountsArray
    positions_yx_m: NDArray[np.float64]
    frame_numbers: NDArray[np.int64]
    detector_distance_m: float | None = None
    photon_energy_eV: float | None = None
    detector_pixel_yx_m: Pair | None = None
    probe: NDArray[np.complex64] | None = None
    object: NDArray[np.complex64] | None = None
    object_origin_yx_m: Pair | None = None
    pixel_yx_m: Pair | None = None
    bad_pixels: NDArray[np.bool_] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        frames = len(self.counts)
        if len(self.counts.shape) != 3 or 0 in self.counts.shape:
            raise FileFormatError(f"diffraction has shape {self.counts.shape}, not (M, h, w)")
        if self.counts.dtype.type not in (*_DTYPES, _CORRECTED):
            raise FileFormatError(
                f"diffraction is {self.counts.dtype}: counts are uint8, uint16 or uint32"
            )
        if self.positions_yx_m.shape != (frames, 2):
            raise FileFormatError(
                f"positions_yx_m has shape {self.positions_yx_m.shape}, "
                f"not ({frames}, 2) as the {frames} frames ask for"
            )
        if self.frame_numbers.shape != (frames,) or self.frame_numbers.min() < 0:
            raise FileFormatError(
                f"frame_numbers has shape {self.frame_numbers.shape} or negative members; "
                f"{frames} numbers from 0 are needed"
            )
        if len(np.unique(self.frame_numbers)) != frames:
            raise FileFormatError("frame_numbers has repeated members; each frame has its own")
        if self.bad_pixels is not None and self.bad_pixels.shape != self.frame_shape_yx:
            raise FileFormatError(
                f"bad_pixels has shape {self.bad_pixels.shape}, frames are {self.frame_shape_yx}"
            )

    @property
    def frame_shape_yx(self) -> tuple[int, int]:
        """Rows and columns of a frame."""
        return self.counts.shape[1], self.counts.shape[2]

    def __len__(self) -> int:
        return len(self.counts)

    def pixel_for(self, size_px: int) -> Pair:
        """Size (y, x) of an object pixel, metres: the file's, else from the geometry.

        Args:
            size_px: N of a patch, which the file's pixel is taken to be of.

        Raises:
            GeometryError: the scan tells neither.
        """
        if self.pixel_yx_m is not None:
            return self.pixel_yx_m
        energy, distance = self.photon_energy_eV, self.detector_distance_m
        if energy is None or distance is None or self.detector_pixel_yx_m is None:
            raise GeometryError(
                "the scan tells no object pixel: give pixel_yx_m, or photon_energy_eV, "
                "detector_distance_m and detector_pixel_yx_m"
            )
        return object_pixel_yx_m(energy, distance, self.detector_pixel_yx_m, size_px)


def load_scan(path: Path) -> ScanFile:
    """Read a scan file.

    Raises:
        FileFormatError: the file is missing, unreadable or breaks one of the rules at the top of
            the module; the text says which key and what to do.
    """
    arrays = read_npz(path, "scan file")
    try:
        return _read(arrays)
    except (FileFormatError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: {error}") from error


def save_scan(path: Path, scan: ScanFile) -> None:
    """Write ``scan`` to ``path``; a reader sees the old file or the whole new one.

    Raises:
        FileFormatError: the counts are corrected ones, or the file cannot be written.
    """
    if scan.counts.dtype.type not in _DTYPES:
        raise FileFormatError(f"{path}: a scan file holds counts, not {scan.counts.dtype}")
    arrays: dict[str, Any] = {
        "diffraction": scan.counts,
        "measurement_domain": np.array("counts"),
        "positions_yx_m": scan.positions_yx_m,
        "frame_numbers": scan.frame_numbers,
        "detector_distance_m": scan.detector_distance_m,
        "photon_energy_eV": scan.photon_energy_eV,
        "detector_pixel_yx_m": scan.detector_pixel_yx_m,
        "probe": scan.probe,
        "object": scan.object,
        "object_origin_yx_m": scan.object_origin_yx_m,
        "pixel_yx_m": scan.pixel_yx_m,
        "bad_pixels": scan.bad_pixels,
        "metadata": np.array(json.dumps(dict(scan.metadata))),
    }
    save_arrays(path, {key: value for key, value in arrays.items() if value is not None})


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an NPZ of ``arrays`` so that no reader ever sees a part of it.

    Raises:
        FileFormatError: the file cannot be written.
    """
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def _read(held: Mapping[str, NDArray[Any]]) -> ScanFile:
    for key in ("diffraction", "positions_yx_m"):
        if key not in held:
            raise FileFormatError(f"key {key} is missing; there are {', '.join(held)}")
    domain = str(held["measurement_domain"]) if "measurement_domain" in held else "missing"
    if domain != "counts":
        raise FileFormatError(
            f"measurement_domain is {domain}: store detector counts and say so with "
            "measurement_domain = 'counts' (amplitudes must be squared first)"
        )
    positions = held["positions_yx_m"].astype(np.float64, casting="same_kind")
    numbers = held.get("frame_numbers", np.arange(len(held["diffraction"])))
    if numbers.dtype.kind not in "iu":
        raise FileFormatError(f"frame_numbers is {numbers.dtype}, not integers")
    return ScanFile(
        counts=_unsigned(held["diffraction"]),
        positions_yx_m=positions,
        frame_numbers=numbers.astype(np.int64),
        detector_distance_m=_scalar(held, "detector_distance_m"),
        photon_energy_eV=_scalar(held, "photon_energy_eV"),
        detector_pixel_yx_m=_pair(held, "detector_pixel_yx_m"),
        probe=_complex(held, "probe", 3),
        object=_complex(held, "object", 2),
        object_origin_yx_m=_pair(held, "object_origin_yx_m"),
        pixel_yx_m=_pair(held, "pixel_yx_m"),
        bad_pixels=_mask(held, "bad_pixels"),
        metadata=_metadata(held),
    )


def _unsigned(counts: NDArray[Any]) -> NDArray[np.unsignedinteger[Any]]:
    if counts.dtype.kind not in "iu":
        raise FileFormatError(
            f"diffraction is {counts.dtype}: store integer counts (numpy.rint and astype uint16)"
        )
    native = counts.dtype.newbyteorder("=").type
    if native in _DTYPES or not counts.size:
        return np.ascontiguousarray(counts, native)
    low, high = int(counts.min()), int(counts.max())
    if low < 0 or high >= 2**32:
        raise FileFormatError(f"diffraction holds {low} to {high}; counts are 0 to 2**32 - 1")
    return counts.astype(np.uint16 if high < 2**16 else np.uint32)


def _scalar(held: Mapping[str, NDArray[Any]], key: str) -> float | None:
    if key not in held:
        return None
    value = held[key]
    if value.size != 1 or value.dtype.kind not in "iuf" or not 0 < value.item() < np.inf:
        raise FileFormatError(f"{key} is {value!r}, not one number above 0")
    return float(value.item())


def _pair(held: Mapping[str, NDArray[Any]], key: str) -> Pair | None:
    if key not in held:
        return None
    value = held[key]
    if value.shape != (2,) or value.dtype.kind not in "iuf" or not np.isfinite(value).all():
        raise FileFormatError(f"{key} is {value!r}, not two finite numbers (y, x)")
    return float(value[0]), float(value[1])


def _complex(held: Mapping[str, NDArray[Any]], key: str, axes: int) -> NDArray[np.complex64] | None:
    if key not in held:
        return None
    value = held[key]
    if value.ndim != axes or value.dtype.kind != "c":
        raise FileFormatError(f"{key} is {value.dtype} {value.shape}, not complex of {axes} axes")
    return value.astype(np.complex64)


def _mask(held: Mapping[str, NDArray[Any]], key: str) -> NDArray[np.bool_] | None:
    if key not in held:
        return None
    value = held[key]
    if value.dtype.kind != "b":
        raise FileFormatError(f"{key} is {value.dtype}, not bool: store True where a pixel is bad")
    return value.astype(np.bool_)


def _metadata(held: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    if "metadata" not in held:
        return {}
    try:
        metadata = json.loads(str(held["metadata"]))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"metadata is not JSON text: {error}") from error
    if not isinstance(metadata, dict):
        raise FileFormatError("metadata is not a JSON object")
    return metadata  # pyright: ignore[reportUnknownVariableType]
