"""The JSON parts of a DECTRIS version 1 stream: what they hold, and the words they use.

Shared by the decoder, its series header and the encoder of this dialect; nobody else needs it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

import msgspec
import numpy as np

from ptycho_stream.errors import MalformedMessage
from ptycho_stream.messages import BytesLike
from ptycho_stream.wire.detector_config import series_name

HeaderDetail = Literal["none", "basic", "all"]

PIXEL_TYPES = {"uint8": "u1", "uint16": "u2", "uint32": "u4"}
TABLES = ("dflatfield", "dpixelmask", "dcountrate_table")
# A hostile sender nests JSON so deeply that the parser gives up with RecursionError.
BAD_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)

_SYNONYMS = {  # as some senders write them
    "deseries_end": "dseries_end",
    "flatfield": "dflatfield",
    "pixelmask": "dpixelmask",
    "countrate_table": "dcountrate_table",
}
_ENCODING = re.compile(r"(?:bs(8|16|32))?(?:-?(lz4))?([<>])")


class Head(msgspec.Struct, gc=False):
    """Any part with an ``htype``, and the keys that the first parts of messages carry."""

    htype: str
    series: int | str | None = None
    frame: int = -1
    header_detail: str | None = None

    @property
    def series_name(self) -> str:
        """The series as text.

        Raises:
            MalformedMessage: it is missing, absurdly long or not printable.
        """
        return series_name(self.series, self.htype)


class ArrayHead(msgspec.Struct, gc=False):
    """Part 2 of an image, or the head of a table (which has no encoding)."""

    htype: str
    shape: tuple[int, ...]
    type: str
    encoding: str = "<"
    size: int = -1

    @property
    def shape_yx(self) -> tuple[int, int]:
        """Rows and columns of the wire's [w, h] or [w, h, 1].

        Raises:
            MalformedMessage: it is neither.
        """
        if len(self.shape) < 2 or any(n != 1 for n in self.shape[2:]):
            raise MalformedMessage(f"shape {list(self.shape)} is neither [w, h] nor [w, h, 1]")
        return self.shape[1], self.shape[0]


class Times(msgspec.Struct, gc=False):
    """Part 4 of an image; nanoseconds, of any type so that a bad time costs no frame."""

    htype: str
    start_time: Any = None
    stop_time: Any = None


parse_head = msgspec.json.Decoder(Head).decode
parse_array_head = msgspec.json.Decoder(ArrayHead).decode
parse_times = msgspec.json.Decoder(Times).decode


def peek(part: BytesLike, max_bytes: int) -> Head | None:
    """The head of a JSON part that says its ``htype``; None of anything else, a blob say."""
    if len(part) > max_bytes or len(part) < 2 or part[0] != 0x7B:  # {
        return None
    try:
        return parse_head(part)
    except BAD_JSON:
        return None


@lru_cache(maxsize=64)
def kind_of(htype: str) -> str:
    """``dimage`` of ``dimage-1.0``."""
    name = htype.partition("-")[0]
    return _SYNONYMS.get(name, name)


@lru_cache(maxsize=64)
def split_encoding(text: str, type_name: str) -> tuple[str, str, int | None]:
    """Our encoding, numpy dtype and shuffle width of ``bs16-lz4<`` and its like.

    Raises:
        MalformedMessage: encoding or pixel type is none that the format knows.
    """
    match = _ENCODING.fullmatch(text)
    code = PIXEL_TYPES.get(type_name)
    if match is None or code is None or (match[1] and not match[2]):
        raise MalformedMessage(
            f"encoding {text!r} of type {type_name!r} is not known: it should be "
            f"[bs8|bs16|bs32][[-]lz4]< of {', '.join(PIXEL_TYPES)}"
        )
    dtype = np.dtype(match[3] + code).str
    if not match[2]:
        return "raw", dtype, None
    return ("bslz4", dtype, int(match[1])) if match[1] else ("lz4", dtype, None)
