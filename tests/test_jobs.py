"""The queue of training jobs: what is refused, what survives which death, what is told.

Processes are real, training is not (``stand_in_training``); ``test_training_on_demand`` has both.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_harness import DaemonHarness, wait_for
from scan_samples import make_scan

from ptycho_stream.errors import ControlError
from ptycho_stream.models.folders import model_folder

pytestmark = pytest.mark.slow

STAND_IN = str(Path(__file__).parent / "stand_in_training")
PIXEL = {"pixel_yx_m": (1e-8, 1e-8)}


def prepared(folder: Path) -> DaemonHarness:
    harness = DaemonHarness(
        folder,
        {"model": {"registry": "models"}, "training": {"nice": 7}},
        stages=("ingest",),
        environment={"PYTHONPATH": STAND_IN},
    )
    make_scan(harness.data, 20, **PIXEL)
    return harness


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[DaemonHarness]:
    harness = prepared(tmp_path)
    yield harness
    harness.stop()


@pytest.fixture
def fresh(harness: DaemonHarness) -> DaemonHarness:
    """A daemon of the test's own, to be killed."""
    harness.start()
    return harness


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonHarness]:
    """A daemon of all tests that leave it alive."""
    with prepared(tmp_path_factory.mktemp("shared")) as harness:
        yield harness


def finetune(daemon: DaemonHarness, name: str, **choices: Any) -> str:
    """Queue a job on the scan of 20 frames; its id."""
    with daemon.control() as control:
        oldest = control.scans()[-1]["scan_id"]
        return control.finetune(oldest, name=name, **choices)["job_id"]


def job(daemon: DaemonHarness, job_id: str | None = None) -> dict[str, Any]:
    with daemon.control() as control:
        return control.job(job_id)


def until(daemon: DaemonHarness, job_id: str, state: str, timeout_s: float = 20) -> dict[str, Any]:
    try:
        wait_for(lambda: job(daemon, job_id)["state"] == state, timeout_s, f"job {state}")
    except AssertionError:
        raise AssertionError(f"{job(daemon, job_id)}\n{daemon.log}") from None
    return job(daemon, job_id)


def trainer_pid(daemon: DaemonHarness, job_id: str, timeout_s: float = 20) -> int:
    """Pid of the process that runs a job, once it does a step."""
    wait_for(lambda: job(daemon, job_id)["step"] > 0, timeout_s, "a step")
    marked = f"jobs/{job_id}".encode()
    pids = [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and marked in cmdline(path)
    ]
    assert len(pids) == 1
    return pids[0]


def begun_at(told: dict[str, Any]) -> list[int]:
    """The steps from which the job's processes began."""
    lines = (Path(told["folder"]) / "begun").read_text().splitlines()
    return [int(line.split()[0]) for line in lines]


def cmdline(path: Path) -> bytes:
    try:
        return (path / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_job_runs_yielding_to_others_and_tells_how_it_is(fresh):
    job_id = finetune(fresh, "works", steps=20)
    running = wait_for(lambda: (told := job(fresh, job_id))["step"] > 2 and told, 20)
    assert running["state"] == "running"
    assert 0 < running["fraction"] < 1 and running["loss"] < 1
    assert fresh.status()["training"]["running"]["job_id"] == job_id
    assert fresh.metrics()["ptycho_stream_training_running_state"] == 1
    assert fresh.metrics()["ptycho_stream_training_steps"] > 2
    done = until(fresh, job_id, "done")
    assert done["message"] == "made of 20 steps"
    assert done["model"] == "works"
    assert done["spec"]["steps"] == 20
    folder = Path(done["folder"])
    assert folder.parent == fresh.data / "jobs"
    assert (folder / "begun").read_text() == f"0 {os.nice(0) + 7} PASSIVE\n"
    ended = 'ptycho_stream_training_jobs_ended_total{kind="finetune",state="done"}'
    fresh.metric(ended, 1)
    assert fresh.metrics()["ptycho_stream_training_running_state"] == 0


def test_jobs_run_one_after_the_other_in_their_order(daemon):
    first, second = (finetune(daemon, name, steps=10) for name in ("works-1", "works-2"))
    with daemon.control() as control:
        assert [told["job_id"] for told in control.jobs(2)] == [second, first]
        assert len(control.jobs(1)) == 1
    until(daemon, first, "running")
    assert job(daemon, second)["state"] == "queued"
    assert daemon.metrics()["ptycho_stream_training_queued_jobs"] == 1
    until(daemon, first, "done")
    until(daemon, second, "done")


def test_a_killed_process_is_begun_again_from_its_checkpoint_and_no_stage_notices(fresh):
    job_id = finetune(fresh, "works", steps=40)
    os.kill(trainer_pid(fresh, job_id), signal.SIGKILL)
    done = until(fresh, job_id, "done")
    first, again = begun_at(done)
    assert first == 0 and again > 0
    fresh.metric("ptycho_stream_training_processes_died_total", 1)
    assert fresh.status()["stages"]["ingest"]["restarts"] == 0
    assert "it goes on from its last checkpoint" in fresh.log


@pytest.mark.long  # test_job_queue counts deaths without processes
def test_a_job_whose_process_always_dies_has_failed(fresh):
    job_id = finetune(fresh, "dies")
    failed = until(fresh, job_id, "failed", 50)
    assert "5 times" in failed["message"] and "batch_frames" in failed["message"]
    fresh.metric("ptycho_stream_training_processes_died_total", 5)


def test_a_daemon_that_stops_pauses_its_job_and_goes_on_with_it(fresh):
    job_id = finetune(fresh, "works", steps=60)
    trainer_pid(fresh, job_id)
    assert fresh.stop() == 0
    held = json.loads((fresh.data / "jobs" / job_id / "progress.json").read_text())
    assert held["state"] == "queued"
    fresh.start()
    done = until(fresh, job_id, "done")
    first, again = begun_at(done)
    assert first == 0 and again >= held["step"] > 0


def test_a_daemon_that_is_killed_takes_its_trainer_along_and_goes_on_later(fresh):
    job_id = finetune(fresh, "works", steps=60)
    pid = trainer_pid(fresh, job_id)
    fresh.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), what="the trainer's end")
    fresh.start()
    assert until(fresh, job_id, "done")["step"] == 60


def test_a_running_job_is_cancelled(daemon):
    job_id = finetune(daemon, "works", steps=1000)
    pid = trainer_pid(daemon, job_id)
    with daemon.control() as control:
        control.cancel()
    assert until(daemon, job_id, "cancelled")["model"] is None
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), what="the trainer's end")
    with daemon.control() as control:
        with pytest.raises(ControlError, match="over"):
            control.cancel(job_id)
        with pytest.raises(ControlError, match="no training job runs"):
            control.cancel()


def test_a_waiting_job_is_cancelled_before_it_begins(daemon):
    first, second = (finetune(daemon, name, steps=1000) for name in ("works-1", "works-2"))
    until(daemon, first, "running")
    with daemon.control() as control:
        assert control.cancel(second)["state"] == "cancelled"
        control.cancel(first)
    until(daemon, first, "cancelled")
    assert not (daemon.data / "jobs" / second / "begun").exists()


def test_a_job_that_does_not_listen_is_killed_when_it_is_cancelled(daemon):
    job_id = finetune(daemon, "hangs")
    wait_for(lambda: (daemon.data / "jobs" / job_id / "begun").exists(), 20)
    with daemon.control() as control:
        control.cancel(job_id)
    assert "killed" in until(daemon, job_id, "cancelled", 30)["message"]


def test_a_cancelled_job_stays_cancelled_though_the_daemon_dies(fresh):
    job_id = finetune(fresh, "hangs")
    wait_for(lambda: (fresh.data / "jobs" / job_id / "begun").exists(), 20)
    with fresh.control() as control:
        control.cancel(job_id)
    fresh.kill()
    fresh.start()
    assert job(fresh, job_id)["state"] == "cancelled"


@pytest.mark.parametrize(
    ("name", "said"), [("fails", "lower learning_rate"), ("raises", "out of memory")]
)
def test_a_fault_ends_the_job_with_words_and_nothing_else(daemon, name, said):
    failed = until(daemon, finetune(daemon, name), "failed")
    assert said in failed["message"]
    assert said in daemon.log
    assert daemon.status()["stages"]["ingest"]["restarts"] == 0
    until(daemon, finetune(daemon, "works"), "done")


def refused(daemon: DaemonHarness, code: str, said: str, *scan_ids: str, **choices: Any) -> None:
    with daemon.control() as control, pytest.raises(ControlError, match=said) as caught:
        control.finetune(*scan_ids, **choices)
    assert caught.value.code == code


def test_what_cannot_be_done_is_refused_at_once_in_words(daemon):
    refused(daemon, "not_found", "no scan", "01ARZ3NDEKTSV4RRFFQ69G5FAV")
    with daemon.control() as control:
        scan_id = control.scans()[-1]["scan_id"]
    refused(daemon, "failed", "none from 20 on", scan_id, frames=(20, 30))
    (daemon.folder / "models" / "taken").mkdir(parents=True)
    refused(daemon, "failed", "choose a new name", name="taken")
    refused(daemon, "failed", "no model name", name="../up")
    refused(daemon, "failed", "no model 'nobody'", model="nobody")
    refused(daemon, "bad_arguments", "loss", loss="magic")
    refused(daemon, "bad_arguments", "budget", minutes=1.0, steps=5)
    refused(daemon, "bad_arguments", "minutes", minutes=float("inf"))
    refused(daemon, "bad_arguments", "colour", colour="blue")
    with daemon.control() as control, pytest.raises(ControlError, match="no job X"):
        control.job("X")


def test_a_damaged_parent_is_refused_by_name_of_the_fault(daemon):
    parent = daemon.folder / "models" / "mine"
    shutil.copytree(model_folder(None, "unrolled-v2"), parent)
    manifest = parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"unrolled-v2"', '"mine"'))
    weights = parent / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(daemon, "failed", "truncated or altered", model="mine")
    weights.unlink()
    refused(daemon, "failed", "cannot be read", model="mine")


def test_two_jobs_do_not_make_the_same_model(daemon):
    job_id = finetune(daemon, "works", steps=1000)
    refused(daemon, "failed", "another job makes a model 'works'", name="works")
    with daemon.control() as control:
        control.cancel(job_id)


def test_a_scan_without_pairs_or_pixel_size_is_refused(daemon):
    scan_id = make_scan(daemon.data, 3)
    refused(daemon, "failed", "geometry", scan_id)
    empty = make_scan(daemon.data, 0, **PIXEL)
    refused(daemon, "failed", "0 frames with a position", empty)


def test_without_a_registry_there_is_nowhere_to_put_a_model(harness):
    harness.write_config({"model": {"registry": None}})
    harness.start()
    refused(harness, "failed", r"model\.registry")


def test_a_pinned_model_cannot_be_replaced_by_force(harness):
    harness.write_config({"model": {"name": "unrolled-v2"}})
    harness.start()
    refused(harness, "failed", "pins the model", promote="always")


def test_a_damaged_job_file_is_left_out_with_a_line_in_the_log(harness):
    folder = harness.data / "jobs" / "01ARZ3NDEKTSV4RRFFQ69G5FAV"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text("{")
    harness.start()
    with harness.control() as control:
        assert control.jobs() == []
        with pytest.raises(ControlError, match="no job yet"):
            control.job()
    assert "left out of the jobs" in harness.log


def test_a_full_queue_refuses_more(fresh):
    for number in range(20):
        finetune(fresh, f"works-{number}", steps=1000)
    refused(fresh, "failed", "20 jobs wait", name="works-20")


def test_the_daemon_is_up_without_torch_and_lightning(daemon):
    maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert "torch" not in maps
