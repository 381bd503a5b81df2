"""Pictures of a reconstructed object: phase and amplitude as grey levels (PNG), as numbers (TIFF).

Used by exports, the demo's preview and ``ptycho-stream export``; the terminal's coarse image takes
its grey levels from here too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from ptycho_stream.atomic_file import atomic_file, atomic_path
from ptycho_stream.errors import FileFormatError
from ptycho_stream.results import Image

UNSEEN_RGB = (32, 40, 64)
GAP_PX = 8
# Grey levels span these percentiles, so that a few wild pixels at the rim do not hide the rest.
PERCENTILES = (1.0, 99.0)


def phase(object_yx: NDArray[np.complex64]) -> NDArray[np.float32]:
    """Phase in radians about its mean direction; float32 (H, W), NaN where unseen.

    An object's mean phase is arbitrary; taking it out keeps the picture away from the wrap at pi.
    """
    seen = np.isfinite(object_yx)
    if not seen.any():
        return np.full(object_yx.shape, np.nan, np.float32)
    mean = object_yx[seen].sum(dtype=np.complex128)
    turn = np.complex64(np.conj(mean) / abs(mean)) if mean else np.complex64(1)
    angles = np.angle(np.where(seen, object_yx, 1) * turn)
    return np.where(seen, angles, np.float32(np.nan)).astype(np.float32)


def grey_levels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values (H, W) as uint8 grey levels between their percentiles; NaN becomes 0."""
    seen = np.isfinite(values)
    if not seen.any():
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(values[seen], PERCENTILES)
    span = max(float(high - low), 1e-6)
    scaled = np.clip((np.where(seen, values, low) - low) / span, 0, 1) * 255
    return scaled.astype(np.uint8)


def coloured(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values (H, W) as uint8 (H, W, 3): grey, and a dark blue where NaN says unseen."""
    rgb = np.repeat(grey_levels(values)[:, :, None], 3, axis=2)
    rgb[~np.isfinite(values)] = UNSEEN_RGB
    return rgb


def save_png(image: Image, path: Path | str) -> None:
    """Write phase (left) and amplitude (right) of an image side by side as PNG.

    The file is there whole or not at all.

    Raises:
        FileFormatError: nothing was seen yet, or the path cannot be written.
    """
    object_yx = image.object_yx
    if not object_yx.size:
        raise FileFormatError(f"scan {image.scan_id} has no pixel to draw yet: {path} not written")
    gap = np.full((object_yx.shape[0], GAP_PX, 3), 255, np.uint8)
    halves = (coloured(phase(object_yx)), gap, coloured(np.abs(object_yx)))
    with atomic_file(Path(path)) as file:
        Picture.fromarray(np.concatenate(halves, axis=1)).save(file, format="PNG")


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
