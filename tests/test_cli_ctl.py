"""``ctl``, ``models``, ``config`` and the program itself: output, errors and exit statuses."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from results_source import free_ports

from ptycho_stream.cli import COMMANDS
from ptycho_streamd.control import ControlServer
from ptycho_streamd.security import Gate

SCAN = {
    "scan_id": "01JBQ3N8Z5T0V6W7X8Y9ZABCDE",
    "state": "complete",
    "series": "7",
    "created_ns": 1_760_000_000_000_000_000,
    "expected_frames": 516,
    "counts": {"missing": 2, "duplicate": 0},
    "reason": "",
}

SNAPSHOT = {
    "name": "noon",
    "path": "/data/scans/noon.npz",
    "problem": "",
    "taken_ns": 1_760_000_000_000_000_000,
    "frames": 12,
    "layer": "refined",
    "verdict": "good",
}

FRAME = {
    "scan_id": SCAN["scan_id"],
    "frame": 12,
    "slot": 11,
    "frames": 516,
    "received_ns": 1_760_000_000_000_000_000,
    "dark": False,
    "position_yx_m": [1e-6, -2e-6],
    "bin_px": 1,
    "shape_yx": [2, 3],
    "counts": np.arange(6, dtype="<f4").tobytes(),
    "valid": bytes([1, 1, 1, 1, 1, 0]),
}


def run(*words, timeout=30):
    program = "import sys; from ptycho_stream.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def daemon():
    """A control server that answers each command with something that tells it apart."""
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    gate = Gate()
    server = ControlServer(gate, endpoint)
    over = threading.Event()

    def answer(request):
        match request.command:
            case "scans":
                server.reply(request, [SCAN])
            case "snapshots":
                server.reply(request, [SNAPSHOT])
            case "frame":
                server.reply(request, {**FRAME, "look": request.arguments["look"]})
            case "abort":
                server.fail(request, "not_found", "no scan is running: see `ctl scans`")
            case _:
                server.reply(request, {"did": request.command, **request.arguments})

    def serve():
        while not over.is_set():
            if server.socket.poll(20):
                for request in server.poll():
                    answer(request)

    thread = threading.Thread(target=serve)
    thread.start()
    yield endpoint
    over.set()
    thread.join()
    server.close()
    gate.close()


def ctl(daemon, *words):
    return run("ctl", *words, "--endpoint", daemon)


@pytest.mark.parametrize("name", ["status", "scan", "start", "stop", "export", "reload"])
def test_each_command_reaches_the_daemon(daemon, name):
    done = ctl(daemon, name, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["did"] == name


def test_answers_are_lines_of_names_for_people(daemon):
    done = ctl(daemon, "start", "--meta", "sample=a=b", "--frames", 12)
    lines = dict(text.split(": ", 1) for text in done.stdout.splitlines())
    assert lines["did"] == "start"
    assert lines["metadata.sample"] == "a=b"
    assert (lines["expected_frames"], lines["series"]) == ("12", "-")


def test_a_snapshot_is_asked_for_by_name(daemon):
    told = json.loads(ctl(daemon, "snapshot", "noon", "--force", "--json").stdout)
    assert told == {"did": "snapshot", "name": "noon", "scan_id": None, "force": True}
    assert ctl(daemon, "snapshot", "../noon").returncode == 1


def test_snapshots_are_a_table_or_json(daemon):
    table = ctl(daemon, "snapshots").stdout
    assert "noon" in table and "good" in table and "2025-10-09 08:53:20" in table
    assert json.loads(ctl(daemon, "snapshots", "--json").stdout) == [SNAPSHOT]


def test_a_frame_is_described_and_written(daemon, tmp_path):
    done = ctl(daemon, "frame", "--number", 12, "--stored", "--out", tmp_path / "a.npz", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["frame"], told["look"], told["total"]) == (12, "stored", 15)
    assert (told["shape_yx"], told["masked"]) == ([2, 3], 1)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as held:
        assert held["counts"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert held["valid"].sum() == 5
    assert "total: 15" in ctl(daemon, "frame").stdout


def test_reprocessing_asks_for_what_is_to_be_otherwise(daemon, tmp_path):
    words = ["--orientation", "flip_x", "--center", 30, 31.5, "--model", "mine", "--dc", "corner"]
    words += ["--background", "dark-frames", "--flat-field", "none", "--bad-pixels", "bad.npy"]
    done = ctl(daemon, "reprocess", "X", *words, "--probe", tmp_path / "p.npz", "--json")
    assert json.loads(done.stdout) == {
        "did": "reprocess",
        "scan_id": "X",
        "orientation": "flip_x",
        "center_yx_px": [30.0, 31.5],
        "dc": "corner",
        "bad_pixels": str(Path("bad.npy").absolute()),
        "flat_field": "none",
        "background": "dark-frames",
        "bad_frames": None,
        "probe": str(tmp_path / "p.npz"),
        "model": "mine",
    }
    relative = json.loads(ctl(daemon, "reprocess", "--probe", "p.npz", "--json").stdout)
    assert relative["probe"].startswith("/") and relative["scan_id"] is None
    refused = ctl(daemon, "reprocess", "--orientation", "upside-down")
    assert refused.returncode == 1 and "orientation" in refused.stderr


def test_scans_are_a_table_or_json(daemon):
    table = ctl(daemon, "scans").stdout
    assert SCAN["scan_id"] in table and "missing 2" in table and "2025-10-09 08:53:20" in table
    assert json.loads(ctl(daemon, "scans", "--json").stdout) == [SCAN]


def test_a_refusal_is_one_line_and_status_1(daemon):
    done = ctl(daemon, "abort")
    assert done.returncode == 1
    assert done.stderr == "error: no scan is running: see `ctl scans`\n"


def test_no_daemon_is_one_line_and_status_1():
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    done = run("ctl", "status", "--endpoint", endpoint, "--timeout", "0.3")
    assert done.returncode == 1
    assert "is ptycho-streamd running" in done.stderr and done.stderr.count("\n") == 1


def test_the_endpoint_comes_from_the_configuration(daemon, tmp_path):
    config = tmp_path / "daemon.toml"
    config.write_text(f'[probe]\npath = "probe.npz"\n[control]\nendpoint = "{daemon}"\n')
    done = run("ctl", "status", "--config", config, "--json")
    assert json.loads(done.stdout)["did"] == "status"


@pytest.mark.parametrize(
    "words",
    [
        ("ctl", "status", "--no-such-option"),
        ("ctl", "start", "--meta", "nothing"),
        ("no-such-command",),
        ("watch", "--once", "--until-complete"),
    ],
)
def test_wrong_usage_is_status_2(words):
    done = run(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_config_check_explains_each_problem_by_key(tmp_path):
    config = tmp_path / "daemon.toml"
    config.write_text('[probe]\npath = "probe.npz"\nmodes = 0\n[detector]\ndialect = "x"\nno = 1\n')
    done = run("config", "check", config)
    assert done.returncode == 1
    for key in ("probe.modes", "detector.dialect", "detector.no"):
        assert key in done.stderr
    problem = json.loads(run("config", "check", config, "--json").stdout)
    assert problem["ok"] is False and "probe.modes" in problem["problem"]
    assert run("config", "check", tmp_path / "none.toml").returncode == 1


def test_config_check_of_a_sound_file(tmp_path):
    config = tmp_path / "daemon.toml"
    config.write_text('[probe]\npath = "probe.npz"\n')
    assert run("config", "check", config).returncode == 0
    said = json.loads(run("config", "check", config, "--json").stdout)
    assert said["ok"] and said["settings"]["results"]["queue_bytes"] > 0


def test_models_are_listed_and_described():
    listed = json.loads(run("models", "list", "--json").stdout)
    name = listed[0]["name"]
    assert name in run("models", "list").stdout
    assert listed[0].pop("in_use") is True
    assert json.loads(run("models", "show", name).stdout) == listed[0]
    missing = run("models", "show", "no-such-model")
    assert missing.returncode == 1 and name in missing.stderr


@pytest.mark.slow
def test_a_model_is_trained_into_a_registry(tmp_path):
    made = run(
        *("models", "pretrain", "tiny", "--registry", tmp_path / "models"),
        *("--minutes", "0.02", "--threads", "1", "--work", tmp_path / "work"),
        timeout=55,
    )
    assert made.returncode == 0, made.stderr
    listed = json.loads(run("models", "list", "--registry", tmp_path / "models", "--json").stdout)
    tiny = next(model for model in listed if model["name"] == "tiny")
    assert tiny["seed"] == 1 and tiny["metrics"] and tiny["sha256"]


def test_help_lists_every_command():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize(
    "name",
    [
        *COMMANDS,
        *("ctl status", "ctl scans", "ctl export", "ctl finetune", "ctl train", "ctl jobs"),
        *("ctl job", "ctl cancel", "ctl use", "ctl rollback"),
        *("ctl snapshot", "ctl snapshots", "ctl reprocess"),
        *("models use", "models rollback", "models export"),
    ],
)
def test_every_command_has_help_with_an_example(name):
    done = run(*name.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert "Example" in done.stdout


@pytest.mark.parametrize("name", ["watch", "ctl", "config", "export"])
def test_light_commands_do_not_load_torch(name):
    program = (
        "import sys; from ptycho_stream.cli import main; main([sys.argv[1], '--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, name], timeout=30).returncode == 0


@pytest.mark.parametrize("name", ["no/name", "there"])
def test_pretraining_under_an_impossible_name_fails_before_it_trains(tmp_path, name):
    (tmp_path / "models" / "there").mkdir(parents=True)
    done = run(
        *("models", "pretrain", name, "--registry", tmp_path / "models"),
        *("--minutes", 60, "--work", tmp_path / "work"),
    )
    assert done.returncode == 1 and name in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("simulate", "--out", "scan.npz", "--step-px", "0"),
        ("simulate", "--out", "scan.npz", "--photons", "-1"),
        ("simulate", "--out", "scan.npz", "--energy-ev", "nan"),
        ("simulate", "--out", "scan.npz", "--distance-m", "0"),
        ("simulate", "--out", "scan.npz", "--seed", "-1"),
        ("watch", "--next"),
        ("watch", "--next", "--once"),
    ],
)
def test_options_that_could_do_nothing_are_wrong_usage(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.returncode == 2, done.stderr
    assert words[-2 if words[0] == "simulate" else 1] in done.stderr


def test_bash_completes_commands():
    program = Path(sys.executable).parent
    script = (
        "source <(ptycho-stream --show-completion); "
        "COMP_WORDS=(ptycho-stream ctl sna) COMP_CWORD=2; "
        "_ptycho_stream_completion ptycho-stream; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PATH": f"{program}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.stdout.split() == ["snapshot", "snapshots"], done.stderr
