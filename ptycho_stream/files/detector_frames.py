"""The frames of a stored detector as an HDF5 file, with the positions of the scan beside it.

Used by ``ptycho-stream export-detectors``.  Laid out as NeXus data:

==========================  ====================================================================
``/entry``                  attributes ``scan_id``, ``detector``, ``beside`` (empty: unknown),
                            ``series``, ``state``, ``metadata`` (JSON)
``/entry/data/data``        (M, h, w), the stored pixels, by rising frame number, without
                            frames that recovery marked as lost
``.../frame_number``        int64 (M,)
``.../start_ns``,           int64 (M,), UTC, -1 where the detector does not tell
``.../stop_ns``
``.../received_ns``         int64 (M,), UTC
``.../position_yx_m``       float64 (M, 2), of the other scan's frame with the same number, NaN
                            where it has none; not there without such a scan
==========================  ====================================================================
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.files.hdf5_output import hdf5_output
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import FRAME_FLAG_LOST

_AT_ONCE: Final = 64
_TIMES: Final = ("start_ns", "stop_ns", "received_ns")


def write_detector_frames(path: Path, scan: ScanReader, beside: ScanReader | None) -> int:
    """Write the frames of ``scan``; returns how many.

    Args:
        path: of the new file, which appears whole or not at all.
        scan: of a stored detector.
        beside: the scan that it belongs to; None: nobody knows.

    Raises:
        FileFormatError: the path cannot be written.
        StoreError: the scan cannot be read.
    """
    records = scan.records()
    records = records[(records["flags"] & FRAME_FLAG_LOST) == 0]
    records = records[np.argsort(records["number"], kind="stable")]
    numbers = records["number"].astype(np.int64)
    with hdf5_output(path) as file:
        entry = file.create_group("entry")
        data = entry.create_group("data")
        entry.attrs["NX_class"], data.attrs["NX_class"] = "NXentry", "NXdata"
        data.attrs["signal"] = "data"
        _describe(entry, scan)
        _copy_pixels(data, scan, records["slot"])
        data["frame_number"] = numbers
        for name in _TIMES:
            data[name] = records[name]
        if beside is not None:
            data["position_yx_m"] = _positions_of(beside, numbers)
    return len(numbers)


def _describe(entry: Any, scan: ScanReader) -> None:
    header = scan.header
    entry.attrs["scan_id"] = header.scan_id
    entry.attrs["detector"] = header.detector
    entry.attrs["beside"] = header.beside or ""
    entry.attrs["series"] = header.series
    entry.attrs["state"] = header.state
    entry.attrs["metadata"] = json.dumps(dict(header.metadata))


def _copy_pixels(data: Any, scan: ScanReader, slots: NDArray[np.integer[Any]]) -> None:
    header = scan.header
    shape = (len(slots), *header.frame_shape_yx)
    chunks = (1, *header.frame_shape_yx) if len(slots) else None
    pixels = data.create_dataset("data", shape, np.dtype(header.dtype), chunks=chunks)
    for first in range(0, len(slots), _AT_ONCE):
        pixels[first : first + _AT_ONCE] = scan.frames(slots[first : first + _AT_ONCE])


def _positions_of(beside: ScanReader, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Positions (M, 2) of the frames with these numbers (M,), as they were corrected last."""
    pairs = beside.pairs()
    known = {int(pair["number"]): (float(pair["y_m"]), float(pair["x_m"])) for pair in pairs}
    nowhere = (float("nan"), float("nan"))
    found = [known.get(number, nowhere) for number in numbers.tolist()]
    return np.array(found, np.float64).reshape(-1, 2)
