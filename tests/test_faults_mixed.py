"""Faults of every kind at random while a scan runs, against the model of what must hold.

Stages are killed, stopped and let go on; the disk fills up; the clock is set to another year;
garbage and half-closed connections come to every port; messages are lost and doubled; a subscriber
does not read. Afterwards the store and the image are compared with what was sent, and a quiet scan
has to come out whole, without anybody having touched the daemon.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import zmq
from daemon_harness import DaemonHarness, wait_for
from live_scan import FRAMES, assert_same_image, check_committed_frames, simulated, undisturbed

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.reconstruct.recipe import load_recipe
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image
from ptycho_stream.scans import Catalogue, ScanHeader, ScanReader
from ptycho_stream.simulate.outlet import Outlet
from ptycho_stream.simulate.series import DetectorOptions, NativeSeries

CLOCK = Path(__file__).parent / "stand_in_clock"
RATE_HZ = 75
MALFORMED = 'ptycho_stream_messages_undecodable_total{reason="malformed"}'
READ_NEVER = (
    "import sys, time, zmq; s = zmq.Context().socket(zmq.SUB); s.rcvhwm = 1; "
    "s.subscribe(b''); s.connect(sys.argv[1]); time.sleep(600)"
)


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    return simulated(seed=3)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 48 MB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def daemon(
    tmp_path_factory: pytest.TempPathFactory, disk: Path, scan: ScanFile
) -> Iterator[DaemonHarness]:
    folder = tmp_path_factory.mktemp("mixed")
    np.savez(folder / "probe.npz", probe=scan.probe)
    (folder / "clock").write_bytes(bytes(8))
    settings = {
        "data": {
            "directory": str(disk / "data"),
            "resume_s": 4.0,
            "min_free_bytes": 6_000_000,
            "frames_per_file": 32,
        },
        "positions": {"source": "inline", "endpoint": None, "socket": None},
        "reconstruct": {"save_interval_s": 0.3},
    }
    environment = {
        "PTYCHO_STREAM_TEST_CLOCK": str(folder / "clock"),
        "PYTHONPATH": os.pathsep.join([str(CLOCK), os.environ.get("PYTHONPATH", "")]),
    }
    with DaemonHarness(folder, settings, environment=environment) as harness:
        results = harness.settings.results.endpoint
        deaf = subprocess.Popen([sys.executable, "-c", READ_NEVER, results])
        try:
            yield harness
        finally:
            deaf.kill()
            deaf.wait()


@dataclass
class Stream:
    """A scan that is being sent, and what happens to its messages on the way."""

    scan: ScanFile
    series: int
    rng: random.Random | None
    sent: set[int] = field(default_factory=set)
    doubled: int = 0
    garbage: int = 0

    def run(self, outlet: Outlet) -> None:
        messages = NativeSeries(self.scan, self.series, DetectorOptions("native"), True)
        outlet.send(messages.start())
        for number in range(FRAMES):
            chance = 1.0 if self.rng is None else self.rng.random()
            if chance < 0.03:
                continue  # lost
            if chance < 0.05:
                outlet.send([b"\xc1 no message"])
                self.garbage += 1
            self.sent.add(number)
            outlet.send(messages.frame(number))
            if 0.05 <= chance < 0.08:
                outlet.send(messages.frame(number))
                self.doubled += 1
            time.sleep(1 / RATE_HZ)
        outlet.send(messages.end())


class Faults:
    """What is done to the daemon while it records; each method is one fault."""

    def __init__(self, daemon: DaemonHarness, disk: Path, rng: random.Random) -> None:
        self.daemon, self._disk, self._rng = daemon, disk, rng
        self._open = ExitStack()
        self.kills: list[str] = []
        self.filled = False

    def any(self) -> None:
        """One fault, by chance."""
        faults: list[Callable[[], None]] = [
            *(self.kill, self.kill, self.stand_still, self.stand_still),
            *(self.fill_the_disk, self.set_the_clock, self.garbage, self.half_closed),
        ]
        self._rng.choice(faults)()

    def kill(self) -> None:
        stage = self._rng.choice(("ingest", "reconstruct"))
        self.daemon.kill(stage)
        self.kills.append(stage)

    def stand_still(self) -> None:
        stage = self._rng.choice(("ingest", "reconstruct"))
        pid = self.daemon.stage_pid(stage)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._rng.uniform(0.1, 1.5))
        os.kill(pid, signal.SIGCONT)

    def fill_the_disk(self) -> None:
        self.filled = True
        with suppress(OSError), (self._disk / "others").open("ab", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass

    def set_the_clock(self) -> None:
        ahead_s = self._rng.choice((-3e7, -4000.0, 4000.0, 3e7))
        with (self.daemon.folder / "clock").open("r+b") as file:
            file.write(struct.pack("<d", ahead_s))

    def garbage(self) -> None:
        for port in self._ports():
            with (  # a stage that is being started again does not listen yet
                suppress(ConnectionError),
                socket.create_connection(("127.0.0.1", port), timeout=5) as one,
            ):
                one.sendall(self._rng.randbytes(300))
        settings = self.daemon.settings
        context = zmq.Context()
        for endpoint in (settings.control.endpoint, settings.results.resync_endpoint):
            with context.socket(zmq.DEALER) as junk:
                junk.linger = 200
                junk.connect(endpoint)
                for _ in range(20):
                    junk.send_multipart([self._rng.randbytes(40)] * self._rng.randrange(1, 4))
        context.term()

    def half_closed(self) -> None:
        for port in self._ports():
            with suppress(ConnectionError):
                one = self._open.enter_context(socket.create_connection(("127.0.0.1", port), 5))
                one.shutdown(socket.SHUT_WR)

    def _ports(self) -> list[int]:
        settings = self.daemon.settings
        endpoints = (settings.results.endpoint, settings.results.resync_endpoint)
        ports = [urlsplit(one).port for one in (*endpoints, settings.control.endpoint)]
        return [port for port in (*ports, settings.http.port) if port]

    def end(self) -> None:
        """Everything is as it was, but for what is done already."""
        self._open.close()
        (self._disk / "others").unlink(missing_ok=True)
        wait_for(lambda: self.daemon.ingest().get("refusing") == "", 30, "room for new scans")


def play(daemon: DaemonHarness, stream: Stream) -> threading.Thread:
    def run() -> None:
        with Outlet(daemon.detector_endpoint) as outlet:
            outlet.wait_for_receiver()
            stream.run(outlet)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def finished(daemon: DaemonHarness, series: int) -> list[ScanHeader] | None:
    """The scans of a series, if there are any, all are sealed and their images finished."""
    found = [h for h in Catalogue(daemon.data).scans() if h.series == str(series)]
    folder = daemon.data / "scans"
    over = all(h.sealed and (folder / h.scan_id / "reconstruct.done").exists() for h in found)
    return found if found and over else None


def check_scan(daemon: DaemonHarness, header: ScanHeader, scan: ScanFile, folder: Path) -> set[int]:
    settings = daemon.settings
    numbers = check_committed_frames(settings, header.scan_id, scan)
    with ScanReader.open(settings.data.directory, header.scan_id) as reader:
        positioned = sorted(reader.pairs()["number"].tolist())
        kept = ScanImage(reader, load_recipe(settings), settings.reconstruct.tile_px)
        image = Image(kept.image(final=True)) if positioned else None
    assert len(set(positioned)) == len(positioned) == header.counts["positioned"]
    if image is not None:
        assert sorted(image.frame_numbers.tolist()) == positioned
        quiet = undisturbed(settings, header.scan_id, folder / header.scan_id)
        assert_same_image(image, quiet)
    return set(numbers)


def run_seed(daemon: DaemonHarness, disk: Path, scan: ScanFile, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    Catalogue(daemon.data).retain(0)
    series, before = 2 * seed + 1, daemon.metrics()
    stream, faults = Stream(scan, series, rng), Faults(daemon, disk, random.Random(-seed))
    sender = play(daemon, stream)
    for _ in range(rng.randint(1, 3)):
        time.sleep(rng.uniform(0.2, 1.0))
        faults.any()
    sender.join(60)
    assert not sender.is_alive(), daemon.log[-3000:]
    faults.end()
    said = f"the end of seed {seed}: {faults.kills}, filled {faults.filled}"
    found = [] if faults.filled else wait_for(lambda: finished(daemon, series), 60, said)
    if faults.filled:  # so early, perhaps, that nothing was recorded at all
        wait_for(lambda: daemon.ingest().get("scans") == [], 30, said)
        with suppress(AssertionError):
            found = wait_for(lambda: finished(daemon, series), 20, said)
    numbers = [check_scan(daemon, header, scan, folder) for header in found]
    everything = set().union(*numbers)
    assert sum(map(len, numbers)) == len(everything) and everything <= stream.sent
    if not faults.filled and "ingest" not in faults.kills:
        (header,) = found
        assert header.state == "complete" and everything == stream.sent
        assert header.counts["duplicate"] == stream.doubled
        assert header.counts["missing"] == FRAMES - len(stream.sent)
        grown = daemon.metrics().get(MALFORMED, 0) - before.get(MALFORMED, 0)
        assert grown == stream.garbage
    if faults.filled:
        assert all(h.state == "complete" or "full" in h.reason or faults.kills for h in found)
    quiet = Stream(scan, series + 1, None)
    play(daemon, quiet).join(60)
    (header,) = wait_for(lambda: finished(daemon, series + 1), 60, f"the scan after {said}")
    assert header.state == "complete", (said, header.reason)
    assert check_scan(daemon, header, scan, folder) == set(range(FRAMES))
    assert header.scan_id == max(h.scan_id for h in Catalogue(daemon.data).scans())
    after = daemon.metrics()
    for stage in ("ingest", "reconstruct"):
        key = f'ptycho_stream_stage_restarts_total{{stage="{stage}"}}'
        assert after.get(key, 0) - before.get(key, 0) == faults.kills.count(stage), (
            f"{said}\n{daemon.log[-4000:]}"
        )
    assert "Traceback" not in daemon.log, daemon.log[-6000:]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", range(3))
def test_faults_of_all_kinds_leave_what_must_hold(
    daemon: DaemonHarness, disk: Path, scan: ScanFile, seed: int, tmp_path: Path
) -> None:
    run_seed(daemon, disk, scan, seed, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", range(3, 43))
def test_faults_of_all_kinds_leave_what_must_hold_in_40_scans(
    daemon: DaemonHarness, disk: Path, scan: ScanFile, seed: int, tmp_path: Path
) -> None:
    run_seed(daemon, disk, scan, seed, tmp_path)
