"""Training on a scan that runs: a job of its own process, a new model, a new image, no frame lost.

Everything is real: the daemon, its stages, Lightning, the kills.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for
from test_jobs import job, trainer_pid, until

from ptycho_stream.client import ResultStream
from ptycho_stream.errors import ControlError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.models.active import DEFAULT_MODEL
from ptycho_stream.models.folders import model_folder
from ptycho_stream.results import Image
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

FRAMES, LAST = 240, 40
RECONSTRUCTED = "ptycho_stream_frames_reconstructed_total"
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    return scan_file_of(simulate_experiment(seed=11, frames=FRAMES, size_px=64))


@pytest.fixture
def harness(tmp_path: Path, scan: ScanFile) -> Iterator[DaemonHarness]:
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    tables: dict[str, dict[str, Any] | None] = {
        "detector": {"dialect": "dectris-v1"},
        "model": {"registry": "models"},
        "training": {"nice": 0},  # a machine busy with other things would starve it
    }
    harness = DaemonHarness(tmp_path, tables)
    yield harness
    harness.stop()


@pytest.fixture
def daemon(harness: DaemonHarness) -> DaemonHarness:
    harness.start()
    return harness


class Player(threading.Thread):
    """Sends a scan beside the test: all but the last frames steadily, those when the test says."""

    def __init__(self, daemon: DaemonHarness, scan: ScanFile, pause_s: float) -> None:
        super().__init__()
        self._daemon, self._scan, self._pause_s = daemon, scan, pause_s
        self.to_the_end = threading.Event()

    def run(self) -> None:
        with (
            DetectorSimulator(self._daemon.detector_endpoint) as detector,
            PositionSimulator(self._daemon.positions_endpoint) as positioner,
        ):
            detector.wait_for_receiver()
            positioner.wait_for_receiver()
            positioner.send_scan(self._scan)
            for number, _ in enumerate(detector.frames(self._scan)):
                if number == FRAMES - LAST:
                    self.to_the_end.wait(120)
                self.to_the_end.wait(self._pause_s)

    def __enter__(self) -> Player:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.to_the_end.set()
        self.join()


def scan_ids(daemon: DaemonHarness) -> list[str]:
    """Of all scans in the store, newest first."""
    with daemon.control() as control:
        return [header["scan_id"] for header in control.scans()]


def final_image(daemon: DaemonHarness, scan_id: str) -> Image:
    settings = daemon.settings.results
    with ResultStream(settings.endpoint, settings.resync_endpoint) as results:
        return results.wait_complete(scan_id, timeout_s=60)


def stored_scan(daemon: DaemonHarness, scan: ScanFile) -> Image:
    """Play the scan as fast as it goes; its image."""
    before = len(scan_ids(daemon))
    with Player(daemon, scan, 0.0):
        wait_for(lambda: len(scan_ids(daemon)) > before, 30, "the scan in the store")
    return final_image(daemon, scan_ids(daemon)[0])


def model_in_use(daemon: DaemonHarness) -> str:
    return daemon.status()["stages"]["reconstruct"]["status"]["model"]


def problem(daemon: DaemonHarness) -> str:
    return daemon.status()["stages"]["reconstruct"]["status"]["problem"]


def undisturbed(daemon: DaemonHarness) -> None:
    """No stage has been restarted, no frame is missing."""
    stages = daemon.status()["stages"]
    assert {name: stage["restarts"] for name, stage in stages.items()} == {
        "ingest": 0,
        "reconstruct": 0,
    }, daemon.log
    assert daemon.metrics().get("ptycho_stream_frames_missing_total", 0) == 0


def copy_model(daemon: DaemonHarness, name: str) -> Path:
    """The shipped model under another name in the registry."""
    folder = daemon.folder / "models" / name
    shutil.copytree(model_folder(None, DEFAULT_MODEL), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"name": name}))
    return folder


def test_a_running_scan_is_trained_on_and_shown_with_the_new_model(daemon, scan):
    with Player(daemon, scan, 0.05), daemon.control() as control:
        wait_for(lambda: daemon.metrics().get(RECONSTRUCTED, 0) >= 40, 30, "40 frames")
        made = control.finetune(
            name="better", frames=(0, 40), steps=3, batch_frames=8, promote="always"
        )
        assert made["parent"] == DEFAULT_MODEL
        done = until(daemon, made["job_id"], "done", 90)
        assert done["promoted"] is True and done["model"] == "better"
        assert {"excess", "excess_in_use"} <= done["metrics"].keys()
        wait_for(lambda: model_in_use(daemon) == "better", 10, "the new model")
    image = final_image(daemon, made["scan_ids"][0])
    assert image.complete
    assert sorted(image.frame_numbers.tolist()) == list(range(FRAMES))
    assert image.content.model == "better" and image.content.generation > 1
    undisturbed(daemon)
    metrics = daemon.metrics()
    assert metrics["ptycho_stream_training_models_promoted_total"] == 1
    assert any('model_in_use_info{model="better"' in name for name in metrics)
    with daemon.control() as control:
        assert {m["name"]: m["in_use"] for m in control.models()} == {
            "better": True,
            DEFAULT_MODEL: False,
        }
        assert control.rollback_model() == {"model": DEFAULT_MODEL, "was": "better"}
    assert model_in_use(daemon) == DEFAULT_MODEL
    again = stored_scan(daemon, scan)
    assert again.content.model == DEFAULT_MODEL
    undisturbed(daemon)


def test_a_trainer_that_is_killed_and_a_daemon_that_stops_cost_the_job_nothing_but_time(
    daemon, scan
):
    stored_scan(daemon, scan)
    with daemon.control() as control:
        job_id = control.finetune(name="tried", steps=12, batch_frames=4)["job_id"]
    os.kill(trainer_pid(daemon, job_id, 60), signal.SIGKILL)
    daemon.metric("ptycho_stream_training_processes_died_total", 1)
    undisturbed(daemon)
    wait_for(lambda: job(daemon, job_id)["step"] > 1, 60, "the job to go on")
    assert daemon.stop() == 0
    daemon.start()
    done = until(daemon, job_id, "done", 90)
    assert done["step"] == 12
    assert (daemon.folder / "models" / "tried" / "manifest.json").exists()


def test_a_model_that_does_not_load_is_refused_and_the_present_one_stays(daemon, scan):
    good, cut, altered, foreign = (
        copy_model(daemon, name) for name in ("good", "cut", "altered", "foreign")
    )
    weights = cut / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    weights = altered / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["settings"]["channels"] = [8, 8, 8]
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    with daemon.control() as control:
        assert control.use_model("good") == {"model": "good"}
        for name, said in (
            ("cut", "truncated or altered"),
            ("altered", "truncated or altered"),
            ("foreign", "do not fit"),
            ("nobody", "no model 'nobody'"),
        ):
            with pytest.raises(ControlError, match=said) as caught:
                control.use_model(name)
            assert caught.value.code == "failed"
            assert model_in_use(daemon) == "good"
        # A file that is damaged while it is in use: what was loaded stays, and the daemon says so.
        (good / "weights.safetensors").write_bytes(b"")
        control.reload()
        wait_for(lambda: "still in use: good" in daemon.log, what="a line in the log")
        wait_for(lambda: "truncated or altered" in problem(daemon), what="the problem's name")
        daemon.metric("ptycho_stream_model_stale_state", 1)
        assert model_in_use(daemon) == "good"
        assert stored_scan(daemon, scan).content.model == "good"
        assert control.rollback_model()["model"] == DEFAULT_MODEL
        with pytest.raises(ControlError, match="no model to go back to"):
            control.rollback_model()
    assert problem(daemon) == ""
    daemon.metric("ptycho_stream_model_stale_state", 0)
    undisturbed(daemon)


def test_a_pinned_model_stays(harness):
    harness.write_config({"model": {"name": DEFAULT_MODEL}})
    harness.start()
    copy_model(harness, "other")
    with harness.control() as control:
        with pytest.raises(ControlError, match="pins the model"):
            control.use_model("other")
        with pytest.raises(ControlError, match="pins the model"):
            control.rollback_model()
    wait_for(lambda: model_in_use(harness) == DEFAULT_MODEL, what="the pinned model")


@pytest.mark.long
def test_a_misfit_that_stays_high_starts_one_fine_tuning_a_scan(harness, scan):
    training: dict[str, Any] = {"automatic_above": 1e-9, "automatic_minutes": 0.02}
    harness.write_config({"training": training})
    harness.start()
    with Player(harness, scan, 0.05), harness.control() as control:
        made = wait_for(control.jobs, 60, "a job")[0]
        assert made["automatic"] is True and made["kind"] == "finetune"
        assert harness.metrics()["ptycho_stream_misfit_excess_ratio"] > 1e-9
        until(harness, made["job_id"], "done", 90)
        assert len(control.jobs()) == 1
    assert "its misfit stays above training.automatic_above" in harness.log
    harness.metric("ptycho_stream_training_jobs_triggered_total", 1)
    undisturbed(harness)
