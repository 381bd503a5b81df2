"""areaDetector images over PV Access: a p4p server in a process of its own, into the daemon.

The server is ``ptycho-stream replay --dialect pva``, run with the configuration that ships for APS.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beamline import wait_sealed
from daemon_harness import DaemonHarness, free_port, wait_for
from dialect_profiles import tables_of

from ptycho_stream.cli.endpoint_checkup import check_endpoints
from ptycho_stream.files.npz import ScanFile, save_scan
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.settings import Settings

pytest.importorskip("p4p", reason="pip install '.[pva]'")

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]
PROGRAM = Path(sys.executable).with_name("ptycho-stream")
FRAMES, SHAPE = 60, (32, 48)
CHANNEL, ACQUIRE = "pva://dp_eiger_xrd4:Pva1:Image", "dp_eiger_xrd4:cam1:Acquire_RBV"


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    rng = np.random.default_rng(5)
    return ScanFile(
        counts=rng.poisson(4, (FRAMES, *SHAPE)).astype(np.uint16),
        positions_yx_m=rng.normal(0, 1e-6, (FRAMES, 2)),
        frame_numbers=np.arange(FRAMES),
    )


class Driver:
    """The server at one port, started as often as a test asks."""

    def __init__(self, folder: Path, scan: ScanFile) -> None:
        self.server = f"127.0.0.1:{free_port()}"
        self._file = folder / "scan.npz"
        save_scan(self._file, scan)

    @contextmanager
    def acquiring(self, *options: str, rate_hz: int = 100) -> Iterator[subprocess.Popen[bytes]]:
        """An acquisition by a server that listens, of which the caller awaits the end."""
        command = [PROGRAM, "replay", self._file, "--dialect", "pva", "--bind", CHANNEL]
        command += ["--pva-server", self.server, "--rate", str(rate_hz), "--positions", "inline"]
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        try:
            wait_for(self._listens, 30, "the server")
            yield process
        finally:
            process.kill()
            process.wait()

    def _listens(self) -> bool:
        host, _, port = self.server.partition(":")
        try:
            socket.create_connection((host, int(port)), 1.0).close()
        except ConnectionRefusedError:
            return False
        return True


def states(settings: Settings) -> dict[str, str]:
    found = check_endpoints(settings, timeout_s=2.0)
    return {f.subject: f.state for f in found if f.subject.startswith("detector")}


def stored(daemon: DaemonHarness, header: ScanHeader, scan: ScanFile) -> list[int]:
    """Numbers of a scan's frames, each of which holds what was sent, with its own position."""
    with Catalogue(daemon.data).open(header.scan_id) as reader:
        numbers = reader.records()["number"].tolist()
        for slot, number in enumerate(numbers):
            np.testing.assert_array_equal(reader.frame(slot), scan.counts[number])
        pairs = reader.pairs()
        assert pairs["number"].tolist() == numbers
        found = np.stack([pairs["y_m"], pairs["x_m"]], axis=1)
    np.testing.assert_array_equal(found, scan.positions_yx_m[numbers])
    return numbers


def tables(driver: Driver, **pva: Any) -> dict[str, Any]:
    made = tables_of("aps-pva", [CHANNEL])
    made["detector.pva"] |= {"servers": [driver.server], **pva}
    return made


def test_acquisitions_of_a_driver_become_scans(tmp_path: Path, scan: ScanFile) -> None:
    driver = Driver(tmp_path, scan)
    daemon = DaemonHarness(tmp_path, tables(driver), stages=("ingest",))
    assert states(daemon.settings)["detector"] == "refused"
    with driver.acquiring("--acquire-channel", ACQUIRE) as process:
        wait_for(lambda: states(daemon.settings)["detector"] == "OK")
        assert states(daemon.settings)["detector.pva.acquire_channel"] == "OK"
        process.kill()
    acquiring = ("--acquire-channel", ACQUIRE, "--repeat", "2")
    with driver.acquiring(*acquiring) as process, daemon:
        assert process.wait(60) == 0
        first, second = wait_sealed(daemon, 2)
        for header in (first, second):
            assert header.state == "complete", header.reason
            assert stored(daemon, header, scan) == list(range(FRAMES))
            assert header.counts["positioned"] == FRAMES
            assert header.counts["missing"] == header.counts["duplicate"] == 0
            assert not header.joined_late
        daemon.metric("ptycho_stream_frames_received_total", 2 * FRAMES)
        (endpoint,) = daemon.ingest()["endpoints"]
        assert endpoint["socket"] == "pva" and endpoint["disconnected"] <= 1


def test_a_driver_that_is_killed_and_started_again(tmp_path: Path, scan: ScanFile) -> None:
    """Compressed arrays; without an acquire channel series end by silence."""
    driver = Driver(tmp_path, scan)
    settings = tables(driver, acquire_channel=None)
    settings["detector"] |= {"silence_s": 1.0}
    options = ("--encoding", "bslz4")
    daemon = DaemonHarness(tmp_path, settings, stages=("ingest",))
    with driver.acquiring(*options, rate_hz=50) as process, daemon:
        wait_for(lambda: daemon.ingest()["frames_received"] >= 20, 30)
        process.kill()
        process.wait()
        (cut,) = wait_sealed(daemon, 1)
        assert 20 <= cut.counts["frames"] < FRAMES
        assert stored(daemon, cut, scan) == list(range(cut.counts["frames"]))
        assert states(daemon.settings)["detector"] == "refused"
        with driver.acquiring(*options) as another:
            assert another.wait(60) == 0
            whole = wait_sealed(daemon, 2)[-1]
        assert whole.state == "complete", whole.reason
        assert stored(daemon, whole, scan) == list(range(FRAMES))
        (endpoint,) = daemon.ingest()["endpoints"]
        assert endpoint["connected"] == 2
