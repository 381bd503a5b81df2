"""Simulated detectors of the JSON-and-blob dialects over real sockets, read by our decoders."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import zmq
from daemon_harness import free_port

from ptycho_stream.cli import main
from ptycho_stream.errors import EndpointError, SettingsError
from ptycho_stream.files.npz import ScanFile, save_scan
from ptycho_stream.messages import Frame, Message, ScanEnd, ScanStart
from ptycho_stream.settings import DetectorSettings
from ptycho_stream.simulate.detector import DetectorSimulator, consecutive_endpoints
from ptycho_stream.simulate.outlet import Outlet
from ptycho_stream.simulate.series import DetectorOptions
from ptycho_stream.wire import WireLimits, frame_decoders
from ptycho_stream.wire.compression import decode

FRAMES = 25


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    rng = np.random.default_rng(2)
    return ScanFile(
        counts=rng.poisson(4, (FRAMES, 20, 24)).astype(np.uint16),
        positions_yx_m=rng.normal(0, 1e-6, (FRAMES, 2)),
        frame_numbers=np.arange(FRAMES),
        photon_energy_eV=8800.0,
        bad_pixels=np.eye(20, 24, dtype=bool),
        metadata={"sample": "noise"},
    )


def received(detector: DetectorSimulator, scan: ScanFile, kind: int) -> list[Message]:
    """What our decoders make of a series."""
    settings = DetectorSettings(
        dialect=detector.options.dialect,
        endpoint=detector.endpoints[0],
        more_endpoints=detector.endpoints[1:],
    )
    messages: list[Message] = []
    with zmq.Context() as context:
        poller, sockets = zmq.Poller(), {}
        decoders = frame_decoders(settings, WireLimits())
        for endpoint, decoder in zip(settings.endpoints, decoders, strict=True):
            socket = context.socket(kind)
            socket.linger = 0
            if kind == zmq.SUB:
                socket.subscribe(b"")
            socket.connect(endpoint)
            poller.register(socket, zmq.POLLIN)
            sockets[socket] = decoder
        detector.wait_for_receiver(5)
        sending = threading.Thread(target=detector.send_series, args=(scan, 3))
        sending.start()
        while sum(isinstance(message, Frame) for message in messages) < FRAMES or (
            settings.dialect in ("stins", "slsdet") and not isinstance(messages[-1], ScanEnd)
        ):
            ready = poller.poll(5000)
            assert ready, f"only {len(messages)} messages came"
            for socket, _ in ready:
                messages += sockets[socket].receive(socket.recv_multipart())
        sending.join(5)
        for socket in sockets:
            socket.close()
    return messages


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (DetectorOptions("stins"), "push"),
        (DetectorOptions("stins", "lz4"), "pub"),
        (DetectorOptions("psi"), "pub"),
        (DetectorOptions("psi"), "push"),
        (DetectorOptions("odin"), "pub"),
        (DetectorOptions("odin", "raw"), "push"),
        (DetectorOptions("slsdet"), "pub"),
        (DetectorOptions("slsdet", modules_yx=(2, 3)), "pub"),
    ],
    ids=str,
)
def test_a_series_arrives_bit_exact(scan: ScanFile, options: DetectorOptions, kind: str) -> None:
    with DetectorSimulator(options=options, kind=kind, timeout_s=5) as detector:
        messages = received(detector, scan, zmq.PULL if kind == "push" else zmq.SUB)
        name = detector.series_name(3) or options.dialect
    start, *rest = messages
    assert isinstance(start, ScanStart) and start.series == name
    frames = [message for message in rest if isinstance(message, Frame)]
    assert [frame.number for frame in frames] == list(range(FRAMES))
    for frame, counts in zip(frames, scan.counts, strict=True):
        pixels = decode(frame.image)
        assert (pixels[scan.bad_pixels] == np.iinfo(np.uint16).max).all()
        np.testing.assert_array_equal(pixels[~scan.bad_pixels], counts[~scan.bad_pixels])
    if options.dialect == "stins":
        assert start.expected_frames == FRAMES
        assert start.geometry.photon_energy_eV == 8800.0
        assert start.metadata["sample"] == "noise"


def test_a_publisher_waits_for_a_slow_subscriber() -> None:
    """Real ones would drop; what a simulator sends arrives."""
    size, count = 1 << 20, 60
    with (
        Outlet("tcp://127.0.0.1:*", "pub", timeout_s=10) as outlet,
        zmq.Context() as context,
        context.socket(zmq.SUB) as socket,
    ):
        socket.linger, socket.rcvhwm = 0, 1
        socket.subscribe(b"")
        socket.connect(outlet.endpoint)
        outlet.wait_for_receiver()
        sending = threading.Thread(
            target=lambda: [outlet.send([bytes([n]) * size]) for n in range(count)]
        )
        sending.start()
        got = [socket.recv()[0] for _ in range(count)]
        sending.join()
    assert got == list(range(count))


def test_modules_take_ports_one_after_the_other() -> None:
    assert consecutive_endpoints("tcp://127.0.0.1:30001", 3) == [
        "tcp://127.0.0.1:30001",
        "tcp://127.0.0.1:30002",
        "tcp://127.0.0.1:30003",
    ]
    assert consecutive_endpoints("tcp://127.0.0.1:*", 2) == ["tcp://127.0.0.1:*"] * 2
    for first in ("ipc:///tmp/x", "tcp://127.0.0.1:65535", "tcp://127.0.0.1:x"):
        with pytest.raises(SettingsError, match="ports"):
            consecutive_endpoints(first, 2)


def test_a_port_that_a_module_cannot_have_frees_those_of_the_others() -> None:
    port = free_port()
    options = DetectorOptions("slsdet", modules_yx=(1, 2))
    with Outlet(f"tcp://127.0.0.1:{port + 1}"), pytest.raises(EndpointError, match="cannot bind"):
        DetectorSimulator(f"tcp://127.0.0.1:{port}", options)
    DetectorSimulator(f"tcp://127.0.0.1:{port}", options).__exit__(None, None, None)


@pytest.mark.parametrize(
    "options",
    [
        {"dialect": "psi", "encoding": "bslz4"},
        {"dialect": "slsdet", "modules_yx": (0, 2)},
        {"dialect": "odin", "modules_yx": (2, 2)},
        {"dialect": "stins", "one_part_each": True},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(SettingsError):
        DetectorOptions(**options)


def test_frames_that_cannot_be_said_are_refused(scan: ScanFile) -> None:
    with DetectorSimulator(options=DetectorOptions("slsdet", modules_yx=(3, 1))) as detector:
        with pytest.raises(SettingsError, match="cannot be cut into 3 x 1 modules"):
            detector.send_series(scan)
        with pytest.raises(SettingsError, match="carry no positions"):
            detector.send_series(scan, inline_positions=True)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (("--dialect", "pva", "--rate", "10", "--socket", "pub"), 2),
        (("--dialect", "odin", "--pva-server", "127.0.0.1:5075"), 2),
        (("--dialect", "psi", "--acquire-channel", "A"), 2),
        (("--dialect", "pva"), 1),
        (("--dialect", "odin", "--modules", "2", "2"), 1),
    ],
)
def test_options_of_other_dialects_are_refused(
    scan: ScanFile, tmp_path: Path, options: tuple[str, ...], status: int
) -> None:
    save_scan(tmp_path / "scan.npz", scan)
    assert main(["replay", str(tmp_path / "scan.npz"), *options]) == status
