"""DECTRIS SIMPLON stream, version 1: the messages that a detector sends.

Used by the detector simulator (:mod:`ptycho_stream.simulate.detector`) and by tests; the other
direction is :mod:`ptycho_stream.wire.dectris_v1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from ptycho_stream.wire.compression import encode
from ptycho_stream.wire.dectris_v1_parts import PIXEL_TYPES, HeaderDetail, split_encoding

_TYPE_NAMES = {np.dtype(code): name for name, code in PIXEL_TYPES.items()}
_to_json = msgspec.json.Encoder().encode


class DectrisV1Encoder:
    """Makes the messages of one series; each method returns the parts of one multipart message.

    Args:
        series: number of the series, from 1.
        encoding: as the format writes it: ``<``, ``lz4<``, ``bs8-lz4<``, ``bs16-lz4<``,
            ``bs32-lz4<``.

    Example::

        encoder = DectrisV1Encoder(series=1, encoding="bs16-lz4<")
        socket.send_multipart(encoder.start("basic", {"nimages": 100}))
        socket.send_multipart(encoder.frame(0, pixels, start_ns=0, stop_ns=1_000_000))
        socket.send_multipart(encoder.end())
    """

    def __init__(self, series: int, encoding: str = "bs16-lz4<") -> None:
        self.series = series
        self._encoding = encoding

    def start(
        self,
        detail: HeaderDetail = "basic",
        config: Mapping[str, Any] | None = None,
        pixel_mask: NDArray[np.generic] | None = None,
        appendix: bytes | None = None,
    ) -> list[bytes]:
        """The series header.

        Args:
            detail: ``none`` 1 part, ``basic`` 2, ``all`` 8 (with a flat field of ones).
            config: the detector's configuration, flat.
            pixel_mask: (y, x), non-zero where bad, sent with ``all``; zeros if None.
            appendix: free text or JSON.
        """
        parts = [_to_json({"htype": "dheader-1.0", "series": self.series, "header_detail": detail})]
        told = dict(config or {})
        if detail != "none":
            parts.append(_to_json(told))
        if detail == "all":
            shape = (told.get("y_pixels_in_detector", 1), told.get("x_pixels_in_detector", 1))
            mask = np.zeros(shape, "<u4") if pixel_mask is None else pixel_mask.astype("<u4")
            rates = np.array([[0.0, 1e9], [0.0, 1e9]], "<f4")
            parts += _table("dflatfield-1.0", np.ones(shape, "<f4")) + _table(
                "dpixelmask-1.0", mask
            )
            parts += _table("dcountrate_table-1.0", rates)
        return parts if appendix is None else [*parts, appendix]

    def frame(
        self,
        number: int,
        pixels: NDArray[np.generic],
        start_ns: int = 0,
        stop_ns: int = 0,
        appendix: bytes | None = None,
    ) -> list[bytes]:
        """One image: pixels (y, x) of uint8, uint16 or uint32, times of the detector's clock."""
        native = pixels.dtype.newbyteorder("=")
        type_name = _TYPE_NAMES.get(native)
        if type_name is None:
            raise ValueError(f"a DECTRIS detector has no {pixels.dtype.name} pixels: cast them")
        encoding, dtype, shuffle_bits = split_encoding(self._encoding, type_name)
        blob = encode(pixels.astype(dtype, copy=False), encoding, shuffle_bits)
        height, width = pixels.shape
        head = {
            "htype": "dimage-1.0",
            "series": self.series,
            "frame": number,
            "hash": xxhash.xxh3_128_hexdigest(blob),  # some receivers want one, none checks it
        }
        array = {
            "htype": "dimage_d-1.0",
            "shape": [width, height],
            "type": type_name,
            "encoding": self._encoding,
            "size": len(blob),
        }
        times = {
            "htype": "dconfig-1.0",
            "start_time": start_ns,
            "stop_time": stop_ns,
            "real_time": max(stop_ns - start_ns, 0),
        }
        parts = [_to_json(head), _to_json(array), blob, _to_json(times)]
        return parts if appendix is None else [*parts, appendix]

    def end(self) -> list[bytes]:
        """The series end."""
        return [_to_json({"htype": "dseries_end-1.0", "series": self.series})]


def _table(htype: str, values: NDArray[np.generic]) -> list[bytes]:
    height, width = values.shape
    head = {"htype": htype, "shape": [width, height], "type": values.dtype.name}
    return [_to_json(head), values.tobytes()]
