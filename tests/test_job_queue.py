"""The queue of training jobs, as the supervisor turns it: deaths that count, a full disk.

Without processes; ``test_jobs`` has them.
"""

from __future__ import annotations

import sys
import threading
import time
import types
from pathlib import Path

import msgspec
import pytest
from daemon_harness import DaemonHarness
from prometheus_client import CollectorRegistry
from scan_samples import make_scan

from ptycho_stream.errors import ModelError, TrainingError
from ptycho_stream.models.folders import new_model_folder
from ptycho_stream.training.job import JobProgress
from ptycho_streamd import jobs as jobs_module
from ptycho_streamd.bus import Beat
from ptycho_streamd.job_files import JobFolder
from ptycho_streamd.job_metrics import JobMetrics
from ptycho_streamd.jobs import MAX_STARTS, Jobs
from ptycho_streamd.train import Trainer


class Process:
    """Stands in for the training process: begins when told, ends when the test says."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.starts = 0
        self.last_words = ""
        self.status: int | None = None
        self.fault: OSError | None = None

    def start(self, _environment: object, _arguments: object) -> None:
        self.starts += 1
        if self.fault is not None:
            raise self.fault
        self.pid, self.status = 1, None

    def reap(self, _settings: object) -> int | None:
        status, self.status = self.status, None
        return status

    def heard(self, _beat: Beat) -> bool:
        return True

    def ask_to_stop(self) -> None:
        pass

    def wait_until(self, _deadline_s: float) -> None:
        self.pid = None


class Bench:
    """A store with a scan, and the jobs of one daemon after the other."""

    def __init__(self, folder: Path) -> None:
        self.harness = DaemonHarness(folder, {"model": {"registry": "models"}})
        make_scan(self.harness.data, 20, pixel_yx_m=(1e-8, 1e-8))
        self.process = Process()
        self.jobs = self.begun()

    def begun(self) -> Jobs:
        """The jobs of a daemon that begins."""
        self.process = Process()
        metrics = JobMetrics(CollectorRegistry())
        settings = self.harness.settings
        self.jobs = Jobs(lambda: settings, self.process, metrics, lambda: None)
        return self.jobs

    @property
    def folder(self) -> JobFolder:
        return JobFolder(Path(self.jobs.job(None)["folder"]))

    @property
    def state(self) -> str:
        return self.jobs.job(None)["state"]

    def says(self, progress: JobProgress) -> None:
        told = {"job_id": "", "progress": msgspec.to_builtins(progress)}
        self.jobs.heard(Beat("train", 1, told, []))

    def dies(self, step: int) -> None:
        """The process begins, comes to ``step`` and dies."""
        self.jobs.turn()
        self.says(JobProgress(state="running", step=step))
        self.process.status = -9
        self.jobs.turn()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(jobs_module, "FIRST_BACKOFF_S", 0.0)
    bench = Bench(tmp_path)
    bench.jobs.submit("finetune", {"name": "mine"})
    return bench


def test_deaths_count_only_in_a_row_without_getting_further(bench):
    for step in range(1, 3 * MAX_STARTS):
        bench.dies(step)
        assert bench.state != "failed"
    for _ in range(MAX_STARTS - 2):
        bench.dies(1)
        assert bench.state != "failed"
    bench.dies(1)
    assert bench.state == "failed"


def test_a_daemon_that_stops_is_no_death_of_its_job(bench):
    for _ in range(2 * MAX_STARTS):
        bench.jobs.turn()
        bench.jobs.ask_to_stop()
        bench.jobs.wait_until(time.monotonic())
        assert bench.folder.record().starts == 0
        assert bench.begun().job(None)["state"] == "queued"


def test_a_daemon_that_is_killed_again_and_again_is_one(bench):
    for _ in range(MAX_STARTS):
        assert bench.state == "queued"
        bench.jobs.turn()
        bench.begun()
    assert bench.state == "failed"


def test_a_process_that_cannot_be_started_leaves_the_job_waiting(bench, caplog):
    bench.process.fault = BlockingIOError(11, "no more processes")
    for _ in range(3 * MAX_STARTS):
        bench.jobs.turn()
    assert bench.state == "queued" and "no more processes" in caplog.text
    bench.process.fault = None
    bench.jobs._not_before_s = 0.0
    bench.jobs.turn()
    assert bench.state == "running"
    assert bench.folder.record().starts == 1


def test_tries_to_start_grow_rare(bench, monkeypatch):
    monkeypatch.setattr(jobs_module, "FIRST_BACKOFF_S", 10.0)
    bench.process.fault = BlockingIOError(11, "no more processes")
    for _ in range(10):
        bench.jobs.turn()
    assert bench.process.starts == 1


def full(*_args: object) -> None:
    raise TrainingError("the job cannot be kept on disk: no space left")


@pytest.mark.parametrize("write", ["write_progress", "write_record"])
def test_a_full_disk_takes_no_start_from_a_job(bench, monkeypatch, write):
    with monkeypatch.context() as disk:
        disk.setattr(JobFolder, write, full)
        for _ in range(2 * MAX_STARTS):
            bench.jobs.turn()
    assert bench.state == "queued" and bench.process.starts == 0
    bench.jobs.turn()
    assert bench.folder.record().starts == 1


def test_an_end_that_the_disk_refused_was_heard(bench):
    bench.jobs.turn()
    bench.says(JobProgress(state="done", step=7, model="mine"))
    bench.process.status = 1
    bench.jobs.turn()
    assert bench.state == "done"
    assert bench.folder.progress().model == "mine"


def test_a_job_that_is_over_leaves_no_weights_but_those_in_the_registry(bench):
    bench.jobs.turn()
    for name in ("last.ckpt", "trained.safetensors", "metrics.csv"):
        (bench.folder.path / name).write_text("x")
    bench.folder.write_progress(JobProgress(state="done"))
    bench.process.status = 0
    bench.jobs.turn()
    left = {path.name for path in bench.folder.path.iterdir()}
    assert left == {"job.json", "progress.json", "metrics.csv"}


def test_a_registry_that_cannot_be_read_is_an_error_of_the_package(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot make"):
        new_model_folder(tmp_path / "file" / "models", "mine")


class Link:
    """Stands in for a stage's link to the supervisor."""

    cancelled = False
    stop_reason = ""

    def __init__(self) -> None:
        self.socket = types.SimpleNamespace(poll=lambda _ms: time.sleep(0.001))
        self.states: list[str] = []

    @property
    def stopping(self) -> bool:
        return self.stop_reason != ""

    def requests(self) -> tuple[()]:
        return ()

    def beat(self, status: dict, _registry: object, *, now: bool) -> None:
        self.states.append(status["progress"]["state"])


def trains(monkeypatch: pytest.MonkeyPatch, run_job: object) -> None:
    module = types.ModuleType("ptycho_stream.training.jobs")
    module.run_job = run_job  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_full_disk_does_not_end_a_training(bench, monkeypatch):
    def run_job(_spec, _settings, _folder, report, _stop):
        report(JobProgress(state="running", step=1))
        time.sleep(0.05)
        return JobProgress(state="done", model="mine")

    trains(monkeypatch, run_job)
    link = Link()
    trainer = Trainer(link, bench.harness.settings, bench.folder)
    monkeypatch.setattr(JobFolder, "write_progress", full)
    assert trainer.run() == 1  # who started it knows that the file does not tell the end
    assert link.states[-1] == "done"


def test_a_training_whose_daemon_is_gone_leaves_at_once(bench, monkeypatch):
    over = threading.Event()

    def run_job(_spec, _settings, _folder, _report, _stop):
        over.wait(30)
        return JobProgress(state="queued")

    def leave(status: int) -> None:
        raise SystemExit(status)

    trains(monkeypatch, run_job)
    monkeypatch.setattr("os._exit", leave)
    link = Link()
    link.stop_reason = "orphaned"
    began_s = time.monotonic()
    with pytest.raises(SystemExit):
        Trainer(link, bench.harness.settings, bench.folder).run()
    assert time.monotonic() - began_s < 1
    over.set()
