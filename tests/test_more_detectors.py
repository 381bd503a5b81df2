"""A second detector beside the reconstructed one, in one daemon: stored, linked, never an image."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from beamline import wait_sealed
from daemon_harness import DaemonHarness, wait_for
from scan_samples import make_header, write_frames
from typer.testing import CliRunner

from ptycho_stream.cli import build_app
from ptycho_stream.cli.endpoint_checkup import check_endpoints
from ptycho_stream.errors import ControlError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.writer import ScanWriter
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.series import DetectorOptions

FRAMES = 30


def made_scan(seed: int, shape: tuple[int, int]) -> ScanFile:
    rng = np.random.default_rng(seed)
    return ScanFile(
        counts=rng.poisson(4, (FRAMES, *shape)).astype(np.uint16),
        positions_yx_m=np.rint(rng.normal(0, 1e3, (FRAMES, 2))) * 1e-9,
        frame_numbers=np.arange(FRAMES),
    )


FAR, NEAR = made_scan(1, (64, 64)), made_scan(2, (20, 36))


class Line:
    """A native detector with positions, an Odin detector beside it, and their daemon."""

    def __init__(self, folder: Path) -> None:
        self.beside = DetectorSimulator(options=DetectorOptions("odin", rate_hz=200))
        fluo = {"name": "fluo", "dialect": "odin", "socket": "sub", "silence_s": 0.5}
        self.daemon = DaemonHarness(
            folder, {"more_detectors": [{**fluo, "endpoint": self.beside.endpoint}]}
        )
        self.detector = DetectorSimulator(
            self.daemon.detector_endpoint, DetectorOptions("native", rate_hz=200)
        )
        self.positions = PositionSimulator(self.daemon.positions_endpoint)

    def close(self) -> None:
        for sender in (self.beside, self.detector, self.positions):
            sender.__exit__(KeyboardInterrupt, None, None)

    def headers(self) -> list[ScanHeader]:
        """All scans, oldest first."""
        return Catalogue(self.daemon.data).scans()[::-1]

    def frames(self, scan_id: str) -> dict[int, np.ndarray]:
        with Catalogue(self.daemon.data).open(scan_id) as reader:
            numbers = reader.records()["number"].tolist()
            return {number: reader.frame(slot).copy() for slot, number in enumerate(numbers)}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    line = Line(tmp_path_factory.mktemp("line"))
    try:
        with line.daemon:
            for sender in (line.beside, line.detector, line.positions):
                sender.wait_for_receiver(20)
            yield line
    finally:
        line.close()


@pytest.fixture(scope="module")
def both(line: Line) -> tuple[ScanHeader, ScanHeader]:
    """A scan of both detectors: the reconstructed one's, and the one beside it."""
    beside, detector = line.beside.frames(NEAR, 7), line.detector
    for _ in range(3):  # it begins before the other has said anything
        next(beside)
    play(FAR, detector, line.positions, "before", on_frame=lambda _: next(beside, None))
    for _ in beside:
        pass
    found = wait_sealed(line.daemon, 2)
    (main,) = (header for header in found if not header.detector)
    (other,) = (header for header in found if header.detector)
    return main, other


def test_both_are_stored_and_know_of_each_other(line: Line, both) -> None:
    main, other = both
    assert (main.state, other.state) == ("complete", "complete"), (main.reason, other.reason)
    assert (main.detector, main.beside) == ("", None)
    assert (other.detector, other.beside) == ("fluo", main.scan_id)
    assert other.created_ns < main.created_ns
    for header, scan in ((main, FAR), (other, NEAR)):
        stored = line.frames(header.scan_id)
        assert sorted(stored) == list(range(FRAMES))
        for number, pixels in stored.items():
            np.testing.assert_array_equal(pixels, scan.counts[number])
    assert main.counts["positioned"] == FRAMES
    assert other.counts["positioned"] == other.counts["unpositioned"] == 0


def test_only_one_becomes_an_image(line: Line, both) -> None:
    main, other = both
    catalogue = Catalogue(line.daemon.data)
    wait_for(lambda: (catalogue.directory(main.scan_id) / "reconstruct.done").exists(), 20)
    assert not list(catalogue.directory(other.scan_id).glob("reconstruct*"))
    with line.daemon.control() as control:
        assert control.call("scan", {"scan_id": None})["scan_id"] == main.scan_id
        for command, more in (
            ("export", {"formats": ["npz"]}),
            ("snapshot", {"name": "a", "force": False}),
            ("reprocess", {}),
            ("finetune", {"scan_ids": [other.scan_id]}),
        ):
            arguments = more if command == "finetune" else {"scan_id": other.scan_id, **more}
            with pytest.raises(ControlError, match=r"stored and not reconstructed|model.registry"):
                control.call(command, arguments)


def test_its_frames_are_exported_with_the_positions_of_the_scan(line: Line, both, tmp_path) -> None:
    main, other = both
    done = CliRunner().invoke(
        build_app(["export-detectors"]),
        ["export-detectors", "--config", str(line.daemon.config), "--out", str(tmp_path), "--json"],
    )
    assert done.exit_code == 0, done.output
    path = tmp_path / f"{main.scan_id}-fluo.h5"
    wanted = {"file": str(path), "scan_id": other.scan_id, "frames": FRAMES}
    assert json.loads(done.output) == [wanted]
    with h5py.File(path) as file:
        data = file["entry/data"]
        np.testing.assert_array_equal(data["data"], NEAR.counts)
        np.testing.assert_array_equal(data["frame_number"], np.arange(FRAMES))
        np.testing.assert_array_equal(data["position_yx_m"], FAR.positions_yx_m)
        assert (np.diff(data["received_ns"]) >= 0).all()
        assert file["entry"].attrs["beside"] == main.scan_id
    none = CliRunner().invoke(
        build_app(["export-detectors"]),
        ["export-detectors", "--config", str(line.daemon.config), "--detector", "other"],
    )
    assert "no scan of other is beside" in str(none.exception)


def test_status_metrics_and_doctor_tell_them_apart(line: Line, both) -> None:
    received = "ptycho_stream_frames_received_total"
    line.daemon.metric(received, FRAMES)
    line.daemon.metric(f'{received}{{detector="fluo"}}', FRAMES)
    stages = line.daemon.status()["stages"]
    assert set(stages) == {"ingest", "ingest-fluo", "reconstruct"}
    found = check_endpoints(line.daemon.settings, timeout_s=2.0)
    states = {finding.subject: finding.state for finding in found}
    assert states["detector"] == states["more_detectors.fluo"] == "OK"


def test_one_that_is_alone_says_so_and_can_be_stopped(line: Line, both) -> None:
    sending = line.beside.frames(NEAR, 8)
    next(sending)
    wait_for(lambda: len(line.headers()) == 3)
    scan_id = line.headers()[-1].scan_id
    with line.daemon.control() as control:
        with pytest.raises(ControlError, match="no scan is running"):
            control.stop()
        assert control.stop(scan_id) == {"scan_id": scan_id}
    header = wait_sealed(line.daemon, 3)[-1]
    assert (header.state, header.beside) == ("unmatched", None)
    assert "no scan of the reconstructed detector" in header.reason


def test_its_death_costs_the_other_nothing(line: Line, both) -> None:
    beside = line.beside.frames(NEAR, 9)
    for _ in range(10):
        next(beside)
    name = 'ptycho_stream_frames_committed_total{detector="fluo"}'
    wait_for(lambda: line.daemon.metrics().get(name, 0) >= FRAMES + 11)
    line.daemon.kill("ingest-fluo")
    play(FAR, line.detector, line.positions, "before", series=2)
    wait_for(lambda: line.daemon.status()["stages"]["ingest-fluo"]["alive"], 20)
    line.beside.wait_for_receiver(20)
    time.sleep(0.3)  # a subscription takes a moment
    for _ in beside:
        pass
    found = wait_sealed(line.daemon, 5)
    main = next(h for h in reversed(found) if not h.detector)
    other = next(h for h in reversed(found) if h.detector)
    assert main.state == "complete" and len(line.frames(main.scan_id)) == FRAMES
    stored = line.frames(other.scan_id)
    assert {*range(10)} <= set(stored) and len(stored) > 10
    for number, pixels in stored.items():
        np.testing.assert_array_equal(pixels, NEAR.counts[number])


def test_a_detector_that_is_taken_out_of_the_settings_leaves_no_open_scan(tmp_path: Path) -> None:
    daemon = DaemonHarness(tmp_path, stages=("ingest",))
    with ScanWriter.create(daemon.data, make_header(detector="fluo", state="running"), 10) as left:
        write_frames(left, range(5), pairs=False)
        left.commit()
    with daemon:
        (header,) = Catalogue(daemon.data).scans()
    assert header.state == "interrupted" and "not in the settings" in header.reason
    with Catalogue(daemon.data).open(header.scan_id) as reader:
        assert reader.committed == 5
