"""PtychoPINN's data file: written, so that its trainer reads what is ours, and read.

Written by ``ptycho-stream simulate --format ptychopinn`` and by exports, read by
:mod:`ptycho_stream.files.measured`. Its keys, of M frames of N x N pixels:

==================================  =============================================================
``diff3d`` (or ``diffraction``)     float32 (M, N, N), amplitude with zero frequency at the middle,
                                    scaled so that its largest value is 1; 0 where a pixel is bad
``xcoords``, ``ycoords``            float64 (M,), object pixels: the patch of a frame is columns
                                    x - N/2 to x + N/2 of ``objectGuess``, rows y - N/2 to y + N/2
``xcoords_start, ycoords_start``    the same
``scan_index``                      int64 (M,), the frames' numbers
``probeGuess``                      complex64 (N, N), the strongest mode, in units of ``diff3d``:
                                    |fftshift FFT_ortho(P O)| is the amplitude
``objectGuess``                     complex64 (H, W), where the truth is known
``_metadata``                       JSON text: ``nphotons`` and ``dose_photons`` (mean over frames
                                    of the photons counted in good pixels),
                                    ``measurement_domain`` "amplitude", ``amplitude_scale`` (diff3d
                                    = amplitude_scale * sqrt(counts)), ``pixel_yx_m`` and
                                    ``object_origin_yx_m``, and the scan's own metadata
==================================  =============================================================

PtychoPINN wants amplitudes below 10 and takes the photons from its configuration: give it
``nphotons`` from ``_metadata``. Files of others hold raw counts under the same key as often as
amplitudes: the domain must be told, by ``measurement_domain`` in the file or by the user.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.assemble import EAGER_BYTES, Found, assembled
from ptycho_stream.files.counts import HeldFrames
from ptycho_stream.files.measured_choice import Domain, MeasuredChoice
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.npz_members import read_npz, save_streamed

FRAME_KEYS: Final = ("diff3d", "diffraction")
_AT_ONCE: Final = 64
_EDGE_PX: Final = 0.5
"""Their coordinates count from the edge of the first pixel, ours from its centre."""


def save_ptychopinn(
    path: Path, scan: ScanFile, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write ``scan`` to ``path``; a reader sees the old file or the whole new one.

    Args:
        path: of the file.
        scan: its frames are read twice, in blocks.
        progress: called with the frames written so far and all of them.

    Raises:
        FileFormatError: the scan lacks the probe or the pixel size, its frames are not square or
            hold no photon, or the file cannot be written.
    """
    rows, columns = scan.frame_shape_yx
    if scan.probe is None or scan.pixel_yx_m is None:
        missing = "probe" if scan.probe is None else "pixel_yx_m"
        raise FileFormatError(f"{path}: PtychoPINN's format needs {missing}, the scan has none")
    if rows != columns:
        raise FileFormatError(f"{path}: PtychoPINN's frames are square, these are {rows}x{columns}")
    brightest, dose = _brightness(scan)
    if not brightest > 0:
        raise FileFormatError(f"{path}: no frame holds a photon, nothing to write")
    origin_yx_m = scan.object_origin_yx_m or tuple(scan.positions_yx_m.min(0))
    y, x = ((scan.positions_yx_m - origin_yx_m) / scan.pixel_yx_m + _EDGE_PX).T
    metadata = {
        **scan.metadata,
        "nphotons": dose,
        "dose_photons": dose,
        "measurement_domain": "amplitude",
        "amplitude_scale": 1 / brightest,
        "probe_modes": len(scan.probe),
        "pixel_yx_m": scan.pixel_yx_m,
        "object_origin_yx_m": origin_yx_m,
        "software": "ptycho-stream",
    }
    strongest = int(np.square(np.abs(scan.probe)).sum((-2, -1)).argmax())
    arrays = {
        "xcoords": x,
        "ycoords": y,
        "xcoords_start": x,
        "ycoords_start": y,
        "scan_index": scan.frame_numbers,
        "probeGuess": (scan.probe[strongest] / np.float32(brightest)).astype(np.complex64),
        "_metadata": np.array(json.dumps(metadata, default=str)),
    }
    if scan.object is not None:
        arrays["objectGuess"] = scan.object

    def amplitudes() -> Iterator[NDArray[np.floating[Any]]]:
        done = 0
        for counts in _blocks(scan):
            yield np.sqrt(counts, dtype=np.float32) / np.float32(brightest)
            done += len(counts)
            if progress is not None:
                progress(done, len(scan))

    shape, dtype = (len(scan), rows, columns), np.dtype(np.float32)
    save_streamed(path, arrays, "diff3d", shape, dtype, amplitudes())


def _blocks(scan: ScanFile) -> Iterator[NDArray[Any]]:
    """Counts (n, N, N) of all frames, 0 where a pixel is bad."""
    for first in range(0, len(scan), _AT_ONCE):
        counts = scan.counts[first : first + _AT_ONCE]
        yield counts if scan.bad_pixels is None else np.where(scan.bad_pixels, 0, counts)


def _brightness(scan: ScanFile) -> tuple[float, float]:
    """The largest amplitude, and the mean over frames of the counts in good pixels."""
    most, total = 0.0, 0.0
    for counts in _blocks(scan):
        most = max(most, float(counts.max()))
        total += float(counts.sum(dtype=np.float64))
    return float(np.sqrt(np.float32(most))), total / len(scan)


def load_ptychopinn(path: Path, choice: MeasuredChoice | None = None) -> ScanFile:
    """Read a file of PtychoPINN's, its own or one that was made for it.

    Raises:
        FileFormatError: it is missing, damaged, lacks a key, does not tell the domain of its
            frames or the size of a pixel, or is not plausible; the text says what to do.
    """
    return scan_of_ptychopinn(path, read_npz(path), choice or MeasuredChoice())


def scan_of_ptychopinn(
    path: Path, held: Mapping[str, NDArray[Any]], choice: MeasuredChoice
) -> ScanFile:
    """The scan in the arrays of the NPZ ``path``; see :func:`load_ptychopinn`."""
    key = next((name for name in FRAME_KEYS if name in held), None)
    for wanted, there in (("diff3d", key), ("xcoords", "xcoords"), ("ycoords", "ycoords")):
        if there is None or there not in held:
            raise FileFormatError(f"{path}: key {wanted} is missing; there are {', '.join(held)}")
    frames, where = held[cast("str", key)], f"{path}: {key}"
    metadata = told_metadata(path, held)
    domain = told_domain(path, held, metadata)
    if domain is None and choice.domain is None:
        raise FileFormatError(
            f"{where}: the file does not tell whether it holds amplitudes or counts, and both are "
            "found under this key: say domain = 'amplitude' or 'counts'"
        )
    count = held["xcoords"].size
    if frames.ndim == 3 and choice.frames_axis == "last":
        frames = np.moveaxis(frames, -1, 0)
    if frames.ndim != 3 or held["ycoords"].size != count:
        raise FileFormatError(
            f"{where} has shape {frames.shape}, with {count} xcoords and {held['ycoords'].size} "
            "ycoords; it is (M, N, N) with M of each"
        )
    coordinates = np.stack([held["ycoords"].ravel(), held["xcoords"].ravel()], 1)
    if coordinates.dtype.kind not in "iuf":
        raise FileFormatError(f"{path}: xcoords or ycoords are {coordinates.dtype}, not numbers")
    origin_px, pixel = np.zeros(2), _pair(path, metadata, "pixel_yx_m")
    origin_m = _pair(path, metadata, "object_origin_yx_m")
    if pixel is not None and 0 in pixel:
        raise FileFormatError(f"{path}: pixel_yx_m in _metadata is {pixel}: correct it")
    if pixel is not None and origin_m is not None:
        origin_px = np.asarray(origin_m) / pixel
    scale = _factor(path, metadata, "amplitude_scale")
    photons = _factor(path, metadata, "nphotons")
    if (choice.domain or domain) != "amplitude":
        scale = photons = None
    probe = _probe(path, held)
    found = Found(
        where,
        HeldFrames(frames),
        coordinates.astype(np.float64) - _EDGE_PX + origin_px,
        in_pixels=True,
        numbers=_numbers(held, count),
        domain=domain,
        counts_per_unit=None if scale is None else scale**-2,
        photons=photons,
        pixel_yx_m=pixel,
        probe=probe if probe is None or scale is None else probe / np.float32(scale),
        object=_object(held),
        object_origin_yx=(float(origin_px[0]), float(origin_px[1])),
        bad_pixels=_mask(path, held),
        metadata=metadata,
    )
    return assembled(found, choice, EAGER_BYTES)


def told_metadata(path: Path, held: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """What ``_metadata`` holds; empty if it is not there.

    Raises:
        FileFormatError: it is not the text of a JSON object.
    """
    if "_metadata" not in held:
        return {}
    try:
        metadata: Any = json.loads(str(held["_metadata"]))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: _metadata is not JSON text: {error}") from error
    if not isinstance(metadata, dict):
        raise FileFormatError(f"{path}: _metadata is not a JSON object")
    return cast("dict[str, Any]", metadata)


def told_domain(
    path: Path, held: Mapping[str, NDArray[Any]], metadata: dict[str, Any]
) -> Domain | None:
    """What the file says of its frames, as a key, in its metadata (which it leaves), or in both.

    Raises:
        FileFormatError: it is no domain, or another one in each place.
    """
    told = {str(metadata.pop("measurement_domain"))} if "measurement_domain" in metadata else set()
    if "measurement_domain" in held:
        told.add(str(held["measurement_domain"]))
    if len(told) > 1:
        raise FileFormatError(
            f"{path} says of its frames that they are {' and '.join(sorted(told))}: correct "
            "measurement_domain there"
        )
    domain = next(iter(told), None)
    if domain is not None and domain not in get_args(Domain):
        raise FileFormatError(
            f"{path}: measurement_domain is {domain!r}, which is none of "
            f"{', '.join(get_args(Domain))}: correct it"
        )
    return cast("Domain | None", domain)


def _numbers(held: Mapping[str, NDArray[Any]], count: int) -> NDArray[np.int64] | None:
    """Numbers of the frames; None where ``scan_index`` names the object, as PtychoPINN allows."""
    index = held.get("scan_index")
    if index is None or index.shape != (count,) or index.dtype.kind not in "iu":
        return None
    distinct = len(np.unique(index)) == count and index.min() >= 0
    return index.astype(np.int64) if distinct else None


def _probe(path: Path, held: Mapping[str, NDArray[Any]]) -> NDArray[np.complex64] | None:
    if "probeGuess" not in held:
        return None
    probe = held["probeGuess"]
    while probe.ndim > 3 and probe.shape[0] == 1:
        probe = probe[0]
    probe = probe[None] if probe.ndim == 2 else probe
    if probe.ndim != 3 or probe.shape[1] != probe.shape[2] or probe.dtype.kind != "c":
        raise FileFormatError(
            f"{path}: probeGuess is {probe.dtype} {probe.shape}, not complex (N, N): leave it out, "
            "and give a probe"
        )
    return probe.astype(np.complex64)


def _object(held: Mapping[str, NDArray[Any]]) -> NDArray[np.complex64] | None:
    guess = held.get("objectGuess")
    return None if guess is None or guess.ndim != 2 else guess.astype(np.complex64)


def _mask(path: Path, held: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_] | None:
    mask = held.get("bad_pixels")
    if mask is not None and (mask.ndim != 2 or mask.dtype.kind not in "biu"):
        raise FileFormatError(f"{path}: bad_pixels is {mask.dtype} {mask.shape}, not bool (N, N)")
    return None if mask is None else mask != 0


def _pair(path: Path, metadata: dict[str, Any], name: str) -> tuple[float, float] | None:
    """Two numbers (y, x) of the metadata, which they leave."""
    value = metadata.pop(name, None)
    if value is None:
        return None
    try:
        y, x = map(float, value)
    except (TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path}: {name} in _metadata is {value!r}, not two numbers (y, x)"
        ) from error
    if not (np.isfinite(y) and np.isfinite(x)):
        raise FileFormatError(f"{path}: {name} in _metadata is {value!r}, not two finite numbers")
    return y, x


def _factor(path: Path, metadata: dict[str, Any], name: str) -> float | None:
    """A number above 0 of the metadata, which it leaves."""
    value = metadata.pop(name, None)
    if value is not None and not (isinstance(value, int | float) and 1e-30 < value < 1e30):
        raise FileFormatError(
            f"{path}: {name} in _metadata is {value!r}, no number above 0: correct it, or leave it "
            "out"
        )
    return None if value is None else float(value)
