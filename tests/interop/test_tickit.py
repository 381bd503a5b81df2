"""The EIGER simulator of tickit-devices, versions 1 and 2, and the messages that it was made from.

It needs an older cbor2, so it lives in an environment of its own (``make .venv-tickit/installed``),
whose wheel also holds version 2 messages that a real EIGER2 16M has sent.  What we make of all this
is compared with what HDF5's filter for such frames makes of the same bytes.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import h5py
import numpy as np
import pytest
import zmq
from daemon_harness import DaemonHarness, free_port, wait_for
from numpy.typing import NDArray

from ptycho_stream.messages import Frame, ScanEnd, ScanStart
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.simulate.detector import PositionSimulator
from ptycho_stream.wire import DectrisV2Decoder
from ptycho_stream.wire.compression import decode, decode_window

hdf5plugin = pytest.importorskip("hdf5plugin", reason="pip install '.[interop]'")

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

ENVIRONMENT = Path(__file__).parents[2] / ".venv-tickit"
SHAPE = (4362, 4148)
FRAMES = 3
DETECTOR = "detector/api/1.8.0"
FORMATS = {"dectris-v1": "legacy", "dectris-v2": "cbor"}


@pytest.fixture(scope="module")
def python() -> Path:
    found = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "installed").exists():
        pytest.skip(f"there is no {ENVIRONMENT.name}: make .venv-tickit/installed")
    return found


@pytest.fixture(scope="module")
def recorded(python: Path) -> Path:
    """Where the wheel keeps what real detectors have sent."""
    (found,) = ENVIRONMENT.glob("lib/python*/site-packages/tickit_devices/eiger/data")
    return found


def decompressed(blob: bytes) -> NDArray[np.uint16]:
    """By the filter that reads the files which such detectors write."""
    with h5py.File("in-memory", "w", driver="core", backing_store=False) as file:
        how = hdf5plugin.Bitshuffle(cname="lz4")
        frames = file.create_dataset("frames", SHAPE, "<u2", chunks=SHAPE, **how)
        frames.id.write_direct_chunk((0, 0), blob)
        return frames[...]


@pytest.fixture(scope="module")
def sent(recorded: Path) -> dict[str, NDArray[np.uint16]]:
    """The frame that the simulator sends again and again, by dialect."""
    message = cbor2.loads((recorded / "stream2" / "image.cbor").read_bytes())
    shape, typed = message["data"]["threshold_1"].value
    algorithm, _, blob = typed.value.value
    assert (tuple(shape), typed.tag, algorithm) == (SHAPE, 69, "bslz4")
    return {
        "dectris-v1": decompressed((recorded / "frame_sample").read_bytes()),
        "dectris-v2": decompressed(blob),
    }


class Eiger:
    """The simulator in a process of its own."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.ports = {"dectris-v1": free_port(), "dectris-v2": free_port()}
        self._rest = f"http://127.0.0.1:{free_port()}"
        config = folder / "eiger.yaml"
        config.write_text(
            "- type: tickit_devices.eiger.Eiger\n  name: eiger\n  inputs: {}\n  host: 127.0.0.1\n"
            f"  port: {self._rest.rpartition(':')[2]}\n"
            f"  stream_legacy_port: {self.ports['dectris-v1']}\n"
            f"  stream_cbor_port: {self.ports['dectris-v2']}\n"
        )
        program = Path(__file__).with_name("tickit_bound.py")
        command = [python, program, "--log-level", "WARNING", "all", config]
        self._log = folder / "eiger.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def wait_ready(self) -> None:
        try:
            wait_for(self._answers, 30, "the simulator")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._log.read_text()}") from None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._rest}/{DETECTOR}/status/state", timeout=5):
                return True
        except OSError:
            return False

    def put(self, path: str, value: Any = None) -> None:
        body = b"" if value is None else json.dumps({"value": value}).encode()
        request = urllib.request.Request(f"{self._rest}/{path}", body, method="PUT")
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200

    def acquire(self, dialect: str, header_detail: str) -> None:
        self.put("stream/api/1.8.0/config/format", FORMATS[dialect])
        self.put("stream/api/1.8.0/config/header_detail", header_detail)
        for key, value in (("nimages", FRAMES), ("trigger_mode", "ints"), ("frame_time", 0.05)):
            self.put(f"{DETECTOR}/config/{key}", value)
        for command in ("initialize", "arm", "trigger"):
            self.put(f"{DETECTOR}/command/{command}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def eiger(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Eiger]:
    made = Eiger(python, tmp_path_factory.mktemp("eiger"))
    try:
        made.wait_ready()
        yield made
    finally:
        made.close()


def daemon_for(folder: Path, dialect: str, endpoint: str, **detector: Any) -> DaemonHarness:
    tables: dict[str, Any] = {
        "data": {"frames_per_file": 1},
        "detector": {"dialect": dialect, "endpoint": endpoint, **detector},
    }
    return DaemonHarness(folder, tables, stages=("ingest",))


def sealed(daemon: DaemonHarness, count: int) -> list[ScanHeader]:
    def found() -> list[ScanHeader] | None:
        scans = Catalogue(daemon.data).scans()[::-1]
        return scans if len(scans) == count and all(h.sealed for h in scans) else None

    try:
        return wait_for(found, 40, f"the end of {count} scans")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{daemon.log}") from None


def check(
    daemon: DaemonHarness, header: ScanHeader, frame: NDArray[np.uint16], where: NDArray[np.float64]
) -> None:
    """Assert that a scan holds this frame at each position, bit by bit, and counts no other."""
    assert (header.state, header.expected_frames) == ("complete", len(where)), header.reason
    counts = {name: count for name, count in header.counts.items() if count}
    assert counts == {n: len(where) for n in ("frames", "positioned", "positions")}
    with Catalogue(daemon.data).open(header.scan_id) as reader:
        assert reader.records()["number"].tolist() == list(range(len(where)))
        for slot in range(len(where)):
            np.testing.assert_array_equal(reader.frame(slot), frame)
        pairs = np.sort(reader.pairs(), order="number")
        np.testing.assert_array_equal(np.stack([pairs["y_m"], pairs["x_m"]], axis=1), where)
    daemon.metric("ptycho_stream_frames_missing_total", 0)


@pytest.mark.parametrize("dialect", FORMATS)
def test_its_series_are_stored_bit_exact(
    eiger: Eiger, sent: dict[str, NDArray[np.uint16]], dialect: str, tmp_path: Path
) -> None:
    where = np.random.default_rng(1).normal(0, 1e-6, (FRAMES, 2))
    endpoint = f"tcp://127.0.0.1:{eiger.ports[dialect]}"
    with (
        daemon_for(tmp_path, dialect, endpoint) as daemon,
        PositionSimulator(daemon.positions_endpoint) as positioner,
    ):
        for count, detail in enumerate(("basic", "all"), 1):
            eiger.acquire(dialect, detail)
            (running,) = wait_for(lambda: daemon.ingest().get("scans"), what="a scan")
            positioner.start(running["series"])
            positioner.send(np.arange(FRAMES), where)
            positioner.end()
            header = sealed(daemon, count)[-1]
            check(daemon, header, sent[dialect], where)
        daemon.metric("ptycho_stream_frames_received_total", 2 * FRAMES)
        daemon.metric("ptycho_stream_frames_committed_total", 2 * FRAMES)
        bad = [name for name, n in daemon.metrics().items() if "undecodable_total" in name and n]
        assert not bad, daemon.log


def test_messages_of_a_real_detector_are_understood(
    recorded: Path, sent: dict[str, NDArray[np.uint16]]
) -> None:
    decoder = DectrisV2Decoder()
    names = ("start", "image", "end")
    parts = [(recorded / "stream2" / f"{name}.cbor").read_bytes() for name in names]
    start, frame, end = decoder.receive(parts)
    assert isinstance(start, ScanStart)
    assert (start.series, start.expected_frames, start.frame_shape_yx) == ("15614", 1, SHAPE)
    geometry = start.geometry
    assert geometry.detector_distance_m == pytest.approx(0.23716, abs=1e-5)
    assert geometry.photon_energy_eV == pytest.approx(13500.3, abs=0.01)
    assert geometry.detector_pixel_yx_m == (75e-6, 75e-6)
    assert geometry.beam_center_yx_px == pytest.approx((2163.621, 2049.384), abs=1e-3)
    assert start.metadata["detector_description"] == "Dectris EIGER2 Si 16M"
    assert start.metadata["series_unique_id"] == "01HBV3JPF9T4ZDPADX6EMK6XMZ"
    assert isinstance(frame, Frame)
    assert (frame.number, frame.image.dtype, frame.image.shape_yx) == (0, "<u2", SHAPE)
    assert frame.start_ns == 1_696_348_069_434_000_000  # 2023-10-03 17:47:49.434 +02:00
    assert frame.stop_ns == frame.start_ns + 215_873 * 20  # of a clock of 50 MHz
    expected = sent["dectris-v2"]
    np.testing.assert_array_equal(decode(frame.image), expected)
    window = slice(2000, 2256), slice(1900, 2156)
    np.testing.assert_array_equal(decode_window(frame.image, window), expected[window])
    assert end == ScanEnd("15614")


def test_messages_of_a_real_detector_are_stored(
    recorded: Path, sent: dict[str, NDArray[np.uint16]], tmp_path: Path
) -> None:
    """From a plain PUSH socket; a window about the beam's centre is stored."""
    where = np.array([[1e-6, -2e-6]])
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with (
        daemon_for(tmp_path, "dectris-v2", endpoint, crop_yx_px=[256, 512]) as daemon,
        PositionSimulator(daemon.positions_endpoint) as positioner,
        zmq.Context() as context,
        context.socket(zmq.PUSH) as push,
    ):
        push.linger = 0
        push.bind(endpoint)
        positioner.start(15614)
        positioner.send(np.arange(1), where)
        positioner.end()
        for name in ("start", "image", "end"):
            push.send((recorded / "stream2" / f"{name}.cbor").read_bytes())
        (header,) = sealed(daemon, 1)
        window = slice(2164 - 128, 2164 + 128), slice(2049 - 256, 2049 + 256)
        assert header.crop_corner_yx_px == (2164 - 128, 2049 - 256)
        check(daemon, header, sent["dectris-v2"][window], where)
        with Catalogue(daemon.data).open(header.scan_id) as reader:
            assert reader.records()["start_ns"].tolist() == [1_696_348_069_434_000_000]
        assert header.metadata["detector_serial_number"] == "E-32-0117"
