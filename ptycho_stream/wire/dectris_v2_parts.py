"""CBOR tags of DECTRIS version 2, and its arrays: a shape, a pixel type and bytes.

Used by the decoder and encoder of this dialect.  An array is CBOR tag 40 around [[rows, columns],
typed array] (RFC 8746); the typed array is a byte string, or tag 56500 around [algorithm, element
size, byte string] (DECTRIS' own), in a tag that says the type.
"""

from __future__ import annotations

from typing import Any, Final

from ptycho_stream.errors import MalformedMessage
from ptycho_stream.messages import EncodedImage
from ptycho_stream.wire.cbor import Tag
from ptycho_stream.wire.limits import WireLimits

SELF_DESCRIBED: Final = 55799
MULTI_DIMENSIONAL: Final = 40
COMPRESSED: Final = 56500
PIXEL_TYPES: Final = {
    64: "|u1",
    65: ">u2",
    66: ">u4",
    67: ">u8",
    68: "|u1",
    69: "<u2",
    70: "<u4",
    71: "<u8",
}
"""Unsigned integers by the number of their tag in RFC 8746 (68 differs in arithmetic only)."""


def read_array(item: Any, limits: WireLimits) -> EncodedImage:
    """A two-dimensional array of unsigned integers, not decoded.

    Raises:
        MalformedMessage: it is none.
        LimitExceeded: it is larger than accepted.
    """
    content: Any = item.value if type(item) is Tag and item.number == MULTI_DIMENSIONAL else None
    match content:
        case [[int(rows), int(columns)], Tag(number, typed)]:
            pass
        case _:
            raise MalformedMessage("an image is no CBOR array (tag 40) of rows and columns")
    dtype = PIXEL_TYPES.get(number)
    if dtype is None:
        raise MalformedMessage(
            f"pixels are of the type with CBOR tag {number}: only unsigned integers "
            f"({', '.join(map(str, PIXEL_TYPES))}) are understood"
        )
    itemsize = int(dtype[2])
    limits.check_shape((rows, columns), itemsize)
    blob, encoding, shuffle_bits = _content(typed)
    if shuffle_bits == 8 * itemsize:
        shuffle_bits = None
    return EncodedImage(blob, encoding, dtype, (rows, columns), shuffle_bits)


def _content(typed: Any) -> tuple[memoryview, str, int | None]:
    """Bytes, our name of their encoding, and the width of shuffled elements."""
    if isinstance(typed, memoryview):
        return typed, "raw", None
    if type(typed) is Tag and typed.number == COMPRESSED:
        match typed.value:
            case ["bslz4", int(itemsize), memoryview() as blob]:
                return blob, "bslz4", 8 * itemsize
            case ["lz4", _, memoryview() as blob]:
                return blob, "lz4-hdf5", None
            case [str(algorithm), _, _]:
                raise MalformedMessage(
                    f"compression {algorithm[:40]!r} is not known: set the detector's to bslz4, "
                    "lz4 or none"
                )
            case _:
                pass
    raise MalformedMessage("an array holds neither bytes nor compressed bytes (CBOR tag 56500)")
