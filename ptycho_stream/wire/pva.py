"""areaDetector images over PV Access (NTNDArray): updates of a channel to messages.

The daemon's PVA source feeds :class:`PvaDecoder` what a client library has received, as the plain
values of :class:`NdArrayUpdate`; nothing here needs that library.  What the fields mean is in
``docs/dialects/pva.md``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import DecodeError, LimitExceeded, MalformedMessage, WireError
from ptycho_stream.messages import (
    EncodedImage,
    Frame,
    Message,
    ScanStart,
    Undecodable,
)
from ptycho_stream.settings import PvaSettings
from ptycho_stream.wire.json_blob_head import framed_image
from ptycho_stream.wire.limits import WireLimits, checked_name
from ptycho_stream.wire.series_tracker import SeriesTracker

SOURCE: Final = "pva"
CODECS: Final = {"": "raw", "lz4": "lz4", "lz4hdf5": "lz4-hdf5", "bslz4": "bslz4"}
# Pixel types of compressed arrays are numbers, which the two servers of areaDetector write
# differently: EPICS' ScalarType (pvDatabase), or NDDataType_t (PVXS).  The uncompressed size tells
# which it is, but for 1 with 1 byte, where signed counts would make no sense anyway.
SCALAR_TYPES: Final = {1: "u1", 2: "u2", 3: "u4", 4: "u8", 5: "u1", 6: "u2", 7: "u4", 8: "u8"}
ND_TYPES: Final = {0: "u1", 1: "u1", 2: "u2", 3: "u2", 4: "u4", 5: "u4", 6: "u8", 7: "u8"}
FLOAT_TYPES: Final = {9: "f4", 10: "f8"}, {8: "f4", 9: "f8"}
MAX_INT64: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class NdArrayUpdate:
    """One update of an NTNDArray channel.

    Attributes:
        unique_id: the driver's number of the array, a signed 32-bit counter.
        dimensions: sizes, the fastest (x) first.
        codec: name of the compression, empty for none.
        codec_type: the pixel type of a compressed array as its sender numbers it; None: not told.
        value: the array's elements, flat; of a compressed one its bytes.  None: nothing is in it.
        uncompressed_bytes: of a compressed array.
        time_ns: when it was taken, UTC nanoseconds; 0: not told.
        attributes: of the array, by name.
    """

    unique_id: int
    dimensions: tuple[int, ...]
    codec: str
    codec_type: int | None
    value: NDArray[Any] | None
    uncompressed_bytes: int
    time_ns: int
    attributes: Mapping[str, object]


class PvaDecoder:
    """Turns updates into frames, and says where series begin and end.  It never raises.

    The first update after a connection is what the server has held since its last frame, of this
    acquisition or of one long past.  It waits for the next, which tells: only if that goes on
    counting, and soon after, do they belong together.

    Args:
        settings: what attributes and channels mean.
        limits: what is accepted.
        silence_ns: so long without a frame ends a series.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        settings: PvaSettings | None = None,
        limits: WireLimits | None = None,
        silence_ns: int = 60_000_000_000,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._settings = settings or PvaSettings()
        self._limits = limits or WireLimits()
        self._silence_ns = silence_ns
        self._clock = clock
        self._tracker = SeriesTracker(SOURCE, self._settings.first_number, silence_ns, clock)
        self._connected = False
        self._held: NdArrayUpdate | None = None
        self._acquiring: bool | None = None
        self._quiet_since_ns = 0
        self._begun_early = False

    def connected(self) -> None:
        """The channel was connected to, for the first time or anew."""
        self._connected = True
        self._held = None

    def receive(self, update: NdArrayUpdate) -> list[Message]:
        """Messages that ``update`` makes."""
        self._quiet_since_ns = self._clock()
        if self._connected:
            self._connected = False
            self._held = update if update.value is not None else None  # empty before the first
            return []
        held, self._held = self._held, None
        out: list[Message] = []
        if held is not None and self._goes_on(held, update):
            out += self._take(held)
        return out + self._take(update)

    def acquire(self, acquiring: bool) -> list[Message]:
        """The detector's acquire channel has this value now."""
        before, self._acquiring = self._acquiring, acquiring
        self._quiet_since_ns = self._clock()
        early, self._begun_early = self._begun_early, False
        if not acquiring or before is not False:
            return []  # of a series that runs already when we come we know no beginning
        self._held = None
        # The two channels come in no order: a first frame may have overtaken this.
        return [] if early else self._tracker.start(SOURCE)

    def overdue(self) -> list[Message]:
        """The end of a series whose last frames have had time to come; call now and then."""
        if self._acquiring is not False or self._tracker.series is None:
            return []
        if self._clock() - self._quiet_since_ns < self._settings.quiet_s * 1e9:
            return []
        return self._tracker.end()

    def _goes_on(self, held: NdArrayUpdate, update: NdArrayUpdate) -> bool:
        if update.unique_id <= held.unique_id:
            return False
        if not held.time_ns or not update.time_ns:
            return self._acquiring is True
        return 0 <= update.time_ns - held.time_ns <= self._silence_ns

    def _take(self, update: NdArrayUpdate) -> list[Message]:
        try:
            frame = self._frame(update)
        except WireError as error:
            return [Undecodable(error.reason, str(error), self._tracker.series)]
        out = [self._described(message, update) for message in self._tracker.take(frame)]
        if self._acquiring is False and any(type(message) is ScanStart for message in out):
            self._begun_early = True
        return out

    def _frame(self, update: NdArrayUpdate) -> Frame:
        self._limits.check_number(update.unique_id)
        image = self._image(update)
        settings, told = self._settings, update.attributes
        position = None
        if settings.position_attributes_yx is not None:
            y, x = (_reading(told, name) for name in settings.position_attributes_yx)
            if y is not None and x is not None:
                scale_y, scale_x = settings.position_scale_yx_m
                position = y * scale_y, x * scale_x
        i0 = None if settings.i0_attribute is None else _reading(told, settings.i0_attribute)
        start_ns = update.time_ns if 0 < update.time_ns <= MAX_INT64 else None
        return Frame(self._series_name(told), update.unique_id, image, position, start_ns, None, i0)

    def _image(self, update: NdArrayUpdate) -> EncodedImage:
        if update.value is None:
            raise MalformedMessage("an array without pixels: the driver has not acquired yet")
        encoding = CODECS.get(update.codec)
        if encoding is None:
            raise MalformedMessage(
                f"codec {update.codec!r:.40} is not understood: set the codec plugin to LZ4, BSLZ4 "
                "or None"
            )
        shape_yx = self._shape_yx(update)
        pixels = math.prod(shape_yx)
        if encoding != "raw":
            dtype = _compressed_type(update, pixels)
            self._limits.check_shape(shape_yx, int(dtype[2:]))
            blob = np.ascontiguousarray(update.value).data.cast("B")
            if len(blob) > self._limits.max_message_bytes:
                raise LimitExceeded(f"{len(blob)} bytes, above {self._limits.max_message_bytes}")
            return framed_image(blob, encoding, dtype, shape_yx)
        value = np.ascontiguousarray(update.value)
        dtype = _raw_type(value.dtype)
        self._limits.check_shape(shape_yx, int(dtype[2:]))
        if value.size != pixels:
            raise DecodeError(f"{value.size} pixels came for an array of {shape_yx}")
        return EncodedImage(value.data.cast("B"), "raw", dtype, shape_yx)

    def _shape_yx(self, update: NdArrayUpdate) -> tuple[int, int]:
        sizes = update.dimensions
        if len(sizes) < 2 or any(size != 1 for size in sizes[2:]):
            raise MalformedMessage(
                f"an array of dimensions {sizes[:8]} is no image in one colour: set the driver's "
                "ColorMode to Mono"
            )
        return sizes[1], sizes[0]

    def _series_name(self, attributes: Mapping[str, object]) -> str:
        name = self._settings.series_attribute
        if name is None:
            return SOURCE
        value = attributes.get(name)
        if not isinstance(value, str | int | float):
            raise MalformedMessage(
                f"an array has no attribute {name!r}: correct detector.pva.series_attribute or the "
                "driver's attributes file"
            )
        return checked_name(str(value) or SOURCE)

    def _described(self, message: Message, update: NdArrayUpdate) -> Message:
        if type(message) is not ScanStart:
            return message
        try:
            metadata = self._limits.bounded_metadata(update.attributes)
        except WireError:
            return message  # a frame with too many attributes is a frame all the same
        return replace(message, metadata=metadata)


def _reading(attributes: Mapping[str, object], name: str) -> float | None:
    """A number among the attributes; None if there is none or it is not finite."""
    value = attributes.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _raw_type(dtype: np.dtype[Any]) -> str:
    """Ours of an uncompressed array; signed counts are kept as unsigned ones of the same bits.

    Raises:
        MalformedMessage: these are no counts.
    """
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise MalformedMessage(f"an array of {dtype.name} holds no counts")
    kind = "f" if dtype.kind == "f" else "u"
    return np.dtype(f"{'>' if dtype.str[0] == '>' else '<'}{kind}{dtype.itemsize}").str


def _compressed_type(update: NdArrayUpdate, pixels: int) -> str:
    """Little-endian numpy name of a compressed array's pixels.

    Raises:
        MalformedMessage: type and size do not go together.
    """
    code, size = update.codec_type, update.uncompressed_bytes
    itemsize = size // pixels if pixels > 0 and size % pixels == 0 else 0
    if code is not None:
        scalar_floats, nd_floats = FLOAT_TYPES
        for table in (SCALAR_TYPES, ND_TYPES, scalar_floats, nd_floats):
            found = table.get(code)
            if found is not None and int(found[1:]) == itemsize:
                return np.dtype("<" + found).str
    raise MalformedMessage(
        f"a compressed array of {size} bytes, {pixels} pixels and type {code}: no pixel type fits"
    )
