"""Sans-IO codecs, one file a dialect: received parts in, messages out, and back.

Nothing here opens a socket.  Ingest picks a decoder by the name in the settings with
:func:`decoder_for`; pixels stay encoded until :func:`ptycho_stream.wire.compression.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ptycho_stream.errors import SettingsError
from ptycho_stream.messages import BytesLike, Message
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
    "decoder_for",
]


class FrameDecoder(Protocol):
    """What every dialect's decoder does."""

    def receive(self, parts: Sequence[BytesLike]) -> list[Message]:
        """Messages completed by the parts of one received ZeroMQ message; never raises."""
        ...


def decoder_for(dialect: str, limits: WireLimits) -> FrameDecoder:
    """A new decoder of ``dialect``, ``dectris-v1`` or ``native``.

    Raises:
        SettingsError: no such dialect.
    """
    match dialect:
        case "dectris-v1":
            return DectrisV1Decoder(limits)
        case "native":
            return NativeDecoder(limits)
        case _:
            raise SettingsError(f"dialect {dialect!r} is neither 'dectris-v1' nor 'native'")
