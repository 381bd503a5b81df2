"""Sans-IO codecs, one file a dialect: received parts in, messages out, and back.

Nothing here opens a socket.  Ingest picks a decoder by the name in the settings with
:func:`frame_decoders`; pixels stay encoded until :func:`ptycho_stream.wire.compression.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ptycho_stream.errors import SettingsError
from ptycho_stream.messages import BytesLike, Message
from ptycho_stream.settings import DetectorSettings, PositionSettings
from ptycho_stream.wire.bluesky import BlueskyDecoder
from ptycho_stream.wire.dectris_v1 import DectrisV1Decoder
from ptycho_stream.wire.dectris_v1_encoder import DectrisV1Encoder
from ptycho_stream.wire.dectris_v2 import DectrisV2Decoder
from ptycho_stream.wire.dectris_v2_encoder import DectrisV2Encoder
from ptycho_stream.wire.json_blob import StinsDecoder, odin_decoder, psi_decoder
from ptycho_stream.wire.limits import WireLimits
from ptycho_stream.wire.native import NativeDecoder, NativeEncoder
from ptycho_stream.wire.panda import PandaDecoder
from ptycho_stream.wire.slsdet import SlsdetDecoder

__all__ = [
    "DectrisV1Decoder",
    "DectrisV1Encoder",
    "DectrisV2Decoder",
    "DectrisV2Encoder",
    "FrameDecoder",
    "NativeDecoder",
    "NativeEncoder",
    "PatientDecoder",
    "WireLimits",
    "frame_decoders",
    "position_decoder",
]


class FrameDecoder(Protocol):
    """What every dialect's decoder does."""

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """Messages completed by the parts of one received ZeroMQ message; never raises."""
        ...


@runtime_checkable
class PatientDecoder(FrameDecoder, Protocol):
    """A decoder that waits for something, and not for ever."""

    def overdue(self) -> list[Message]:
        """What has waited long enough; called whenever nothing has come."""
        ...


def frame_decoders(detector: DetectorSettings, limits: WireLimits) -> list[FrameDecoder]:
    """A decoder for each of the detector's endpoints, in their order.

    Where the endpoints carry pieces of the same series or frames it is one for all.

    Raises:
        SettingsError: the dialect is none of ZeroMQ.
    """
    if detector.dialect == "slsdet":
        modules = SlsdetDecoder(detector.slsdet, limits, round(detector.silence_s * 1e9))
        return [modules.endpoint() for _ in detector.endpoints]
    shared = _shared_decoder(detector, limits)
    if shared is not None:
        return [shared for _ in detector.endpoints]
    return [_frame_decoder(detector, limits) for _ in detector.endpoints]


def position_decoder(positions: PositionSettings, limits: WireLimits) -> FrameDecoder | None:
    """A new decoder of the position stream; None where there is none."""
    match positions.source:
        case "native":
            return NativeDecoder(limits)
        case "panda":
            assert positions.panda is not None
            return PandaDecoder(positions.panda, limits)
        case "bluesky":
            assert positions.bluesky is not None
            return BlueskyDecoder(positions.bluesky, limits)
        case "inline" | "file" | "generated":
            return None


def _shared_decoder(detector: DetectorSettings, limits: WireLimits) -> FrameDecoder | None:
    silence_ns = round(detector.silence_s * 1e9)
    match detector.dialect:
        case "dectris-v2":
            return DectrisV2Decoder(detector.dectris_v2.channel, limits)
        case "stins":
            return StinsDecoder(limits)
        case "psi":
            return psi_decoder(detector.psi, limits, silence_ns)
        case "odin":
            return odin_decoder(detector.odin, limits, silence_ns)
        case _:
            return None


def _frame_decoder(detector: DetectorSettings, limits: WireLimits) -> FrameDecoder:
    match detector.dialect:
        case "dectris-v1":
            return DectrisV1Decoder(limits)
        case "native":
            return NativeDecoder(limits)
        case other:
            raise SettingsError(
                f"dialect {other!r} cannot be had over ZeroMQ: only [detector] can use it"
            )
