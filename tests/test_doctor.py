"""The doctor says what is wrong with a configuration, and takes no frame while it looks."""

from __future__ import annotations

import json
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from daemon_harness import DaemonHarness, free_port, wait_for
from typer.testing import CliRunner

from ptycho_stream.cli.checkup import Finding, check_files, check_machine
from ptycho_stream.cli.config import app as config_app
from ptycho_stream.cli.endpoint_checkup import check_endpoints
from ptycho_stream.cli.knock import knock
from ptycho_stream.cli.pva_checkup import check_channels
from ptycho_stream.errors import SettingsError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.settings import DetectorSettings, Settings, load_settings
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.series import DetectorOptions

FRAMES = 4000


class Senders:
    """Bound sockets that live as long as a test."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self._kept: list[zmq.Socket] = []

    def socket(self, kind: int) -> zmq.Socket:
        self._kept.append(self.context.socket(kind))
        return self._kept[-1]

    def bound(self, kind: int) -> tuple[zmq.Socket, str]:
        sender = self.socket(kind)
        return sender, f"tcp://127.0.0.1:{sender.bind_to_random_port('tcp://127.0.0.1')}"


@pytest.fixture
def senders() -> Iterator[Senders]:
    senders = Senders()
    yield senders
    senders.context.destroy(linger=0)


def settings_with(
    folder: Path, detector: str | None = None, positions: str | None = None
) -> Settings:
    here = "tcp://127.0.0.1:{}"
    return Settings.model_validate(
        {
            "data": {"directory": folder / "data", "min_free_bytes": 0},
            "probe": {"path": folder / "probe.npz"},
            "detector": {"endpoint": detector or here.format(free_port())},
            "positions": {"endpoint": positions or here.format(free_port()), "socket": "sub"},
            "results": {
                "endpoint": here.format(free_port()),
                "resync_endpoint": here.format(free_port()),
            },
            "control": {"endpoint": here.format(free_port())},
            "http": {"port": free_port()},
            "viewer": {"port": free_port()},
            "reconstruct": {"size_px": 32, "device": "cpu"},
        }
    )


def states(settings: Settings) -> dict[str, str]:
    return {found.subject: found.state for found in check_endpoints(settings, timeout_s=0.5)}


@pytest.mark.parametrize("kind", ["PUSH", "PUB", "XPUB", "ROUTER", "PULL"])
def test_knocking_tells_the_kind_of_socket(senders: Senders, kind: str) -> None:
    _, endpoint = senders.bound(getattr(zmq, kind))
    found = knock(endpoint)
    assert (found.answer, found.socket_type) == ("ok", kind)


def test_knocking_works_over_ipc(senders: Senders, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/detector"
    assert knock(endpoint).answer == "refused"
    senders.socket(zmq.PUSH).bind(endpoint)
    assert knock(endpoint).socket_type == "PUSH"


def test_a_socket_with_keys_is_told_from_one_without(senders: Senders) -> None:
    sender = senders.socket(zmq.PUSH)
    sender.curve_server = True
    sender.curve_publickey, sender.curve_secretkey = zmq.curve_keypair()
    port = sender.bind_to_random_port("tcp://127.0.0.1")
    assert knock(f"tcp://127.0.0.1:{port}").answer == "keyed"


def test_a_port_that_says_nothing_is_silent_and_a_closed_one_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert knock(endpoint, 0.2).answer == "silent"
    assert knock(endpoint, 0.2).answer == "refused"


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff\x00", b""])
def test_something_that_is_not_zeromq_is_told(greeting: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            line, _ = server.accept()
            line.sendall(greeting)
            line.close()

        thread = threading.Thread(target=answer)
        thread.start()
        found = knock(f"tcp://127.0.0.1:{server.getsockname()[1]}", 1.0)
        thread.join()
    assert found.answer == "not zeromq"


def test_no_frame_is_taken_while_it_looks(senders: Senders, tmp_path: Path) -> None:
    """A PUSH would deal frames to a second PULL: 424 of 2,000 went that way once."""
    sender, endpoint = senders.bound(zmq.PUSH)
    reader = senders.socket(zmq.PULL)
    reader.connect(endpoint)
    got: list[int] = []
    sent = threading.Event()

    def stream() -> None:
        for k in range(FRAMES):
            sender.send(k.to_bytes(4, "big"))
            time.sleep(0.0002)
        sent.set()

    thread = threading.Thread(target=stream)
    thread.start()
    settings = settings_with(tmp_path, detector=endpoint)
    looks = 0

    def look() -> None:
        while not sent.is_set():
            check_endpoints(settings, 0.5)

    looker = threading.Thread(target=look)
    looker.start()
    while len(got) < FRAMES and reader.poll(2000):
        got.append(int.from_bytes(reader.recv(), "big"))
        looks += looker.is_alive()
    thread.join()
    looker.join()
    assert looks > 100, "the doctor looked while frames were under way"
    assert got == list(range(FRAMES))


def test_streams_are_judged_without_a_daemon(senders: Senders, tmp_path: Path) -> None:
    _, push = senders.bound(zmq.PUSH)
    _, pub = senders.bound(zmq.PUB)
    assert states(settings_with(tmp_path, push, pub)) == {
        "control": "no daemon",
        "detector": "OK",
        "positions": "OK",
        "results": "OK",
        "results.resync": "OK",
        "http": "OK",
        "viewer": "OK",
    }
    swapped = states(settings_with(tmp_path, pub, push))
    assert (swapped["detector"], swapped["positions"]) == ("wrong kind", "wrong kind")
    assert states(settings_with(tmp_path))["detector"] == "refused"


def test_every_endpoint_of_a_detector_is_judged(senders: Senders, tmp_path: Path) -> None:
    _, pub = senders.bound(zmq.PUB)
    _, push = senders.bound(zmq.PUSH)
    settings = settings_with(tmp_path)
    detector = DetectorSettings(
        dialect="slsdet", socket="sub", endpoint=pub, more_endpoints=(push, "tcp://127.0.0.1:1")
    )
    found = check_endpoints(settings.model_copy(update={"detector": detector}), 0.5)
    states = {f.target: f.state for f in found if f.subject == "detector"}
    assert states == {pub: "OK", push: "wrong kind", "tcp://127.0.0.1:1": "refused"}


def test_a_channel_needs_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "p4p.client.thread", None)
    detector = DetectorSettings(dialect="pva", endpoint="pva://SIM:Image")
    (found,) = check_channels("detector", detector, timeout_s=0.5)
    assert (found.state, found.ok) == ("no library", False)
    assert "pip install 'ptycho-stream[pva]'" in found.detail


def test_a_port_that_another_program_uses_is_told(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    port = int(settings.results.endpoint.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        assert states(settings)["results"] == "in use"
    with socket.create_server(("127.0.0.1", settings.viewer.port)):
        assert states(settings)["viewer"] == "in use"
    unseen = settings.viewer.model_copy(update={"enabled": False})
    assert "viewer" not in states(settings.model_copy(update={"viewer": unseen}))


def test_an_address_of_ipv6_is_looked_at(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    http = settings.http.model_copy(update={"host": "::1"})
    settings = settings.model_copy(update={"http": http})
    assert states(settings)["http"] in ("OK", "in use")  # in use: this machine has no IPv6


@pytest.mark.parametrize(
    ("device", "gpus", "state"),
    [
        ("auto", 0, "OK"),
        ("cpu", 1, "OK"),
        ("cuda", 0, "missing"),
        ("cuda", 1, "OK"),
        ("cuda:1", 2, "OK"),
        ("cuda:1", 1, "missing"),
    ],
)
def test_the_device_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, state: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    settings = settings_with(tmp_path)
    reconstruct = settings.reconstruct.model_copy(update={"device": device})
    (found,) = check_machine(settings.model_copy(update={"reconstruct": reconstruct}))
    assert (found.state, found.ok) == (state, state == "OK")


def test_files_are_looked_at(tmp_path: Path) -> None:
    def found() -> dict[str, str]:
        return {finding.subject: finding.state for finding in check_files(settings)}

    settings = settings_with(tmp_path)
    assert found()["probe.path"] == "missing"
    assert found()["data.directory"] == "OK"
    np.savez(tmp_path / "probe.npz", probe=np.ones((1, 64, 64), np.complex64))
    assert found()["probe.path"] == "wrong size"
    np.savez(tmp_path / "probe.npz", probe=np.zeros((1, 32, 32), np.complex64))
    assert found()["probe.path"] == "unusable"
    np.savez(tmp_path / "probe.npz", probe=np.ones((1, 32, 32), np.complex64))
    assert found()["probe.path"] == "OK"
    settings = settings.model_copy(
        update={
            "data": settings.data.model_copy(update={"min_free_bytes": 10**18}),
            "model": settings.model.model_copy(update={"name": "no-such-model"}),
        }
    )
    assert found()["data.directory"] == "full"
    assert found()["model.name"] == "unusable"


def test_optics_are_tried_out_where_the_geometry_is_known(tmp_path: Path) -> None:
    def found(text: str) -> Finding:
        path = tmp_path / "optics.toml"
        path.write_text(f'[probe.optics]\nkind = "gaussian"\nfwhm_m = 3e-7\n{text}')
        checked = CliRunner().invoke(config_app, ["check", str(path)])
        (finding,) = [f for f in check_files(load_settings(path)) if f.subject == "probe.optics"]
        assert isinstance(checked.exception, SettingsError) is not finding.ok
        assert finding.ok or finding.detail in str(checked.exception)
        return finding

    geometry = "detector_distance_m = 2.0\ndetector_pixel_yx_m = [75e-6, 75e-6]\n"
    unknown = found(f"[geometry]\n{geometry}")
    assert unknown.ok and "made for each scan" in unknown.detail
    known = found(f"[geometry]\nphoton_energy_eV = 8800.0\n{geometry}")
    assert known.ok and "fits 128 pixels of 29.4 nm" in known.detail
    wide = found(f"defocus_m = 1.0\n[geometry]\nphoton_energy_eV = 8800.0\n{geometry}")
    assert (wide.state, wide.target) == ("unusable", "gaussian")
    assert "come nearer to the waist" in wide.detail


@contextmanager
def hanging_up(endpoint: str) -> Iterator[None]:
    """Something that listens at an endpoint and closes every connection, as a proxy may."""
    host, port = endpoint.removeprefix("tcp://").split(":")

    class Server(socketserver.TCPServer):
        allow_reuse_address = True

    with Server((host, int(port)), socketserver.BaseRequestHandler) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.05,))
        serving.start()
        try:
            yield
        finally:
            server.shutdown()
            serving.join()


def test_a_running_daemon_is_asked_and_loses_no_frame(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scan = ScanFile(
        rng.poisson(3, (400, 64, 64)).astype(np.uint16),
        rng.normal(0, 1e-6, (400, 2)),
        np.arange(400),
    )
    dialect = {"detector": {"dialect": "dectris-v1"}}
    with DaemonHarness(tmp_path, dialect, stages=("ingest",)) as daemon:
        settings = daemon.settings
        before = states(settings)
        assert (before["control"], before["detector"]) == ("OK", "refused")
        with hanging_up(daemon.detector_endpoint):
            wait_for(lambda: states(settings)["detector"] == "no handshake")
        with (
            DetectorSimulator(daemon.detector_endpoint, DetectorOptions(rate_hz=200)) as detector,
            PositionSimulator(daemon.positions_endpoint) as positions,
        ):
            detector.wait_for_receiver()
            positions.wait_for_receiver()
            wait_for(lambda: states(settings)["detector"] == "silent")
            player = threading.Thread(target=play, args=(scan, detector, positions))
            player.start()
            seen = []
            while player.is_alive():
                seen.append(states(settings)["detector"])
                time.sleep(0.02)
            player.join()
            assert wait_for(
                lambda: [header for header in Catalogue(daemon.data).scans() if header.ended_ns],
                30,
                what=daemon.log[-3000:],
            )
        (header,) = Catalogue(daemon.data).scans()
        assert header.state == "complete"
        with Catalogue(daemon.data).open(header.scan_id) as reader:
            assert reader.committed == len(scan)
    assert "OK" in seen and len(seen) > 5


@pytest.mark.timeout(90)
def test_the_command_prints_and_tells_by_its_exit_status(senders: Senders, tmp_path: Path) -> None:
    _, push = senders.bound(zmq.PUSH)
    (tmp_path / "beamline.toml").write_text(
        f"""
        [detector]
        endpoint = "{push}"
        [positions]
        source = "inline"
        [probe]
        path = "probe.npz"
        [data]
        min_free_bytes = 0
        [control]
        endpoint = "tcp://127.0.0.1:{free_port()}"
        [results]
        endpoint = "tcp://127.0.0.1:{free_port()}"
        resync_endpoint = "tcp://127.0.0.1:{free_port()}"
        [http]
        port = 0
        [viewer]
        port = 0
        [reconstruct]
        device = "cpu"
        """
    )

    def doctor(*options: str) -> subprocess.CompletedProcess[str]:
        program = "import sys; from ptycho_stream.cli import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", program, "doctor", *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    sick = doctor("--config", str(tmp_path / "beamline.toml"))
    assert sick.returncode == 1
    assert "probe.path\tmissing" in sick.stdout
    np.savez(tmp_path / "probe.npz", probe=np.ones((1, 128, 128), np.complex64))
    well = doctor("--config", str(tmp_path / "beamline.toml"), "--json")
    assert well.returncode == 0, well.stdout + well.stderr
    report = {finding["subject"]: finding["state"] for finding in json.loads(well.stdout)}
    assert report["detector"] == report["probe.path"] == report["model.name"] == "OK"
    assert doctor("--no-such-option").returncode == 2
    assert doctor("--config", str(tmp_path / "none.toml")).returncode == 1
