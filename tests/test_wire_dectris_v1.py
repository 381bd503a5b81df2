"""The DECTRIS version 1 dialect: whole messages, broken-up ones, aborted ones and rubbish."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.messages import Frame, Message, ScanEnd, ScanStart, Undecodable
from ptycho_stream.wire import DectrisV1Decoder, DectrisV1Encoder, DectrisV2Encoder, WireLimits
from ptycho_stream.wire.compression import decode

CONFIG = {
    "nimages": 2,
    "ntrigger": 3,
    "trigger_mode": "ints",
    "x_pixels_in_detector": 6,
    "y_pixels_in_detector": 4,
    "bit_depth_image": 16,
    "x_pixel_size": 75e-6,
    "y_pixel_size": 50e-6,
    "beam_center_x": 3.5,
    "beam_center_y": 2.5,
    "detector_distance": 2.0,
    "wavelength": 1.0,
    "count_time": 0.01,
    "frame_time": 0.011,
}
PIXELS = np.arange(24, dtype="<u2").reshape(4, 6)


def series(number: int = 1, frames: int = 2, detail: str = "basic", appendix: bytes | None = None):
    encoder = DectrisV1Encoder(number)
    yield encoder.start(detail, CONFIG, appendix=appendix)
    for k in range(frames):
        yield encoder.frame(k, PIXELS + k, start_ns=10 * k, stop_ns=10 * k + 9, appendix=appendix)
    yield encoder.end()


def receive_all(decoder: DectrisV1Decoder, messages) -> list[Message]:
    return [message for parts in messages for message in decoder.receive(parts)]


def one_part_each(messages):
    return ([part] for parts in messages for part in parts)


def kinds(messages: list[Message]) -> list[str]:
    return [type(message).__name__ for message in messages]


@pytest.mark.parametrize("broken_up", [False, True])
@pytest.mark.parametrize("appendix", [None, b'{"sample": "star"}', b"free text"])
@pytest.mark.parametrize("detail", ["none", "basic", "all"])
def test_a_series_is_understood_whole_and_broken_up(detail, appendix, broken_up) -> None:
    messages = series(detail=detail, appendix=appendix)
    got = receive_all(DectrisV1Decoder(), one_part_each(messages) if broken_up else messages)
    assert kinds(got) == ["ScanStart", "Frame", "Frame", "ScanEnd"]
    for k, frame in enumerate(got[1:3]):
        assert isinstance(frame, Frame)
        assert (frame.series, frame.number) == ("1", k)
        assert (frame.start_ns, frame.stop_ns) == (10 * k, 10 * k + 9)
        np.testing.assert_array_equal(decode(frame.image), PIXELS + k)


def test_the_header_tells_the_experiment() -> None:
    (start,) = DectrisV1Decoder().receive(next(iter(series())))
    assert isinstance(start, ScanStart)
    assert start.expected_frames == 6
    assert start.frame_shape_yx == (4, 6)
    assert start.dtype == "<u2"
    geometry = start.geometry
    assert geometry.detector_pixel_yx_m == (50e-6, 75e-6)
    assert geometry.beam_center_yx_px == (2.5, 3.5)
    assert geometry.detector_distance_m == 2.0
    assert geometry.photon_energy_eV == pytest.approx(12398.42)
    assert (geometry.count_time_s, geometry.frame_time_s) == (0.01, 0.011)
    assert start.metadata["trigger_mode"] == "ints"


@pytest.mark.parametrize(
    ("mode", "expected"), [("ints", 6), ("exts", 6), ("inte", 3), ("exte", 3), (None, 6)]
)
def test_a_gated_series_has_one_frame_a_trigger(mode: str | None, expected: int) -> None:
    parts = DectrisV1Encoder(1).start("basic", {**CONFIG, "trigger_mode": mode})
    (start,) = DectrisV1Decoder().receive(parts)
    assert isinstance(start, ScanStart)
    assert start.expected_frames == expected


def test_the_mask_comes_with_all() -> None:
    mask = np.zeros((4, 6), "<u4")
    mask[1, 5] = 2
    parts = DectrisV1Encoder(1).start("all", CONFIG, pixel_mask=mask)
    assert len(parts) == 8
    (start,) = DectrisV1Decoder().receive(parts)
    assert isinstance(start, ScanStart)
    np.testing.assert_array_equal(start.pixel_mask, mask != 0)


def test_names_that_other_senders_use_are_understood() -> None:
    parts = DectrisV1Encoder(4).start("all", CONFIG)
    parts = [
        part.replace(b"dflatfield", b"flatfield").replace(b"dpixelmask", b"pixelmask")
        for part in parts
    ]
    end = [b'{"htype": "deseries_end-1.0", "series": 4}']
    got = receive_all(DectrisV1Decoder(), [parts, end])
    assert kinds(got) == ["ScanStart", "ScanEnd"]
    assert got[0].pixel_mask is not None


def test_a_shape_may_have_a_third_axis_of_one() -> None:
    parts = DectrisV1Encoder(1).frame(0, PIXELS)
    parts[1] = json.dumps({**json.loads(parts[1]), "shape": [6, 4, 1]}).encode()
    (frame,) = DectrisV1Decoder().receive(parts)
    assert isinstance(frame, Frame) and frame.image.shape_yx == (4, 6)


@pytest.mark.parametrize(
    "encoding", ["<", "lz4<", "-lz4<", "bs8-lz4<", "bs16-lz4<", "bs32lz4<", ">"]
)
def test_every_encoding_is_understood(encoding: str) -> None:
    (frame,) = DectrisV1Decoder().receive(DectrisV1Encoder(1, encoding).frame(0, PIXELS))
    assert isinstance(frame, Frame)
    np.testing.assert_array_equal(decode(frame.image), PIXELS)


@pytest.mark.parametrize("broken_up", [False, True])
@pytest.mark.parametrize("lost_after", range(1, 8))
def test_an_aborted_series_costs_itself_only(lost_after: int, broken_up: bool) -> None:
    """The first series stops after so many parts; the next is received complete."""
    head = list(itertools.islice(one_part_each(series(1)), lost_after))
    following = series(2)
    got = receive_all(
        DectrisV1Decoder(), [*head, *(one_part_each(following) if broken_up else following)]
    )
    second = got[kinds(got).index("ScanStart", 1 if lost_after > 1 else 0) :]
    of_second = [m for m in got if getattr(m, "series", None) == "2"]
    assert kinds(of_second) == ["ScanStart", "Frame", "Frame", "ScanEnd"]
    assert second[-4:] == of_second


def test_a_frame_whose_blob_was_lost_is_torn_and_the_next_is_whole() -> None:
    messages = list(one_part_each(series(1, frames=2)))
    del messages[4]  # header, configuration, image, image_d, *blob*
    got = receive_all(DectrisV1Decoder(), messages)
    assert kinds(got) == ["ScanStart", "Undecodable", "Undecodable", "Frame", "ScanEnd"]
    assert got[1].reason == "torn"
    assert got[3].number == 1


def test_a_frame_whose_times_were_lost_is_kept() -> None:
    messages = list(one_part_each(series(1, frames=2)))
    del messages[5]
    got = receive_all(DectrisV1Decoder(), messages)
    assert kinds(got) == ["ScanStart", "Frame", "Frame", "ScanEnd"]
    assert got[1].start_ns is None


def test_a_header_without_its_tables_still_starts_the_series() -> None:
    messages = list(series(1, detail="all"))
    messages[0] = messages[0][:4]
    got = receive_all(DectrisV1Decoder(), messages)
    assert kinds(got) == ["Undecodable", "ScanStart", "Frame", "Frame", "ScanEnd"]
    assert got[0].reason == "torn"
    assert got[1].expected_frames == 6


def test_series_numbers_may_start_again() -> None:
    got = receive_all(DectrisV1Decoder(), [*series(1), *series(1)])
    assert kinds(got) == ["ScanStart", "Frame", "Frame", "ScanEnd"] * 2


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (b"", "malformed"),
        (b"not json", "malformed"),
        (b'{"htype": "dimage-1.0"', "malformed"),
        (b"[" * 200_000, "malformed"),
        (b'{"a":' * 100_000, "malformed"),
        (
            b'{"htype":"dheader-1.0","series":1,"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
            "malformed",
        ),
        (b'{"htype": 5}', "malformed"),
        (b'{"htype": "dheader-1.0"}', "malformed"),
        (b'{"htype": "dseries_end-1.0", "series": ' + b"9" * 6000 + b"}", "malformed"),
        (b'{"htype": "dimage_d-1.0", "shape": [1, 1], "type": "uint8"}', "torn"),
        (b'{"htype": "something-1.0"}', "torn"),
    ],
)
def test_rubbish_is_reported_and_the_stream_goes_on(part: bytes, reason: str) -> None:
    decoder = DectrisV1Decoder()
    (problem,) = decoder.receive([part])
    assert isinstance(problem, Undecodable)
    assert problem.reason == reason
    assert kinds(receive_all(decoder, series())) == ["ScanStart", "Frame", "Frame", "ScanEnd"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": [10**9, 10**9]}, "limit"),
        ({"shape": [0, 6]}, "limit"),
        ({"shape": [-1, 6]}, "limit"),
        ({"shape": [6]}, "malformed"),
        ({"shape": [6, 4, 2]}, "malformed"),
        ({"shape": "6x4"}, "malformed"),
        ({"type": "float64"}, "malformed"),
        ({"encoding": "bs16-zstd<"}, "malformed"),
        ({"encoding": "bs16<"}, "malformed"),
    ],
)
def test_an_absurd_image_header_is_refused(changes: dict, reason: str) -> None:
    decoder = DectrisV1Decoder()
    parts = DectrisV1Encoder(1).frame(0, PIXELS)
    parts[1] = json.dumps({**json.loads(parts[1]), **changes}).encode()
    problems = decoder.receive(parts)
    assert problems[0].reason == reason
    assert all(isinstance(problem, Undecodable) for problem in problems)
    assert kinds(receive_all(decoder, series())) == ["ScanStart", "Frame", "Frame", "ScanEnd"]


@pytest.mark.parametrize("number", [-1, 2**60])
def test_an_absurd_frame_number_is_refused(number: int) -> None:
    (problem,) = DectrisV1Decoder().receive(DectrisV1Encoder(1).frame(number, PIXELS))
    assert isinstance(problem, Undecodable) and problem.reason == "limit"


def test_version_2_is_told_from_rubbish() -> None:
    (problem,) = DectrisV1Decoder().receive(DectrisV2Encoder(1).end())
    assert problem.reason == "malformed" and "dectris-v2" in problem.detail


def test_a_part_above_the_limit_is_refused() -> None:
    decoder = DectrisV1Decoder(WireLimits(max_message_bytes=1000))
    parts = DectrisV1Encoder(1, "<").frame(0, np.zeros((100, 100), "u1"))
    assert decoder.receive(parts)[0].reason == "limit"


def test_deep_metadata_start_the_series_without_them() -> None:
    parts = DectrisV1Encoder(1).start("basic", CONFIG)
    parts[1] = b'{"x":' + b"[" * 50 + b"]" * 50 + b"}"
    got = DectrisV1Decoder().receive(parts)
    assert kinds(got) == ["Undecodable", "ScanStart"]
    assert got[0].reason == "limit"


@pytest.mark.parametrize(
    ("changes", "shape_yx", "expected"),
    [
        ({"x_pixels_in_detector": 2**40}, None, 6),
        ({"x_pixels_in_detector": 9000, "y_pixels_in_detector": 8000}, None, 6),
        ({"nimages": 2**63, "ntrigger": 2**63}, (4, 6), None),
        ({"nimages": 2**40, "ntrigger": 2}, (4, 6), None),
        ({"ntrigger": 2**41, "trigger_mode": "exte"}, (4, 6), None),
    ],
)
def test_absurd_counts_and_shapes_of_a_header_are_left_to_the_frames(
    changes: dict, shape_yx: tuple[int, int] | None, expected: int | None
) -> None:
    parts = DectrisV1Encoder(1).start("basic", {**CONFIG, **changes})
    problem, start = DectrisV1Decoder().receive(parts)
    assert isinstance(problem, Undecodable)
    assert (problem.reason, problem.series) == ("limit", "1")
    assert isinstance(start, ScanStart)
    assert (start.frame_shape_yx, start.expected_frames) == (shape_yx, expected)
    assert start.geometry.detector_distance_m == 2.0


def test_a_header_shape_too_large_for_its_bit_depth_is_left_to_the_frames() -> None:
    limits = WireLimits(max_decoded_bytes=4 * 6 * 2 - 1)
    problem, start = DectrisV1Decoder(limits).receive(next(iter(series())))
    assert problem.reason == "limit"
    assert start.frame_shape_yx is None


def test_a_series_name_that_would_forge_log_lines_is_refused() -> None:
    part = json.dumps({"htype": "dseries_end-1.0", "series": "1\nSTATUS=fine"}).encode()
    (problem,) = DectrisV1Decoder().receive([part])
    assert problem.reason == "malformed"
    assert "\n" not in problem.detail


@pytest.mark.parametrize("at", [0, 1, 3])
def test_long_json_of_an_image_is_not_parsed(at: int) -> None:
    decoder = DectrisV1Decoder(WireLimits(max_header_bytes=1000))
    parts = DectrisV1Encoder(1).frame(0, PIXELS)
    parts[at] = parts[at][:-1] + b',"more":"' + b"x" * 1000 + b'"}'
    got = decoder.receive(parts)
    assert isinstance(got[0], Frame if at == 3 else Undecodable)
    assert isinstance(got[-1], Undecodable)
    assert kinds(receive_all(decoder, series())) == ["ScanStart", "Frame", "Frame", "ScanEnd"]


KEYS_READ = [*CONFIG, "photon_energy"]
KEYS_OF_PARTS = [
    *("htype", "series", "frame", "header_detail", "shape", "type", "encoding", "size"),
    *("start_time", "stop_time"),
]
ODD = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([2**63, 2**64 - 1, 10**400, 5e-324, 1e-310, 1e308, -0.0, "inte", "\ud800"])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
ODD_JSON = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS_READ), ODD_JSON))
def test_whatever_a_configuration_holds_its_series_starts(changes: dict) -> None:
    parts = DectrisV1Encoder(1).start("basic", CONFIG)
    parts[1] = json.dumps({**CONFIG, **changes}).encode()
    got = DectrisV1Decoder().receive(parts)
    start = got[-1]
    assert isinstance(start, ScanStart) and start.series == "1"
    assert all(isinstance(message, Undecodable) for message in got[:-1])
    told = start.geometry
    for value in (told.photon_energy_eV, told.detector_distance_m, told.count_time_s):
        assert value is None or 0 < value < float("inf")
    assert start.expected_frames is None or 0 < start.expected_frames <= 2**40
    assert start.dtype in (None, "|u1", "<u2", "<u4")


@settings(max_examples=300, deadline=None)
@given(
    index=st.integers(0, 7),
    changes=st.dictionaries(
        st.sampled_from(KEYS_OF_PARTS),
        ODD_JSON,
        min_size=1,
    ),
    broken_up=st.booleans(),
)
def test_whatever_a_part_holds_the_next_series_is_whole(index, changes, broken_up) -> None:
    """Every JSON part of a header with tables and of an image, one changed at a time."""
    encoder = DectrisV1Encoder(1)
    messages = [encoder.start("all", CONFIG), encoder.frame(0, PIXELS)]
    where = [(m, k) for m in (0, 1) for k in ((0, 2, 4, 6), (0, 1, 3))[m]]
    m, k = where[index % len(where)]
    messages[m][k] = json.dumps({**json.loads(messages[m][k]), **changes}).encode()
    decoder = DectrisV1Decoder()
    for message in receive_all(decoder, one_part_each(messages) if broken_up else messages):
        if isinstance(message, Frame):
            assert 0 <= message.number <= 2**40
    decoder.receive([b"resynchronise"])
    assert kinds(receive_all(decoder, series(2)))[-4:] == ["ScanStart", "Frame", "Frame", "ScanEnd"]


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 64),
    width=st.integers(1, 64),
    dtype=st.sampled_from(["u1", "<u2", "<u4"]),
    encoding=st.sampled_from(["<", "lz4<", "bs8-lz4<"]),
    number=st.integers(0, 2**31),
    times=st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)),
)
def test_frames_round_trip(height, width, dtype, encoding, number, times) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (height, width)).astype(dtype)
    parts = DectrisV1Encoder(9, encoding).frame(number, pixels, *times)
    (frame,) = DectrisV1Decoder().receive(parts)
    assert isinstance(frame, Frame)
    assert (frame.series, frame.number, frame.start_ns, frame.stop_ns) == ("9", number, *times)
    np.testing.assert_array_equal(decode(frame.image), pixels)


def test_mutated_messages_never_raise() -> None:
    rng = np.random.default_rng(5)
    decoder = DectrisV1Decoder()
    good = [parts for detail in ("none", "basic", "all") for parts in series(1, 2, detail)]
    problems = 0
    for _ in range(20_000):
        parts = [bytearray(part) for part in good[rng.integers(len(good))]]
        victim = parts[rng.integers(len(parts))]
        match rng.integers(5):
            case 0 if victim:
                victim[rng.integers(len(victim))] = rng.integers(256)
            case 1:
                del victim[rng.integers(len(victim) + 1) :]
            case 2:
                del parts[rng.integers(len(parts))]
            case 3:
                parts.insert(rng.integers(len(parts) + 1), bytearray(rng.bytes(20)))
            case _:
                at = rng.integers(len(victim) + 1)
                victim[at:at] = rng.bytes(rng.integers(1, 9))
        for message in decoder.receive([bytes(part) for part in parts]):
            problems += isinstance(message, Undecodable)
            if isinstance(message, ScanStart):
                json.dumps(dict(message.metadata), ensure_ascii=False).encode()
    assert problems > 1000
    decoder.receive([b"resynchronise"])
    got = receive_all(decoder, series(2))
    assert kinds(got)[-4:] == ["ScanStart", "Frame", "Frame", "ScanEnd"]
    assert got[-1] == ScanEnd("2")
