"""Against libertem-dectris, an independent sender and receiver of DECTRIS version 1, bit exact."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq
from dectris_dump import write_dump
from make_siemens_star import siemens_star

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.messages import Frame, ScanEnd, ScanStart
from ptycho_stream.simulate.detector import DetectorSimulator
from ptycho_stream.simulate.series import DetectorOptions
from ptycho_stream.wire import DectrisV1Decoder
from ptycho_stream.wire.compression import decode

libertem_dectris = pytest.importorskip("libertem_dectris", reason="pip install '.[interop]'")

pytestmark = pytest.mark.interop


def noise(dtype: str = "<u2", frames: int = 60) -> ScanFile:
    counts = np.random.default_rng(4).poisson(5, (frames, 96, 128)).astype(dtype)
    return ScanFile(counts, np.zeros((frames, 2)), np.arange(frames), metadata={"sample": "noise"})


@contextmanager
def running(work: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(20)
    assert not thread.is_alive()


def received_by_us(uri: str, count: int) -> list[object]:
    """Everything of one series, as our decoder understands it."""
    decoder, got = DectrisV1Decoder(), []
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.linger = 0
        socket.connect(uri)
        while not (got and isinstance(got[-1], ScanEnd)):
            assert socket.poll(10_000), f"silence after {len(got)} messages of {count + 2}"
            got += decoder.receive(socket.recv_multipart())
    return got


def assert_same_frames(got: list[object], scan: ScanFile) -> None:
    assert isinstance(got[0], ScanStart)
    assert got[0].expected_frames == len(scan)
    frames = [message for message in got if isinstance(message, Frame)]
    assert len(frames) == len(got) - 2, "nothing but start, frames and end"
    assert [frame.number for frame in frames] == list(range(len(scan)))
    for frame, counts in zip(frames, scan.counts, strict=True):
        np.testing.assert_array_equal(decode(frame.image), counts)


def received_by_libertem(scan: ScanFile, endpoint: str, folder: Path) -> np.ndarray:
    height, width = scan.frame_shape_yx
    connection = libertem_dectris.DectrisConnection(
        endpoint,
        8,
        str(folder / "shm.sock"),
        num_slots=400,
        bytes_per_frame=scan.counts[0].nbytes,
        huge=False,
    )
    got = np.zeros_like(scan.counts)
    try:
        connection.start_passive()
        config, series = connection.wait_for_arm(timeout=10.0)
        assert series == 7
        assert config.get_num_frames() == len(scan)
        client = libertem_dectris.CamClient(connection.get_socket_path())
        at = 0
        while at < len(scan):
            stack = connection.get_next_stack(8)
            out = np.empty((len(stack), height, width), scan.counts.dtype)
            client.decode_range_into_buffer(stack, out, 0, len(stack))
            client.done(stack)
            got[at : at + len(out)] = out
            at += len(out)
        client.close()
    finally:
        connection.close()
    return got


@pytest.mark.parametrize("one_part_each", [False, True])
@pytest.mark.parametrize(
    ("dtype", "encoding"),
    [("u1", "bs8-lz4<"), ("<u2", "bs16-lz4<"), ("<u4", "bs32-lz4<"), ("<u2", "lz4<")],
)
def test_our_detector_is_read_bit_exact(
    dtype: str, encoding: str, one_part_each: bool, tmp_path: Path
) -> None:
    scan = noise(dtype)
    options = DetectorOptions(encoding=encoding, one_part_each=one_part_each)
    with (
        DetectorSimulator(options=options, timeout_s=10) as detector,
        running(lambda: detector.send_series(scan, series=7)),
    ):
        got = received_by_libertem(scan, detector.endpoint, tmp_path)
    np.testing.assert_array_equal(got, scan.counts)


def test_their_mocked_detector_is_understood() -> None:
    """It sends parts one by one, and blobs whose 12-byte header is zero."""
    sim = libertem_dectris.DectrisSim.new_mocked(
        uri="tcp://127.0.0.1", num_frames=20, dwelltime=None, random_port=True
    )
    uri = sim.get_uri()

    def send() -> None:
        sim.send_headers()
        sim.send_frames()
        sim.send_footer()

    with running(send):
        got = received_by_us(uri, 20)
    frames = [message for message in got if isinstance(message, Frame)]
    assert len(frames) == 20
    assert len(got) == 22
    for frame in frames:
        assert decode(frame.image).shape == frame.image.shape_yx


def test_their_detector_with_measured_frames_is_understood(
    data_folder: Path, tmp_path: Path
) -> None:
    scan = siemens_star(data_folder)
    write_dump(tmp_path / "siemens-star.dump", scan)
    sim = libertem_dectris.DectrisSim(
        "tcp://127.0.0.1", str(tmp_path / "siemens-star.dump"), dwelltime=None, random_port=True
    )
    uri = sim.get_uri()

    def send() -> None:
        sim.send_headers()
        sim.send_frames()
        sim.send_footer()

    with running(send):
        got = received_by_us(uri, len(scan))
    assert_same_frames(got, scan)
    assert got[0].metadata["sample"] == "siemens star"


def test_measured_frames_of_our_detector_are_read_bit_exact(
    data_folder: Path, tmp_path: Path
) -> None:
    scan = siemens_star(data_folder)
    with (
        DetectorSimulator(timeout_s=10) as detector,
        running(lambda: detector.send_series(scan, series=7)),
    ):
        got = received_by_libertem(scan, detector.endpoint, tmp_path)
    np.testing.assert_array_equal(got, scan.counts)
