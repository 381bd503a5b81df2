"""What a view needs beside the frames (mask, flat field, background, list of bad frames), as files.

They lie in the scan's own folder, so that a scan can be copied and looked at anywhere, and are
named by a digest of their content, which the view in the scan's header holds: one that is altered
is noticed. Written by ingest, read by :mod:`ptycho_stream.scans.viewed_scan`.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import StoreError
from ptycho_stream.scans.disk import replace_file

_DIGEST_CHARACTERS = 32


def keep_view_data(directory: Path, values: NDArray[Any]) -> str:
    """Write an array into a scan's folder, unless it is there; the digest that names it.

    Raises:
        DiskFull: there is no room.
        StoreError: the operating system refused otherwise.
    """
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(values), allow_pickle=False)
    digest = _digest(data.getvalue())
    path = _path(directory, digest)
    if not path.exists():
        replace_file(path, data.getvalue())
    return digest


def view_data(directory: Path, digest: str) -> NDArray[Any]:
    """The array that :func:`keep_view_data` has written.

    Raises:
        StoreError: it is missing, or is not what was written.
    """
    path = _path(directory, digest)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"cannot read {path}, which the scan's view needs: {error.strerror}"
        ) from error
    if _digest(data) != digest:
        raise StoreError(
            f"{path} has been altered: give the scan its mask, flat field or background again with "
            "`ptycho-stream ctl reprocess`"
        )
    return np.load(io.BytesIO(data), allow_pickle=False)


def _path(directory: Path, digest: str) -> Path:
    if not re.fullmatch(f"[0-9a-f]{{{_DIGEST_CHARACTERS}}}", digest):
        raise StoreError(f"the view of scan {directory.name} names {digest!r}, which is no digest")
    return directory / f"view-{digest}.npy"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARACTERS]
