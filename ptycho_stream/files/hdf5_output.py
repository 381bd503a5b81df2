"""HDF5 files that are there whole or not at all, with frames that are copied in blocks.

Used by the writers of ptychodus, CXI and stored detectors' files. Compression is gzip, which every
HDF5 program reads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import h5py  # pyright: ignore[reportMissingTypeStubs]
import numpy as np

from ptycho_stream.atomic_file import atomic_path
from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.npz import ScanFile

Progress = Callable[[int, int], None]
"""Called with the frames written so far and all of them."""

_CHUNK_BYTES: Final = 1 << 20
_COMPRESSION: Final = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


@contextmanager
def hdf5_output(path: Path) -> Generator[Any]:
    """An open HDF5 file that takes the name ``path`` when the block ends, and is gone if it fails.

    Raises:
        FileFormatError: the path cannot be written.
    """
    with atomic_path(path) as partial:
        try:
            with h5py.File(partial, "w") as file:
                yield file
        except RuntimeError as error:  # what HDF5 has for a full disk, beside OSError
            raise FileFormatError(f"cannot write {path}: {error}") from error


def write_frames(group: Any, name: str, scan: ScanFile, progress: Progress | None) -> Any:
    """Copy the frames of a scan into a new dataset (M, h, w), block by block.

    Args:
        group: of the file.
        name: of the dataset.
        scan: whose frames they are; 0 is written where a pixel is bad.
        progress: told of each block.

    Returns:
        The dataset.
    """
    count, (h, w) = len(scan), scan.frame_shape_yx
    at_once = max(1, min(count, _CHUNK_BYTES // (h * w * scan.counts.dtype.itemsize)))
    dataset = group.create_dataset(
        name, (count, h, w), scan.counts.dtype, chunks=(at_once, h, w), **_COMPRESSION
    )
    for first in range(0, count, at_once):
        block = scan.counts[first : first + at_once]
        if scan.bad_pixels is not None:
            block = np.where(scan.bad_pixels, np.zeros((), block.dtype), block)
        dataset[first : first + at_once] = block
        if progress is not None:
            progress(min(first + at_once, count), count)
    return dataset
