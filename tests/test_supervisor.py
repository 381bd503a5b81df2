"""The daemon's first process: what it owns, what it restarts, what it tells whom."""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_harness import DaemonHarness, wait_for

from ptycho_stream.errors import ControlError, SettingsError
from ptycho_stream.settings import GaussianSettings, ProbeSettings, load_settings
from ptycho_streamd.notify import Notifier
from ptycho_streamd.reload import merge_reloaded
from ptycho_streamd.settings_file import write_settings
from ptycho_streamd.supervisor import Supervisor, main


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonHarness]:
    with DaemonHarness(tmp_path, stages=("ingest",)) as harness:
        yield harness


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_stage_that_dies_is_restarted_with_growing_pauses_and_counted(daemon):
    pids = {daemon.stage_pid("ingest")}
    for restarts in (1, 2, 3, 4):
        daemon.kill("ingest")
        wait_for(lambda n=restarts: daemon.status()["stages"]["ingest"]["restarts"] == n)
        wait_for(lambda: daemon.status()["stages"]["ingest"]["alive"])
        pids.add(daemon.stage_pid("ingest"))
    assert len(pids) == 5
    assert daemon.log.count("again in 0.1 s") == 3
    assert daemon.log.count("again in 0.2 s") == 1
    daemon.metric('ptycho_stream_stage_restarts_total{stage="ingest"}', 4)


def test_a_silent_stage_is_killed_and_healthz_says_so(tmp_path):
    tables = {"supervisor": {"heartbeat_timeout_s": 1.5}}
    with DaemonHarness(tmp_path, tables, stages=("ingest",)) as daemon:
        stopped = daemon.stage_pid("ingest")
        os.kill(stopped, signal.SIGSTOP)

        def unwell() -> bool:
            try:
                urllib.request.urlopen(daemon.url("/healthz"), timeout=5).close()
            except urllib.error.HTTPError as error:
                error.close()
                return error.code == 503
            return False

        wait_for(unwell)
        wait_for(lambda: gone(stopped))
        daemon.wait_ready()


def test_children_end_with_a_supervisor_that_was_killed(daemon):
    ingest = daemon.stage_pid("ingest")
    os.kill(daemon.pid, signal.SIGKILL)
    wait_for(lambda: gone(ingest))
    daemon.wait()


def test_a_port_in_use_is_named_with_its_setting_and_the_status_is_1(tmp_path):
    for table, key in (("control", "endpoint"), ("http", "port")):
        daemon = DaemonHarness(tmp_path, stages=("ingest",))
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            value = port if key == "port" else f"tcp://127.0.0.1:{port}"
            daemon.write_config({table: {key: value}})
            daemon.start(ready=False)
            assert daemon.wait(20) == 1
        assert f"{table}.{key}" in daemon.log


def test_a_port_that_a_stage_cannot_bind_ends_the_start(tmp_path):
    daemon = DaemonHarness(tmp_path, {"detector": {"attach": "bind"}}, stages=("ingest",))
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(daemon.detector_endpoint.rsplit(":", 1)[1])))
        other.listen()
        daemon.start(ready=False)
        assert daemon.wait(20) == 1
    assert "the daemon cannot start: cannot bind detector.endpoint" in daemon.log


@pytest.mark.slow
def test_a_second_daemon_on_the_same_data_is_refused(daemon, tmp_path):
    folder = tmp_path / "second"
    folder.mkdir()
    tables = {"data": {"directory": str(daemon.data)}}
    second = DaemonHarness(folder, tables, stages=("ingest",))
    second.start(ready=False)
    assert second.wait(30) == 1
    assert f"another ptycho-streamd (pid {daemon.pid})" in second.log


def test_sighup_reads_the_settings_again_and_keeps_the_old_ones_if_they_are_wrong(daemon):
    daemon.write_config({"positions": {"wait_s": 3.5}, "detector": {"dialect": "dectris-v1"}})
    with daemon.control() as control:
        answer = control.reload()
    assert answer == {"applied": ["positions.wait_s"], "needs_restart": ["detector.dialect"]}
    daemon.write_config({"positions": {"wait_s": -1}})
    daemon.hangup()
    wait_for(lambda: "the settings stay as they were" in daemon.log)
    with daemon.control() as control, pytest.raises(ControlError, match=r"positions\.wait_s"):
        control.reload()
    wait_for(lambda: daemon.status()["state"] == "ready", what="ready")


def test_a_stage_that_starts_again_gets_what_the_daemon_goes_by_and_not_the_file(daemon):
    daemon.write_config({"positions": {"wait_s": 3.5}})
    with daemon.control() as control:
        control.reload()
    daemon.write_config({"positions": {"wait_s": -1}})
    killed = daemon.stage_pid("ingest")
    daemon.kill("ingest")
    wait_for(lambda: daemon.stage_pid("ingest") != killed)
    wait_for(lambda: daemon.status()["stages"]["ingest"]["alive"])
    assert daemon.status()["stages"]["ingest"]["restarts"] == 1
    assert "wait_s" not in daemon.log.split("ended with status")[1]


def test_the_settings_of_a_stage_are_those_of_the_supervisor(tmp_path):
    daemon = DaemonHarness(tmp_path)
    daemon.write_config(
        {
            "view": {"center_yx_px": [31.5, 1e300]},
            "export": {"formats": ["npz", "png"]},
        }
    )
    metadata = {"sample": 'a "b"\n\x7f\\ µ\U0001f600', "dose 1": 1e-30, "n": 7, "ok": True}
    settings = load_settings(daemon.config).model_copy(update={"metadata": metadata})
    path = tmp_path / "elsewhere" / "settings.toml"
    path.parent.mkdir()
    write_settings(settings, path)
    assert load_settings(path) == settings
    optics = GaussianSettings(fwhm_m=3e-7, defocus_m=-1e-5)
    settings = settings.model_copy(update={"probe": ProbeSettings(optics=optics)})
    write_settings(settings, path)
    assert load_settings(path) == settings
    with pytest.raises(SettingsError, match="cannot write"):
        write_settings(settings, tmp_path / "nowhere" / "settings.toml")


def test_a_reload_before_the_daemon_is_ready_does_not_say_that_it_is(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = str(tmp_path / "notify")
        manager.bind(path)
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        daemon = DaemonHarness(tmp_path, stages=("ingest",))
        supervisor = Supervisor(daemon.config, daemon.settings, ("ingest",))
        try:
            supervisor._reload()
            with pytest.raises(BlockingIOError):
                manager.recv(4096)
        finally:
            supervisor._close()


def test_a_name_from_outside_is_no_message_to_systemd(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = str(tmp_path / "notify")
        manager.bind(path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notifier = Notifier()
        notifier.status("series 1\nMAINPID=1\r\x00 running")
        assert manager.recv(4096).decode() == "STATUS=series 1\ufffdMAINPID=1\ufffd\ufffd running"
        notifier.close()


def test_systemd_hears_readiness_status_watchdog_and_stop(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = str(tmp_path / "notify")
        manager.bind(path)
        manager.settimeout(10)
        environment = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "600000"}
        daemon = DaemonHarness(tmp_path, stages=("ingest",), environment=environment)
        daemon.start()
        heard: list[str] = []
        until_s = time.monotonic() + 10
        while heard.count("WATCHDOG=1") < 3 or "STATUS=waiting for a scan" not in heard:
            assert time.monotonic() < until_s, heard
            heard.append(manager.recv(4096).decode())
        assert "READY=1" in heard
        daemon.stop()
        manager.setblocking(False)
        while heard[-1] != "STOPPING=1":
            heard.append(manager.recv(4096).decode())


def test_scans_and_unknown_ones_are_answered_from_the_store(daemon):
    with daemon.control() as control:
        assert control.scans() == []
        with pytest.raises(ControlError, match="no scan") as caught:
            control.scan()
        assert caught.value.code == "not_found"
        with pytest.raises(ControlError):
            control.scan("01ARZ3NDEKTSV4RRFFQ69G5FAV")
        with pytest.raises(ControlError, match="not running") as caught:
            control.export()
        assert caught.value.code == "unavailable"


def test_http_knows_two_pages(daemon):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(daemon.url("/other"), timeout=5)
    assert caught.value.code == 404
    caught.value.close()


def test_the_program_checks_a_file_and_says_what_is_wrong(tmp_path, capsys):
    daemon = DaemonHarness(tmp_path)
    assert main(["--config", str(daemon.config), "--check"]) == 0
    daemon.write_config({"detector": {"colour": "blue"}})
    assert main(["--config", str(daemon.config), "--check"]) == 1
    assert "detector.colour: unknown key" in capsys.readouterr().err
    assert main(["--config", str(daemon.config)]) == 78
    with pytest.raises(SystemExit) as caught:
        main(["--colour"])
    assert caught.value.code == 2


def test_a_reload_keeps_what_is_bound_to_sockets_and_files(tmp_path):
    daemon = DaemonHarness(tmp_path)
    before = load_settings(daemon.config)
    daemon.write_config({"control": {"endpoint": "tcp://127.0.0.1:1"}, "view": {"dc": "corner"}})
    outcome = merge_reloaded(before, load_settings(daemon.config))
    assert outcome.applied == ("view.dc",)
    assert outcome.needs_restart == ("control.endpoint",)
    assert outcome.settings.control == before.control
    assert outcome.settings.view.dc == "corner"
