"""A DECTRIS version 1 series header while its parts come in, and the ScanStart that they make.

Used by :mod:`ptycho_stream.wire.dectris_v1` only.  It holds up to eight parts and an appendix: the
series, the detector's configuration, and flat field, pixel mask and count rate table as head and
blob each.
"""

from __future__ import annotations

import math
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import (
    DecodeError,
    MalformedMessage,
    TornMessage,
    WireError,
)
from ptycho_stream.messages import BytesLike, Message, ScanStart, Undecodable
from ptycho_stream.wire.dectris_v1_parts import (
    BAD_JSON,
    TABLES,
    ArrayHead,
    Head,
    kind_of,
    parse_array_head,
)
from ptycho_stream.wire.detector_config import (
    expected_frames,
    geometry_of,
    is_count,
    unless_refused,
)
from ptycho_stream.wire.limits import WireLimits

_TABLE_DTYPES = {"float32": "<f4", "uint32": "<u4", "uint16": "<u2", "uint8": "u1"}
_BIT_DEPTHS = {8: "|u1", 16: "<u2", 32: "<u4"}


class PendingHeader:
    """Collects the parts of one series header."""

    def __init__(self, head: Head, limits: WireLimits) -> None:
        self.series = head.series_name
        self._limits = limits
        self._wants_config = head.header_detail in ("basic", "all")
        self._tables_to_come = len(TABLES) if head.header_detail == "all" else 0
        self._table: ArrayHead | None = None
        self._config: dict[str, Any] = {}
        self._appendix: BytesLike | None = None
        self._pixel_mask: NDArray[np.bool_] | None = None

    @property
    def complete(self) -> bool:
        """Whether all announced parts are there (an appendix may follow)."""
        return not (self._wants_config or self._tables_to_come or self._table)

    def wants(self, part: BytesLike, head: Head | None) -> bool:
        """Whether ``part`` is the one that comes next."""
        if self._table is not None:
            return head is None or len(part) == self._table_bytes(self._table)
        if self._wants_config:
            return head is None
        return self._tables_to_come > 0 and head is not None and kind_of(head.htype) in TABLES

    def take(self, part: BytesLike) -> None:
        """Take the part that :meth:`wants` agreed to.

        Raises:
            WireError: it is not what it should be; the header goes on without it.
        """
        if self._table is not None:
            table, self._table = self._table, None
            self._add_table(table, part)
        elif self._wants_config:
            self._wants_config = False
            self._config = self._read_config(part)
        else:
            self._tables_to_come -= 1
            try:
                self._table = parse_array_head(part)
            except BAD_JSON as error:
                raise MalformedMessage(f"the head of a header table: {error}") from error

    def take_appendix(self, part: BytesLike) -> None:
        """Keep a free part that followed the header in its message."""
        self._appendix = part

    def messages(self, source: str) -> list[Message]:
        """The ScanStart that the parts make, after what had to be left out of it.

        Whatever the parts hold the series starts: the first frame tells what this does not.
        """
        problems: list[WireError] = []
        if not self.complete:
            what = "configuration" if self._wants_config else "tables"
            problems.append(
                TornMessage(f"the header of series {self.series} came without its {what}")
            )
        config = self._config
        depth = config.get("bit_depth_image")
        dtype = _BIT_DEPTHS.get(depth) if isinstance(depth, int) else None
        start = ScanStart(
            source=source,
            series=self.series,
            expected_frames=unless_refused(lambda: expected_frames(config, self._limits), problems),
            frame_shape_yx=unless_refused(lambda: self._frame_shape_yx(dtype), problems),
            dtype=dtype,
            geometry=geometry_of(config),
            metadata=unless_refused(self._metadata, problems) or {},
            pixel_mask=self._pixel_mask,
        )
        refused = [Undecodable(error.reason, str(error), self.series) for error in problems]
        return [*refused, start]

    def _metadata(self) -> dict[str, Any]:
        metadata = self._limits.bounded_metadata(self._config)
        if self._appendix is not None:
            metadata.update(self._limits.bounded_metadata({"appendix": self._read_appendix()}))
        return metadata

    def _frame_shape_yx(self, dtype: str | None) -> tuple[int, int] | None:
        config = self._config
        height, width = config.get("y_pixels_in_detector"), config.get("x_pixels_in_detector")
        if not is_count(height) or not is_count(width):
            return None
        shape_yx = cast("tuple[int, int]", (height, width))
        self._limits.check_shape(shape_yx, np.dtype(dtype).itemsize if dtype else 1)
        return shape_yx

    def _read_config(self, part: BytesLike) -> dict[str, Any]:
        if len(part) > self._limits.max_header_bytes:
            raise MalformedMessage(
                f"a configuration of {len(part)} bytes is above {self._limits.max_header_bytes}"
            )
        try:
            return msgspec.json.decode(part, type=dict[str, Any])
        except BAD_JSON as error:
            raise MalformedMessage(
                f"the configuration of series {self.series} is not a JSON object: {error}"
            ) from error

    def _read_appendix(self) -> Any:
        part = bytes(self._appendix or b"")[: self._limits.max_header_bytes]
        try:
            return msgspec.json.decode(part)
        except BAD_JSON:
            return part.decode("utf-8", errors="replace")  # free text

    def _table_bytes(self, table: ArrayHead) -> int:
        dtype = _TABLE_DTYPES.get(table.type)
        return math.prod(table.shape) * np.dtype(dtype).itemsize if dtype else -1

    def _add_table(self, table: ArrayHead, blob: BytesLike) -> None:
        name = kind_of(table.htype)
        dtype = _TABLE_DTYPES.get(table.type)
        if dtype is None or len(blob) != self._table_bytes(table):
            raise DecodeError(
                f"{name} of series {self.series}: {len(blob)} bytes are not {list(table.shape)} "
                f"of {table.type!r}"
            )
        if name != "dpixelmask":
            return  # flat field and count rates: the detector has corrected for them, or not
        self._limits.check_shape(table.shape_yx, np.dtype(dtype).itemsize)
        self._pixel_mask = np.frombuffer(blob, dtype).reshape(table.shape_yx) != 0
