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

from ptycho_stream.errors import DecodeError, MalformedMessage
from ptycho_stream.geometry import PLANCK_TIMES_LIGHT_EV_M
from ptycho_stream.messages import BytesLike, DetectorGeometry, ScanStart
from ptycho_stream.wire.dectris_v1_parts import (
    BAD_JSON,
    TABLES,
    ArrayHead,
    Head,
    kind_of,
    parse_array_head,
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
        self._flatfield: NDArray[np.float32] | None = None

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

    @property
    def missing(self) -> str | None:
        """What ``header_detail`` announced and did not come; None if all is there."""
        if self.complete:
            return None
        what = "configuration" if self._wants_config else "tables"
        return f"the header of series {self.series} came without its {what}"

    def scan_start(self, source: str) -> ScanStart:
        """What the parts say so far.

        Raises:
            WireError: the configuration or the appendix exceeds the limits.
        """
        config = self._config
        metadata = self._limits.bounded_metadata(config)
        if self._appendix is not None:
            metadata.update(self._limits.bounded_metadata({"appendix": self._read_appendix()}))
        width, height = config.get("x_pixels_in_detector"), config.get("y_pixels_in_detector")
        shape = (height, width) if _is_count(width) and _is_count(height) else None
        return ScanStart(
            source=source,
            series=self.series,
            expected_frames=_expected_frames(config),
            frame_shape_yx=cast("tuple[int, int] | None", shape),
            dtype=_BIT_DEPTHS.get(cast("int", config.get("bit_depth_image"))),
            geometry=_geometry(config),
            metadata=metadata,
            pixel_mask=self._pixel_mask,
            flatfield=self._flatfield,
        )

    def bare_scan_start(self, source: str) -> ScanStart:
        """The series alone, for a header whose contents cannot be used."""
        return ScanStart(source=source, series=self.series)

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
        if name == "dcountrate_table":
            return  # the detector has applied it; nothing of ours undoes that
        self._limits.check_shape(table.shape_yx, np.dtype(dtype).itemsize)
        array = np.frombuffer(blob, dtype).reshape(table.shape_yx)
        if name == "dpixelmask":
            self._pixel_mask = array != 0
        else:
            self._flatfield = array.astype(np.float32)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _expected_frames(config: dict[str, Any]) -> int | None:
    """``nimages`` a trigger where the detector times them (ints, exts), one where a gate does."""
    triggers, images = config.get("ntrigger"), config.get("nimages")
    mode = config.get("trigger_mode")
    if mode in ("inte", "exte"):
        return triggers if _is_count(triggers) else None
    if not _is_count(images):
        return None
    return cast("int", images) * (cast("int", triggers) if _is_count(triggers) else 1)


def _geometry(config: dict[str, Any]) -> DetectorGeometry:
    def positive(key: str) -> float | None:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if 0 < value < math.inf else None

    def pair(y_key: str, x_key: str) -> tuple[float, float] | None:
        y, x = positive(y_key), positive(x_key)
        return None if y is None or x is None else (y, x)

    energy, wavelength_angstrom = positive("photon_energy"), positive("wavelength")
    if energy is None and wavelength_angstrom is not None:
        energy = PLANCK_TIMES_LIGHT_EV_M / (wavelength_angstrom * 1e-10)
    return DetectorGeometry(
        detector_distance_m=positive("detector_distance"),
        photon_energy_eV=energy,
        detector_pixel_yx_m=pair("y_pixel_size", "x_pixel_size"),
        beam_center_yx_px=pair("beam_center_y", "beam_center_x"),
        count_time_s=positive("count_time"),
        frame_time_s=positive("frame_time"),
    )
