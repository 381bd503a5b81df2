"""The start message of a DECTRIS version 2 series, and the ScanStart that it makes.

Used by :mod:`ptycho_stream.wire.dectris_v2` only.  Whatever the message holds, its series starts:
what makes no sense is left out and reported, and the first frame tells what this does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import WireError
from ptycho_stream.messages import DetectorGeometry, ScanStart
from ptycho_stream.wire.cbor import Tag
from ptycho_stream.wire.compression import decode
from ptycho_stream.wire.dectris_v2_parts import read_array
from ptycho_stream.wire.detector_config import (
    expected_frames,
    geometry_of,
    is_count,
    unless_refused,
)
from ptycho_stream.wire.limits import WireLimits, bounded_document

SOURCE: Final = "dectris-v2"
TABLES: Final = ("countrate_correction_lookup_table", "flatfield", "pixel_mask")
_DTYPES: Final = {"uint8": "|u1", "uint16": "<u2", "uint32": "<u4"}


def read_start(
    told: Mapping[str, Any], series: str, channel: str | None, limits: WireLimits
) -> tuple[ScanStart, list[WireError]]:
    """What a start message says of its series, and what had to be left out.

    Args:
        told: the message.
        series: its name.
        channel: that is recorded; None: not known yet.
        limits: what is accepted.
    """
    problems: list[WireError] = []
    name = told.get("image_dtype")
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    images = {"nimages": told.get("number_of_images")}
    start = ScanStart(
        source=SOURCE,
        series=series,
        expected_frames=unless_refused(lambda: expected_frames(images, limits), problems),
        frame_shape_yx=unless_refused(lambda: _frame_shape_yx(told, dtype, limits), problems),
        dtype=dtype,
        geometry=_geometry(told),
        metadata=_metadata(told, channel),
        pixel_mask=unless_refused(
            lambda: _pixel_mask(told.get("pixel_mask"), channel, limits), problems
        ),
    )
    return start, problems


def channels_of(told: Mapping[str, Any]) -> list[str]:
    """The channels that a start message announces, in their order."""
    names = told.get("channels")
    if not isinstance(names, list):
        return []
    return [name for name in cast("list[Any]", names) if isinstance(name, str)]


def _frame_shape_yx(
    told: Mapping[str, Any], dtype: str | None, limits: WireLimits
) -> tuple[int, int] | None:
    height, width = told.get("image_size_y"), told.get("image_size_x")
    if not is_count(height) or not is_count(width):
        return None
    shape_yx = cast("tuple[int, int]", (height, width))
    limits.check_shape(shape_yx, int(dtype[2]) if dtype else 1)
    return shape_yx


def _geometry(told: Mapping[str, Any]) -> DetectorGeometry:
    """The words of version 2 in those of version 1."""
    config = {
        "photon_energy": told.get("incident_energy"),
        "wavelength": told.get("incident_wavelength"),
        "x_pixel_size": told.get("pixel_size_x"),
        "y_pixel_size": told.get("pixel_size_y"),
        **{
            key: told.get(key)
            for key in ("beam_center_x", "beam_center_y", "count_time", "frame_time")
        },
    }
    match told.get("detector_translation"):
        case [_, _, (int() | float()) as z_m]:
            config["detector_distance"] = abs(z_m)  # a real one says -0.237: z is towards the beam
        case _:
            pass
    return geometry_of(config)


def _pixel_mask(masks: Any, channel: str | None, limits: WireLimits) -> NDArray[np.bool_] | None:
    """Bad pixels of the channel, of the first mask where it is not known."""
    if not isinstance(masks, dict):
        return None
    by_channel = cast("dict[str, Any]", masks)
    item = next(iter(by_channel.values()), None) if channel is None else by_channel.get(channel)
    if type(item) is not Tag:
        return None  # null, and what some senders write for a mask that they have not
    return decode(read_array(item, limits), max_bytes=limits.max_decoded_bytes) != 0


def _metadata(told: Mapping[str, Any], channel: str | None) -> dict[str, Any]:
    """All but the tables.  A map of the user's is theirs to fill: its keys stand beside ours."""
    plain = {key: _plain(value) for key, value in told.items() if key not in (*TABLES, "type")}
    user_data = plain.get("user_data")
    if isinstance(user_data, dict):
        del plain["user_data"]
        plain = {**cast("dict[str, Any]", user_data), **plain}
    if channel is not None:
        plain["channel"] = channel
    return bounded_document(plain)


def _plain(item: Any) -> Any:
    """An item as metadata can hold it: tags are taken off, bytes are only counted."""
    if type(item) is Tag:
        return _plain(item.value)
    if isinstance(item, memoryview):
        return f"{item.nbytes} bytes"
    if isinstance(item, dict):
        return {key: _plain(value) for key, value in cast("dict[str, Any]", item).items()}
    if isinstance(item, list):
        return [_plain(value) for value in cast("list[Any]", item)]
    return item
