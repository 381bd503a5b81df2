"""Another way of looking at a scan's frames, as the control command ``reprocess`` asks for it.

Used by ingest, which writes it into the header of a scan: the one that it is writing, or one that
is sealed; and where a recorded scan is reconstructed, for what its frames show to be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptycho_stream.errors import GeometryError
from ptycho_stream.files.view_files import FILES, requested_files, with_bad_pixels
from ptycho_stream.geometry import View
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader

_WORDS = ("orientation", "center_yx_px", "dc")
WORDS = (*_WORDS, *FILES)
"""What may be asked for; None: as it is."""


def asks_for_a_view(arguments: dict[str, Any]) -> bool:
    """Whether any of ``arguments`` is about how frames are looked at."""
    return any(arguments.get(word) is not None for word in WORDS)


def changed_view(header: ScanHeader, directory: Path, arguments: Mapping[str, Any]) -> View:
    """The view that a scan gets: the present one if nothing changes, else its next version.

    Args:
        header: of the scan.
        directory: of the scan, where files that are named are kept.
        arguments: what is asked for; ``bad_pixels_yx``, stored pixels (y, x), are added to the
            view's mask.

    Raises:
        GeometryError: the centre or a pixel lies outside the stored frame, or there are no dark
            frames.
        FileFormatError: a file that is named cannot be used.
        StoreError: it cannot be kept.
    """
    asked = {word: arguments[word] for word in _WORDS if arguments.get(word) is not None}
    if "center_yx_px" in asked:
        y, x = asked["center_yx_px"] = tuple(map(float, asked["center_yx_px"]))
        height, width = header.frame_shape_yx
        if not (0 <= y < height and 0 <= x < width):
            raise GeometryError(
                f"the centre ({y:g}, {x:g}) lies outside the stored frames of scan "
                f"{header.scan_id}, {height} x {width} pixels: give it in pixels of those"
            )
    view = header.view
    asked |= requested_files(header, directory, arguments)
    if arguments.get("bad_pixels_yx"):
        masked = replace(view, bad_pixels=asked.get("bad_pixels", view.bad_pixels))
        pixels_yx = arguments["bad_pixels_yx"]
        asked["bad_pixels"] = with_bad_pixels(masked, header, directory, pixels_yx)
    if all(getattr(view, word) == value for word, value in asked.items()):
        return view
    return view.next(**asked)


def change_sealed(root: Path, scan_id: str, arguments: dict[str, Any]) -> View:
    """Give a scan that nobody writes another view; which it has now.

    Args:
        root: the data directory.
        scan_id: of the scan.
        arguments: what is asked for.

    Raises:
        GeometryError: what is asked for does not fit the scan.
        FileFormatError: a file that is named cannot be used.
        ScanNotFound: there is no such scan.
        ScanLocked: it is being written; its writer has to do it.
        StoreError: the header cannot be read or written.
    """
    catalogue = Catalogue(root)
    with catalogue.open(scan_id) as reader:
        header = reader.header
    view = changed_view(header, catalogue.directory(scan_id), arguments)
    if view != header.view:
        catalogue.add_view(scan_id, view)
    return view
