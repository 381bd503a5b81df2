"""DECTRIS SIMPLON stream, version 2: the messages that a detector sends.

Used by the detector simulator (:mod:`ptycho_stream.simulate.detector`) and by tests; the other
direction is :mod:`ptycho_stream.wire.dectris_v2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, get_args

import cbor2
import numpy as np
from numpy.typing import NDArray

from ptycho_stream.wire.compression import encode
from ptycho_stream.wire.dectris_v2_parts import (
    COMPRESSED,
    MULTI_DIMENSIONAL,
    PIXEL_TYPES,
    SELF_DESCRIBED,
)

Compression = Literal["bslz4", "lz4", "none"]
COMPRESSIONS: Final[tuple[str, ...]] = get_args(Compression)

_TAGS: Final = {np.dtype(code): tag for tag, code in reversed(PIXEL_TYPES.items())}
_DATE: Final = 0
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TIME_BASE_HZ: Final = 1_000_000_000


class DectrisV2Encoder:
    """Makes the messages of one series; each method returns one message as its only part.

    Args:
        series: number of the series, from 1.
        compression: of the pixels, as the format writes it.
        unique_id: of the series among all that were ever measured; None: not sent.
        begun_ns: when the series began, UTC, cut to microseconds; images are dated from it.

    Example::

        encoder = DectrisV2Encoder(series=1, begun_ns=time.time_ns())
        socket.send_multipart(encoder.start({"number_of_images": 100, "channels": ["threshold_1"]}))
        socket.send_multipart(encoder.frame(0, {"threshold_1": pixels}))
        socket.send_multipart(encoder.end())
    """

    def __init__(
        self,
        series: int,
        compression: Compression = "bslz4",
        unique_id: str | None = None,
        begun_ns: int = 0,
    ) -> None:
        self.series = series
        self.begun_ns = begun_ns // 1000 * 1000
        self._compression: Compression = compression
        self._ids: dict[str, Any] = {"series_id": series}
        if unique_id is not None:
            self._ids["series_unique_id"] = unique_id
        begun = _EPOCH + timedelta(microseconds=self.begun_ns // 1000)
        self._date = cbor2.CBORTag(_DATE, begun.isoformat())

    def start(
        self,
        told: Mapping[str, Any],
        pixel_mask: Mapping[str, NDArray[np.generic]] | None = None,
    ) -> list[bytes]:
        """The start of the series.

        Args:
            told: what the message says beside type, series and date: channels,
                number_of_images ...
            pixel_mask: by channel (y, x), not 0 where bad; None: not sent.
        """
        message = {"type": "start", **self._ids, "arm_date": self._date, **told}
        if pixel_mask is not None:
            message["pixel_mask"] = {
                channel: self._array(mask.astype("<u4")) for channel, mask in pixel_mask.items()
            }
        return [cbor2.dumps(message)]  # a detector describes images and ends only as CBOR

    def frame(
        self,
        number: int,
        pixels: Mapping[str, NDArray[np.generic]],
        start_ns: int = 0,
        stop_ns: int = 0,
    ) -> list[bytes]:
        """One image: by channel (y, x) of uint8, uint16 or uint32, in either byte order.

        Times count from the series' beginning.
        """
        message = {
            "type": "image",
            **self._ids,
            "image_id": number,
            "series_date": self._date,
            "start_time": [start_ns, _TIME_BASE_HZ],
            "stop_time": [stop_ns, _TIME_BASE_HZ],
            "real_time": [max(stop_ns - start_ns, 0), _TIME_BASE_HZ],
            "data": {channel: self._array(image) for channel, image in pixels.items()},
        }
        return [_described(message)]

    def end(self) -> list[bytes]:
        """The end of the series."""
        return [_described({"type": "end", **self._ids})]

    def _array(self, pixels: NDArray[np.generic]) -> cbor2.CBORTag:
        tag = _TAGS.get(pixels.dtype)
        if tag is None:
            raise ValueError(f"a DECTRIS detector has no {pixels.dtype.name} pixels: cast them")
        content: Any
        match self._compression:
            case "none":
                content = encode(pixels, "raw")
            case "lz4":
                content = cbor2.CBORTag(COMPRESSED, ["lz4", 0, encode(pixels, "lz4-hdf5")])
            case "bslz4":
                blob = encode(pixels, "bslz4")
                content = cbor2.CBORTag(COMPRESSED, ["bslz4", pixels.dtype.itemsize, blob])
        return cbor2.CBORTag(MULTI_DIMENSIONAL, [list(pixels.shape), cbor2.CBORTag(tag, content)])


def _described(message: Mapping[str, Any]) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(SELF_DESCRIBED, message))
