"""Our own dialect: a msgpack map a message, with pixels or a pixel mask as a second part.

For beamlines that write their own sender, and for scan positions whatever the detector speaks.
:class:`NativeDecoder` is fed by ingest; :class:`NativeEncoder` makes what the simulators and other
people's senders send.  The format, with all keys, is in ``docs/protocol.md``.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ptycho_stream.errors import (
    DecodeError,
    LimitExceeded,
    MalformedMessage,
    TornMessage,
    WireError,
)
from ptycho_stream.messages import (
    BytesLike,
    DetectorGeometry,
    EncodedImage,
    Frame,
    Gate,
    Message,
    Positions,
    PositionsEnd,
    PositionsStart,
    ScanEnd,
    ScanStart,
    Undecodable,
)
from ptycho_stream.wire.compression import ENCODINGS, encode
from ptycho_stream.wire.limits import WireLimits, checked_name

SOURCE = "native"
VERSION = 1
DTYPES = ("|u1", "<u2", "<u4")

Pair = tuple[float, float]
# As lists: a number in 9 bytes, a pair of floats in 19, a reading in 9, a bool in 1, and some for
# the lists' own heads.
_MAX_BYTES_A_POSITION = 48
_BAD_MSGPACK = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


class _ScanStart(msgspec.Struct, tag_field="type", tag="scan_start", omit_defaults=True):
    series: str
    version: int = VERSION
    expected_frames: int | None = None
    frame_shape_yx: tuple[int, int] | None = None
    dtype: str | None = None
    detector_distance_m: float | None = None
    photon_energy_eV: float | None = None
    detector_pixel_yx_m: Pair | None = None
    beam_center_yx_px: Pair | None = None
    count_time_s: float | None = None
    frame_time_s: float | None = None
    metadata: dict[str, Any] = {}


class _Frame(msgspec.Struct, tag_field="type", tag="frame", omit_defaults=True, gc=False):
    series: str
    frame: int
    shape_yx: tuple[int, int]
    dtype: str
    encoding: str = "raw"
    shuffle_bits: int | None = None
    position_yx_m: Pair | None = None
    start_ns: int | None = None
    stop_ns: int | None = None
    i0: float | None = None
    gate: Gate = "open"


class _ScanEnd(msgspec.Struct, tag_field="type", tag="scan_end"):
    series: str


class _PositionsStart(msgspec.Struct, tag_field="type", tag="positions_start", omit_defaults=True):
    epoch: str
    version: int = VERSION
    series: str | None = None
    metadata: dict[str, Any] = {}


class _Positions(msgspec.Struct, tag_field="type", tag="positions", omit_defaults=True):
    """Lists, or bytes: little-endian int64 (``frames``), uint8 (``skip``), float64 (others)."""

    epoch: str
    frames: bytes | list[int]
    position_yx_m: bytes | list[Pair]
    series: str | None = None
    i0: bytes | list[float] | None = None
    skip: bytes | list[bool] | None = None


class _PositionsEnd(msgspec.Struct, tag_field="type", tag="positions_end"):
    epoch: str


class _Kind(msgspec.Struct):
    """What a header is, read without making anything of its other keys."""

    type: str = ""


_Any = _Frame | _Positions | _ScanStart | _ScanEnd | _PositionsStart | _PositionsEnd
_decode = msgspec.msgpack.Decoder(_Any).decode
_decode_kind = msgspec.msgpack.Decoder(_Kind).decode
_encode = msgspec.msgpack.Encoder().encode


class NativeDecoder:
    """Turns native messages into ours.  It never raises on bad input and keeps no state.

    Example::

        decoder = NativeDecoder()
        for message in decoder.receive(socket.recv_multipart()):
            ...
    """

    def __init__(self, limits: WireLimits | None = None) -> None:
        self._limits = limits or WireLimits()

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """The message in one received ZeroMQ message.

        Args:
            parts: its parts in order; the blob of a frame is kept by reference.
        """
        try:
            return [self._message(parts)]
        except WireError as error:
            return [Undecodable(error.reason, str(error))]

    def _message(self, parts: Sequence[BytesLike]) -> Message:
        if not parts or max(map(len, parts)) > self._limits.max_message_bytes:
            raise LimitExceeded(
                f"a message of {len(parts)} parts is empty or has one above "
                f"{self._limits.max_message_bytes} bytes"
            )
        try:
            self._check_header(parts[0])
            raw: _Any = _decode(parts[0])
        except _BAD_MSGPACK as error:
            raise MalformedMessage(f"not a message of the native dialect: {error}") from error
        least = 2 if isinstance(raw, _Frame) else 1
        most = 2 if isinstance(raw, _Frame | _ScanStart) else 1
        if not least <= len(parts) <= most:
            name = str(raw.__struct_config__.tag)
            raise TornMessage(f"a {name} message has {len(parts)} parts instead of {most}")
        match raw:
            case _Frame():
                return self._frame(raw, parts[1])
            case _Positions():
                return self._positions(raw)
            case _ScanStart():
                return self._scan_start(raw, parts[1] if len(parts) == 2 else None)
            case _ScanEnd():
                return ScanEnd(checked_name(raw.series))
            case _PositionsStart():
                _check_version(raw.version)
                metadata = self._limits.bounded_metadata(raw.metadata)
                series = _optional_name(raw.series)
                return PositionsStart(checked_name(raw.epoch), series, metadata)
            case _PositionsEnd():
                return PositionsEnd(checked_name(raw.epoch))

    def _check_header(self, header: BytesLike) -> None:
        limits = self._limits
        longest = limits.max_header_bytes
        if len(header) <= longest:
            return
        if _decode_kind(header).type == _Positions.__struct_config__.tag:
            longest += limits.max_positions * _MAX_BYTES_A_POSITION
        if len(header) > longest:
            raise LimitExceeded(f"a header of {len(header)} bytes, above {longest}")

    def _frame(self, raw: _Frame, blob: BytesLike) -> Frame:
        limits = self._limits
        limits.check_number(raw.frame)
        limits.check_shape(raw.shape_yx, _itemsize(raw.dtype))
        if raw.encoding not in ENCODINGS:
            raise MalformedMessage(f"encoding {raw.encoding!r} is none of {', '.join(ENCODINGS)}")
        image = EncodedImage(blob, raw.encoding, raw.dtype, raw.shape_yx, raw.shuffle_bits)
        start_ns, stop_ns = _time_ns(raw.start_ns), _time_ns(raw.stop_ns)
        series = checked_name(raw.series)
        return Frame(
            series,
            raw.frame,
            image,
            raw.position_yx_m,
            start_ns,
            stop_ns,
            _positive(raw.i0),
            raw.gate,
        )

    def _positions(self, raw: _Positions) -> Positions:
        size = len(raw.frames) // (8 if isinstance(raw.frames, bytes) else 1)
        if size > self._limits.max_positions:
            raise LimitExceeded(
                f"{size} positions in one message, above {self._limits.max_positions}"
            )
        try:
            numbers = _array(raw.frames, "<i8").astype(np.int64)
            position = _array(raw.position_yx_m, "<f8").astype(np.float64)
            i0 = None if raw.i0 is None else _array(raw.i0, "<f8").astype(np.float64)
            skip = None if raw.skip is None else _array(raw.skip, "|u1") != 0
        except (ValueError, OverflowError) as error:
            raise MalformedMessage(f"positions that are no numbers: {error}") from error
        if position.size != 2 * numbers.size:
            raise MalformedMessage(
                f"{numbers.size} frame numbers came with {position.size} coordinates, not 2 each"
            )
        for name, told in (("i0", i0), ("skip", skip)):
            if told is not None and told.size != numbers.size:
                raise MalformedMessage(
                    f"{numbers.size} frame numbers came with {told.size} of {name}, not 1 each"
                )
        if numbers.size:
            self._limits.check_number(int(numbers.min()))
            self._limits.check_number(int(numbers.max()))
        series = _optional_name(raw.series)
        position = position.reshape(-1, 2)
        return Positions(checked_name(raw.epoch), series, numbers, position, i0, skip)

    def _scan_start(self, raw: _ScanStart, mask: BytesLike | None) -> ScanStart:
        _check_version(raw.version)
        if raw.expected_frames is not None:
            self._limits.check_number(raw.expected_frames)
        if raw.frame_shape_yx is not None:
            itemsize = _itemsize(raw.dtype) if raw.dtype is not None else 1
            self._limits.check_shape(raw.frame_shape_yx, itemsize)
        geometry = DetectorGeometry(
            detector_distance_m=_positive(raw.detector_distance_m),
            photon_energy_eV=_positive(raw.photon_energy_eV),
            detector_pixel_yx_m=_positive_pair(raw.detector_pixel_yx_m),
            beam_center_yx_px=_finite_pair(raw.beam_center_yx_px),
            count_time_s=_positive(raw.count_time_s),
            frame_time_s=_positive(raw.frame_time_s),
        )
        return ScanStart(
            source=SOURCE,
            series=checked_name(raw.series),
            expected_frames=raw.expected_frames,
            frame_shape_yx=raw.frame_shape_yx,
            dtype=raw.dtype,
            geometry=geometry,
            metadata=self._limits.bounded_metadata(raw.metadata),
            pixel_mask=None if mask is None else _pixel_mask(mask, raw.frame_shape_yx),
        )


class NativeEncoder:
    """Makes native messages: each method returns the parts of one ZeroMQ message.

    Args:
        series: the detector's name of the scan, unique among those open.
        epoch: the positioner's unique name of its run, only for position messages; a new UUID if
            None.
        encoding: of the pixels, one of ``raw``, ``lz4``, ``bslz4``, ``lz4-hdf5``.

    Example::

        encoder = NativeEncoder(series="7", encoding="bslz4")
        socket.send_multipart(encoder.scan_start(expected_frames=100))
        socket.send_multipart(encoder.frame(0, pixels, position_yx_m=(1e-6, 2e-6)))
        socket.send_multipart(encoder.scan_end())
    """

    def __init__(self, series: str, epoch: str | None = None, encoding: str = "raw") -> None:
        self.series = series
        self.epoch = epoch or uuid.uuid4().hex
        self._encoding = encoding

    def scan_start(
        self,
        expected_frames: int | None = None,
        frame_shape_yx: tuple[int, int] | None = None,
        dtype: str | None = None,
        geometry: DetectorGeometry | None = None,
        metadata: Mapping[str, Any] | None = None,
        pixel_mask: NDArray[np.bool_] | None = None,
    ) -> list[bytes]:
        """The beginning of a scan; the mask (y, x), True where a pixel is bad, needs the shape."""
        told = geometry or DetectorGeometry()
        start = _ScanStart(
            series=self.series,
            expected_frames=expected_frames,
            frame_shape_yx=frame_shape_yx,
            dtype=dtype,
            detector_distance_m=told.detector_distance_m,
            photon_energy_eV=told.photon_energy_eV,
            detector_pixel_yx_m=told.detector_pixel_yx_m,
            beam_center_yx_px=told.beam_center_yx_px,
            count_time_s=told.count_time_s,
            frame_time_s=told.frame_time_s,
            metadata=dict(metadata or {}),
        )
        blobs = [] if pixel_mask is None else [pixel_mask.astype(np.uint8).tobytes()]
        return [_encode(start), *blobs]

    def frame(
        self,
        number: int,
        pixels: NDArray[np.generic],
        position_yx_m: tuple[float, float] | None = None,
        start_ns: int | None = None,
        stop_ns: int | None = None,
        i0: float | None = None,
        gate: Gate = "open",
    ) -> list[bytes]:
        """One frame (y, x) of uint8, uint16 or uint32, with its position where it is known.

        With it may go a reading of the beam monitor, and whether it is dark or to be left out.
        """
        little = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
        head = _Frame(
            series=self.series,
            frame=number,
            shape_yx=(pixels.shape[0], pixels.shape[1]),
            dtype=little.dtype.str,
            encoding=self._encoding,
            position_yx_m=position_yx_m,
            start_ns=start_ns,
            stop_ns=stop_ns,
            i0=i0,
            gate=gate,
        )
        return [_encode(head), encode(little, self._encoding)]

    def scan_end(self) -> list[bytes]:
        """The end of the scan."""
        return [_encode(_ScanEnd(self.series))]

    def positions_start(
        self, metadata: Mapping[str, Any] | None = None, name_series: bool = True
    ) -> list[bytes]:
        """The beginning of the epoch, which names the series where the positioner knows it."""
        series = self.series if name_series else None
        return [_encode(_PositionsStart(self.epoch, series=series, metadata=dict(metadata or {})))]

    def positions(
        self,
        numbers: ArrayLike,
        position_yx_m: ArrayLike,
        name_series: bool = True,
        i0: ArrayLike | None = None,
        skip: ArrayLike | None = None,
    ) -> list[bytes]:
        """A batch: frame numbers (n,), stage coordinates of the probe's centre (n, 2) in metres.

        With it may go readings of the beam monitor (n,), NaN where there is none, and which frames
        are to be left out of the image (n,).
        """
        batch = _Positions(
            epoch=self.epoch,
            frames=np.asarray(numbers, "<i8").tobytes(),
            position_yx_m=np.asarray(position_yx_m, "<f8").tobytes(),
            series=self.series if name_series else None,
            i0=None if i0 is None else np.asarray(i0, "<f8").tobytes(),
            skip=None if skip is None else np.asarray(skip, bool).astype("|u1").tobytes(),
        )
        return [_encode(batch)]

    def positions_end(self) -> list[bytes]:
        """The end of the epoch."""
        return [_encode(_PositionsEnd(self.epoch))]


def _optional_name(text: str | None) -> str | None:
    return None if text is None else checked_name(text)


def _check_version(version: int) -> None:
    if version != VERSION:
        raise MalformedMessage(
            f"version {version} of the native dialect came, this is version {VERSION}: "
            "update the older side"
        )


def _itemsize(dtype: str) -> int:
    if dtype not in DTYPES:
        raise MalformedMessage(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    return int(dtype[2])


def _time_ns(value: int | None) -> int | None:
    return value if value is not None and 0 <= value < 2**63 else None


def _array(values: bytes | Sequence[Any], dtype: str) -> NDArray[np.generic]:
    return np.frombuffer(values, dtype) if isinstance(values, bytes) else np.array(values, dtype)


def _positive(value: float | None) -> float | None:
    return value if value is not None and 0 < value < math.inf else None


def _positive_pair(pair: Pair | None) -> Pair | None:
    return pair if pair is not None and all(0 < value < math.inf for value in pair) else None


def _finite_pair(pair: Pair | None) -> Pair | None:
    return pair if pair is not None and all(map(math.isfinite, pair)) else None


def _pixel_mask(blob: BytesLike, shape_yx: tuple[int, int] | None) -> NDArray[np.bool_]:
    if shape_yx is None or len(blob) != math.prod(shape_yx):
        raise DecodeError(f"a pixel mask of {len(blob)} bytes has not the shape frame_shape_yx")
    return np.frombuffer(blob, np.uint8).reshape(shape_yx) != 0
