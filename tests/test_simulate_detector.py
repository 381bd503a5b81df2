"""The simulated detector and positioner over real sockets, read by our own decoders."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import zmq

from ptycho_stream.errors import EndpointError, SettingsError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.messages import (
    Frame,
    Message,
    Positions,
    PositionsEnd,
    PositionsStart,
    ScanEnd,
    ScanStart,
)
from ptycho_stream.settings import DetectorSettings
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.outlet import Outlet
from ptycho_stream.simulate.series import DetectorOptions
from ptycho_stream.wire import WireLimits, frame_decoders
from ptycho_stream.wire.compression import decode


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    rng = np.random.default_rng(2)
    return ScanFile(
        counts=rng.poisson(4, (25, 20, 24)).astype(np.uint16),
        positions_yx_m=rng.normal(0, 1e-6, (25, 2)),
        frame_numbers=np.arange(25),
        detector_distance_m=2.0,
        photon_energy_eV=8800.0,
        detector_pixel_yx_m=(75e-6, 50e-6),
        metadata={"sample": "noise"},
    )


class Receiver:
    """A PULL or SUB in a thread that decodes all that comes until it is stopped."""

    def __init__(self, endpoint: str, dialect: str, kind: int = zmq.PULL) -> None:
        self.messages: list[Message] = []
        self._args = (endpoint, dialect, kind)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        endpoint, dialect, kind = self._args
        (decoder,) = frame_decoders(DetectorSettings(dialect=dialect), WireLimits())
        with zmq.Context() as context, context.socket(kind) as socket:
            socket.linger = 0
            if kind == zmq.SUB:
                socket.subscribe(b"")
            socket.connect(endpoint)
            while not self._stop.is_set():
                if socket.poll(20):
                    self.messages += decoder.receive(socket.recv_multipart())

    def wait_for(self, done: Callable[[list[Message]], bool], timeout_s: float = 10) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not done(self.messages):
            assert time.monotonic() < deadline_s, f"only {len(self.messages)} messages came"
            time.sleep(0.01)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)


@contextmanager
def receiving(endpoint: str, dialect: str, kind: int = zmq.PULL) -> Iterator[Receiver]:
    receiver = Receiver(endpoint, dialect, kind)
    try:
        yield receiver
    finally:
        receiver.stop()


def ended(messages: list[Message]) -> bool:
    return bool(messages) and isinstance(messages[-1], ScanEnd)


def assert_frames(messages: list[Message], scan: ScanFile) -> None:
    frames = [message for message in messages if isinstance(message, Frame)]
    assert [frame.number for frame in frames] == list(scan.frame_numbers)
    for frame, counts in zip(frames, scan.counts, strict=True):
        np.testing.assert_array_equal(decode(frame.image), counts)


@pytest.mark.parametrize(
    "options",
    [
        DetectorOptions(),
        DetectorOptions(header_detail="none", encoding="lz4<"),
        DetectorOptions(header_detail="all", encoding="<"),
        DetectorOptions(header_detail="all", one_part_each=True),
        DetectorOptions(dialect="dectris-v2"),
        DetectorOptions(dialect="dectris-v2", header_detail="all", encoding="lz4"),
        DetectorOptions(dialect="native"),
        DetectorOptions(dialect="native", encoding="raw"),
    ],
    ids=str,
)
def test_a_series_arrives_bit_exact(scan: ScanFile, options: DetectorOptions) -> None:
    with (
        DetectorSimulator(options=options) as detector,
        receiving(detector.endpoint, options.dialect) as receiver,
    ):
        assert detector.send_series(scan, series=3) == len(scan)
        receiver.wait_for(ended)
    start = receiver.messages[0]
    assert isinstance(start, ScanStart)
    assert start.series == "3"
    assert_frames(receiver.messages, scan)
    assert receiver.messages[-1] == ScanEnd("3")
    if options.header_detail != "none":
        assert start.expected_frames == 25
        assert start.frame_shape_yx == (20, 24)
        assert start.dtype == "<u2"
        assert start.geometry.detector_pixel_yx_m == (75e-6, 50e-6)
        assert start.geometry.photon_energy_eV == 8800.0
        assert start.geometry.beam_center_yx_px == (10.0, 12.0)
        assert start.metadata["sample"] == "noise"


def test_an_aborted_series_has_no_end_and_the_next_follows(scan: ScanFile) -> None:
    with (
        DetectorSimulator() as detector,
        receiving(detector.endpoint, "dectris-v1") as receiver,
    ):
        assert detector.send_series(scan, series=1, stop_after=10) == 10
        detector.send_series(scan, series=1)
        receiver.wait_for(ended)
    assert len(receiver.messages) == 1 + 10 + 1 + 25 + 1
    assert isinstance(receiver.messages[11], ScanStart)


def test_the_rate_is_kept(scan: ScanFile) -> None:
    with (
        DetectorSimulator(options=DetectorOptions(rate_hz=100)) as detector,
        receiving(detector.endpoint, "dectris-v1") as receiver,
    ):
        detector.wait_for_receiver()
        began_s = time.monotonic()
        detector.send_series(scan)
        assert 0.24 <= time.monotonic() - began_s < 2
        receiver.wait_for(ended)


@pytest.mark.parametrize("timing", ["before", "during", "after"])
@pytest.mark.parametrize(("kind", "socket"), [("push", zmq.PULL), ("pub", zmq.SUB)])
def test_positions_come_as_one_epoch(scan: ScanFile, timing: str, kind: str, socket: int) -> None:
    with (
        DetectorSimulator() as detector,
        PositionSimulator(kind=kind) as positions,
        receiving(detector.endpoint, "dectris-v1") as frames,
        receiving(positions.endpoint, "native", socket) as where,
    ):
        positions.wait_for_receiver()
        seen: list[int] = []
        assert play(scan, detector, positions, timing, series=5, on_frame=seen.append) == 25
        assert seen == list(range(1, 26))
        frames.wait_for(ended)
        where.wait_for(lambda messages: len(messages) == 5)
    start, *batches, end = where.messages
    assert isinstance(start, PositionsStart)
    assert start.series == "5"
    assert end == PositionsEnd(start.epoch)
    assert all(isinstance(batch, Positions) and batch.epoch == start.epoch for batch in batches)
    np.testing.assert_array_equal(
        np.concatenate([batch.position_yx_m for batch in batches]), scan.positions_yx_m
    )


def test_positions_may_travel_with_the_frames(scan: ScanFile) -> None:
    with (
        DetectorSimulator(options=DetectorOptions(dialect="native")) as detector,
        receiving(detector.endpoint, "native") as receiver,
    ):
        play(scan, detector, None, "inline")
        receiver.wait_for(ended)
    got = [message.position_yx_m for message in receiver.messages if isinstance(message, Frame)]
    np.testing.assert_array_equal(got, scan.positions_yx_m)


def test_every_epoch_has_a_name_of_its_own(scan: ScanFile) -> None:
    with (
        PositionSimulator() as positions,
        receiving(positions.endpoint, "native") as receiver,
    ):
        positions.send_scan(scan)
        positions.send_scan(scan)
        receiver.wait_for(lambda got: len(got) == 6)
    epochs = [message.epoch for message in receiver.messages if isinstance(message, PositionsStart)]
    assert len(set(epochs)) == 2


def test_an_error_names_the_endpoint_where_nobody_receives(scan: ScanFile) -> None:
    with DetectorSimulator(timeout_s=0.2) as detector:
        with pytest.raises(EndpointError, match=detector.endpoint):
            detector.wait_for_receiver()
        with pytest.raises(EndpointError, match="no receiver"):
            detector.send_series(scan)
    with (
        PositionSimulator(kind="pub", timeout_s=0.2) as positions,
        pytest.raises(EndpointError, match="sub"),
    ):
        positions.wait_for_receiver()


@contextmanager
def slow_receiver(endpoint: str, messages: int, pause_s: float) -> Iterator[list[int]]:
    """Takes so many messages with a pause before each, then none, but stays connected."""
    sizes: list[int] = []
    stop = threading.Event()

    def run() -> None:
        with zmq.Context() as context, context.socket(zmq.PULL) as socket:
            socket.linger = 0
            socket.rcvhwm = 1
            socket.connect(endpoint)
            while not stop.wait(pause_s):
                if len(sizes) < messages and socket.poll(0):
                    sizes.append(sum(map(len, socket.recv_multipart())))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield sizes
    finally:
        stop.set()
        thread.join()


def test_a_slow_receiver_gets_everything_however_long_it_takes() -> None:
    size, count = 1 << 20, 120
    outlet = Outlet("tcp://127.0.0.1:*", timeout_s=1)
    with slow_receiver(outlet.endpoint, count, 0.05) as sizes:
        with outlet:
            for _ in range(count):
                outlet.send([bytes(size)])
        # What has left this process is in the receiver's buffers.
        deadline_s = time.monotonic() + 5
        while len(sizes) < count and time.monotonic() < deadline_s:
            time.sleep(0.05)
    assert sizes == [size] * count


def test_messages_that_nobody_took_are_an_error() -> None:
    outlet = Outlet("tcp://127.0.0.1:*", timeout_s=0.3)
    with slow_receiver(outlet.endpoint, 0, 0.05):
        outlet.wait_for_receiver()
        for _ in range(3):  # one reaches the receiver's queue, one is on its way, one waits
            outlet.send([bytes(64 << 20)])
        with pytest.raises(EndpointError, match=outlet.endpoint):
            outlet.close()


def test_a_port_in_use_is_an_error() -> None:
    with DetectorSimulator() as first, pytest.raises(EndpointError, match="cannot bind"):
        DetectorSimulator(first.endpoint)


@pytest.mark.parametrize(
    "options",
    [
        {"dialect": "native", "encoding": "bs16-lz4<"},
        {"dialect": "native", "one_part_each": True},
        {"dialect": "dectris-v2", "encoding": "bs16-lz4<"},
        {"dialect": "dectris-v2", "one_part_each": True},
        {"encoding": "bslz4"},
        {"rate_hz": 0.0},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(SettingsError):
        DetectorOptions(**options)


def test_dectris_frames_carry_no_positions(scan: ScanFile) -> None:
    with DetectorSimulator() as detector, pytest.raises(SettingsError, match="native"):
        detector.send_series(scan, inline_positions=True)
