"""Another way of looking at a scan's frames, as the control command ``reprocess`` asks for it.

Used by ingest, which writes it into the header of a scan: the one that it is writing, or one that
is sealed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptycho_stream.errors import GeometryError
from ptycho_stream.geometry import View
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader

WORDS = ("orientation", "center_yx_px", "dc")
"""What may be asked for; None: as it is."""


def asks_for_a_view(arguments: dict[str, Any]) -> bool:
    """Whether any of ``arguments`` is about how frames are looked at."""
    return any(arguments.get(word) is not None for word in WORDS)


def changed_view(header: ScanHeader, arguments: dict[str, Any]) -> View:
    """The view that a scan gets: the present one if nothing changes, else its next version.

    Raises:
        GeometryError: the centre lies outside the stored frame.
    """
    asked = {word: arguments[word] for word in WORDS if arguments.get(word) is not None}
    if "center_yx_px" in asked:
        y, x = asked["center_yx_px"] = tuple(map(float, asked["center_yx_px"]))
        height, width = header.frame_shape_yx
        if not (0 <= y < height and 0 <= x < width):
            raise GeometryError(
                f"the centre ({y:g}, {x:g}) lies outside the stored frames of scan "
                f"{header.scan_id}, {height} x {width} pixels: give it in pixels of those"
            )
    view = header.view
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
        GeometryError: the centre lies outside the stored frame.
        ScanNotFound: there is no such scan.
        ScanLocked: it is being written; its writer has to do it.
        StoreError: the header cannot be read or written.
    """
    catalogue = Catalogue(root)
    with catalogue.open(scan_id) as reader:
        header = reader.header
    view = changed_view(header, arguments)
    if view != header.view:
        catalogue.add_view(scan_id, view)
    return view
