"""Read and write the arrays of NPZ files so that no damaged or hostile one does harm.

Sizes are compared with what the archive holds before memory is allocated, and nothing pickled is
ever opened. Used by all readers and writers of NPZ files in this package.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import FileFormatError

MAX_NPZ_BYTES: Final = 16 * 1024**3
"""Of all arrays together, unpacked."""
_LOCAL_HEADER_BYTES = 30
_NAME_LENGTH_AT = 26
"""Of a member's local header and in it (APPNOTE.TXT of the ZIP format, 4.3.7)."""


@contextmanager
def _faults(path: Path, what: str) -> Generator[None]:
    try:
        yield
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except (
        *(OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, RuntimeError),
        *(NotImplementedError, SyntaxError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise FileFormatError(f"{path} is not a readable {what}: {error}") from error


def read_npz(path: Path, what: str = "NPZ file") -> dict[str, NDArray[Any]]:
    """All arrays of an NPZ file.

    Args:
        path: of the file.
        what: it should be, for errors.

    Raises:
        FileFormatError: it is missing, damaged, or holds pickled objects.
    """
    if not path.is_file():
        raise FileFormatError(f"there is no {what} {path}")
    with _faults(path, what):
        if not zipfile.is_zipfile(path):
            raise FileFormatError("it is not an NPZ archive")
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            if sum(member.file_size for member in members) > MAX_NPZ_BYTES:
                raise FileFormatError(
                    f"its arrays take more than {MAX_NPZ_BYTES} bytes: write them as HDF5, from "
                    "which frames are read as they are needed"
                )
            for member in members:
                with archive.open(member) as file:
                    _check(file, member)
        # numpy leaves a file open that it opened itself and could not read
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return {key: held[key] for key in held.files}


def npz_keys(path: Path) -> list[str]:
    """Names of the arrays of an NPZ file, none of which is read.

    Raises:
        FileFormatError: it is missing or no NPZ archive.
    """
    if not path.is_file():
        raise FileFormatError(f"there is no file {path}")
    with _faults(path, "NPZ file"), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _check(file: IO[bytes], member: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order (true: Fortran's) and dtype of an array, if its member is as long as that."""
    version = npy_format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise FileFormatError(f"{member.filename} has NPY version {version}: save it with numpy")
    read = (
        npy_format.read_array_header_1_0
        if version == (1, 0)
        else (npy_format.read_array_header_2_0)
    )
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise FileFormatError(
            f"{member.filename} holds Python objects, which are never opened: save numbers and "
            "text (a dict as JSON text), not dtype=object"
        )
    promised = int(np.prod(shape, dtype=object)) * dtype.itemsize
    there = member.file_size - file.tell()
    if promised != there:
        raise FileFormatError(
            f"{member.filename} promises {promised} bytes and {there} are there: it is damaged, "
            "save it again"
        )
    return shape, fortran, dtype


def map_npz(path: Path, what: str = "NPZ file") -> dict[str, NDArray[Any]]:
    """The arrays of an NPZ file as read-only maps of it: only what is looked at is read.

    A file that is replaced by another one meanwhile stays readable.

    Args:
        path: of the file, whose arrays are not compressed (``np.savez``).
        what: it should be, for errors.

    Raises:
        FileFormatError: it is missing, damaged, compressed, or holds pickled objects.
    """
    if not path.is_file():
        raise FileFormatError(f"there is no {what} {path}")
    with _faults(path, what), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            member.filename.removesuffix(".npy"): _mapped(archive, member, whole)
            for member in archive.infolist()
            if member.filename.endswith(".npy")
        }


def _mapped(archive: zipfile.ZipFile, member: zipfile.ZipInfo, whole: mmap.mmap) -> NDArray[Any]:
    if member.compress_type != zipfile.ZIP_STORED:
        raise FileFormatError(f"{member.filename} is compressed: save it with np.savez")
    with archive.open(member) as stored:
        shape, fortran, dtype = _check(stored, member)
        header_bytes = stored.tell()
    # The local header's name and extra field may be longer than those of the directory.
    name, extra = struct.unpack_from("<HH", whole, member.header_offset + _NAME_LENGTH_AT)
    first = member.header_offset + _LOCAL_HEADER_BYTES + name + extra + header_bytes
    count = int(np.prod(shape))
    flat = np.frombuffer(whole, dtype, count, first)
    return flat.reshape(shape, order="F" if fortran else "C")


def save_streamed(
    path: Path,
    arrays: Mapping[str, Any],
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    blocks: Iterable[NDArray[Any]],
) -> None:
    """Write an NPZ with one more array, ``name``, that is never in memory as a whole.

    Args:
        path: of the file.
        arrays: the others.
        name: of the streamed one.
        shape: of it.
        dtype: of it.
        blocks: its parts along the first axis, in order.

    Raises:
        FileFormatError: the file cannot be written.
        ValueError: the blocks do not make up the shape.
    """
    with (
        atomic_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            header = {"descr": npy_format.dtype_to_descr(dtype), "fortran_order": False}
            npy_format.write_array_header_2_0(member, {**header, "shape": shape})
            rows = 0
            for block in blocks:
                rows += len(block)
                member.write(np.ascontiguousarray(block, dtype).data)
            if rows != shape[0]:
                raise ValueError(f"{rows} rows of {name} came, {shape[0]} were promised")
        for key, value in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                npy_format.write_array(member, np.asarray(value), allow_pickle=False)
