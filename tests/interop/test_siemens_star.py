"""The measured siemens star, from a detector's stream to an image judged against the reference.

Once with our own replay, once with the same frames from libertem-dectris' sender; judged by the
scoring program that comes with the data.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness
from dectris_dump import write_dump
from make_siemens_star import REFERENCE, siemens_star

from ptycho_stream.client import ResultStream
from ptycho_stream.files.npz import ScanFile, save_scan
from ptycho_stream.results import Image
from ptycho_stream.scans import Catalogue
from ptycho_stream.simulate.detector import PositionSimulator

libertem_dectris = pytest.importorskip("libertem_dectris", reason="pip install '.[interop]'")

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]
FRAMES = 516
MAX_NRMSE = 0.15


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


@pytest.fixture
def score(data_folder: Path, tmp_path: Path) -> Callable[[Image], dict[str, float]]:
    tool = data_folder.parent / "tools" / "score_object.py"

    def judge(image: Image) -> dict[str, float]:
        image.save(tmp_path / "object.npz")
        answer = subprocess.run(
            [sys.executable, tool, tmp_path / "object.npz", data_folder / REFERENCE],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return {name: float(v) for name, v in (row.split() for row in answer.stdout.splitlines())}

    return judge


def final_image(daemon: DaemonHarness) -> Image:
    results = daemon.settings.results
    with ResultStream(results.endpoint, results.resync_endpoint) as stream:
        return stream.wait_complete(timeout_s=90)


def assert_all_frames_and_a_good_image(daemon, scan, image, figures) -> None:
    print(figures)
    assert image.complete
    assert sorted(image.frame_numbers.tolist()) == list(range(FRAMES))
    with Catalogue(daemon.data).open(image.scan_id) as reader:
        for slot, number in enumerate(reader.records()["number"].tolist()):
            np.testing.assert_array_equal(reader.frame(slot), scan.counts[number])
    assert figures["nrmse"] <= MAX_NRMSE
    assert figures["coverage"] > 0.95


def test_replayed_by_us(daemon, scan, score, tmp_path):
    save_scan(tmp_path / "scan.npz", scan)
    with daemon:
        replay = [Path(sys.executable).with_name("ptycho-stream"), "replay", tmp_path / "scan.npz"]
        replay += ["--bind", daemon.detector_endpoint, "--rate", "200"]
        replay += ["--positions-bind", daemon.positions_endpoint]
        subprocess.run(replay, timeout=90, check=True)
        image = final_image(daemon)
        assert_all_frames_and_a_good_image(daemon, scan, image, score(image))


def test_sent_by_libertem(daemon, scan, score, tmp_path):
    dump = tmp_path / "star.dump"
    write_dump(dump, scan, series=4)
    sim = libertem_dectris.DectrisSim(
        "tcp://127.0.0.1", str(dump), dwelltime=5000, random_port=True
    )
    daemon.write_config({"detector": {"endpoint": sim.get_uri()}})
    with daemon, PositionSimulator(daemon.positions_endpoint) as positions:
        positions.wait_for_receiver()
        positions.send_scan(scan, series=4)
        sim.send_headers()
        sim.send_frames()
        sim.send_footer()
        image = final_image(daemon)
        assert_all_frames_and_a_good_image(daemon, scan, image, score(image))
