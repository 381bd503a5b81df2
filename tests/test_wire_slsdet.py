"""slsReceiver: modules of several endpoints become frames, whatever comes late, twice or not."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.errors import MalformedMessage, TornMessage
from ptycho_stream.messages import EncodedImage, Frame, Message, ScanEnd, ScanStart, Undecodable
from ptycho_stream.settings import SlsdetSettings
from ptycho_stream.wire import WireLimits
from ptycho_stream.wire.compression import decode
from ptycho_stream.wire.json_blob_encoder import SlsdetEncoder
from ptycho_stream.wire.module_frames import Layout, Module, ModuleFrames
from ptycho_stream.wire.slsdet import SlsdetDecoder

BAD = np.iinfo(np.uint16).max
MODULE = (6, 8)
PLACES = list(product(range(2), range(2)))


class Clock:
    """Seconds that a test sets."""

    now_s = 100.0

    def __call__(self) -> int:
        return int(self.now_s * 1e9)


class Detector:
    """2 x 2 modules with a receiver each, and the decoder of what they send.

    ``send`` is (endpoint, parts); what the decoder made of it all is in ``messages``.
    """

    def __init__(self, **options: object) -> None:
        self.clock = Clock()
        limits = options.pop("limits", WireLimits())
        decoder = SlsdetDecoder(SlsdetSettings(**options), limits, clock=self.clock)
        self.endpoints = [decoder.endpoint() for _ in PLACES]
        self.messages: list[Message] = []
        self.run(0)

    def run(self, index: int) -> None:
        """All receivers begin another acquisition."""
        self.encoders = [
            SlsdetEncoder("/data/run", index, (2, 2), place, flipped=place[0] == 1)
            for place in PLACES
        ]

    def frame(self, number: int, modules: str = "0123", **options: bool) -> None:
        for k in map(int, modules):
            pixels = whole(number)[Layout((2, 2), MODULE, "<u2").area(PLACES[k])]
            self.send(k, self.encoders[k].frame(number, pixels, **options))

    def end(self, modules: str = "0123") -> None:
        for k in map(int, modules):
            self.send(k, self.encoders[k].end())

    def send(self, endpoint: int, parts: list[bytes]) -> None:
        self.messages += self.endpoints[endpoint].receive(parts)

    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds
        for endpoint in self.endpoints:
            self.messages += endpoint.overdue()

    def told(self) -> list[str]:
        """What came since the last call: starts, frames by number, ends; skipped ones with !."""
        out: list[str] = []
        for message in self.messages:
            match message:
                case ScanStart():
                    out.append(f"start {message.series}")
                case ScanEnd():
                    out.append(f"end {message.series}")
                case Frame():
                    out.append(f"{message.number}{'!' if message.gate == 'skip' else ''}")
                case Undecodable():
                    out.append(message.reason)
        self.messages = []
        return out


def whole(number: int) -> np.ndarray:
    return np.random.default_rng(number).poisson(3, (12, 16)).astype(np.uint16)


# ---- as it should be -----------------------------------------------------------------------------


def test_modules_become_frames_and_all_ends_an_end() -> None:
    detector = Detector()
    for number in range(3):
        detector.frame(number)
    detector.end()
    frames = [message for message in detector.messages if isinstance(message, Frame)]
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(decode(frame.image), whole(number))
    start = detector.messages[0]
    assert isinstance(start, ScanStart)
    assert (start.source, start.frame_shape_yx, start.dtype) == ("slsdet", (12, 16), "<u2")
    assert start.metadata["fname"] == "/data/run"
    assert detector.told() == ["start run_0", "0", "1", "2", "end run_0"]


def test_modules_may_come_in_any_order_and_frames_overlap() -> None:
    detector = Detector()
    detector.frame(0, "31")
    detector.frame(1, "3")
    detector.frame(0, "20")
    detector.frame(1, "102")
    assert detector.told() == ["start run_0", "0", "1"]


def test_gaps_lie_between_modules_and_are_bad() -> None:
    detector = Detector(gap_yx_px=(1, 3))
    detector.frame(0)
    (frame,) = [message for message in detector.messages if isinstance(message, Frame)]
    pixels = decode(frame.image)
    assert pixels.shape == (13, 19)
    assert (pixels[6] == BAD).all() and (pixels[:, 8:11] == BAD).all()
    np.testing.assert_array_equal(np.delete(np.delete(pixels, 6, 0), [8, 9, 10], 1), whole(0))


@pytest.mark.parametrize(("bits", "dtype"), [(8, "|u1"), (12, "<u2"), (16, "<u2"), (32, "<u4")])
def test_pixels_have_the_bits_of_the_header(bits: int, dtype: str) -> None:
    decoder = SlsdetDecoder().endpoint()
    pixels = np.arange(48, dtype=dtype).reshape(6, 8)
    head, blob = SlsdetEncoder().frame(0, pixels)
    header = {**json.loads(head), "bitmode": bits}
    _, frame = decoder.receive([json.dumps(header).encode(), blob])
    assert frame.image.dtype == dtype
    np.testing.assert_array_equal(decode(frame.image), pixels)


def test_a_single_module_keeps_its_pixels_where_they_are() -> None:
    """Nothing is copied, and a place from a former, larger detector does not matter."""
    decoder = SlsdetDecoder().endpoint()
    head, blob = SlsdetEncoder("/data/run", 0, (1, 1), (1, 3)).frame(0, whole(0))
    _, frame = decoder.receive([head, blob])
    assert frame.image.blob is blob


# ---- what is missing -----------------------------------------------------------------------------


def test_a_frame_without_a_module_is_given_out_after_a_while() -> None:
    detector = Detector(wait_ms=200)
    detector.frame(0)
    detector.frame(1, "023")
    detector.frame(2)
    assert detector.told() == ["start run_0", "0", "2"]
    detector.wait(0.1)
    assert detector.told() == []
    detector.wait(0.15)
    (lost, frame) = detector.messages
    assert isinstance(lost, Undecodable) and "[(0, 1)]" in lost.detail
    pixels = decode(frame.image)
    assert (pixels[:6, 8:] == BAD).all()
    np.testing.assert_array_equal(pixels[:, :8], whole(1)[:, :8])
    assert detector.told() == ["incomplete", "1!"]
    detector.frame(1, "1")
    assert detector.told() == ["torn"]


@pytest.mark.parametrize(("incomplete", "told"), [("skip", ["1!"]), ("use", ["1"]), ("drop", [])])
def test_what_becomes_of_it_is_a_setting(incomplete: str, told: list[str]) -> None:
    detector = Detector(incomplete=incomplete)
    detector.frame(0)
    detector.frame(1, "0")
    detector.end()
    assert detector.told() == ["start run_0", "0", "incomplete", *told, "end run_0"]


def test_packets_that_a_module_lost_are_counted_and_its_pixels_kept() -> None:
    detector = Detector()
    detector.frame(0, "012")
    detector.frame(0, "3", complete=False)
    frame = detector.messages[-1]
    np.testing.assert_array_equal(decode(frame.image), whole(0))
    assert detector.told() == ["start run_0", "incomplete", "0!"]


def test_waiting_modules_are_bounded_in_bytes() -> None:
    detector = Detector(wait_bytes=1_000_000, gap_yx_px=(0, 0))
    size = 500
    for number in range(4):
        big = SlsdetEncoder("/data/run", 0, (2, 2), (0, 0))
        detector.send(0, big.frame(number, np.zeros((size, size), np.uint16)))
    # Of 500 kB each: two may wait.
    assert detector.told() == ["start run_0", "incomplete", "0!", "incomplete", "1!"]


# ---- acquisitions --------------------------------------------------------------------------------


def test_a_receiver_that_is_ahead_waits_for_the_others() -> None:
    """Module 0's socket is read before the others': two acquisitions stay two."""
    detector = Detector()
    for run in (0, 1):
        detector.run(run)
        for number in range(3):
            detector.frame(number, "0")
        detector.end("0")
    for run in (0, 1):
        detector.run(run)
        for number in range(3):
            detector.frame(number, "123")
        detector.end("123")
    one = ["0", "1", "2"]
    assert detector.told() == ["start run_0", *one, "end run_0", "start run_1", *one, "end run_1"]


def test_acquisitions_of_one_name_are_told_apart() -> None:
    """Receivers that write no file may not count; the second one's end is lost."""
    detector = Detector()
    for last in ("0123", "013", "0123"):
        for number in range(3):
            detector.frame(number)
        detector.end(last)
    told = ["start run_0", "0", "1", "2", "end run_0"]
    assert detector.told() == told * 3


def test_an_end_that_is_lost_costs_a_wait() -> None:
    detector = Detector(wait_ms=500)
    detector.frame(0)
    detector.frame(1)
    detector.end("012")
    assert detector.told() == ["start run_0", "0", "1"]
    detector.wait(0.6)
    assert detector.told() == ["end run_0"]
    detector.run(1)
    detector.frame(0)
    assert detector.told() == ["start run_1", "0"]


def test_a_module_that_is_dead_is_waited_for_once() -> None:
    detector = Detector(wait_ms=500)
    for run in range(3):
        detector.run(run)
        detector.frame(0, "012")
        detector.end("012")
        if not run:
            assert detector.told() == ["start run_0"]
            detector.wait(0.6)
        assert detector.told()[-3:] == ["incomplete", "0!", f"end run_{run}"]
    detector.run(3)
    detector.frame(0)
    detector.end()
    assert detector.told() == ["start run_3", "0", "end run_3"]


def test_an_acquisition_whose_first_frame_is_lost_is_one_of_its_own() -> None:
    detector = Detector()
    detector.frame(0)
    detector.end()
    detector.run(1)
    detector.frame(1)
    detector.end()
    assert detector.told() == ["start run_0", "0", "end run_0", "start run_1", "1", "end run_1"]


def test_a_detector_joined_in_the_middle_has_no_start() -> None:
    detector = Detector()
    detector.frame(7)
    detector.end()
    assert detector.told() == ["7", "end run_0"]


def test_what_is_held_is_bounded_in_bytes() -> None:
    detector = Detector(wait_bytes=1_000_000)
    for run in (0, 1):
        encoder = SlsdetEncoder("/data/run", run, (2, 2), (0, 0))
        for number in range(3 if run else 1):
            detector.send(0, encoder.frame(number, np.zeros((500, 500), np.uint16)))
    told = detector.told()
    assert told[:4] == ["start run_0", "incomplete", "0!", "end run_0"]
    assert told[4] == "start run_1"


def test_one_endpoint_may_carry_several_modules() -> None:
    """A relay that merges the receivers' streams."""
    detector = Detector()
    only = SlsdetDecoder(clock=detector.clock).endpoint()
    detector.endpoints = [only] * 4
    for number in range(2):
        detector.frame(number)
    detector.end()
    assert detector.told() == ["start run_0", "0", "1", "end run_0"]


# ---- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "reason", "detail"),
    [
        ({"jsonversion": 2}, "malformed", "4, 5 are known"),
        ({"bitmode": 24}, "malformed", "8, 16, 32"),
        ({"row": 2}, "malformed", "modules_yx"),
        ({"row": -1}, "limit", "outside"),
        ({"column": "x"}, "malformed", "whole number"),
        ({"detshape": [0, 2]}, "malformed", "two counts"),
        ({"detshape": [10**6, 10**6]}, "limit", "max_shape_yx_px"),
        ({"detshape": [50, 50]}, "limit", "over 1024"),
        ({"quad": 1}, "malformed", "quad"),
        ({"shape": [8, 7]}, "undecodable", "promised"),
        ({"fname": "a\nb"}, "malformed", "printable"),
        ({"frameIndex": 2**50}, "limit", "frame number"),
    ],
)
def test_a_bad_header_says_what_is_wrong(keys: dict, reason: str, detail: str) -> None:
    detector = Detector()
    head, blob = detector.encoders[0].frame(0, whole(0)[:6, :8])
    detector.send(0, [json.dumps({**json.loads(head), **keys}).encode(), blob])
    (message,) = detector.messages
    assert isinstance(message, Undecodable) and message.reason == reason
    assert detail in message.detail


def test_modules_that_do_not_fit_each_other_are_refused() -> None:
    layout = Layout((1, 2), (2, 2), "<u2")
    image = EncodedImage(bytes(8), "raw", "<u2", (2, 2))
    frames = ModuleFrames(wait_ns=10, wait_bytes=1000)
    assert frames.add("s", 0, Module((0, 0), layout, image), 0) == []
    with pytest.raises(MalformedMessage, match="came twice"):
        frames.add("s", 0, Module((0, 0), layout, image), 0)
    with pytest.raises(MalformedMessage, match="must be alike"):
        frames.add("s", 0, Module((0, 1), Layout((1, 2), (2, 2), "<u4"), image), 0)
    (given,) = frames.overdue(10)
    assert given.lacks == "module(s) [(0, 1)]"
    with pytest.raises(TornMessage, match="wait_ms"):
        frames.add("s", 0, Module((0, 1), layout, image), 0)


def test_flipped_modules_come_from_the_bottom_up() -> None:
    layout = Layout((1, 1), (3, 2), "|u1")
    image = EncodedImage(bytes(range(6)), "raw", "|u1", (3, 2))
    (made,) = ModuleFrames(10, 1000).add("s", 0, Module((0, 0), layout, image, flipped=True), 0)
    assert bytes(made.image.blob) == bytes([4, 5, 2, 3, 0, 1])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_is_lost_doubled_or_damaged_nothing_raises(data: st.DataObject) -> None:
    """And no frame comes that holds other pixels than were sent, or bad ones."""
    detector = Detector(wait_ms=100)
    runs = data.draw(st.integers(1, 3))
    sent: list[list[list[bytes]]] = [[] for _ in PLACES]
    for run in range(runs):
        detector.run(run)
        for k, place in enumerate(PLACES):
            area = Layout((2, 2), MODULE, "<u2").area(place)
            for number in range(3):
                sent[k].append(detector.encoders[k].frame(number, whole(number)[area]))
            sent[k].append(detector.encoders[k].end())
    while any(sent):
        k = data.draw(st.sampled_from([k for k in range(4) if sent[k]]))
        parts = sent[k].pop(0)
        fate = data.draw(st.sampled_from(["", "", "", "", "lost", "twice", "noise", "wait"]))
        if fate == "noise":
            at = data.draw(st.integers(0, len(parts[0]) - 1))
            parts = [parts[0][:at] + b"\xff" + parts[0][at + 1 :], *parts[1:]]
        if fate == "wait":
            detector.wait(data.draw(st.floats(0.01, 0.3)))
        for _ in range({"lost": 0, "twice": 2}.get(fate, 1)):
            detector.send(k, parts)
    for _ in range(runs + 1):
        detector.wait(1.0)
    for message in detector.messages:
        if isinstance(message, Frame) and message.image.shape_yx == (12, 16):
            pixels = decode(message.image)
            if message.number < 3:
                bad = pixels == BAD
                np.testing.assert_array_equal(pixels[~bad], whole(message.number)[~bad])
    assert [m for m in detector.messages if isinstance(m, Frame)] or runs == 1
