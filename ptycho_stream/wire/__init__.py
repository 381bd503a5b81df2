"""Sans-IO codecs, one file a dialect: received parts in, messages out, and back.

Nothing here opens a socket.  Ingest picks a decoder by the name in the settings with
:func:`frame_decoders`; pixels stay encoded until :func:`ptycho_stream.wire.compression.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ptycho_stream.messages import BytesLike, Message
from ptycho_stream.settings import DetectorSettings, PositionSettings
from ptycho_stream.wire.dectris_v1 import DectrisV1Decoder
from ptycho_stream.wire.dectris_v1_encoder import DectrisV1Encoder
from ptycho_stream.wire.limits import WireLimits
from ptycho_stream.wire.native import NativeDecoder, NativeEncoder

__all__ = [
    "DectrisV1Decoder",
    "DectrisV1Encoder",
    "FrameDecoder",
    "NativeDecoder",
    "NativeEncoder",
    "WireLimits",
    "frame_decoders",
    "position_decoder",
]


class FrameDecoder(Protocol):
    """What every dialect's decoder does."""

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """Messages completed by the parts of one received ZeroMQ message; never raises."""
        ...


def frame_decoders(detector: DetectorSettings, limits: WireLimits) -> list[FrameDecoder]:
    """A new decoder for each of the detector's endpoints, in their order."""
    return [_frame_decoder(detector, limits) for _ in detector.endpoints]


def position_decoder(positions: PositionSettings, limits: WireLimits) -> FrameDecoder | None:
    """A new decoder of the position stream; None where there is none."""
    match positions.source:
        case "native":
            return NativeDecoder(limits)
        case "inline" | "file":
            return None


def _frame_decoder(detector: DetectorSettings, limits: WireLimits) -> FrameDecoder:
    match detector.dialect:
        case "dectris-v1":
            return DectrisV1Decoder(limits)
        case "native":
            return NativeDecoder(limits)
