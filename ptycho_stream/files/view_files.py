"""Files that settings or requests name for a view, made fit for a scan and kept in its folder.

Masks, flat fields and backgrounds come in the shape of the detector or of the stored frames; lists
of bad frames are text. Used by the recorder for the settings' files, for ``reprocess``, and where a
recorded scan is stored by settings.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError, GeometryError
from ptycho_stream.files.frame_list import load_frame_list
from ptycho_stream.files.pixel_map import load_pixel_map
from ptycho_stream.geometry import View
from ptycho_stream.scans.dark_frames import dark_frames_of, last_dark_series
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.stored_part import StoredPart
from ptycho_stream.scans.view_data import keep_view_data, view_data
from ptycho_stream.settings import ViewSettings

FILES: Final = ("bad_pixels", "flat_field", "background", "bad_frames")
"""Fields of a view that are made from files; requests name a file, or one of the words below."""
NONE: Final = "none"
DARK_FRAMES: Final = "dark-frames"

log = logging.getLogger(__name__)


def view_of_settings(
    view: View, settings: ViewSettings, header: ScanHeader, directory: Path
) -> View:
    """``view`` with the files that the settings name.

    One that cannot be used is logged and left out: the scan is recorded all the same.

    Raises:
        StoreError: a file cannot be written into the scan's folder.
    """
    named = {
        "bad_pixels": settings.bad_pixels_path,
        "flat_field": settings.flat_field_path,
        "background": settings.background_path,
        "bad_frames": settings.bad_frames_path,
    }
    for field, path in named.items():
        digest: str | None = None
        try:
            if path is not None:
                digest = kept_file(field, str(path), header, directory)
            elif field == "background" and settings.background == DARK_FRAMES:
                digest = _dark_frames(header, directory)
        except (FileFormatError, GeometryError) as error:
            log.error(
                "scan %s is looked at without view.%s: %s; give it one with `ptycho-stream ctl "
                "reprocess`",
                header.scan_id,
                field,
                error,
            )
        view = replace(view, **{field: digest})
    return view


def requested_files(
    header: ScanHeader, directory: Path, arguments: Mapping[str, Any]
) -> dict[str, str | None]:
    """Fields of a view for what a request names: files, ``none``, or ``dark-frames``.

    Raises:
        FileFormatError: a file cannot be used.
        GeometryError: the scan has no dark frames.
        StoreError: a file cannot be written into the scan's folder.
    """
    found: dict[str, str | None] = {}
    for field in FILES:
        source: str | None = arguments.get(field)
        if source is None:
            continue
        if source == NONE:
            found[field] = None
        elif field == "background" and source == DARK_FRAMES:
            found[field] = _dark_frames(header, directory)
            if found[field] is None:
                raise GeometryError(
                    f"scan {header.scan_id} has no dark frames, and no dark series of its layout "
                    "was recorded before: name a file"
                )
        else:
            found[field] = kept_file(field, source, header, directory)
    return found


def kept_file(field: str, source: str, header: ScanHeader, directory: Path) -> str:
    """Keep a file that a user names in the scan's folder, fit for its stored frames; its digest.

    Raises:
        FileFormatError: it cannot be used.
        StoreError: it cannot be written.
    """
    path = Path(source)
    if field == "bad_frames":
        return keep_view_data(directory, load_frame_list(path))
    part = StoredPart.of(header)
    held = load_pixel_map(path, field, (part.detector_shape_yx, part.shape_yx))
    match field:
        case "bad_pixels":
            return keep_view_data(directory, part.any(held != 0))
        case "flat_field":
            return keep_view_data(directory, _flat_field(part, held, path))
        case _:
            return keep_view_data(directory, part.sum(held))


def with_bad_pixels(
    view: View, header: ScanHeader, directory: Path, pixels_yx: Sequence[Sequence[int]]
) -> str:
    """Digest of the view's mask with some stored pixels (y, x) more.

    Raises:
        GeometryError: one lies outside the stored frame.
        StoreError: a mask cannot be read or written.
    """
    mask = np.zeros(header.frame_shape_yx, bool)
    if view.bad_pixels is not None:
        mask |= view_data(directory, view.bad_pixels)
    for y, x in pixels_yx:
        if not (0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]):
            raise GeometryError(
                f"pixel ({y}, {x}) lies outside the stored frames of scan {header.scan_id}, "
                f"{mask.shape[0]} x {mask.shape[1]} pixels: name pixels of those"
            )
        mask[y, x] = True
    return keep_view_data(directory, mask)


def _flat_field(part: StoredPart, held: NDArray[Any], path: Path) -> NDArray[np.float64]:
    """Mean response of each stored pixel, 1 in the middle of the good ones, NaN where bad."""
    good = np.isfinite(held) & (held > 0)
    flat = part.mean(np.where(good, held, np.nan))
    middle = float(np.nanmedian(flat)) if np.isfinite(flat).any() else 0.0
    if not middle > 0:
        raise FileFormatError(
            f"{path}, the flat_field, is nowhere above 0 in the stored part of the detector: it "
            "holds the response of each pixel, about 1"
        )
    return flat / middle


def _dark_frames(header: ScanHeader, directory: Path) -> str | None:
    """Digest of the mean of a scan's own dark frames, else of the last dark series; None: neither.

    Raises:
        StoreError: frames cannot be read.
    """
    with ScanReader(directory) as reader:
        own = dark_frames_of(reader).mean
    root = directory.parents[1]
    mean = own if own is not None else last_dark_series(root, header)
    return None if mean is None else keep_view_data(directory, mean)
