"""Training from the terminal: what reaches the daemon, what is printed, a job without a daemon."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from daemon_harness import DaemonHarness
from results_source import free_ports
from test_cli_ctl import run
from typer.testing import CliRunner

from ptycho_stream.cli import build_app
from ptycho_stream.models.active import DEFAULT_MODEL
from ptycho_stream.models.folders import model_folder
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.cnn import CnnNetwork, CnnSettings
from ptycho_stream.scans import ScanHeader, ScanWriter, new_scan_id
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_streamd.control import ControlServer
from ptycho_streamd.security import Gate

MINE = Manifest("mine", "cnn", CnnSettings(size_px=32, n_filters_scale=1).to_json())
PROGRAM = "import sys; from ptycho_stream.cli import main; sys.exit(main())"
JOB = {
    "job_id": "01JBQ3N8Z5T0V6W7X8Y9ZABCDE",
    "kind": "finetune",
    "name": "better",
    "scan_ids": ["S"],
    "parent": "unrolled-v2",
    "automatic": False,
    "created_ns": 1_760_000_000_000_000_000,
    "folder": "/somewhere",
    "state": "running",
    "step": 3,
    "fraction": 0.25,
    "loss": 0.5,
    "elapsed_s": 10.0,
    "remaining_s": 30.0,
    "message": "training on 40 frames",
    "metrics": {},
    "promoted": None,
    "model": None,
}
DONE = JOB | {
    "state": "done",
    "fraction": 1.0,
    "message": "better it is",
    "metrics": {"excess": 0.0125},
    "promoted": True,
    "model": "better",
}


class Answers:
    """A control server whose job is over, as ``end`` says, when it is asked for the second time."""

    def __init__(self, end):
        self.endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        self.asked = []
        self._end = end
        self._gate = Gate()
        self._server = ControlServer(self._gate, self.endpoint)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self):
        self._over.set()
        self._thread.join()
        self._server.close()
        self._gate.close()

    def arguments(self):
        """Those of the last request, without what was left out."""
        held = {key: value for key, value in self.asked[-1][1].items() if value not in (None, {})}
        return json.loads(json.dumps(held))

    def _serve(self):
        while not self._over.is_set():
            if self._server.socket.poll(20):
                for request in self._server.poll():
                    self.asked.append((request.command, request.arguments))
                    self._answer(request)

    def _answer(self, request):
        polls = [command for command, _ in self.asked].count("job")
        match request.command:
            case "finetune" | "train":
                self._server.reply(request, JOB | {"state": "queued"})
            case "jobs":
                self._server.reply(request, [JOB | {"automatic": True}])
            case "job":
                self._server.reply(request, self._end if polls > 1 else JOB)
            case _:
                self._server.reply(request, {"did": request.command, **request.arguments})


@pytest.fixture
def answers():
    server = Answers(DONE)
    yield server
    server.close()


def ctl(server, *words):
    return run("ctl", *words, "--endpoint", server.endpoint)


def test_a_fine_tuning_is_asked_for_with_what_was_given_and_nothing_else(answers):
    done = ctl(answers, "finetune", "S", "--frames", "0:258", "--minutes", 2, "--from", "mine")
    assert done.returncode == 0, done.stderr
    assert "01JBQ3N8Z5T0V6W7X8Y9ZABCDE will make better" in done.stdout
    assert answers.arguments() == {
        "scan_ids": ["S"],
        "frames": [0, 258],
        "minutes": 2.0,
        "model": "mine",
    }


def test_a_training_names_a_network(answers):
    done = ctl(
        *(answers, "train", "--architecture", "cnn", "--network", '{"size_px": 64}', "--json")
    )
    assert json.loads(done.stdout)["state"] == "queued"
    assert answers.arguments() == {
        "scan_ids": [],
        "architecture": "cnn",
        "network": {"size_px": 64},
    }


def test_one_may_wait_for_the_end(answers):
    done = ctl(answers, "finetune", "--wait")
    assert done.returncode == 0, done.stderr
    assert "better: running (step 3, loss 0.5, 30 s left)" in done.stderr
    assert done.stdout == "better: done; better it is; in use now; excess 0.0125\n"
    assert json.loads(ctl(answers, "finetune", "--wait", "--json").stdout) == DONE


def test_a_job_that_fails_is_status_1():
    server = Answers(DONE | {"state": "failed", "message": "the loss is not a number"})
    try:
        done = ctl(server, "finetune", "--wait")
    finally:
        server.close()
    assert done.returncode == 1
    assert "failed; the loss is not a number" in done.stdout


def test_jobs_are_a_table_or_json(answers):
    table = ctl(answers, "jobs").stdout
    for word in (JOB["job_id"], "better", "running", "25%", "(automatic)", "2025-10-09"):
        assert word in table
    assert json.loads(ctl(answers, "jobs", "--json").stdout)[0]["job_id"] == JOB["job_id"]
    assert "message: training on 40 frames" in ctl(answers, "job").stdout


@pytest.mark.parametrize(
    ("words", "did"),
    [
        (("cancel",), "cancel"),
        (("use", "mine"), "use_model"),
        (("rollback",), "rollback_model"),
    ],
)
def test_models_and_jobs_are_commanded(answers, words, did):
    assert json.loads(ctl(answers, *words, "--json").stdout)["did"] == did


@pytest.mark.parametrize(
    "words",
    [
        ("ctl", "finetune", "--frames", "9"),
        ("ctl", "finetune", "--frames", "9:3"),
        ("ctl", "train", "--network", "[1]"),
        ("ctl", "train", "--network", "{"),
        ("ctl", "finetune", "--minutes", "-1"),
        ("ctl", "use"),
    ],
)
def test_wrong_usage_is_status_2(words):
    done = run(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def here(*words):
    """The same without a process of its own, which would import torch."""
    given = [str(word) for word in words]
    return CliRunner().invoke(build_app(given), given)


def test_the_model_in_use_is_changed_in_a_registry_without_a_daemon(tmp_path):
    registry = tmp_path / "models"
    shutil.copytree(model_folder(None, DEFAULT_MODEL), registry / "mine")
    manifest = registry / "mine" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"name": "mine"}))
    where = ("--registry", registry)
    assert "mine is in use" in here("models", "use", "mine", *where).stdout
    assert "mine (in use)" in here("models", "list", *where).stdout
    copied = here("models", "export", "default", tmp_path / "stick", *where)
    assert (tmp_path / "stick" / "mine" / "manifest.json").exists(), copied.stderr
    assert f"{DEFAULT_MODEL} is in use" in here("models", "rollback", *where).stdout
    again = run("models", "rollback", *where)
    assert again.returncode == 1 and "no model to go back to" in again.stderr


@pytest.fixture
def store(tmp_path):
    """A configuration whose store holds a scan of 60 frames."""
    harness = DaemonHarness(tmp_path, {"model": {"registry": "models"}})
    made = simulate_experiment(seed=4, frames=60, size_px=64)
    np.savez(tmp_path / "probe.npz", probe=made.probe.modes)
    header = ScanHeader(
        scan_id=new_scan_id(),
        source="detector",
        series="1",
        state="armed",
        created_ns=time.time_ns(),
        frame_shape_yx=(64, 64),
        dtype="<u2",
        size_px=64,
        pixel_yx_m=made.pixel_yx_m,
    )
    with ScanWriter.create(harness.data, header, 128) as writer:
        for number, (frame, (y_m, x_m)) in enumerate(
            zip(made.counts, made.positions_yx_m, strict=True)
        ):
            slot = writer.append(number, frame, time.time_ns(), time.monotonic_ns())
            writer.append_pair(number, slot, y_m, x_m, time.monotonic_ns())
        writer.seal("complete", {})
    return harness


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_job_in_the_terminal_is_interrupted_and_gone_on_with(store, tmp_path):
    work = tmp_path / "work"
    words = ["train", "--config", store.config, "--work", work]
    program = [sys.executable, "-c", PROGRAM, *map(str, words)]
    options = ["--from", "default", "--name", "mine", "--steps", "40", "--batch-frames", "8"]
    with subprocess.Popen([*program, *options], stdout=subprocess.PIPE, text=True) as first:
        try:
            deadline_s = time.monotonic() + 90
            while not (work / "last.ckpt").exists():
                assert time.monotonic() < deadline_s and first.poll() is None
                time.sleep(0.05)
            os.kill(first.pid, signal.SIGTERM)  # which Ctrl-C is like
            said, _ = first.communicate(timeout=30)
        finally:
            first.kill()
    assert first.returncode == 1 and f"go on with --resume {work}" in said
    other = run(*words, "--from", "default")
    assert other.returncode == 1 and "--resume" in other.stderr
    done = run(*words[:3], "--resume", work, "--json", timeout=90)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert (job["state"], job["step"], job["model"]) == ("done", 40, "mine")
    assert (tmp_path / "models" / "mine" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--resume", "work", "--steps", "9"), "leave out all but"),
        (("--resume", "work", "--work", "other"), "leave out all but"),
        (("--from", "default", "--network", "{}"), "--network goes with"),
    ],
)
def test_options_that_would_do_nothing_are_refused(store, words, said):
    done = CliRunner().invoke(
        build_app(["train"]), ["train", "--config", str(store.config), *words]
    )
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_a_pinned_model_is_the_one_in_use_for_the_terminal_too(store, tmp_path):
    registry = ModelRegistry(tmp_path / "models")
    registry.save(CnnNetwork(CnnSettings(size_px=32, n_filters_scale=1)), MINE)
    registry.use("mine")
    store.write_config({"model": {"name": DEFAULT_MODEL}})
    words = ["models", "list", "--json", "--config", str(store.config)]
    listed = json.loads(CliRunner().invoke(build_app(words), words).stdout)
    assert {m["name"]: m["in_use"] for m in listed} == {"mine": False, DEFAULT_MODEL: True}
    words = ["models", "export", "default", str(tmp_path / "stick"), "--config", str(store.config)]
    assert CliRunner().invoke(build_app(words), words).exit_code == 0
    assert (tmp_path / "stick" / DEFAULT_MODEL).is_dir()


def test_a_job_in_the_terminal_that_cannot_be_done_is_one_line(store, tmp_path):
    resumed = run("train", "--config", store.config, "--resume", tmp_path / "none")
    assert resumed.returncode == 1 and "no job to go on with" in resumed.stderr
    where = ("--config", store.config, "--work", tmp_path / "work")
    for words, status, said in (
        ((), 2, "--architecture"),
        (("--from", "nobody"), 1, "no model 'nobody'"),
        (("--from", "default", "--loss", "magic"), 1, "loss"),
        (("--from", "default", "--name", "../up"), 1, "no model name"),
    ):
        done = run("train", *where, *words)
        assert done.returncode == status, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
