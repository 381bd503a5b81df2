"""Processes killed at random while a scan runs: nothing that was committed is lost or altered.

One daemon serves several seeds, each of which is a scan with kills of its own.  After each, what is
in the store and in the image is compared with a model: frames are those that were sent, bit by bit,
each at most once; what was seen committed before a kill is there; holes are counted; the image is
that of an undisturbed run over the same frames; and nobody has repaired anything by hand.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for
from live_scan import (
    FRAMES,
    assert_same_image,
    check_committed_frames,
    simulated,
    undisturbed,
)

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.reconstruct.recipe import load_recipe
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image
from ptycho_stream.scans import Catalogue, ScanHeader, ScanReader
from ptycho_stream.scans.ulid import is_scan_id
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.series import DetectorOptions

VICTIMS = ("ingest", "reconstruct", "supervisor")


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    return simulated(seed=3)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, scan: ScanFile) -> Iterator[DaemonHarness]:
    folder = tmp_path_factory.mktemp("killed")
    np.savez(folder / "probe.npz", probe=scan.probe)
    settings = {
        "data": {"resume_s": 4.0},
        "detector": {"dialect": "dectris-v1"},
        "reconstruct": {"save_interval_s": 0.3},
    }
    with DaemonHarness(folder, settings) as harness:
        yield harness


def scan_ids(daemon: DaemonHarness) -> set[str]:
    folder = daemon.data / "scans"
    return {p.name for p in folder.glob("*") if is_scan_id(p.name)}


def committed_numbers(daemon: DaemonHarness, scans: set[str]) -> set[int]:
    """Numbers of the frames that any reader could have seen by now."""
    seen: set[int] = set()
    for scan_id in scans:
        with ScanReader.open(daemon.data, scan_id) as reader:
            seen |= set(reader.records()["number"].tolist())
    return seen


class Killer:
    """Kills processes of a daemon, and starts it again as systemd would.

    Attributes:
        seen: numbers of frames that were committed before any kill.
        back_s: seconds from each kill until all stages were alive again.
    """

    def __init__(self, daemon: DaemonHarness, before: set[str]) -> None:
        self._daemon = daemon
        self._before = before
        self.seen: set[int] = set()
        self.back_s: list[tuple[str, float]] = []

    def kill(self, victim: str) -> None:
        daemon = self._daemon
        pid = daemon.pid if victim == "supervisor" else daemon.stage_pid(victim)
        self.seen |= committed_numbers(daemon, scan_ids(daemon) - self._before)
        os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        if victim == "supervisor":
            daemon.wait()
            daemon.start()
        else:
            wait_for(lambda: daemon.status()["stages"][victim]["pid"] not in (None, pid), 20)
            daemon.wait_ready()
        self.back_s.append((victim, time.monotonic() - killed_s))


def sealed(daemon: DaemonHarness, before: set[str]) -> list[ScanHeader] | None:
    """The new scans, if there are any and all are sealed and their images finished."""
    found = [h for h in Catalogue(daemon.data).scans() if h.scan_id not in before]
    over = all(
        h.sealed and (daemon.data / "scans" / h.scan_id / "reconstruct.done").exists()
        for h in found
    )
    return found if found and over else None


def check_scan(daemon: DaemonHarness, header: ScanHeader, scan: ScanFile, folder: Path) -> set[int]:
    """Compare a scan and its image with the model; its frames' numbers."""
    settings = daemon.settings
    numbers = check_committed_frames(settings, header.scan_id, scan)
    highest = max(numbers, default=-1)
    announced = FRAMES if header.state == "complete" else highest + 1
    assert header.counts["frames"] == len(numbers)
    assert header.counts["missing"] == announced - len(numbers)
    with ScanReader.open(settings.data.directory, header.scan_id) as reader:
        pairs = reader.pairs()
        positioned = sorted(pairs["number"].tolist())
        assert len(set(positioned)) == len(positioned) == header.counts["positioned"]
        expected_yx_m = scan.positions_yx_m[pairs["number"].astype(int)]
        assert np.array_equal(np.stack([pairs["y_m"], pairs["x_m"]], 1), expected_yx_m)
        if not len(pairs):
            return set(numbers)
        kept = ScanImage(reader, load_recipe(settings), settings.reconstruct.tile_px)
        image = Image(kept.image(final=True))
    assert sorted(image.frame_numbers.tolist()) == positioned
    assert_same_image(image, undisturbed(settings, header.scan_id, folder / header.scan_id))
    return set(numbers)


@contextmanager
def playing(daemon: DaemonHarness, scan: ScanFile, series: int) -> Iterator[None]:
    """The scan is being played while the body runs; waits for its end.

    Without a subscriber: what one has not read when its publisher is killed makes libzmq 4.3.5
    abort this process once in some hundred times.
    """
    options = DetectorOptions(rate_hz=60)
    with (
        DetectorSimulator(daemon.detector_endpoint, options) as detector,
        PositionSimulator(daemon.positions_endpoint) as positions,
    ):
        player = threading.Thread(
            target=play, args=(scan, detector, positions), kwargs={"series": series}
        )
        player.start()
        try:
            yield
        finally:
            player.join(60)
            assert not player.is_alive()


def run_seed(daemon: DaemonHarness, scan: ScanFile, seed: int, folder: Path) -> Killer:
    rng = np.random.default_rng(seed)
    before = scan_ids(daemon)
    killer = Killer(daemon, before)
    with playing(daemon, scan, series=seed + 1):
        for _ in range(rng.integers(1, 4)):
            time.sleep(rng.uniform(0.0, 1.2))
            killer.kill(str(rng.choice(VICTIMS)))
    found = wait_for(lambda: sealed(daemon, before), 60, f"the end of seed {seed}\n{daemon.log}")
    frames: set[int] = set()
    for header in found:
        numbers = check_scan(daemon, header, scan, folder)
        assert frames.isdisjoint(numbers), "a frame is in two scans"
        frames |= numbers
    assert killer.seen <= frames
    assert daemon.metrics().get("ptycho_stream_scans_unrecoverable_total", 0.0) == 0
    assert "Traceback" not in daemon.log, "a stage that ends alone ends in order"
    return killer


def run_seeds(daemon: DaemonHarness, scan: ScanFile, seeds: range, folder: Path) -> None:
    back_s: list[tuple[str, float]] = []
    for seed in seeds:
        back_s += run_seed(daemon, scan, seed, folder).back_s
    for victim in VICTIMS:
        times = sorted(seconds for name, seconds in back_s if name == victim)
        if times:
            print(
                f"{victim}: {len(times)} kills, back after {times[len(times) // 2]:.1f} s", end=""
            )
            print(f" (median), {times[-1]:.1f} s at most")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_processes_killed_at_random_change_nothing(
    daemon: DaemonHarness, scan: ScanFile, tmp_path: Path
) -> None:
    run_seeds(daemon, scan, range(3), tmp_path)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, 100, 10))
def test_processes_killed_at_random_change_nothing_in_100_scans(
    daemon: DaemonHarness, scan: ScanFile, first: int, tmp_path: Path
) -> None:
    run_seeds(daemon, scan, range(first, first + 10), tmp_path)
