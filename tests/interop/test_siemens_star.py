"""The measured siemens star, from a detector's stream to an image judged against the reference.

With our own replay, and with the same frames from libertem-dectris' sender; the image is what
``ptycho-stream watch`` writes, judged by the programs that come with the data.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for
from dectris_dump import write_dump
from make_siemens_star import REFERENCE, SOURCE, siemens_star

from ptycho_stream.files.npz import ScanFile, save_scan
from ptycho_stream.scans import Catalogue
from ptycho_stream.simulate.detector import PositionSimulator

libertem_dectris = pytest.importorskip("libertem_dectris", reason="pip install '.[interop]'")

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]
FRAMES = 516
MAX_NRMSE = 0.15
BATCH = 30
PROGRAM = Path(sys.executable).with_name("ptycho-stream")
KEYS = {
    "object",
    "weight",
    "origin_yx_m",
    "pixel_yx_m",
    "probe",
    "positions_yx_m",
    "frame_numbers",
    "scan_id",
    "metadata",
}


@pytest.fixture(scope="module")
def scan(data_folder: Path) -> ScanFile:
    """The measured frames, with the reference's first probe mode."""
    return siemens_star(data_folder, modes=1)


@pytest.fixture
def daemon(tmp_path: Path, scan: ScanFile) -> DaemonHarness:
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    return DaemonHarness(
        tmp_path,
        {
            "detector": {"dialect": "dectris-v1"},
            "reconstruct": {"size_px": 128, "threads": 2},
            "geometry": None,  # the stream's header tells it
            "positions": {"wait_s": 10.0},
        },
    )


def watch(daemon: DaemonHarness, out: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [PROGRAM, "watch", "--config", daemon.config, *options, "--out", out, "--timeout", "90"],
        stdout=subprocess.DEVNULL,
    )


@contextmanager
def watched(daemon: DaemonHarness, out: Path) -> Iterator[None]:
    """``watch`` runs beside the body, and has written ``out`` after it."""
    program = watch(daemon, out, "--until-complete")
    try:
        yield
        assert program.wait(90) == 0
    finally:
        program.kill()
        program.wait()


def check_file(
    daemon: DaemonHarness,
    scan: ScanFile,
    path: Path,
    data_folder: Path,
    figures: Callable[..., dict[str, float]],
) -> None:
    """All frames are stored bit by bit and are in the file, whose image is good."""
    with np.load(path, allow_pickle=False) as held:
        assert set(held.files) >= KEYS
        assert sorted(held["frame_numbers"].tolist()) == list(range(FRAMES))
        np.testing.assert_array_equal(
            held["positions_yx_m"], scan.positions_yx_m[held["frame_numbers"]]
        )
        scan_id = str(held["scan_id"])
    with Catalogue(daemon.data).open(scan_id) as reader:
        assert reader.header.state == "complete"
        records = reader.records()
        assert sorted(records["number"].tolist()) == list(range(FRAMES))
        for slot, number in enumerate(records["number"].tolist()):
            np.testing.assert_array_equal(reader.frame(slot), scan.counts[number])
    score = figures("score_object.py", path, data_folder / REFERENCE)
    assert score["nrmse"] <= MAX_NRMSE
    assert score["coverage"] > 0.95
    explained = figures("r_factor.py", path, data_folder / SOURCE)
    assert explained["frames"] > 400
    assert np.isfinite(explained["r_factor"])


@pytest.mark.parametrize("dialect", ["dectris-v1", "dectris-v2"])
def test_replayed_by_us(daemon, scan, dialect, figures, data_folder, tmp_path):
    save_scan(tmp_path / "scan.npz", scan)
    daemon.write_config({"detector": {"dialect": dialect}})
    out, again = tmp_path / "object.npz", tmp_path / "once.npz"
    with daemon:
        replay = [PROGRAM, "replay", tmp_path / "scan.npz", "--rate", "200", "--dialect", dialect]
        replay += ["--bind", daemon.detector_endpoint]
        replay += ["--positions-bind", daemon.positions_endpoint]
        with watched(daemon, out):
            subprocess.run(replay, timeout=90, check=True)
        check_file(daemon, scan, out, data_folder, figures)
        assert watch(daemon, again, "--once").wait(60) == 0
    with np.load(out) as first, np.load(again) as second:
        assert set(first.files) == set(second.files)
        for key in first.files:
            np.testing.assert_array_equal(first[key], second[key], err_msg=key)


@pytest.mark.parametrize("timing", ["before", "during", "after"])
def test_sent_by_libertem(daemon, scan, timing, figures, data_folder, tmp_path):
    dump = tmp_path / "star.dump"
    write_dump(dump, scan, series=4)
    sim = libertem_dectris.DectrisSim(
        "tcp://127.0.0.1", str(dump), dwelltime=5000, random_port=True
    )
    daemon.write_config({"detector": {"endpoint": sim.get_uri()}})

    def send_frames() -> None:
        sim.send_headers()
        sim.send_frames()
        sim.send_footer()

    def received() -> float:
        return daemon.metrics().get("ptycho_stream_frames_received_total", 0.0)

    def send_positions(positions: PositionSimulator) -> None:
        """Where they come during the frames, each batch a moment after its frames."""
        positions.start(series=4)
        for first in range(0, FRAMES, BATCH):
            if timing == "during":
                last = min(first + BATCH, FRAMES)
                wait_for(lambda last=last: received() >= last, 30, f"frame {last}")
            part = slice(first, first + BATCH)
            positions.send(scan.frame_numbers[part], scan.positions_yx_m[part])
            if timing == "during" and first == 0:
                assert detector.is_alive(), "the frames are all sent already"
        positions.end()

    detector = threading.Thread(target=send_frames)
    out = tmp_path / "object.npz"
    with daemon, PositionSimulator(daemon.positions_endpoint) as positions, watched(daemon, out):
        positions.wait_for_receiver()
        if timing == "before":
            send_positions(positions)
        detector.start()
        if timing == "during":
            send_positions(positions)
        detector.join(60)
        assert not detector.is_alive()
        if timing == "after":
            wait_for(lambda: received() == FRAMES, 30, "the last frame")
            send_positions(positions)
    check_file(daemon, scan, out, data_folder, figures)
