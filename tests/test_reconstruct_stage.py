"""The reconstruct stage when something is wrong: the image waits or ends, nothing dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from daemon_harness import DaemonHarness, wait_for

from ptycho_stream.client import ResultStream
from ptycho_stream.errors import ControlError, ModelError, StoreError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.results import Image
from ptycho_stream.settings import ModelSettings, ReconstructSettings
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_streamd.reconstruct import ReconstructStage
from ptycho_streamd.reconstruct_metrics import ReconstructMetrics

FRAMES = 40
pytestmark = [pytest.mark.timeout(90), pytest.mark.slow]


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    return scan_file_of(simulate_experiment(seed=8, frames=FRAMES, size_px=64))


@pytest.fixture
def daemon(tmp_path: Path, scan: ScanFile) -> Iterator[DaemonHarness]:
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    harness = DaemonHarness(tmp_path, {"detector": {"dialect": "dectris-v1"}})
    yield harness
    harness.stop()


def send(daemon: DaemonHarness, scan: ScanFile, *, positions: bool = True) -> None:
    with (
        DetectorSimulator(daemon.detector_endpoint) as detector,
        PositionSimulator(daemon.positions_endpoint) as positioner,
    ):
        detector.wait_for_receiver()
        positioner.wait_for_receiver()
        play(scan, detector, positioner if positions else None)


def final_image(daemon: DaemonHarness) -> Image:
    settings = daemon.settings.results
    with ResultStream(settings.endpoint, settings.resync_endpoint) as results:
        return results.wait_complete(timeout_s=30)


def restarts(daemon: DaemonHarness) -> int:
    return daemon.status()["stages"]["reconstruct"]["restarts"]


def test_an_export_folder_that_cannot_be_made_is_said_and_costs_nothing_else(daemon, scan):
    blocked = daemon.folder / "blocked"
    blocked.write_text("a file where the folder should be")
    daemon.write_config({"export": {"directory": str(blocked / "here"), "formats": ["npz"]}})
    daemon.start()
    send(daemon, scan)
    assert final_image(daemon).complete
    daemon.metric("ptycho_stream_exports_failed_total", 1)
    with daemon.control() as control, pytest.raises(ControlError, match=r"export\.directory"):
        control.export()
    assert restarts(daemon) == 0
    assert "cannot make the export folder" in daemon.log


def test_files_are_exported_at_the_end_and_on_request(daemon, scan):
    daemon.write_config({"export": {"directory": "files", "formats": ["npz"]}})
    daemon.start()
    send(daemon, scan)
    image = final_image(daemon)
    path = daemon.folder / "files" / f"{image.scan_id}.npz"
    wait_for(path.exists, what="the export")
    with np.load(path) as held:
        assert np.array_equal(held["object"], image.object_yx, equal_nan=True)
    with daemon.control() as control:
        made = control.export(image.scan_id, ["png"])
    assert made["scan_id"] == image.scan_id
    assert Path(made["paths"][0]).read_bytes().startswith(b"\x89PNG")


def test_requests_before_there_is_a_probe_are_refused_in_words(daemon, scan):
    (daemon.folder / "probe.npz").unlink()
    daemon.start()
    send(daemon, scan)
    with daemon.control() as control:
        wait_for(lambda: control.scans(), what="a scan in the store")
        scan_id = control.scans()[0]["scan_id"]
        with pytest.raises(ControlError, match=r"probe\.npz"):
            control.export(scan_id)
        with pytest.raises(ControlError, match="no image yet"):
            control.export()
    assert restarts(daemon) == 0


def test_a_wrong_view_is_corrected_without_losing_the_image(daemon, scan):
    daemon.start()
    with (
        DetectorSimulator(daemon.detector_endpoint) as detector,
        PositionSimulator(daemon.positions_endpoint) as positioner,
    ):
        detector.wait_for_receiver()
        positioner.wait_for_receiver()
        frames = detector.frames(scan)
        positioner.send_scan(scan)
        for _ in range(10):
            next(frames)
        name = "ptycho_stream_frames_reconstructed_total"
        wait_for(lambda: daemon.metrics().get(name, 0) >= 10, what="the first frames")
        daemon.write_config({"view": {"center_yx_px": [9000.0, 9000.0]}})
        os.kill(daemon.pid, signal.SIGHUP)
        wait_for(
            lambda: "nothing is left" in str(daemon.status()["stages"]["reconstruct"]["status"]),
            what="the complaint about the view",
        )
        daemon.write_config({"view": {"center_yx_px": [32.0, 32.0]}})
        os.kill(daemon.pid, signal.SIGHUP)
        wait_for(lambda: "has view 3" in daemon.log, what="the corrected view")
        for _ in frames:
            pass
    final = final_image(daemon)
    assert final.complete and sorted(final.frame_numbers.tolist()) == list(range(FRAMES))
    assert restarts(daemon) == 0


def test_a_scan_without_positions_ends_with_an_empty_image(daemon, scan):
    daemon.start()
    send(daemon, scan, positions=False)
    final = final_image(daemon)
    assert final.final and final.state == "unmatched"
    assert final.frame_numbers.size == 0 and final.object_yx.size == 0


def test_a_scan_without_geometry_says_what_to_set_and_ends(daemon, scan):
    daemon.write_config({"geometry": None})
    daemon.start()
    bare = ScanFile(scan.counts, scan.positions_yx_m, scan.frame_numbers)
    send(daemon, bare)
    final = final_image(daemon)
    assert final.state == "complete" and final.object_yx.size == 0
    assert "[geometry]" in daemon.log
    assert restarts(daemon) == 0


def test_a_device_that_is_not_there_is_said(daemon, scan):
    daemon.write_config({"reconstruct": {"device": "cuda:63"}})
    daemon.start()
    problem = wait_for(lambda: daemon.status()["stages"]["reconstruct"]["status"].get("problem"))
    assert "cuda:63" in problem
    assert restarts(daemon) == 0


def test_a_former_model_that_does_not_run_here_is_not_gone_back_to(tmp_path, monkeypatch):
    registry = ModelRegistry(tmp_path)
    network, shipped = registry.load()
    for name in ("first", "second"):
        registry.save(network, replace(shipped, name=name, sha256=""))
        registry.use(name)
    (tmp_path / "second" / "weights.safetensors").write_bytes(b"")  # loaded before, so no matter

    def refuse(_self: ReconstructStage, name: str) -> None:
        raise ModelError(f"model {name} does not run on cuda: out of memory")

    monkeypatch.setattr(ReconstructStage, "_loaded_with", refuse)
    stage = object.__new__(ReconstructStage)
    model = ModelSettings(registry=tmp_path)
    monkeypatch.setattr(stage, "_settings", SimpleNamespace(model=model), raising=False)
    with pytest.raises(ModelError, match="model first does not run"):
        stage._rollback_model()
    assert registry.active() == "second"


def test_a_device_without_room_for_a_model_is_an_error_of_the_package(monkeypatch):
    def refuse(*_args: object) -> None:
        raise torch.OutOfMemoryError("no room for 2 GiB")

    monkeypatch.setattr("ptycho_stream.reconstruct.recipe.Predictor", refuse)
    network, shipped = ModelRegistry().load()
    probe = Probe(np.ones((1, 32, 32), np.complex64))
    recipe = Recipe(network, shipped.name, "", probe, None, torch.device("cpu"), 1)
    with pytest.raises(ModelError, match="no room"):
        recipe.warm_up()


def open_scan(name: str, **told: object) -> SimpleNamespace:
    """What the stage asks an open scan that runs and has a batch ready."""
    asked = {"ready": lambda *_: True, "to_rebuild": False, "waits": False, "faults": 0} | told
    reader = SimpleNamespace(scan_id=name, header=SimpleNamespace(sealed=False))
    return SimpleNamespace(reader=reader, refresh=lambda: None, **asked)


def stage_of(
    monkeypatch: pytest.MonkeyPatch, *scans: SimpleNamespace
) -> tuple[ReconstructStage, list[str]]:
    """A stage without a process, and the scans that it takes steps for."""
    stage, worked = object.__new__(ReconstructStage), list[str]()
    for name, value in (
        ("_open", {scan.reader.scan_id: scan for scan in scans}),
        ("_frame_s", 0.0),
        ("_metrics", ReconstructMetrics()),
        ("_settings", SimpleNamespace(reconstruct=ReconstructSettings())),
        ("_step", lambda scan, _limit: worked.append(scan.reader.scan_id)),
    ):
        monkeypatch.setattr(stage, name, value, raising=False)
    return stage, worked


def test_a_scan_that_cannot_say_whether_it_is_ready_waits_and_no_other_does(monkeypatch):
    def unreadable(*_args: object) -> bool:
        raise StoreError("the flat field of the view cannot be read")

    parked = list[str]()
    faulty = open_scan("2", ready=unreadable, park=lambda: parked.append("2"))
    stage, worked = stage_of(monkeypatch, faulty, open_scan("1"))
    assert stage._work()
    assert parked == ["2"] and worked == ["1"]
    assert "flat field" in stage._problem


def test_what_older_scans_want_comes_after_the_fit_that_a_network_waits_for(monkeypatch):
    waiting = open_scan("2", ready=lambda *_: False, waits=True)
    stage, worked = stage_of(monkeypatch, open_scan("1"), waiting)
    assert not stage._work()  # the time goes to the fit
    waiting.waits = False
    assert stage._work() and worked == ["1"]
    stage, worked = stage_of(monkeypatch, waiting, open_scan("3"))
    waiting.waits = True
    assert stage._work() and worked == ["3"]
