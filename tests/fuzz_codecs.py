"""Every codec that takes bytes from outside, with good messages of its own to begin from.

Detectors' and positioners' dialects are those that the settings know: one that is added there and
not here makes ``test_fuzz.py`` fail. A codec may answer with messages or an error of the wire, in
bounded time and memory; it may not raise anything else, nor hand out what its limits forbid.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

import msgpack
import numpy as np
from fuzz_mutator import Parts

from ptycho_stream.errors import ControlError, WireError
from ptycho_stream.messages import Frame, Positions, ScanStart
from ptycho_stream.settings import (
    BlueskySettings,
    DetectorSettings,
    PandaSettings,
    PositionSettings,
)
from ptycho_stream.wire import WireLimits, control, frame_decoders, position_decoder, results
from ptycho_stream.wire.bluesky_encoder import BlueskyEncoder
from ptycho_stream.wire.compression import decode
from ptycho_stream.wire.dectris_v1_encoder import DectrisV1Encoder
from ptycho_stream.wire.dectris_v2_encoder import DectrisV2Encoder
from ptycho_stream.wire.json_blob_encoder import (
    OdinEncoder,
    PsiEncoder,
    SlsdetEncoder,
    StinsEncoder,
)
from ptycho_stream.wire.native import NativeEncoder
from ptycho_stream.wire.panda_encoder import PandaEncoder
from ptycho_stream.wire.pva import NdArrayUpdate, PvaDecoder

LIMITS = WireLimits(
    max_shape_yx_px=(128, 128),
    max_message_bytes=1 << 20,
    max_header_bytes=1 << 17,
    max_decoded_bytes=1 << 17,
    max_positions=10_000,
)
PIXELS = np.random.default_rng(1).poisson(3.0, (24, 32)).astype("<u2")


@dataclass(frozen=True)
class Codec:
    """A codec to be fuzzed.

    Attributes:
        name: of it.
        seeds: good messages, as parts.
        make: what takes a message's parts; a new one for each run of messages.
    """

    name: str
    seeds: Sequence[Parts]
    make: Callable[[], Callable[[Parts], None]]


def _checked(message: object) -> None:
    """What a decoder hands out keeps to the limits, and its pixels decode or are refused."""
    if isinstance(message, Frame):
        LIMITS.check_shape(message.image.shape_yx, 1)
        LIMITS.check_number(message.number)
        try:
            pixels = decode(message.image)
        except WireError:
            return
        assert pixels.shape == message.image.shape_yx
        assert pixels.nbytes <= 8 * LIMITS.max_decoded_bytes
    elif isinstance(message, Positions):
        assert len(message.numbers) == len(message.position_yx_m) <= 4 * LIMITS.max_positions
    elif isinstance(message, ScanStart):
        json.dumps(dict(message.metadata))


def _of_decoder(make: Callable[[], Any]) -> Callable[[], Callable[[Parts], None]]:
    """Of a decoder that never raises."""

    def made() -> Callable[[Parts], None]:
        decoder = make()

        def take(parts: Parts) -> None:
            for message in decoder.receive(parts):
                _checked(message)
            if hasattr(decoder, "overdue"):
                for message in decoder.overdue():
                    _checked(message)

        return take

    return made


def _of_function(function: Callable[[Parts], object]) -> Callable[[], Callable[[Parts], None]]:
    """Of a function that raises errors of the wire, and nothing else."""

    def take(parts: Parts) -> None:
        with suppress(WireError):
            function(parts)

    return lambda: take


def _series(encoder: Any) -> list[Parts]:
    """Start, frames of several kinds of pixels, end."""
    frames = [
        encoder.frame(n, PIXELS.astype(dtype)) for n, dtype in enumerate(("u1", "<u2", "<u4"))
    ]
    return [parts for parts in (encoder.start(), *frames, encoder.end()) if parts]


def _dectris_v1_seeds() -> list[Parts]:
    config = {"nimages": 3, "ntrigger": 1, "trigger_mode": "ints", "bit_depth_image": 16}
    config |= {"x_pixels_in_detector": 32, "y_pixels_in_detector": 24, "photon_energy": 8800.0}
    encoder = DectrisV1Encoder(1)
    mask = np.zeros(PIXELS.shape, np.uint32)
    seeds = [encoder.start("basic", config), encoder.start("all", config, pixel_mask=mask)]
    encodings = ("<", "lz4<", "bs16-lz4<", "bs8-lz4<")
    seeds += [DectrisV1Encoder(1, encoding).frame(1, PIXELS) for encoding in encodings]
    whole = [*seeds, encoder.end()]
    return [*whole, *([part] for parts in whole for part in parts)]  # and broken up


def _dectris_v2_seeds() -> list[Parts]:
    told = {"number_of_images": 3, "channels": ["a", "b"], "image_size_x": 32, "image_size_y": 24}
    told |= {"pixel_size_x": 75e-6, "incident_energy": 8800.0, "image_dtype": "uint16"}
    masks = {"a": np.zeros(PIXELS.shape, np.uint32)}
    seeds = [DectrisV2Encoder(1).start(told), DectrisV2Encoder(1).start(told, masks)]
    for compression in ("none", "lz4", "bslz4"):
        encoder = DectrisV2Encoder(1, compression)
        seeds += [encoder.frame(1, {"a": PIXELS, "b": PIXELS}, 5, 9)]
        seeds += [encoder.frame(2, {"a": PIXELS.astype("<u4")})]
    return [*seeds, DectrisV2Encoder(1).end()]


def _native_seeds() -> list[Parts]:
    encoder = NativeEncoder("1", "e1")
    seeds = [encoder.scan_start(3, PIXELS.shape, "<u2", metadata={"sample": "star", "n": [1, 2]})]
    seeds += [encoder.scan_start(3, PIXELS.shape, "<u2", pixel_mask=PIXELS > 8)]
    for encoding in ("raw", "lz4", "bslz4", "lz4-hdf5"):
        seeds.append(NativeEncoder("1", encoding=encoding).frame(1, PIXELS, (1e-6, 2e-6), 5, 6))
    where = np.zeros((20, 2))
    seeds += [encoder.scan_end(), encoder.positions_start(), encoder.positions(range(20), where)]
    told = {"type": "positions", "epoch": "e1", "frames": [1], "position_yx_m": [[0.0, 1e-6]]}
    return [*seeds, [msgpack.packb(told)], encoder.positions_end()]


def _slsdet_seeds() -> list[Parts]:
    modules = [SlsdetEncoder(modules_yx=(1, 2), place=(0, n)) for n in range(2)]
    return [parts for module in modules for parts in _series(module)]


FRAME_SEEDS: dict[str, Callable[[], list[Parts]]] = {
    "dectris-v1": _dectris_v1_seeds,
    "dectris-v2": _dectris_v2_seeds,
    "native": _native_seeds,
    "stins": lambda: _series(StinsEncoder("/data/star.h5")) + _series(StinsEncoder("", "raw")),
    "psi": lambda: _series(PsiEncoder()) + _series(PsiEncoder("big")),
    "odin": lambda: _series(OdinEncoder("a")) + _series(OdinEncoder("", "raw")),
    "slsdet": _slsdet_seeds,
}


def _panda_seeds() -> list[Parts]:
    encoder = PandaEncoder("2026-11-27T00:00:00Z")
    data = [encoder.data(n, {"/Y": np.arange(40.0), "/X": np.arange(40.0)}) for n in (0, 40, 200)]
    return [encoder.start(), *data, encoder.stop()]


def _bluesky_seeds() -> list[Parts]:
    seeds: list[Parts] = []
    for serializer in ("msgpack", "json"):
        encoder = BlueskyEncoder({"y": "mm", "x": "um"}, serializer=serializer)
        seeds += [encoder.start(scan_id=1), encoder.descriptor()]
        seeds += [encoder.event(1, {"y": 1.0, "x": 2.0})]
        seeds += [encoder.event_page([2, 3], {"y": [1.0, 2.0], "x": [3.0, 4.0]}), encoder.stop()]
    return seeds


POSITION_SOURCES: dict[str, tuple[dict[str, Any], Callable[[], list[Parts]]]] = {
    "native": ({}, _native_seeds),
    "panda": (
        {"panda": PandaSettings(y="/Y", x="/X", scale_yx_m=(1e-6, 1e-6), samples_per_frame=10)},
        _panda_seeds,
    ),
    "bluesky": ({"bluesky": BlueskySettings(y="y", x="x")}, _bluesky_seeds),
}


def _frame_codec(dialect: str) -> Codec:
    settings = DetectorSettings(dialect=dialect)  # pyright: ignore[reportArgumentType]
    make = _of_decoder(lambda: frame_decoders(settings, LIMITS)[0])
    return Codec(dialect, FRAME_SEEDS[dialect](), make)


def _position_codec(source: str) -> Codec:
    more, seeds = POSITION_SOURCES[source]
    settings = PositionSettings(source=source, endpoint="tcp://127.0.0.1:1", **more)
    return Codec(
        f"positions-{source}", seeds(), _of_decoder(lambda: position_decoder(settings, LIMITS))
    )


PVA_TYPES = {name: name for name in ("i1", "u1", "<i2", "<u2", "<i4", "<u4", "<u8", "<f4", "<f8")}


class _PvaFields:
    """An update's fields as JSON, so that the mutator has something to alter."""

    def __init__(self) -> None:
        self._decoder = PvaDecoder(limits=LIMITS)

    def receive(self, parts: Parts) -> list[Any]:
        try:
            update = self._update(json.loads(parts[0]), parts[1])
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
            return []  # the library, whose fields have types, cannot make such an update
        return self._decoder.receive(update)

    def _update(self, raw: dict[str, Any], value: bytes) -> NdArrayUpdate:
        codec_type = raw["codec_type"]
        return NdArrayUpdate(
            unique_id=int(np.int32(raw["unique_id"])),
            dimensions=tuple(int(np.int32(size)) for size in raw["dimensions"]),
            codec=str(raw["codec"]),
            codec_type=None if codec_type is None else int(np.int32(codec_type)),
            value=np.frombuffer(value[: len(value) // 8 * 8], PVA_TYPES[raw["dtype"]]),
            uncompressed_bytes=int(np.int64(raw["uncompressed_bytes"])),
            time_ns=int(np.int64(raw["time_ns"])),
            attributes=dict(raw["attributes"]),
        )

    def overdue(self) -> list[Any]:
        return self._decoder.overdue()


def _pva_seeds() -> list[Parts]:
    fields = {"unique_id": 1, "dimensions": [32, 24], "codec": "", "codec_type": None}
    fields |= {"uncompressed_bytes": PIXELS.nbytes, "time_ns": 5, "attributes": {"I0": 1.0}}
    raw = [json.dumps(fields | {"dtype": "<u2"}).encode(), PIXELS.tobytes()]
    packed = fields | {"codec": "lz4", "codec_type": 6, "dtype": "u1", "unique_id": 2}
    blob = NativeEncoder("1", encoding="lz4").frame(0, PIXELS)[1]
    return [raw, [json.dumps(packed).encode(), bytes(blob)]]


def _control_seeds() -> list[Parts]:
    commands = (("status", {}), ("scans", {"limit": 5}), ("start", {"metadata": {"a": "b"}}))
    requests = [control.encode_request(n, name, told) for n, (name, told) in enumerate(commands)]
    replies = [control.encode_result(1, {"a": [1, 2.0]}), control.encode_error(2, "failed", "x")]
    return [[data] for data in (*requests, *replies)]


def _control(parts: Parts) -> None:
    data = parts[0] if parts else b""
    control.salvage_id(data)
    for decode_one in (control.decode_request, control.decode_reply):
        with suppress(WireError, ControlError):
            decode_one(data)


def _results_seeds() -> list[Parts]:
    from dataclasses import replace

    from results_source import grown

    image = grown(3)
    update = results.ImageUpdate("e", 1, image, 0, 3, 1, fresh=True, more=False, sent_ns=5)
    mark = results.ImageMark(image.scan_id, 1, 1)
    beacon = results.Beacon(epoch="e", images=[mark], sent_ns=5)
    request = results.ResyncRequest(
        id=1, epoch="e", scan_id=image.scan_id, generation=1, tiles=[(0, 0, 1), (-1, 2, 3)]
    )
    refusal = results.Refusal(reply_to=1, epoch="e", reason="busy", message="too soon")
    notice = results.ScanNotice(
        epoch="e", scan_id=image.scan_id, state="running", final=False, sent_ns=5, counts={"n": 3}
    )
    others = [results.encode(message) for message in (beacon, request, refusal, notice)]
    messages = [results.encode_image(update), results.encode_image(replace(update, seq=2)), *others]
    return [[bytes(part) for part in parts] for parts in messages]


def _results(parts: Parts) -> None:
    for decode_one in (results.decode_resync, results.decode_server_message):
        with suppress(WireError):
            decode_one(parts)


def dialects() -> list[str]:
    """Of detectors that the settings know, over ZeroMQ."""
    known = get_args(DetectorSettings.model_fields["dialect"].annotation)
    return [name for name in known if name != "pva"]


def position_streams() -> list[str]:
    """Of positioners that the settings know."""
    known = get_args(PositionSettings.model_fields["source"].annotation)
    return [name for name in known if name not in ("inline", "file", "generated")]


def all_codecs() -> dict[str, Codec]:
    """By name."""
    codecs = [
        *(_frame_codec(name) for name in dialects()),
        *(_position_codec(name) for name in position_streams()),
        Codec("pva", _pva_seeds(), _of_decoder(_PvaFields)),
        Codec("control", _control_seeds(), _of_function(_control)),
        Codec("results", _results_seeds(), _of_function(_results)),
    ]
    return {codec.name: codec for codec in codecs}
