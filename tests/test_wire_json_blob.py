"""STINS, PSI and Odin: what their senders write comes out, and what is damaged is reported."""

from __future__ import annotations

import json

import bitshuffle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.messages import Frame, ScanEnd, ScanStart, Undecodable
from ptycho_stream.settings import DetectorSettings, OdinSettings, PsiSettings
from ptycho_stream.wire import WireLimits, frame_decoders
from ptycho_stream.wire.compression import decode, encode
from ptycho_stream.wire.json_blob import StinsDecoder, odin_decoder, psi_decoder
from ptycho_stream.wire.json_blob_encoder import OdinEncoder, PsiEncoder, StinsEncoder

PIXELS = np.random.default_rng(1).poisson(3.0, (33, 47)).astype(np.uint16)


def changed(parts: list[bytes], **keys: object) -> list[bytes]:
    """``parts`` with other values in the header; None takes a key out."""
    header = {**json.loads(parts[0]), **keys}
    kept = {key: value for key, value in header.items() if value is not None}
    return [json.dumps(kept).encode(), *parts[1:]]


def pixels_of(message) -> np.ndarray:
    assert isinstance(message, Frame), message
    return decode(message.image)


def refused(messages, reason: str, detail: str = "") -> None:
    (message,) = messages
    assert isinstance(message, Undecodable), message
    assert message.reason == reason
    assert detail in message.detail


# ---- STINS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["raw", "lz4", "bslz4"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f4"])
def test_a_stins_series_round_trips(encoding, dtype):
    pixels = PIXELS.astype(dtype)
    decoder, encoder = StinsDecoder(), StinsEncoder("/data/star.h5", encoding)
    (start,) = decoder.receive(encoder.start({"nimages": 2, "photon_energy": 8800.0}))
    assert isinstance(start, ScanStart)
    assert (start.source, start.series, start.expected_frames) == ("stins", "stins", 2)
    assert start.geometry.photon_energy_eV == 8800.0
    assert start.metadata["filename"] == "/data/star.h5"
    for number in range(2):
        (frame,) = decoder.receive(encoder.frame(number, pixels))
        np.testing.assert_array_equal(pixels_of(frame), pixels)
        assert (frame.number, frame.series) == (number, "stins")
    assert decoder.receive(encoder.end()) == [ScanEnd("stins")]


def test_the_headers_of_max_iv_senders_are_understood():
    # As maxiv-science's streaming-receiver writes them: no second part, and other starts.
    decoder = StinsDecoder()
    (start,) = decoder.receive([b'{"htype": "header", "msg_number": 0, "filename": ""}'])
    assert isinstance(start, ScanStart)
    head = {"htype": "image", "frame": 0, "shape": [33, 47], "type": "uint16", "exposure_time": 0.1}
    blob = bitshuffle.compress_lz4(PIXELS).tobytes()  # without the 12 bytes of HDF5
    parts = [json.dumps({**head, "compression": "bslz4", "msg_number": 1}).encode(), blob]
    np.testing.assert_array_equal(pixels_of(decoder.receive(parts)[0]), PIXELS)
    parts = [
        json.dumps({**head, "compression": "none", "msg_number": 2}).encode(),
        PIXELS.tobytes(),
    ]
    np.testing.assert_array_equal(pixels_of(decoder.receive(parts)[0]), PIXELS)
    told = b'{"exptime": 0.25}'
    (start,) = decoder.receive([b'{"htype": "series_start", "msg_number": 3}', told])
    assert isinstance(start, ScanStart) and start.geometry.count_time_s == 0.25


def test_signed_counts_are_kept_with_gaps_as_the_largest_values():
    pixels = PIXELS.astype(np.int32)
    pixels[0, :2] = -1, -2
    (frame,) = StinsDecoder().receive(StinsEncoder(encoding="bslz4").frame(0, pixels))
    found = pixels_of(frame)
    assert found.dtype == np.uint32 and list(found[0, :2]) == [2**32 - 1, 2**32 - 2]
    np.testing.assert_array_equal(found[1:], pixels[1:])


def test_each_message_that_is_missing_is_counted():
    decoder, encoder = StinsDecoder(), StinsEncoder()
    decoder.receive(encoder.start())
    sent = [encoder.frame(n, PIXELS) for n in range(10)]
    messages = [m for n in (0, 1, 5, 3, 6) for m in decoder.receive(sent[n])]
    assert [type(m) for m in messages] == [Frame] * 5  # 2 and 4 might still come
    *lost, end = decoder.receive(encoder.end())
    assert end == ScanEnd("stins")
    assert [m.reason for m in lost] == ["lost"] * 5  # 2, 4, 7, 8, 9
    assert "second receiver" in lost[0].detail
    encoder.next_message = 0  # the sender was restarted
    assert len(decoder.receive(encoder.start())) == 1


@pytest.mark.parametrize(
    ("keys", "reason", "detail"),
    [
        ({"htype": "dimage-1.0"}, "malformed", "known are header"),
        ({"frame": "7"}, "malformed", "frame is '7'"),
        ({"frame": True}, "malformed", "whole number"),
        ({"frame": -1}, "limit", "frame number -1"),
        ({"shape": [33]}, "malformed", "not that of one image"),
        ({"shape": [33, 47, 3]}, "malformed", "not that of one image"),
        ({"shape": [33, 10**9]}, "limit", "max_shape_yx_px"),
        ({"shape": [33, -1]}, "limit", "outside"),
        ({"shape": "33x47"}, "malformed", "list of two"),
        ({"type": "mono12p"}, "malformed", "known are uint8"),
        ({"type": None}, "malformed", "type is None"),
        ({"compression": "blosc"}, "malformed", "none, lz4 or bslz4"),
    ],
)
def test_a_bad_header_says_what_is_wrong(keys, reason, detail):
    refused(
        StinsDecoder().receive(changed(StinsEncoder().frame(0, PIXELS), **keys)), reason, detail
    )


def test_a_start_with_a_bad_second_part_begins_a_series_all_the_same():
    decoder = StinsDecoder()
    first = StinsEncoder().start()
    bad, start = decoder.receive([*first, b"[" * 100_000])
    assert isinstance(bad, Undecodable) and isinstance(start, ScanStart)


def test_frames_with_several_blobs_or_none_are_torn():
    head, blob = StinsEncoder().frame(0, PIXELS)
    refused(StinsDecoder().receive([head]), "torn", "0 blobs")
    refused(StinsDecoder().receive([head, blob, blob]), "torn", "modules")


# ---- PSI -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_a_psi_series_begins_with_its_first_frame(byte_order):
    decoder, encoder = psi_decoder(), PsiEncoder(byte_order)
    start, frame = decoder.receive(encoder.frame(0, PIXELS))
    assert isinstance(start, ScanStart)
    assert (start.series, start.frame_shape_yx) == ("psi", (33, 47))
    np.testing.assert_array_equal(pixels_of(frame), PIXELS)
    (frame,) = decoder.receive(encoder.frame(1, PIXELS + 1))
    np.testing.assert_array_equal(pixels_of(frame), PIXELS + 1)


def test_what_else_a_psi_header_holds_goes_into_the_metadata():
    parts = changed(PsiEncoder().frame(0, PIXELS), pulse_id=9989, htype=["array-1.0"], daq={"a": 1})
    start, _ = psi_decoder().receive(parts)
    assert start.metadata["pulse_id"] == 9989 and start.metadata["daq"] == {"a": 1}


def test_psi_counters_may_begin_anywhere():
    decoder = psi_decoder(PsiSettings(first_number="any"))
    _, first = decoder.receive(PsiEncoder().frame(70_000, PIXELS))
    (second,) = decoder.receive(PsiEncoder().frame(70_002, PIXELS))
    assert (first.number, second.number) == (0, 2)


def test_other_htypes_are_refused():
    parts = changed(PsiEncoder().frame(0, PIXELS), htype="bsr_m-1.1")
    refused(psi_decoder().receive(parts), "malformed", "array-1.0")


# ---- Odin ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["raw", "lz4", "bslz4"])
def test_an_odin_acquisition_round_trips(encoding):
    decoder, encoder = odin_decoder(), OdinEncoder("scan-7", encoding)
    start, frame = decoder.receive(encoder.frame(0, PIXELS))
    assert start.series == "scan-7" and start.metadata["dataset"] == "data"
    np.testing.assert_array_equal(pixels_of(frame), PIXELS)


def test_odin_shapes_are_columns_first_unless_set_otherwise():
    parts = OdinEncoder(shape_order="yx", encoding="raw").frame(0, PIXELS)
    _, frame = odin_decoder(OdinSettings(shape_order="yx")).receive(parts)
    np.testing.assert_array_equal(pixels_of(frame), PIXELS)
    _, frame = odin_decoder().receive(parts)
    assert frame.image.shape_yx == (47, 33)


def test_both_framings_of_lz4_are_told_apart():
    for framing in ("lz4", "lz4-hdf5"):
        head = OdinEncoder(encoding="lz4").frame(0, PIXELS)[0]
        _, frame = odin_decoder().receive([head, encode(PIXELS, framing)])
        np.testing.assert_array_equal(pixels_of(frame), PIXELS)


def test_other_datasets_of_an_odin_stream_are_left_out():
    decoder = odin_decoder(OdinSettings(dataset="data"))
    assert decoder.receive(OdinEncoder(dataset="threshold_1").frame(0, PIXELS)) == []
    assert len(decoder.receive(OdinEncoder(dataset="data").frame(0, PIXELS))) == 2


def test_a_new_acquisition_is_a_new_series():
    decoder = odin_decoder()
    decoder.receive(OdinEncoder("a").frame(0, PIXELS))
    end, start, frame = decoder.receive(OdinEncoder("b").frame(0, PIXELS))
    assert end == ScanEnd("a")
    assert (start.series, frame.series) == ("b", "b")
    refused(decoder.receive(OdinEncoder("c\n").frame(0, PIXELS)), "malformed", "printable")


# ---- all of them ---------------------------------------------------------------------------------

DECODERS = {
    "stins": (lambda limits: StinsDecoder(limits), StinsEncoder),
    "psi": (lambda limits: psi_decoder(limits=limits), PsiEncoder),
    "odin": (lambda limits: odin_decoder(limits=limits), lambda: OdinEncoder("a")),
}


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_damaged_messages_never_raise(name, data):
    make, encoder = DECODERS[name]
    parts = list(encoder().frame(3, PIXELS))
    which = data.draw(st.integers(0, 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "noise", "nest"]))
    part = bytearray(parts[which])
    if kind == "cut":
        del part[data.draw(st.integers(0, len(part))) :]
    elif kind == "flip":
        part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "noise":
        part = bytearray(data.draw(st.binary(max_size=200)))
    else:
        part = bytearray(b'{"htype":' + b"[" * 50_000 + b"]" * 50_000 + b"}")
    parts[which] = bytes(part)
    for message in make(WireLimits()).receive(parts[: data.draw(st.integers(0, 2))] or parts):
        if isinstance(message, Frame):
            assert message.image.shape_yx[0] <= 8192


@pytest.mark.parametrize("name", DECODERS)
def test_limits_are_checked_before_anything_is_made(name):
    make, encoder = DECODERS[name]
    parts = encoder().frame(3, PIXELS)
    small = WireLimits(max_message_bytes=200)
    refused(make(small).receive(parts), "limit", "200 bytes")
    refused(make(WireLimits(max_header_bytes=20)).receive(parts), "limit", "20 bytes")
    refused(make(WireLimits(max_shape_yx_px=(20, 20))).receive(parts), "limit", "max_shape_yx_px")
    refused(make(WireLimits()).receive([]), "limit", "missing")


@pytest.mark.parametrize("name", DECODERS)
def test_several_endpoints_of_these_dialects_share_one_decoder(name):
    detector = DetectorSettings.model_validate(
        {
            "dialect": name,
            "endpoint": "tcp://127.0.0.1:1",
            "more_endpoints": ["tcp://127.0.0.1:2"],
        }
    )
    first, second = frame_decoders(detector, WireLimits())
    assert first is second
