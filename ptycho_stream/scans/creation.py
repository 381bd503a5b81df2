"""Laying out the folder of a new scan, and the space set aside in it for ending well.

Used by the writer only.  The reserve is a small file that is deleted when the scan is sealed: also
on a full disk there is then room for the final header and the last pairs.
"""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.atomic_file import sync_path
from ptycho_stream.errors import DiskFull, ScanSealed, StoreError
from ptycho_stream.scans.append_log import FRAMES_LOG, PAIRS_LOG, POSITIONS_LOG
from ptycho_stream.scans.counters import COUNTERS_NAME, Counters
from ptycho_stream.scans.disk import allocate, disk_errors, replace_file
from ptycho_stream.scans.folders import mask_path
from ptycho_stream.scans.header import ScanHeader, write_header

_log = logging.getLogger(__name__)

_RESERVE_NAME: Final = "reserve"
RESERVE_BYTES: Final = 256 * 2**10
# A batch file is mapped whole and touched ahead: for large frames it holds fewer of them.
_MAX_FILE_BYTES: Final = 128 * 2**20
MAX_FRAME_BYTES: Final = 2**30
"""What claims to be larger is damage, and must not be allocated for."""


def fitted_header(header: ScanHeader, frames_per_file: int) -> ScanHeader:
    """``header`` for a new scan with ``frames_per_file``, or fewer where frames are large.

    Raises:
        ScanSealed: its state is that of an ended scan.
        StoreError: its frames are absurdly large.
    """
    if header.sealed:
        raise ScanSealed(f"a new scan cannot be {header.state}: create it as armed or running")
    check_frame_size(header)
    fitting = max(1, min(frames_per_file, _MAX_FILE_BYTES // header.frame_bytes))
    return replace(header, frames_per_file=fitting)


def check_frame_size(header: ScanHeader) -> None:
    """Refuse a header that memory could not hold a frame of.

    Raises:
        StoreError: its frames are larger than :data:`MAX_FRAME_BYTES`.
    """
    if header.frame_bytes > MAX_FRAME_BYTES:
        raise StoreError(
            f"scan {header.scan_id} has frames of shape (y, x) = {header.frame_shape_yx}, "
            f"{header.dtype}: no frame is so large (limit {MAX_FRAME_BYTES} bytes)"
        )


def fill_new_scan(
    directory: Path, header: ScanHeader, bad_pixels: NDArray[np.bool_] | None
) -> None:
    """Make the files of an empty scan in ``directory``.

    Raises:
        DiskFull: there is no room for them.
        StoreError: the mask does not have the frames' shape, or the disk failed.
    """
    reserve_space(directory)
    Counters(directory / COUNTERS_NAME, writable=True).close()
    with disk_errors(directory):
        for name in (FRAMES_LOG, POSITIONS_LOG, PAIRS_LOG):
            (directory / name).touch()
        for path in directory.iterdir():
            sync_path(path)
    if bad_pixels is not None:
        write_mask(directory, header, bad_pixels)
    write_header(directory, header)


def write_mask(directory: Path, header: ScanHeader, bad_pixels: NDArray[np.bool_]) -> None:
    """Keep the mask of a scan's bad pixels, bool (h, w), True where bad.

    Raises:
        StoreError: it does not have the frames' shape.
        DiskFull: there is no room.
    """
    if bad_pixels.shape != header.frame_shape_yx:
        raise StoreError(
            f"the bad-pixel mask is {bad_pixels.shape} and frames are {header.frame_shape_yx}: "
            "crop it as the frames are"
        )
    data = io.BytesIO()
    np.save(data, bad_pixels.astype(np.bool_), allow_pickle=False)
    replace_file(mask_path(directory), data.getvalue())


def reserve_space(directory: Path) -> None:
    """Set aside the space that :func:`release_reserve` frees.

    Raises:
        DiskFull: there is no room for it.
    """
    path = directory / _RESERVE_NAME
    with disk_errors(path, RESERVE_BYTES), path.open("wb") as file:
        allocate(file.fileno(), RESERVE_BYTES, path)


def try_to_reserve_space(directory: Path) -> None:
    """Set space aside where there is some: a recovered scan is worth ending without it too."""
    try:
        reserve_space(directory)
    except DiskFull as error:
        _log.warning("nothing set aside for the end of scan %s: %s", directory.name, error)


def release_reserve(directory: Path) -> None:
    """Free the space that was set aside."""
    with disk_errors(directory):
        (directory / _RESERVE_NAME).unlink(missing_ok=True)
