"""NTNDArray updates become frames of series, without a client library: plain values go in."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.messages import Frame, Message, ScanEnd, ScanStart, Undecodable
from ptycho_stream.settings import PvaSettings
from ptycho_stream.wire import WireLimits
from ptycho_stream.wire.compression import decode, encode
from ptycho_stream.wire.pva import NdArrayUpdate, PvaDecoder

PIXELS = np.random.default_rng(1).poisson(3.0, (33, 47)).astype(np.uint16)
NOON_NS = 1_800_000_000_000_000_000


class Clock:
    """Seconds that a test sets."""

    now_s = 100.0

    def __call__(self) -> int:
        return int(self.now_s * 1e9)


def update(number: int, **changes: object) -> NdArrayUpdate:
    """An array of PIXELS, taken 1 ms after the one before."""
    fields: dict[str, object] = {
        "unique_id": number,
        "dimensions": (47, 33),
        "codec": "",
        "codec_type": None,
        "value": PIXELS.ravel(),
        "uncompressed_bytes": PIXELS.nbytes,
        "time_ns": NOON_NS + number * 1_000_000,
        "attributes": {},
    }
    return NdArrayUpdate(**{**fields, **changes})  # type: ignore[arg-type]


def words(messages: list[Message]) -> list[str]:
    out: list[str] = []
    for message in messages:
        match message:
            case ScanStart():
                out.append("start")
            case ScanEnd():
                out.append("end")
            case Frame():
                out.append(str(message.number))
            case Undecodable():
                out.append(message.reason)
    return out


class Channel:
    """A decoder that was connected to; ``send`` returns what numbered arrays made of it."""

    def __init__(self, connected: bool = True, **options: object) -> None:
        self.clock = Clock()
        self.decoder = PvaDecoder(PvaSettings(**options), WireLimits(), 10_000_000_000, self.clock)
        if connected:
            self.decoder.connected()
            assert self.decoder.receive(update(0, value=None)) == []  # it has acquired nothing yet

    def send(self, *numbers: int, **changes: object) -> list[str]:
        return words([m for n in numbers for m in self.decoder.receive(update(n, **changes))])

    def acquire(self, acquiring: bool) -> list[str]:
        return words(self.decoder.acquire(acquiring))

    def overdue(self, after_s: float) -> list[str]:
        self.clock.now_s += after_s
        return words(self.decoder.overdue())

    def frame(self, **changes: object) -> Frame:
        """The next array's frame."""
        (*_, frame) = self.decoder.receive(update(1, **changes))
        assert isinstance(frame, Frame), frame
        return frame

    def refused(self, **changes: object) -> Undecodable:
        (message,) = self.decoder.receive(update(1, **changes))
        assert isinstance(message, Undecodable), message
        return message


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "u4", "i2", "f4", "f8"])
def test_uncompressed_arrays_are_taken_as_they_come(dtype: str) -> None:
    pixels = PIXELS.astype(dtype)
    frame = Channel().frame(value=pixels.ravel())
    found = decode(frame.image)
    assert found.shape == (33, 47) and found.dtype.kind in "uf"
    np.testing.assert_array_equal(found, pixels)
    assert frame.start_ns == NOON_NS + 1_000_000


def test_gaps_of_signed_counts_become_the_largest_values() -> None:
    pixels = PIXELS.astype(np.int32)
    pixels[0, :2] = -1, -2
    found = decode(Channel().frame(value=pixels.ravel()).image)
    assert list(found[0, :2]) == [2**32 - 1, 2**32 - 2]


@pytest.mark.parametrize(("codec", "encoding"), [("lz4", "lz4"), ("bslz4", "bslz4")])
@pytest.mark.parametrize(
    ("dtype", "scalar", "nd"), [("u1", 5, 1), ("u2", 6, 3), ("u4", 7, 5), ("f4", 9, 8)]
)
def test_compressed_arrays_of_both_servers(
    codec: str, encoding: str, dtype: str, scalar: int, nd: int
) -> None:
    pixels = PIXELS.astype(dtype)
    blob = np.frombuffer(encode(pixels, encoding), np.uint8)
    for number in (scalar, nd):
        told = {"codec": codec, "codec_type": number, "uncompressed_bytes": pixels.nbytes}
        found = decode(Channel().frame(value=blob, **told).image)
        assert found.dtype == pixels.dtype
        np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"value": None}, "malformed", "has not acquired yet"),
        ({"dimensions": (47,)}, "malformed", "ColorMode"),
        ({"dimensions": (3, 47, 33)}, "malformed", "ColorMode"),
        ({"dimensions": (47, 34)}, "undecodable", "(34, 47)"),
        ({"dimensions": (0, 33)}, "limit", "outside"),
        ({"dimensions": (10**9, 10**9)}, "limit", "max_shape_yx_px"),
        ({"dimensions": (-47, -33)}, "limit", "outside"),
        ({"codec": "blosc"}, "malformed", "LZ4, BSLZ4"),
        ({"codec": "lz4", "codec_type": None}, "malformed", "no pixel type fits"),
        ({"codec": "lz4", "codec_type": 6, "uncompressed_bytes": 7}, "malformed", "no pixel type"),
        ({"value": np.zeros(PIXELS.size, bool)}, "malformed", "holds no counts"),
        ({"unique_id": -5}, "limit", "frame number -5"),
    ],
)
def test_what_is_no_image_says_what_it_is(changes: dict, reason: str, detail: str) -> None:
    message = Channel().refused(**changes)
    assert message.reason == reason
    assert detail in message.detail


# ---- attributes ----------------------------------------------------------------------------------


def test_positions_and_monitor_are_among_the_attributes() -> None:
    channel = Channel(
        position_attributes_yx=("Y", "X"), position_scale_yx_m=(-1e-6, 1e-6), i0_attribute="I0"
    )
    frame = channel.frame(attributes={"Y": 2.0, "X": 3, "I0": 0.5, "Z": "far"})
    assert frame.position_yx_m == (-2e-6, 3e-6)
    assert frame.i0 == 0.5
    for told in ({"Y": 2.0}, {"Y": "2", "X": 3.0}, {"Y": math.nan, "X": 1.0}, {"Y": True, "X": 1}):
        assert channel.frame(attributes=told).position_yx_m is None


def test_a_series_is_over_when_its_attribute_changes() -> None:
    channel = Channel(series_attribute="scan")
    assert channel.send(1, 2, attributes={"scan": 17}) == ["start", "0", "1"]
    (end, start, _) = channel.decoder.receive(update(1, attributes={"scan": 18}))
    assert end == ScanEnd("17")
    assert isinstance(start, ScanStart) and start.series == "18"
    assert start.metadata["scan"] == 18
    assert "no attribute 'scan'" in channel.refused().detail
    assert "printable" in channel.refused(attributes={"scan": "a\x00"}).detail


# ---- where series begin and end ------------------------------------------------------------------


def test_numbers_begin_with_one_and_begin_again_with_the_next_series() -> None:
    channel = Channel()
    assert channel.send(1, 2, 4) == ["start", "0", "1", "3"]
    assert channel.send(1, 2, 3) == ["end", "start", "0", "1", "2"]


def test_what_a_server_has_held_for_long_is_no_frame_of_this_series() -> None:
    channel = Channel(connected=False)
    channel.decoder.connected()
    assert channel.send(40, time_ns=NOON_NS - 3_600_000_000_000) == []
    assert channel.send(1, 2) == ["start", "0", "1"]


def test_the_frame_that_was_there_when_we_came_counts_if_the_next_goes_on() -> None:
    channel = Channel(connected=False)
    channel.decoder.connected()
    assert channel.send(1) == []
    assert channel.send(2, 3) == ["start", "0", "1", "2"]


def test_after_a_lost_connection_the_same_frame_does_not_come_twice() -> None:
    channel = Channel()
    channel.send(1, 2, 3)
    channel.decoder.connected()
    assert channel.send(3) == []
    assert channel.send(6) == ["2", "5"]  # who records it knows that 2 is there


def test_arrays_without_a_time_are_believed_only_while_it_acquires() -> None:
    for acquiring, expected in ((False, ["2"]), (True, ["1", "2"])):
        channel = Channel(connected=False)
        channel.acquire(acquiring)
        channel.decoder.connected()
        assert channel.send(2, time_ns=0) == []
        assert channel.send(3, time_ns=0) == expected


def test_an_acquire_channel_begins_and_ends_series() -> None:
    channel = Channel()
    assert channel.acquire(False) == []
    assert channel.acquire(True) == ["start"]
    assert channel.send(1, 2) == ["0", "1"]
    assert channel.acquire(False) == []
    assert channel.send(3) == ["2"]  # was on its way
    assert channel.overdue(0.5) == []
    assert channel.overdue(0.6) == ["end"]
    assert channel.acquire(True) == ["start"]
    assert channel.send(1) == ["0"]


def test_a_first_frame_may_overtake_the_acquire_channel() -> None:
    channel = Channel()
    channel.acquire(False)
    assert channel.send(1) == ["start", "0"]
    assert channel.acquire(True) == []
    assert channel.send(2) == ["1"]
    channel.acquire(False)
    assert channel.overdue(1.1) == ["end"]


def test_acquisitions_follow_at_once_and_the_first_frame_overtakes_the_news() -> None:
    channel = Channel()
    channel.acquire(False)
    channel.acquire(True)
    assert channel.send(1, 2, 3) == ["0", "1", "2"]
    assert channel.acquire(False) == []
    assert channel.send(1) == []
    assert channel.acquire(True) == ["end", "start", "0"]
    assert channel.send(2, 3) == ["1", "2"]


def test_an_acquisition_that_runs_when_we_come_has_no_start() -> None:
    channel = Channel()
    assert channel.acquire(True) == []
    assert channel.send(7, 8) == ["6", "7"]


# ---- damage --------------------------------------------------------------------------------------

LOOSE = st.none() | st.integers(-(2**63), 2**64) | st.floats() | st.text(max_size=5)


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "unique_id": st.integers(-(2**31), 2**31 - 1),
                "dimensions": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(tuple),
                "codec": st.sampled_from(["", "lz4", "bslz4", "lz4hdf5", "jpeg", "\n"]),
                "codec_type": st.none() | st.integers(-2, 12),
                "value": st.none() | st.binary(max_size=64).map(lambda b: np.frombuffer(b, "u1")),
                "uncompressed_bytes": st.integers(-(2**63), 2**63 - 1),
                "time_ns": st.integers(-(2**63), 2**80),
                "attributes": st.dictionaries(st.sampled_from(["s", "y", "x"]), LOOSE),
            },
        ),
        max_size=10,
    )
)
@settings(max_examples=100, deadline=None)
def test_whatever_comes_nothing_raises_and_nothing_large_is_made(changes: list[dict]) -> None:
    channel = Channel(series_attribute="s", position_attributes_yx=("y", "x"))
    for number, changed in enumerate(changes):
        for message in channel.decoder.receive(update(number, **changed)):
            if isinstance(message, Frame):
                assert max(message.image.shape_yx) <= 8192
