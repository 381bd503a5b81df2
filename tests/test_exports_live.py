"""Files of images from a running daemon: at a scan's end, on request, and while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for

from ptycho_stream.client import ResultStream
from ptycho_stream.errors import ControlError
from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.npz import ScanFile, save_scan
from ptycho_stream.reconstruct.offline import reconstruct_file
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_streamd.export_desk import PENDING_FILE
from ptycho_streamd.image_store import DONE_FILE

FRAMES = 60
pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    return scan_file_of(simulate_experiment(seed=8, frames=FRAMES, size_px=64))


@pytest.fixture
def daemon(tmp_path: Path, scan: ScanFile) -> Iterator[DaemonHarness]:
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    export = {
        "directory": "files",
        "formats": ["ptychodus", "cxi", "tiff"],
        "partial_interval_s": 1.0,
    }
    harness = DaemonHarness(tmp_path, {"detector": {"dialect": "dectris-v1"}, "export": export})
    yield harness
    harness.stop()


def left_over(daemon: DaemonHarness, scan: ScanFile) -> str:
    """A scan that was finished when the daemon was stopped, before its files were written."""
    save_scan(daemon.folder / "scan.npz", scan)
    off = {"refine": {"enabled": False}, "trust": {"enabled": False}}
    image = reconstruct_file(daemon.folder / "scan.npz", tables=off, data=daemon.data)
    folder = scan_directory(daemon.data, image.scan_id)
    (folder / DONE_FILE).touch()
    (folder / PENDING_FILE).touch()
    return image.scan_id


def test_files_come_while_a_scan_runs_at_its_end_and_on_request(daemon, scan, tmp_path):
    earlier = left_over(daemon, scan)
    daemon.start()
    wait_for((tmp_path / "files" / f"{earlier}.cxi").exists, 60, "the files that were left over")
    pending = scan_directory(daemon.data, earlier) / PENDING_FILE
    wait_for(lambda: not pending.exists(), 60, "their note to go")

    def partial() -> list[Path]:
        return sorted((tmp_path / "files").glob("*/product.??????.h5"))

    def hold(sent: int) -> None:
        """Half of the frames are there: the detector pauses until a product tells of them."""
        if sent == FRAMES // 2:
            wait_for(partial, 60, "a product while the scan runs")

    with (
        ResultStream(*_endpoints(daemon)) as results,
        DetectorSimulator(daemon.detector_endpoint) as detector,
        PositionSimulator(daemon.positions_endpoint) as positioner,
    ):
        detector.wait_for_receiver()
        positioner.wait_for_receiver()
        play(scan, detector, positioner, on_frame=hold)
        image = results.wait_complete(timeout_s=90)
    folder = tmp_path / "files" / image.scan_id
    first = partial()[0]
    assert first == folder / "product.000001.h5"
    with h5py.File(first) as file:
        numbers = file["probe_position_indexes"][:]
        assert 0 < len(numbers) <= FRAMES // 2 and file["object"].shape[0] == 1
    wait_for((tmp_path / "files" / f"{image.scan_id}.tiff").exists, 60, "the files at its end")
    wait_for((folder / "product.h5").exists, 60, "the product")
    found = load_measured(folder / "product.h5")
    order = np.searchsorted(found.frame_numbers, np.arange(FRAMES))
    np.testing.assert_array_equal(np.asarray(found.counts)[order], scan.counts)
    assert len(load_measured(first)) == len(numbers), "its frames are those of the scan"
    with daemon.control() as control:
        made = control.export(image.scan_id, ["ptychopinn", "npz"])
        assert [Path(path).suffixes for path in made["paths"]] == [
            [".npz"],
            [".ptychopinn", ".npz"],
        ]
        assert len(load_measured(Path(made["paths"][1]))) == FRAMES
        with pytest.raises(ControlError, match=r"no export format 'bmp': use npz, png"):
            control.export(formats=["bmp"])
    written = "ptycho_stream_exports_written_total"  # 4 left over, 4 at the end, 2 asked for
    wait_for(lambda: daemon.metrics().get(written, 0) >= 11, 10, "the count of files")
    assert daemon.metrics()["ptycho_stream_exports_failed_total"] == 0
    assert daemon.status()["stages"]["reconstruct"]["restarts"] == 0
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.tmp"))


def _endpoints(daemon: DaemonHarness) -> tuple[str, str]:
    return daemon.settings.results.endpoint, daemon.settings.results.resync_endpoint
