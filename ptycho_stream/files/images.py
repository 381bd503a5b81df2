"""Pictures of a reconstructed object: phase and amplitude as grey levels (PNG), as numbers (TIFF).

Used by exports, the demo's preview and ``ptycho-stream export``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

from ptycho_stream.atomic_file import atomic_file, atomic_path
from ptycho_stream.errors import FileFormatError
from ptycho_stream.pictures import phase, png
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


def save_tiff(image: Image, path: Path | str) -> None:
    """Write phase (radians) and amplitude of an image as the two pages of a TIFF, float32.

    NaN where nothing was seen. The resolution is that of the pixels, as pixels a centimetre; what
    else is known stands in the description of the first page, as JSON. The file is there whole or
    not at all.

    Raises:
        FileFormatError: nothing was seen yet, or the path cannot be written.
    """
    object_yx = image.object_yx
    if not object_yx.size:
        raise FileFormatError(f"scan {image.scan_id} has no pixel to draw yet: {path} not written")
    amplitude = np.where(np.isfinite(object_yx), np.abs(object_yx), np.float32(np.nan))
    pages = [Picture.fromarray(page) for page in (phase(object_yx), amplitude.astype(np.float32))]
    known: dict[str, Any] = {
        "pages": ["phase_rad", "amplitude"],
        "scan_id": image.scan_id,
        "pixel_yx_m": image.pixel_yx_m,
        "origin_yx_m": image.origin_yx_m,
        **image.described(),
    }
    per_cm = [0.01 / pixel for pixel in image.pixel_yx_m]
    with atomic_path(Path(path)) as partial:  # pages are appended by reading back
        pages[0].save(
            partial,
            format="TIFF",
            save_all=True,
            append_images=pages[1:],
            resolution_unit="cm",
            x_resolution=per_cm[1],
            y_resolution=per_cm[0],
            description=json.dumps(known, default=str),
            software="ptycho-stream",
        )
