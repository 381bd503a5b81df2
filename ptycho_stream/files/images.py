"""Picture files of a reconstructed object: phase and amplitude as grey levels in a PNG.

Used by exports, the demo's preview and ``ptycho-stream export``.
"""

from __future__ import annotations

from pathlib import Path

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import FileFormatError
from ptycho_stream.pictures import png
from ptycho_stream.results import Image


def save_png(image: Image, path: Path | str) -> None:
    """Write phase (left) and amplitude (right) of an image side by side as PNG.

    The file is there whole or not at all.

    Raises:
        FileFormatError: nothing was seen yet, or the path cannot be written.
    """
    object_yx = image.object_yx
    if not object_yx.size:
        raise FileFormatError(f"scan {image.scan_id} has no pixel to draw yet: {path} not written")
    with atomic_file(Path(path)) as file:
        file.write(png(object_yx))
