"""A number for each pixel, from a file: bad-pixel masks, flat fields and backgrounds.

Read by ingest for the views of scans, as NPY, NPZ or TIFF. Size and type are checked before
anything large is read; no pickled array is ever opened.
"""

from __future__ import annotations

import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ptycho_stream.errors import FileFormatError

SUFFIXES = (".npy", ".npz", ".tif", ".tiff")
_TIFF_MODES = ("1", "L", "I;16", "I;16B", "I", "F")
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    UserWarning,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)
"""What numpy, zipfile and Pillow were seen to raise, or may, on altered files."""
_HEADER_BYTES = 10_000
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def load_pixel_map(path: Path, name: str, shapes_yx: Sequence[tuple[int, int]]) -> NDArray[Any]:
    """A map (h, w) of bools, integers or floats.

    Args:
        path: of an NPY, of an NPZ with one array or one called ``name``, or of a TIFF of one page.
        name: what the map is: ``bad_pixels``, ``flat_field`` or ``background``.
        shapes_yx: which it may have.

    Raises:
        FileFormatError: it is missing or unreadable, or of another shape or type; the text says
            what to do.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise FileFormatError(
            f"{path}, the {name}, is none of NPY, NPZ and TIFF: save it with numpy.save as .npy"
        )
    if not path.is_file():
        raise FileFormatError(f"there is no file {path}, the {name}: correct its path")
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("error", UserWarning)  # of damage, which goes unnoticed else
            match suffix:
                case ".npz":
                    return _read_npz(file, name, shapes_yx)
                case ".npy":
                    return _read_npy(file, shapes_yx)
                case _:
                    return _read_tiff(file, shapes_yx)
    except FileFormatError as error:
        raise FileFormatError(f"{path}, the {name}: {error}") from error
    except _DAMAGE as error:
        raise FileFormatError(f"{path}, the {name}, cannot be read: {error}") from error


def _read_npz(file: IO[bytes], name: str, shapes_yx: Sequence[tuple[int, int]]) -> NDArray[Any]:
    with zipfile.ZipFile(file) as archive:
        members = [entry.removesuffix(".npy") for entry in archive.namelist()]
        if name not in members and len(members) != 1:
            raise FileFormatError(
                f"it holds {', '.join(members[:10]) or 'nothing'}: call the array {name!r}"
            )
        member = name if name in members else members[0]
        with archive.open(f"{member}.npy") as entry:
            return _read_npy(entry, shapes_yx)


def _read_npy(file: IO[bytes], shapes_yx: Sequence[tuple[int, int]]) -> NDArray[Any]:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise FileFormatError(f"NPY version {version} is not read: save it with numpy.save again")
    shape, fortran, dtype = _HEADERS[version](file, max_header_size=_HEADER_BYTES)
    _check(shape, shapes_yx)
    if dtype.kind not in "buif":
        raise FileFormatError(f"it holds {dtype}: save bools, integers or floats")
    data = file.read(math.prod(shape) * dtype.itemsize)
    if len(data) < math.prod(shape) * dtype.itemsize:
        raise FileFormatError("it ends before its last pixel")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _read_tiff(file: IO[bytes], shapes_yx: Sequence[tuple[int, int]]) -> NDArray[Any]:
    try:
        with Image.open(file, formats=("TIFF",)) as image:
            _check((image.height, image.width), shapes_yx)
            if getattr(image, "n_frames", 1) != 1:
                raise FileFormatError(f"it has {image.n_frames} pages: save one")  # pyright: ignore[reportAttributeAccessIssue]
            if image.mode not in _TIFF_MODES:
                raise FileFormatError(f"its pixels are {image.mode}: save one number a pixel")
            return np.array(image)
    except UnidentifiedImageError as error:
        raise FileFormatError("it is no TIFF") from error


def _check(shape: Sequence[int], shapes_yx: Sequence[tuple[int, int]]) -> None:
    if tuple(shape) not in shapes_yx:
        allowed = " or ".join(f"{h} x {w}" for h, w in dict.fromkeys(shapes_yx))
        raise FileFormatError(
            f"it is {' x '.join(map(str, shape))} where {allowed} are wanted (rows x columns, of "
            "the whole detector or of the stored frames): make it fit"
        )
