"""The arrays of a PtychoPINN data set, checked: its file's keys, or what a program hands over.

Raw counts and amplitudes are found under the same key, so the domain has to be told, and is refused
where the numbers cannot be of it. Used by ``raw_data``; ``files.ptychopinn_npz`` writes such files,
and reads them for those who do not speak PtychoPINN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError, ProbeError, PtychoPinnError
from ptycho_stream.files.counts import Conversion
from ptycho_stream.files.measured_choice import Domain
from ptycho_stream.files.npz_members import read_npz
from ptycho_stream.files.plausible import MAX_AMPLITUDE
from ptycho_stream.files.ptychopinn_npz import FRAME_KEYS, told_domain, told_metadata
from ptycho_stream.physics.probe import Probe

_NEEDED = ("xcoords", "ycoords", "scan_index", "probeGuess")


@dataclass(frozen=True, slots=True, eq=False)
class FrameArrays:
    """M frames of N x N and what belongs to them.

    Attributes:
        diff3d: float32 amplitudes or unsigned counts (M, N, N), zero frequency at N // 2.
        measurement_domain: which of the two.
        xcoords: float64 (M,), object pixels; so are ycoords, xcoords_start and ycoords_start.
        scan_index: int64 (M,).
        probeGuess: complex64 (modes, N, N).
        objectGuess: complex64 (H, W), or None.
        Y: complex64 (M, N, N), the patches under the frames, or None.
        bad_pixels: bool (N, N), or None.
        nphotons: of a frame on average, where a file of amplitudes tells.
    """

    diff3d: NDArray[Any]
    measurement_domain: Domain
    xcoords: NDArray[np.float64]
    ycoords: NDArray[np.float64]
    xcoords_start: NDArray[np.float64]
    ycoords_start: NDArray[np.float64]
    scan_index: NDArray[np.int64]
    probeGuess: NDArray[np.complex64]
    objectGuess: NDArray[np.complex64] | None
    Y: NDArray[np.complex64] | None
    bad_pixels: NDArray[np.bool_] | None
    nphotons: float | None


def load_npz(path: Path, measurement_domain: Domain | None = None) -> FrameArrays:
    """Read a PtychoPINN data file.

    Args:
        path: of the file.
        measurement_domain: for a file that does not tell; must not contradict one that does.

    Raises:
        FileFormatError: it is missing, damaged, holds pickled objects, or tells nonsense of itself.
        PtychoPinnError: a key is missing, an array is not what it should be, or the domain is not
            told, told in another way, or implausible.
    """
    held = read_npz(path, "PtychoPINN file")
    told = told_metadata(path, held)
    domain = _domain(told_domain(path, held, told), measurement_domain, path)
    nphotons = told.get("nphotons")
    if nphotons is not None and not (isinstance(nphotons, int | float) and nphotons > 0):
        raise PtychoPinnError(f"{path}: nphotons of _metadata is {nphotons!r}, no number above 0")
    return checked(held, domain, str(path), nphotons)


def _domain(in_file: Domain | None, given: Domain | None, path: Path) -> Domain:
    domain = in_file or given
    if domain is None:
        raise PtychoPinnError(
            f"{path} does not tell whether its frames are amplitudes or counts: say "
            "measurement_domain='amplitude' or 'counts' (its own tag would be measurement_domain "
            "in _metadata)"
        )
    if given is not None and domain != given:
        raise PtychoPinnError(
            f"{path} holds {in_file}, as it says itself, and not {given}: leave the argument out"
        )
    return domain


def checked(
    arrays: Mapping[str, NDArray[Any]], domain: Domain, where: str, nphotons: float | None = None
) -> FrameArrays:
    """The arrays of a data set, if they keep the contract.

    Args:
        arrays: by the contract's keys.
        domain: of the frames.
        where: they come from, for errors.
        nphotons: of a frame on average, if the data tell.

    Raises:
        PtychoPinnError: a key is missing, or an array is not what it should be.
    """
    frames_key = _frames_key(arrays, where)
    missing = [key for key in _NEEDED if key not in arrays]
    if missing:
        raise PtychoPinnError(f"{where}: {', '.join(missing)} missing among {', '.join(arrays)}")
    diff3d = _frames(arrays[frames_key], len(arrays["xcoords"]), domain, f"{where}: {frames_key}")
    count, size, _ = diff3d.shape
    coords = {key: _coords(arrays[key], count, f"{where}: {key}") for key in _NEEDED[:2]}
    start = {
        key: _coords(arrays[f"{key}_start"], count, f"{where}: {key}_start")
        if f"{key}_start" in arrays
        else coords[key]
        for key in coords
    }
    bad = arrays.get("bad_pixels")
    if bad is not None and (bad.shape != (size, size) or bad.dtype.kind != "b"):
        raise PtychoPinnError(f"{where}: bad_pixels is {bad.dtype} {bad.shape}, not bool (N, N)")
    return FrameArrays(
        diff3d=diff3d,
        measurement_domain=domain,
        xcoords=coords["xcoords"],
        ycoords=coords["ycoords"],
        xcoords_start=start["xcoords"],
        ycoords_start=start["ycoords"],
        scan_index=_scan_index(arrays["scan_index"], count, where),
        probeGuess=_probe(arrays["probeGuess"], size, where),
        objectGuess=_waves(arrays, "objectGuess", (None, None), where),
        Y=_waves(arrays, "Y", (count, size, size), where),
        bad_pixels=bad,
        nphotons=nphotons,
    )


def _frames_key(arrays: Mapping[str, NDArray[Any]], where: str) -> str:
    found = [key for key in FRAME_KEYS if key in arrays]
    if len(found) != 1:
        raise PtychoPinnError(
            f"{where}: one of diff3d and diffraction has to be there, and there are "
            f"{', '.join(arrays)}"
        )
    return found[0]


def _frames(values: NDArray[Any], count: int, domain: Domain, where: str) -> NDArray[Any]:
    if values.ndim != 3 or 0 in values.shape or values.dtype.kind not in "uif":
        raise PtychoPinnError(f"{where} is {values.dtype} {values.shape}, not numbers (M, N, N)")
    rows, columns = values.shape[1:]
    if len(values) != count or rows != columns:
        turned = values.shape[2] == count and values.shape[0] == rows
        advice = "; it is (N, N, M): move the last axis to the front" if turned else ""
        raise PtychoPinnError(
            f"{where} is {values.shape}, {count} positions need ({count}, N, N){advice}"
        )
    if domain == "counts":
        try:
            return Conversion(where).counts(values)
        except FileFormatError as error:
            raise PtychoPinnError(
                f"{error} (the domain is told by measurement_domain, which says counts)"
            ) from error
    if not np.isfinite(values).all() or values.min() < 0:
        raise PtychoPinnError(f"{where} holds NaN, infinity or negative numbers: no amplitudes")
    brightest = float(values.max((1, 2)).mean(dtype=np.float64))
    if brightest >= MAX_AMPLITUDE:
        raise PtychoPinnError(
            f"{where}: the brightest pixel of a frame is {brightest:.4g} on average, amplitudes "
            f"are scaled to less than {MAX_AMPLITUDE:g}: if these are counts say "
            "measurement_domain='counts', else divide them all by one number"
        )
    return np.ascontiguousarray(values, np.float32)


def _coords(values: NDArray[Any], count: int, where: str) -> NDArray[np.float64]:
    if values.shape != (count,) or values.dtype.kind not in "uif":
        raise PtychoPinnError(f"{where} is {values.dtype} {values.shape}, not numbers ({count},)")
    if not np.isfinite(values).all():
        raise PtychoPinnError(f"{where} holds NaN or infinity: leave such frames out")
    return values.astype(np.float64)


def _scan_index(values: NDArray[Any], count: int, where: str) -> NDArray[np.int64]:
    if values.shape != (count,) or values.dtype.kind not in "ui":
        raise PtychoPinnError(
            f"{where}: scan_index is {values.dtype} {values.shape}, not integers ({count},)"
        )
    return values.astype(np.int64)


def _probe(values: NDArray[Any], size: int, where: str) -> NDArray[np.complex64]:
    if values.dtype.kind != "c" or values.ndim not in (2, 3) or values.shape[-2:] != (size, size):
        raise PtychoPinnError(
            f"{where}: probeGuess is {values.dtype} {values.shape}, not complex ({size}, {size}) "
            f"or (modes, {size}, {size})"
        )
    try:
        return Probe(values.astype(np.complex64).reshape(-1, size, size)).modes
    except ProbeError as error:
        raise PtychoPinnError(f"{where}: probeGuess: {error}") from error


def _waves(
    arrays: Mapping[str, NDArray[Any]], key: str, shape: tuple[int | None, ...], where: str
) -> NDArray[np.complex64] | None:
    values = arrays.get(key)
    if values is None:
        return None
    fits = values.ndim == len(shape) and all(
        wanted in (None, there) for wanted, there in zip(shape, values.shape, strict=True)
    )
    if values.dtype.kind != "c" or not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise PtychoPinnError(
            f"{where}: {key} is {values.dtype} {values.shape}, not complex ({wanted})"
        )
    if not np.isfinite(values).all():
        raise PtychoPinnError(f"{where}: {key} holds NaN or infinity")
    return values.astype(np.complex64)
