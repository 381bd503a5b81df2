"""The DECTRIS version 2 dialect: series, channels, times, whatever is missing, and rubbish."""

from __future__ import annotations

import json
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.messages import Frame, Message, ScanEnd, ScanStart, Undecodable
from ptycho_stream.settings import DetectorSettings
from ptycho_stream.wire import (
    DectrisV1Encoder,
    DectrisV2Decoder,
    DectrisV2Encoder,
    WireLimits,
    frame_decoders,
)
from ptycho_stream.wire.compression import decode, decode_window, encode

ID = "01HBV3JPF9T4ZDPADX6EMK6XMZ"
BEGUN_NS = 1_696_348_069_434_000_000
TOLD = {
    "channels": ["threshold_1"],
    "image_dtype": "uint16",
    "image_size_x": 6,
    "image_size_y": 4,
    "number_of_images": 6,
    "pixel_size_x": 75e-6,
    "pixel_size_y": 50e-6,
    "beam_center_x": 3.5,
    "beam_center_y": 2.5,
    "detector_translation": [0.1, 0.2, -0.25],
    "incident_wavelength": 1.0,
    "count_time": 0.01,
    "frame_time": 0.011,
    "saturation_value": 21517,
    "threshold_energy": {"threshold_1": 6750.0},
}
PIXELS = np.arange(24, dtype="<u2").reshape(4, 6)


def series(number: int = 1, frames: int = 2, unique_id: str | None = ID):
    encoder = DectrisV2Encoder(number, "bslz4", unique_id, BEGUN_NS)
    yield encoder.start(TOLD)
    for k in range(frames):
        yield encoder.frame(k, {"threshold_1": PIXELS + k}, 10 * k, 10 * k + 9)
    yield encoder.end()


def receive_all(decoder: DectrisV2Decoder, messages) -> list[Message]:
    return [message for parts in messages for message in decoder.receive(parts)]


def kinds(messages: list[Message]) -> list[str]:
    return [type(message).__name__ for message in messages]


def message(**keys: Any) -> list[bytes]:
    return [cbor2.dumps({"series_id": 1, **keys})]


def array(
    pixels: np.ndarray, tag: int = 69, content: Any = None, shape: Any = None
) -> cbor2.CBORTag:
    content = pixels.tobytes() if content is None else content
    return cbor2.CBORTag(40, [shape or list(pixels.shape), cbor2.CBORTag(tag, content)])


def image(data: Any, **keys: Any) -> list[bytes]:
    return message(type="image", image_id=0, data=data, **keys)


def only(messages: list[Message]) -> Any:
    (found,) = messages
    return found


def test_a_series_is_understood() -> None:
    got = receive_all(DectrisV2Decoder(), series())
    assert kinds(got) == ["ScanStart", "Frame", "Frame", "ScanEnd"]
    for k, frame in enumerate(got[1:3]):
        assert isinstance(frame, Frame)
        assert (frame.series, frame.number) == ("1", k)
        assert (frame.start_ns, frame.stop_ns) == (BEGUN_NS + 10 * k, BEGUN_NS + 10 * k + 9)
        np.testing.assert_array_equal(decode(frame.image), PIXELS + k)
    assert got[-1] == ScanEnd("1")


def test_messages_may_come_in_one_zeromq_message() -> None:
    together = [part for parts in series() for part in parts]
    got = DectrisV2Decoder().receive(together)
    assert kinds(got) == ["ScanStart", "Frame", "Frame", "ScanEnd"]


def test_the_start_tells_the_experiment() -> None:
    start = only(DectrisV2Decoder().receive(next(iter(series()))))
    assert start.expected_frames == 6
    assert start.frame_shape_yx == (4, 6)
    assert start.dtype == "<u2"
    geometry = start.geometry
    assert geometry.detector_pixel_yx_m == (50e-6, 75e-6)
    assert geometry.beam_center_yx_px == (2.5, 3.5)
    assert geometry.detector_distance_m == 0.25
    assert geometry.photon_energy_eV == pytest.approx(12398.42)
    assert (geometry.count_time_s, geometry.frame_time_s) == (0.01, 0.011)
    told = start.metadata
    assert told["series_unique_id"] == ID
    assert told["arm_date"].startswith("2023-10-03T15:47:49.434")
    assert (told["channel"], told["saturation_value"]) == ("threshold_1", 21517)
    assert told["threshold_energy"] == {"threshold_1": 6750.0}


@pytest.mark.parametrize("compression", ["bslz4", "lz4", "none"])
@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", ">u2", ">u4"])
def test_every_pixel_type_and_compression_is_understood(dtype: str, compression: str) -> None:
    pixels = np.random.default_rng(1).poisson(3, (40, 33)).astype(dtype)
    parts = DectrisV2Encoder(1, compression).frame(0, {"a": pixels})
    found = only(DectrisV2Decoder().receive(parts)).image
    assert found.shape_yx == (40, 33)
    np.testing.assert_array_equal(decode(found), pixels)
    window = slice(9, 21), slice(3, 30)
    np.testing.assert_array_equal(decode_window(found, window), pixels[window])


def test_pixels_stay_in_the_message() -> None:
    parts = DectrisV2Encoder(1).frame(0, {"a": PIXELS})
    blob = only(DectrisV2Decoder().receive(parts)).image.blob
    assert isinstance(blob, memoryview) and blob.obj is parts[0]


def test_elements_may_be_shuffled_in_another_width() -> None:
    content = cbor2.CBORTag(56500, ["bslz4", 1, encode(PIXELS, "bslz4", 8)])
    frame = only(DectrisV2Decoder().receive(image({"a": array(PIXELS, content=content)})))
    assert frame.image.shuffle_bits == 8
    np.testing.assert_array_equal(decode(frame.image), PIXELS)


def test_a_mask_of_the_recorded_channel_comes_with_the_start() -> None:
    masks = {name: np.zeros((4, 6), "<u4") for name in ("threshold_1", "threshold_2")}
    masks["threshold_1"][1, 5] = 2
    masks["threshold_2"][:] = 8
    for compression in ("none", "bslz4"):
        parts = DectrisV2Encoder(1, compression).start(TOLD, masks)
        start = only(DectrisV2Decoder().receive(parts))
        np.testing.assert_array_equal(start.pixel_mask, masks["threshold_1"] != 0)
        start = DectrisV2Decoder("threshold_2").receive(parts)[0]
        assert start.pixel_mask.all()


@pytest.mark.parametrize(
    "mask", [None, {}, {"threshold_1": None}, {"threshold_1": b"\0\0\0\0"}, {"other": 1}, "none"]
)
def test_a_mask_that_is_none_is_no_mask(mask: Any) -> None:
    start = only(
        DectrisV2Decoder().receive(DectrisV2Encoder(1).start({**TOLD, "pixel_mask": mask}))
    )
    assert start.pixel_mask is None


def test_a_damaged_mask_costs_itself_only() -> None:
    damaged = {"threshold_1": array(np.ones((4, 6), "<u4"), tag=70, content=b"short")}
    parts = DectrisV2Encoder(1).start({**TOLD, "pixel_mask": damaged})
    start, problem = DectrisV2Decoder().receive(parts)
    assert start.pixel_mask is None and start.expected_frames == 6
    assert (problem.reason, problem.series) == ("undecodable", "1")


def test_a_start_with_nothing_but_its_series_starts_it() -> None:
    start = only(DectrisV2Decoder().receive(message(type="start")))
    assert isinstance(start, ScanStart)
    assert (start.series, start.expected_frames, start.frame_shape_yx) == ("1", None, None)


def test_nulls_and_texts_in_the_place_of_values_are_taken_for_nothing() -> None:
    told = dict.fromkeys(TOLD)
    start = only(DectrisV2Decoder().receive(DectrisV2Encoder(1).start(told)))
    assert start.frame_shape_yx is None and start.geometry.detector_distance_m is None
    start = only(DectrisV2Decoder().receive(DectrisV2Encoder(1).start(dict.fromkeys(TOLD, "?"))))
    assert start.dtype is None and start.expected_frames is None


@pytest.mark.parametrize(
    ("changes", "shape_yx", "expected"),
    [
        ({"image_size_x": 2**40}, None, 6),
        ({"image_size_x": 9000, "image_size_y": 8000}, None, 6),
        ({"number_of_images": 2**63}, (4, 6), None),
    ],
)
def test_absurd_counts_and_shapes_of_a_start_are_left_to_the_frames(
    changes: dict, shape_yx: tuple[int, int] | None, expected: int | None
) -> None:
    start, problem = DectrisV2Decoder().receive(DectrisV2Encoder(1).start({**TOLD, **changes}))
    assert (problem.reason, problem.series) == ("limit", "1")
    assert (start.frame_shape_yx, start.expected_frames) == (shape_yx, expected)


def test_a_map_of_the_users_data_stands_beside_the_detectors_words() -> None:
    user = {"sample": "star", "dark": True, "series_id": 99}
    start = only(DectrisV2Decoder().receive(DectrisV2Encoder(4).start({"user_data": user})))
    told = start.metadata
    assert (told["sample"], told["dark"], told["series_id"]) == ("star", True, 4)
    assert "user_data" not in told
    start = only(DectrisV2Decoder().receive(DectrisV2Encoder(4).start({"user_data": "a note"})))
    assert start.metadata["user_data"] == "a note"


@pytest.mark.parametrize(
    ("date", "base_ns"),
    [
        ("2023-10-03T17:47:49.434+02:00", BEGUN_NS),
        (cbor2.CBORTag(0, "2023-10-03T15:47:49.434Z"), BEGUN_NS),
        ("2023-10-03T17:47:49.434", None),
        ("yesterday", None),
        ("2" * 1000, None),
        (None, None),
        (1_696_348_069, None),
    ],
)
def test_images_are_dated_by_their_series_date(date: Any, base_ns: int | None) -> None:
    """Without it their times are known only from each other, which is not what is stored."""
    times = {"start_time": [50_000_000, 100_000_000], "stop_time": [215_873, 50_000_000]}
    frame = only(DectrisV2Decoder().receive(image({"a": array(PIXELS)}, series_date=date, **times)))
    if base_ns is None:
        assert (frame.start_ns, frame.stop_ns) == (None, None)
    else:
        assert (frame.start_ns, frame.stop_ns) == (base_ns + 500_000_000, base_ns + 4_317_460)


@pytest.mark.parametrize(
    ("times", "offsets_ns"),
    [
        ({}, (None, None)),
        ({"start_time": [3, 1000], "real_time": [2, 1000]}, (3_000_000, 5_000_000)),
        ({"start_time": [3, 0], "stop_time": [1]}, (None, None)),
        ({"start_time": 0.5, "stop_time": None}, (None, None)),
        ({"start_time": [2**63, 1], "stop_time": [2, 1]}, (None, 2_000_000_000)),
    ],
)
def test_times_that_are_missing_or_absurd_cost_no_frame(times: dict, offsets_ns: tuple) -> None:
    date = {"series_date": "2023-10-03T17:47:49.434+02:00"}
    frame = only(DectrisV2Decoder().receive(image({"a": array(PIXELS)}, **date, **times)))
    expected = tuple(None if offset is None else BEGUN_NS + offset for offset in offsets_ns)
    assert (frame.start_ns, frame.stop_ns) == expected


TWO = {"threshold_2": PIXELS + 100, "threshold_1": PIXELS}


def two_channels(decoder: DectrisV2Decoder, names: list[str]) -> list[Message]:
    encoder = DectrisV2Encoder(1)
    messages = [encoder.start({**TOLD, "channels": names}), encoder.frame(0, TWO)]
    return receive_all(decoder, [*messages, encoder.frame(1, TWO), encoder.end()])


def test_of_several_channels_the_first_announced_is_recorded_and_the_others_are_told() -> None:
    got = two_channels(DectrisV2Decoder(), ["threshold_1", "threshold_2"])
    assert kinds(got) == ["ScanStart", "Undecodable", "Frame", "Frame", "ScanEnd"]
    start, problem, *frames, _ = got
    assert start.metadata["channel"] == "threshold_1"
    assert start.metadata["channels"] == ["threshold_1", "threshold_2"]
    assert (problem.reason, problem.series) == ("channels", "1")
    assert "threshold_2" in problem.detail and "detector.dectris_v2.channel" in problem.detail
    for frame in frames:
        np.testing.assert_array_equal(decode(frame.image), PIXELS)


def test_a_channel_that_is_asked_for_is_recorded_and_nothing_is_said() -> None:
    got = two_channels(DectrisV2Decoder("threshold_2"), ["threshold_1", "threshold_2"])
    assert kinds(got) == ["ScanStart", "Frame", "Frame", "ScanEnd"]
    np.testing.assert_array_equal(decode(got[1].image), PIXELS + 100)


def test_without_a_start_the_first_channel_of_the_first_image_is_recorded() -> None:
    encoder = DectrisV2Encoder(1)
    swapped = dict(reversed(TWO.items()))
    got = receive_all(DectrisV2Decoder(), [encoder.frame(0, TWO), encoder.frame(1, swapped)])
    assert kinds(got) == ["Undecodable", "Frame", "Frame"]
    for frame in got[1:]:
        np.testing.assert_array_equal(decode(frame.image), PIXELS + 100)


def test_a_channel_that_does_not_come_is_said_with_those_that_do() -> None:
    problem = only(DectrisV2Decoder("difference").receive(DectrisV2Encoder(1).frame(0, TWO)))
    assert problem.reason == "malformed"
    assert "threshold_2, threshold_1" in problem.detail and "difference" in problem.detail


def test_a_series_whose_start_was_lost_is_not_taken_for_the_one_before_of_its_name() -> None:
    """A detector that was switched off and on begins with series 1 again."""
    decoder = DectrisV2Decoder()
    got = receive_all(decoder, [*series(1)][:-1])
    got += receive_all(decoder, [*series(1, unique_id="01ZZ")][1:])
    assert kinds(got) == [
        *("ScanStart", "Frame", "Frame"),
        *("ScanStart", "Undecodable", "Frame", "Frame", "ScanEnd"),
    ]
    assert got[3].metadata["series_unique_id"] == "01ZZ"
    assert (got[3].frame_shape_yx, got[3].dtype) == ((4, 6), "<u2")
    assert got[4].reason == "lost"


def test_a_damaged_image_of_a_series_whose_start_was_lost_does_not_hide_that() -> None:
    decoder = DectrisV2Decoder()
    receive_all(decoder, [*series(1)][:-1])
    damaged = image({"a": array(PIXELS, tag=77)}, series_unique_id="01\nZZ")
    assert kinds(decoder.receive(damaged)) == ["Undecodable"]
    start, lost, _ = decoder.receive(image({"a": array(PIXELS)}, series_unique_id="01\nZZ"))
    assert isinstance(start, ScanStart)
    assert lost.reason == "lost" and "\n" not in lost.detail


def test_series_numbers_may_start_again() -> None:
    decoder = DectrisV2Decoder()
    got = receive_all(decoder, [*series(1, unique_id="A"), *series(1, unique_id="B")])
    assert kinds(got) == ["ScanStart", "Frame", "Frame", "ScanEnd"] * 2


def test_images_without_a_unique_id_belong_to_their_series() -> None:
    decoder = DectrisV2Decoder()
    start, *images = series(1)
    got = receive_all(decoder, [start, *list(series(1, unique_id=None))[1:], *images])
    assert "Undecodable" not in kinds(got) and kinds(got).count("ScanStart") == 1


def test_memory_of_series_is_bounded() -> None:
    decoder = DectrisV2Decoder()
    for number in range(1000):
        decoder.receive(DectrisV2Encoder(number, unique_id="A").frame(0, {"a": PIXELS}))
    assert len(decoder._series) <= 64


def test_all_endpoints_of_a_detector_share_their_series() -> None:
    detector = DetectorSettings(
        dialect="dectris-v2",
        endpoint="tcp://127.0.0.1:31001",
        more_endpoints=("tcp://127.0.0.1:31002",),
    )
    first, second = frame_decoders(detector, WireLimits())
    assert first is second


def test_a_channel_is_set_for_this_dialect_only() -> None:
    table = {"channel": "threshold_2"}
    DetectorSettings(dialect="dectris-v2", dectris_v2=table)
    with pytest.raises(ValueError, match=r"\[detector\.dectris_v2\]"):
        DetectorSettings(dialect="dectris-v1", dectris_v2=table)


NESTED = cbor2.dumps({"series_id": 1, "type": "start", "x": 0})[:-1] + b"\x81" * 100_000 + b"\0"


@pytest.mark.parametrize(
    ("part", "reason", "says"),
    [
        (b"", "malformed", "breaks off"),
        (b"not CBOR", "malformed", "CBOR"),
        (DectrisV1Encoder(1).end()[0], "malformed", "dectris-v1"),
        (cbor2.dumps([1, 2]), "malformed", "map"),
        (cbor2.dumps(cbor2.CBORTag(1, {"series_id": 1})), "malformed", "map"),
        (cbor2.dumps({"type": "image"}), "malformed", "series"),
        (cbor2.dumps({"type": "end", "series_id": "a\nb"}), "malformed", "printable"),
        (cbor2.dumps({"type": "end", "series_id": 2**80}), "malformed", "series"),
        (cbor2.dumps({"type": "hello", "series_id": 1}), "malformed", "hello"),
        (cbor2.dumps({"series_id": 1}), "malformed", "None"),
        (b"\xbb" + (2**60).to_bytes(8, "big"), "limit", "items"),
        (NESTED, "limit", "nested"),
        (message(type="image", image_id=0)[0], "torn", "pixels"),
        (message(type="image", data={"a": array(PIXELS)})[0], "malformed", "image_id"),
        (message(type="image", image_id=-1, data={"a": 1})[0], "limit", "number"),
        (message(type="image", image_id=2**60, data={"a": 1})[0], "limit", "number"),
        (message(type="image", image_id=True, data={"a": 1})[0], "malformed", "image_id"),
        (image({})[0], "torn", "pixels"),
        (image({"a": None})[0], "malformed", "tag 40"),
        (image({"a": PIXELS.tobytes()})[0], "malformed", "tag 40"),
        (image({"a": cbor2.CBORTag(40, [[4, 6], [1, 2]])})[0], "malformed", "tag 40"),
        (image({"a": array(PIXELS, shape=[24])})[0], "malformed", "tag 40"),
        (image({"a": array(PIXELS, shape=[4, 6, 1])})[0], "malformed", "tag 40"),
        (image({"a": array(PIXELS, shape=[10**9, 10**9])})[0], "limit", "shape"),
        (image({"a": array(PIXELS, shape=[0, 6])})[0], "limit", "shape"),
        (image({"a": array(PIXELS, shape=[-4, 6])})[0], "limit", "shape"),
        (image({"a": array(PIXELS, tag=77)})[0], "malformed", "tag 77"),
        (image({"a": array(PIXELS, content=5)})[0], "malformed", "bytes"),
        (
            image({"a": array(PIXELS, content=cbor2.CBORTag(56500, ["zstd", 2, b""]))})[0],
            "malformed",
            "zstd",
        ),
        (
            image({"a": array(PIXELS, content=cbor2.CBORTag(56500, ["bslz4", "2", b""]))})[0],
            "malformed",
            "bslz4",
        ),
    ],
)
def test_rubbish_is_reported_and_the_stream_goes_on(part: bytes, reason: str, says: str) -> None:
    decoder = DectrisV2Decoder()
    problem = only(decoder.receive([part]))
    assert isinstance(problem, Undecodable)
    assert problem.reason == reason
    assert says in problem.detail and "\n" not in problem.detail
    assert kinds(receive_all(decoder, series())) == ["ScanStart", "Frame", "Frame", "ScanEnd"]


def test_a_part_above_the_limit_is_refused() -> None:
    decoder = DectrisV2Decoder(limits=WireLimits(max_message_bytes=1000))
    parts = DectrisV2Encoder(1, "none").frame(0, {"a": np.zeros((100, 100), "u1")})
    assert only(decoder.receive(parts)).reason == "limit"


def test_an_encoder_of_other_pixels_says_so() -> None:
    with pytest.raises(ValueError, match="float64"):
        DectrisV2Encoder(1).frame(0, {"a": np.zeros((2, 2))})


ODD = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=9)
)
ODD_ITEMS = st.recursive(
    ODD,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(cbor2.CBORTag, st.sampled_from([0, 1, 30, 40, 64, 69, 70, 56500]), inner)
    ),
)
KEYS_OF_START = [*TOLD, "incident_energy", "pixel_mask", "user_data", "series_unique_id"]
KEYS_OF_IMAGE = [
    *("type", "series_id", "series_unique_id", "image_id", "data", "series_date"),
    *("start_time", "stop_time", "real_time", "user_data"),
]


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS_OF_START), ODD_ITEMS))
def test_whatever_a_start_holds_its_series_starts(changes: dict) -> None:
    got = DectrisV2Decoder().receive(
        [cbor2.dumps({"type": "start", "series_id": 1, **TOLD, **changes})]
    )
    start = got[0]
    assert isinstance(start, ScanStart) and start.series == "1"
    assert all(isinstance(message, Undecodable) for message in got[1:])
    told = start.geometry
    for value in (told.photon_energy_eV, told.detector_distance_m, told.count_time_s):
        assert value is None or 0 < value < float("inf")
    assert start.expected_frames is None or 0 < start.expected_frames <= 2**40
    assert start.dtype in (None, "|u1", "<u2", "<u4")
    json.dumps(dict(start.metadata), ensure_ascii=False).encode()


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS_OF_IMAGE), ODD_ITEMS, min_size=1))
def test_whatever_an_image_holds_the_next_series_is_whole(changes: dict) -> None:
    decoder = DectrisV2Decoder()
    keys = {"type": "image", "series_id": 1, "image_id": 0, "data": {"a": array(PIXELS)}}
    for found in decoder.receive([cbor2.dumps({**keys, **changes})]):
        if isinstance(found, Frame):
            assert 0 <= found.number <= 2**40
            assert found.start_ns is None or 0 <= found.start_ns < 2**63
    got = receive_all(decoder, series(2))
    assert kinds(got) == ["ScanStart", "Frame", "Frame", "ScanEnd"]


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 64),
    width=st.integers(1, 64),
    dtype=st.sampled_from(["u1", "<u2", "<u4", ">u2"]),
    compression=st.sampled_from(["none", "lz4", "bslz4"]),
    number=st.integers(0, 2**31),
    times=st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)),
)
def test_frames_round_trip(height, width, dtype, compression, number, times) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (height, width)).astype(dtype)
    parts = DectrisV2Encoder(9, compression).frame(number, {"a": pixels}, *times)
    frame = only(DectrisV2Decoder().receive(parts))
    assert (frame.series, frame.number, frame.start_ns, frame.stop_ns) == ("9", number, *times)
    np.testing.assert_array_equal(decode(frame.image), pixels)


def test_mutated_messages_never_raise() -> None:
    rng = np.random.default_rng(5)
    decoder = DectrisV2Decoder()
    masks = {"threshold_1": np.ones((4, 6))}
    good = [parts[0] for parts in series()] + DectrisV2Encoder(1).start(TOLD, masks)
    problems = frames = 0
    for _ in range(20_000):
        victim = bytearray(good[rng.integers(len(good))])
        match rng.integers(4):
            case 0:
                victim[rng.integers(len(victim))] = rng.integers(256)
            case 1:
                del victim[rng.integers(len(victim) + 1) :]
            case 2:
                at = rng.integers(len(victim) + 1)
                victim[at:at] = rng.bytes(rng.integers(1, 9))
            case _:
                at = rng.integers(len(victim))
                victim[at : at + 9] = b"\xbb" + (2**60).to_bytes(8, "big")
        for found in decoder.receive([bytes(victim)]):
            problems += isinstance(found, Undecodable)
            frames += isinstance(found, Frame)
            if isinstance(found, ScanStart):
                json.dumps(dict(found.metadata), ensure_ascii=False).encode()
    assert problems > 5000 and frames > 300
    got = receive_all(decoder, series(2))
    assert kinds(got) == ["ScanStart", "Frame", "Frame", "ScanEnd"]
