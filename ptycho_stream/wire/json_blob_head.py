"""The JSON header of a frame, as the senders of the JSON-and-blob family write it.

Used by the decoders of this family (:mod:`~ptycho_stream.wire.json_blob`,
:mod:`~ptycho_stream.wire.slsdet`): each dialect is a profile that says which key means what.
Where the facts come from is in ``docs/dialects/json-blob.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
import numpy as np

from ptycho_stream.errors import DecodeError, LimitExceeded, MalformedMessage, TornMessage
from ptycho_stream.messages import BytesLike, EncodedImage
from ptycho_stream.wire.limits import WireLimits

Header = dict[str, Any]

BAD_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
# Signed counts are kept as the unsigned numbers of the same bits: -1 and -2, which PILATUS
# detectors write for gaps and dead pixels, become the two largest values, as EIGERs have them.
PIXEL_TYPES: Mapping[str, str] = {
    "uint8": "u1",
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
    "int8": "u1",
    "int16": "u2",
    "int32": "u4",
    "int64": "u8",
    "float": "f4",
    "float32": "f4",
    "float64": "f8",
}
ENCODINGS: Mapping[str, str] = {"none": "raw", "": "raw", "lz4": "lz4", "bslz4": "bslz4"}


@dataclass(frozen=True, slots=True)
class Profile:
    """Which key of a dialect's header means what.

    Attributes:
        name: the dialect's, as the settings have it.
        number: key of the frame number.
        pixel_type: key of the pixel type.
        compression: key of the compression; None: pixels come as they are.
        shape_order: of ``shape``: rows first, or columns first.
        byte_order: key that says ``big`` where pixels are; None: they are little-endian.
    """

    name: str
    number: str
    pixel_type: str
    compression: str | None
    shape_order: Literal["yx", "xy"]
    byte_order: str | None = None


STINS = Profile("stins", "frame", "type", "compression", "yx")
PSI = Profile("psi", "frame", "type", None, "yx", byte_order="encoding")
ODIN = Profile("odin", "frame_num", "dtype", "compression", "xy")
SLSDET = Profile("slsdet", "frameIndex", "bitmode", None, "xy")


def read_header(parts: Sequence[BytesLike], limits: WireLimits) -> Header:
    """The first of ``parts``, a JSON object.

    Raises:
        LimitExceeded: a part is longer than accepted.
        MalformedMessage: it is no JSON object.
    """
    if not parts or len(parts[0]) > limits.max_header_bytes:
        raise LimitExceeded(f"a header is missing or above {limits.max_header_bytes} bytes")
    if max(map(len, parts)) > limits.max_message_bytes:
        raise LimitExceeded(f"a part is above {limits.max_message_bytes} bytes")
    return read_object(parts[0])


def read_object(part: BytesLike) -> Header:
    """A JSON object.

    Raises:
        MalformedMessage: it is none.
    """
    try:
        return msgspec.json.decode(part, type=dict[str, Any])
    except BAD_JSON as error:
        start = bytes(part[:40])
        raise MalformedMessage(f"a header is no JSON object ({error}): {start!r}") from error


def read_number(header: Header, key: str, limits: WireLimits) -> int:
    """The frame number, or another count.

    Raises:
        MalformedMessage: there is none.
        LimitExceeded: it is negative or no scan has so many frames.
    """
    value = header.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise MalformedMessage(f"{key} is {value!r:.40} and should be a whole number")
    limits.check_number(value)
    return value


def read_image(
    profile: Profile, header: Header, parts: Sequence[BytesLike], limits: WireLimits
) -> EncodedImage:
    """The pixels of a message of header and blob, not decoded.

    Raises:
        TornMessage: it has another number of parts.
        MalformedMessage: shape, type or compression are missing or unknown.
        LimitExceeded: the frame is larger than accepted.
    """
    if len(parts) != 2:
        raise TornMessage(
            f"a frame has {len(parts) - 1} blobs, not one: the sender lost its pixels, or sends "
            "modules that are to be put together"
        )
    dtype = _pixel_type(profile, header)
    shape_yx = _shape_yx(profile, header)
    itemsize = int(dtype[2:])
    limits.check_shape(shape_yx, itemsize)
    encoding = _encoding(profile, header)
    return framed_image(parts[1], encoding, dtype, shape_yx)


def framed_image(
    blob: BytesLike, encoding: str, dtype: str, shape_yx: tuple[int, int]
) -> EncodedImage:
    """An image whose blob may have lost, or never had, the 12 bytes before its blocks.

    Of ``lz4`` both framings are met, and of ``bslz4`` both with the head (DECTRIS, HDF5) and
    without (as the bitshuffle library makes it).  The head begins with the decoded size as a 64-bit
    big endian number, of which the first four bytes are 0 below 4 GiB.  No bare LZ4 block begins so
    (it would copy from offset 0), and neither does a block's compressed length.
    """
    headed = bytes(blob[:4]) == b"\0\0\0\0"
    if encoding == "lz4" and headed:
        encoding = "lz4-hdf5"
    elif encoding == "bslz4" and not headed:
        blob = bytes(12) + bytes(blob)
    return EncodedImage(blob, encoding, dtype, shape_yx)


def check_raw(image: EncodedImage) -> None:
    """Refuse a raw blob that has not the length of its pixels.

    Raises:
        DecodeError: that is the case.
    """
    height, width = image.shape_yx
    size = height * width * np.dtype(image.dtype).itemsize
    if len(image.blob) != size:
        raise DecodeError(
            f"{len(image.blob)} bytes of pixels came where {size} were promised for "
            f"{image.shape_yx} {image.dtype}"
        )


def _pixel_type(profile: Profile, header: Header) -> str:
    word = header.get(profile.pixel_type)
    if profile.pixel_type == "bitmode":
        word = f"uint{word}" if word != 12 else "uint16"  # 12 bits come in 16
    code = PIXEL_TYPES.get(word) if isinstance(word, str) else None
    if code is None:
        known = "8, 16, 32" if profile.pixel_type == "bitmode" else ", ".join(PIXEL_TYPES)
        raise MalformedMessage(
            f"{profile.pixel_type} is {header.get(profile.pixel_type)!r:.40}: known are {known}"
        )
    big = profile.byte_order is not None and header.get(profile.byte_order) == "big"
    if code == "u1":
        return "|u1"
    return (">" if big else "<") + code


def _shape_yx(profile: Profile, header: Header) -> tuple[int, int]:
    shape = header.get("shape")
    if not isinstance(shape, list):
        raise MalformedMessage(f"shape is {shape!r:.40} and should be a list of two numbers")
    sizes = [_size(value) for value in cast("list[Any]", shape)[:4]]
    while len(sizes) > 2:  # a third axis of one plane, wherever the sender puts it
        if 1 not in (sizes[0], sizes[-1]):
            break
        sizes.pop(-1 if sizes[-1] == 1 else 0)
    if len(sizes) != 2:
        raise MalformedMessage(f"shape {shape!r:.60} is not that of one image")
    first, second = sizes
    return (first, second) if profile.shape_order == "yx" else (second, first)


def _size(value: object) -> int:
    """An axis' length; odin-data writes it as text."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise MalformedMessage(f"shape holds {value!r:.40}, which is no length")
    return value


def _encoding(profile: Profile, header: Header) -> str:
    word = header.get(profile.compression) if profile.compression else None
    if word is None:
        return "raw"
    encoding = ENCODINGS.get(word.lower()) if isinstance(word, str) else None
    if encoding is None:
        raise MalformedMessage(
            f"compression {word!r:.40} is not known: let the sender use none, lz4 or bslz4"
        )
    return encoding
