"""What the writers of results have to say beside pixels: numbers and words of a scan and its image.

Used by the writers of ptychodus and CXI files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.results import Image


def in_order(image: Image) -> Image:
    """The image with its frames by their numbers, instead of in the order of their coming."""
    content, order = image.content, np.argsort(image.frame_numbers, kind="stable")
    ordered = replace(
        content,
        frame_numbers=content.frame_numbers[order],
        position_yx_m=content.position_yx_m[order],
    )
    return replace(image, content=ordered)


def whole_object(image: Image) -> NDArray[np.complex64]:
    """The object (H, W), 1 (nothing in the beam) where it was never seen.

    Other programs stumble over NaN; what was seen is told by ``weight_yx``.
    """
    obj = image.object_yx
    return np.where(np.isfinite(obj), obj, np.complex64(1))


def object_center_yx_m(image: Image) -> tuple[float, float]:
    """World position of the middle of ``object_yx``, index (n - 1) / 2 along each axis."""
    y, x = (
        origin + (size - 1) / 2 * pixel
        for origin, size, pixel in zip(
            image.origin_yx_m, image.object_yx.shape, image.pixel_yx_m, strict=True
        )
    )
    return y, x


def photons(image: Image) -> float:
    """Of the unattenuated beam, a frame: the sum of |P|^2 over modes and pixels."""
    return float(np.square(np.abs(image.probe)).sum(dtype=np.float64))


def word(metadata: Mapping[str, Any], *names: str) -> str:
    """The first of some texts that the metadata have; empty if they have none."""
    found = (metadata.get(name) for name in names)
    return next((str(value) for value in found if value not in (None, "")), "")


def number(metadata: Mapping[str, Any], *names: str) -> float:
    """The first of some numbers that the metadata have; 0 if they have none."""
    for name in names:
        value = metadata.get(name)
        if isinstance(value, int | float) and np.isfinite(value):
            return float(value)
    return 0.0


def described(image: Image) -> str:
    """All that is known of an image and its scan, as JSON text."""
    return json.dumps(image.described(), default=str)
