"""The native dialect: what goes in comes out, and what is damaged is reported."""

from __future__ import annotations

import math

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.messages import (
    DetectorGeometry,
    Frame,
    Positions,
    PositionsEnd,
    PositionsStart,
    ScanEnd,
    ScanStart,
    Undecodable,
)
from ptycho_stream.settings import DetectorSettings, PositionSettings
from ptycho_stream.wire import (
    DectrisV1Decoder,
    NativeDecoder,
    NativeEncoder,
    WireLimits,
    frame_decoders,
    position_decoder,
)
from ptycho_stream.wire.compression import decode

PIXELS = np.arange(24, dtype="<u2").reshape(4, 6)
GEOMETRY = DetectorGeometry(
    detector_distance_m=2.0,
    photon_energy_eV=8800.0,
    detector_pixel_yx_m=(50e-6, 75e-6),
    beam_center_yx_px=(2.0, 3.0),
    count_time_s=0.01,
    frame_time_s=0.02,
)
ENCODER = NativeEncoder(series="run 7", epoch="epoch 7", encoding="bslz4")


def received(parts: list[bytes]):
    (message,) = NativeDecoder().receive(parts)
    return message


def test_a_scan_start_round_trips() -> None:
    mask = PIXELS > 20
    metadata = {"sample": "star", "angles": [1.0, {"deep": None}], "n": 3}
    start = received(ENCODER.scan_start(6, (4, 6), "<u2", GEOMETRY, metadata, pixel_mask=mask))
    assert isinstance(start, ScanStart)
    assert (start.source, start.series, start.expected_frames) == ("native", "run 7", 6)
    assert (start.frame_shape_yx, start.dtype) == ((4, 6), "<u2")
    assert start.geometry == GEOMETRY
    assert start.metadata == metadata
    np.testing.assert_array_equal(start.pixel_mask, mask)


@settings(max_examples=100, deadline=None)
@given(
    number=st.integers(0, 2**31),
    position=st.none() | st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    times=st.tuples(st.none() | st.integers(0, 2**62), st.none() | st.integers(0, 2**62)),
    encoding=st.sampled_from(["raw", "lz4", "bslz4", "lz4-hdf5"]),
    dtype=st.sampled_from(["u1", "<u2", ">u4"]),
)
def test_a_frame_round_trips(number, position, times, encoding, dtype) -> None:
    pixels = PIXELS.astype(dtype)
    frame = received(NativeEncoder("s", encoding=encoding).frame(number, pixels, position, *times))
    assert isinstance(frame, Frame)
    assert (frame.series, frame.number, frame.position_yx_m) == ("s", number, position)
    assert (frame.start_ns, frame.stop_ns) == times
    np.testing.assert_array_equal(decode(frame.image), pixels)


def test_positions_round_trip_bit_exact() -> None:
    numbers = np.array([5, 3, 4])
    where = np.array([[1e-6, math.pi], [math.nan, -1.0], [0.1 + 0.2, 1e-300]])
    batch = received(ENCODER.positions(numbers, where))
    assert isinstance(batch, Positions)
    assert (batch.epoch, batch.series) == ("epoch 7", "run 7")
    np.testing.assert_array_equal(batch.numbers, numbers)
    np.testing.assert_array_equal(batch.position_yx_m, where)
    assert received(ENCODER.positions([], np.empty((0, 2)))).position_yx_m.shape == (0, 2)


def test_positions_may_be_plain_lists() -> None:
    """So that a sender in any language needs nothing but a msgpack library."""
    raw = {"type": "positions", "epoch": "e", "frames": [0, 1], "position_yx_m": [[1, 2], [3, 4.5]]}
    batch = received([msgpack.packb(raw)])
    assert isinstance(batch, Positions) and batch.series is None
    np.testing.assert_array_equal(batch.position_yx_m, [[1, 2], [3, 4.5]])


def test_epochs_and_ends_round_trip() -> None:
    assert received(ENCODER.positions_start({"a": 1})) == PositionsStart(
        "epoch 7", "run 7", {"a": 1}
    )
    assert received(ENCODER.positions_start(name_series=False)).series is None
    assert received(ENCODER.positions_end()) == PositionsEnd("epoch 7")
    assert received(ENCODER.scan_end()) == ScanEnd("run 7")


def pack(**keys) -> list[bytes]:
    return [msgpack.packb(keys)]


FRAME = {"type": "frame", "series": "1", "frame": 0, "shape_yx": [4, 6], "dtype": "<u2"}


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "limit"),
        ([b""], "malformed"),
        ([b"\xc1"], "malformed"),
        ([b"\x91" * 100_000], "malformed"),
        ([b"\xdd\xff\xff\xff\xff"], "malformed"),
        (pack(type="no such type"), "malformed"),
        (pack(series="1"), "malformed"),
        (pack(type="scan_end", series=""), "malformed"),
        (pack(type="scan_end", series="x" * 10_000), "malformed"),
        (pack(type="scan_start", series="1", version=2), "malformed"),
        (pack(type="scan_start", series="1", expected_frames=-1), "limit"),
        (pack(type="scan_start", series="1", frame_shape_yx=[10**6, 10**6]), "limit"),
        ([*pack(type="scan_start", series="1"), b"123"], "undecodable"),
        ([*pack(type="scan_start", series="1", frame_shape_yx=[2, 2]), b"123"], "undecodable"),
        ([*pack(type="scan_start", series="1"), b"123", b"456"], "torn"),
        (pack(type="scan_end", series="1\nSTATUS=fine"), "malformed"),
        (pack(type="positions_end", epoch="e\r"), "malformed"),
        (pack(**FRAME), "torn"),
        ([*pack(type="scan_end", series="1"), b"blob"], "torn"),
        ([*pack(**{**FRAME, "shape_yx": [10**9, 10**9]}), b""], "limit"),
        ([*pack(**{**FRAME, "frame": -1}), b""], "limit"),
        ([*pack(**{**FRAME, "dtype": "O"}), b""], "malformed"),
        ([*pack(**{**FRAME, "encoding": "zip"}), b""], "malformed"),
        (pack(type="positions", epoch="e", frames=[0], position_yx_m=[]), "malformed"),
        (pack(type="positions", epoch="e", frames=b"123", position_yx_m=b""), "malformed"),
        (pack(type="positions", epoch="e", frames=[2**63], position_yx_m=[[0, 0]]), "malformed"),
        (pack(type="positions", epoch="e", frames=[-1], position_yx_m=[[0, 0]]), "limit"),
    ],
)
def test_rubbish_is_reported(parts: list[bytes], reason: str) -> None:
    problem = received(parts)
    assert isinstance(problem, Undecodable)
    assert problem.reason == reason, problem


def test_deeply_nested_metadata_are_refused() -> None:
    nested: list = []
    for _ in range(50):
        nested = [nested]
    problem = received(pack(type="scan_start", series="1", metadata={"x": nested}))
    assert problem.reason == "limit"


def test_too_many_positions_are_refused() -> None:
    decoder = NativeDecoder(WireLimits(max_positions=2))
    (problem,) = decoder.receive(ENCODER.positions([1, 2, 3], np.zeros((3, 2))))
    assert problem.reason == "limit"


def test_metadata_hold_nothing_that_is_not_json() -> None:
    start = received(ENCODER.scan_start(metadata={"a": math.nan, "b": [math.inf, 1.5]}))
    assert start.metadata == {"a": "nan", "b": ["inf", 1.5]}


@pytest.mark.parametrize(
    ("keys", "blobs"),
    [
        ({**FRAME, "more": "x" * 1000}, [PIXELS.tobytes()]),
        ({"type": "scan_start", "series": "1", "metadata": {"a": [None] * 1000}}, []),
        ({"type": "scan_end", "series": "1", "more": "x" * 1000}, []),
        ({"type": "positions_start", "epoch": "e", "metadata": {"a": "x" * 1000}}, []),
        ({"more": "x" * 1000}, []),
    ],
)
def test_long_headers_are_refused_before_they_are_read(keys: dict, blobs: list[bytes]) -> None:
    decoder = NativeDecoder(WireLimits(max_header_bytes=500))
    (problem,) = decoder.receive([*pack(**keys), *blobs])
    assert isinstance(problem, Undecodable) and problem.reason == "limit"


def test_positions_may_be_longer_than_headers_by_what_their_number_asks_for() -> None:
    decoder = NativeDecoder(WireLimits(max_header_bytes=500, max_positions=100))
    (batch,) = decoder.receive(ENCODER.positions(range(100), np.ones((100, 2))))
    assert isinstance(batch, Positions) and len(batch.numbers) == 100
    lists = {"frames": [2**40] * 100, "position_yx_m": [[0.1, 0.2]] * 100}
    (batch,) = decoder.receive(pack(type="positions", epoch="e", **lists))
    assert isinstance(batch, Positions)
    padded = pack(type="positions", epoch="e", frames=[], position_yx_m=[], more="x" * 6000)
    (problem,) = decoder.receive(padded)
    assert problem.reason == "limit"


def test_epochs_that_nobody_named_are_unique() -> None:
    first, second = (received(NativeEncoder("7").positions_start()).epoch for _ in range(2))
    assert first != second


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
)
KEYS_READ = {
    "scan_start": "series version expected_frames frame_shape_yx dtype detector_distance_m "
    "photon_energy_eV detector_pixel_yx_m beam_center_yx_px count_time_s frame_time_s metadata",
    "frame": "series frame shape_yx dtype encoding shuffle_bits position_yx_m start_ns stop_ns",
    "scan_end": "series",
    "positions_start": "epoch version series metadata",
    "positions": "epoch frames position_yx_m series",
    "positions_end": "epoch",
}
SOUND = {
    "scan_start": {"series": "1"},
    "frame": FRAME,
    "scan_end": {"series": "1"},
    "positions_start": {"epoch": "e"},
    "positions": {"epoch": "e", "frames": [0], "position_yx_m": [[0.0, 1.0]]},
    "positions_end": {"epoch": "e"},
}


@settings(max_examples=500, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(SOUND)))
def test_whatever_a_key_holds_nothing_is_raised(data, kind: str) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(KEYS_READ[kind].split()), ODD, min_size=1))
    parts = pack(**{**SOUND[kind], "type": kind, **changes})
    if kind == "frame":
        parts.append(PIXELS.tobytes())
    assert len(NativeDecoder().receive(parts)) == 1


def test_mutated_messages_never_raise() -> None:
    rng = np.random.default_rng(5)
    decoder = NativeDecoder()
    good = [
        ENCODER.scan_start(6, (4, 6), "<u2", GEOMETRY, {"a": [1, "b"]}, PIXELS > 20),
        ENCODER.frame(3, PIXELS, (1.0, 2.0), 1, 2),
        ENCODER.positions_start({"a": {"b": 1}}),
        ENCODER.positions([1, 2], [[1.0, 2.0], [3.0, 4.0]]),
        pack(type="positions", epoch="e", frames=[0, 1], position_yx_m=[[1, 2], [3, 4.5]]),
        ENCODER.positions_end(),
        ENCODER.scan_end(),
    ]
    problems = 0
    for _ in range(20_000):
        parts = [bytearray(part) for part in good[rng.integers(len(good))]]
        victim = parts[0]
        match rng.integers(3):
            case 0:
                victim[rng.integers(len(victim))] = rng.integers(256)
            case 1:
                del victim[rng.integers(len(victim)) :]
            case _:
                at = rng.integers(len(victim) + 1)
                victim[at:at] = rng.bytes(rng.integers(1, 9))
        (message,) = decoder.receive([bytes(part) for part in parts])
        problems += isinstance(message, Undecodable)
    assert problems > 1000


def test_each_endpoint_has_a_decoder_of_its_dialect() -> None:
    several = ("tcp://127.0.0.1:9001", "tcp://127.0.0.1:9002")
    native = frame_decoders(
        DetectorSettings(dialect="native", more_endpoints=several), WireLimits()
    )
    assert [type(decoder) for decoder in native] == [NativeDecoder] * 3
    assert len(set(map(id, native))) == 3
    (dectris,) = frame_decoders(DetectorSettings(dialect="dectris-v1"), WireLimits())
    assert isinstance(dectris, DectrisV1Decoder)


def test_only_a_stream_of_positions_has_a_decoder() -> None:
    stream = PositionSettings(source="native", endpoint="tcp://127.0.0.1:9001")
    assert isinstance(position_decoder(stream, WireLimits()), NativeDecoder)
    assert position_decoder(PositionSettings(source="inline"), WireLimits()) is None


@pytest.mark.parametrize("gate", ["open", "dark", "skip"])
def test_frames_carry_their_monitor_reading_and_gate(gate) -> None:
    frame = received(ENCODER.frame(3, PIXELS, i0=2.5e8, gate=gate))
    assert (frame.i0, frame.gate) == (2.5e8, gate)
    plain = received(ENCODER.frame(3, PIXELS))
    assert (plain.i0, plain.gate) == (None, "open")


@pytest.mark.parametrize("i0", [0.0, -3.0, float("nan"), float("inf")])
def test_a_reading_of_nothing_is_none(i0) -> None:
    assert received(ENCODER.frame(3, PIXELS, i0=i0)).i0 is None


def test_positions_carry_readings_and_what_is_to_be_left_out() -> None:
    numbers, at = [4, 5, 6], np.zeros((3, 2))
    batch = received(ENCODER.positions(numbers, at, i0=[1.0, np.nan, 3.0], skip=[0, 1, 0]))
    assert np.array_equal(batch.i0, [1.0, np.nan, 3.0], equal_nan=True)
    assert batch.skip.tolist() == [False, True, False]
    lists = {"frames": numbers, "position_yx_m": at.tolist(), "skip": [True, False, True]}
    batch = received(pack(type="positions", epoch="e", i0=[1, 2.5, 3], **lists))
    assert batch.i0.tolist() == [1.0, 2.5, 3.0] and batch.skip.tolist() == [True, False, True]
    plain = received(ENCODER.positions(numbers, at))
    assert plain.i0 is None and plain.skip is None


@pytest.mark.parametrize(
    "told",
    [
        {"i0": [1.0, 2.0]},
        {"skip": [True] * 4},
        {"i0": b"seven b"},
        {"i0": bytes(16)},
        {"skip": b""},
        {"i0": ["x"] * 3},
        {"skip": [2] * 3},
    ],
)
def test_readings_and_gates_that_do_not_fit_the_positions_are_refused(told) -> None:
    whole = {"frames": [1, 2, 3], "position_yx_m": [[0.0, 0.0]] * 3, **told}
    (problem,) = NativeDecoder().receive(pack(type="positions", epoch="e", **whole))
    assert isinstance(problem, Undecodable) and problem.reason == "malformed"


def test_a_gate_of_another_name_is_refused() -> None:
    head = {"type": "frame", "series": "1", "frame": 0, "shape_yx": [1, 1], "dtype": "|u1"}
    (problem,) = NativeDecoder().receive([*pack(**head, gate="shut"), b"\x00"])
    assert isinstance(problem, Undecodable) and problem.reason == "malformed"
