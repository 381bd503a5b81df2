"""``watch`` and ``export`` on a terminal, in a pipe and for programs, as processes of their own."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as Picture
from results_source import PIXEL_M, SCANS, TILE_PX, Source, free_settings, grown

from ptycho_stream.cli.picture import phase_picture, shrunk

FINAL = grown(6, state="complete", final=True)


def command(*words):
    program = "import sys; from ptycho_stream.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, *map(str, words)]


def run(*words, timeout=20):
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def source():
    with Source() as source:
        yield source


def at(source):
    return ("--results", source.endpoints[0], "--resync", source.endpoints[1])


def test_once_writes_the_newest_image_with_the_keys_that_scoring_reads(source, tmp_path):
    source.publish(grown(6))
    out = tmp_path / "image.npz"
    done = run("watch", "--once", "--out", out, *at(source))
    assert done.returncode == 0, done.stderr
    with np.load(out, allow_pickle=False) as saved:
        assert set(saved) == {
            "object",
            "weight",
            "origin_yx_m",
            "pixel_yx_m",
            "probe",
            "positions_yx_m",
            "frame_numbers",
            "scan_id",
            "metadata",
        }
        assert saved["object"].dtype == np.complex64
        assert saved["object"].shape == saved["weight"].shape == (TILE_PX, 4 * TILE_PX)
        expected = np.array([-TILE_PX, -2 * TILE_PX]) * PIXEL_M
        np.testing.assert_allclose(saved["origin_yx_m"], expected)
        np.testing.assert_allclose(saved["pixel_yx_m"], PIXEL_M)
        assert saved["probe"].shape == (2, 8, 8)
        assert saved["positions_yx_m"].shape == (6, 2)
        assert saved["frame_numbers"].tolist() == list(range(6))
        assert str(saved["scan_id"]) == SCANS[0]
        metadata = json.loads(str(saved["metadata"]))
    assert metadata["sample"] == "siemens star"
    assert metadata["ptycho_stream"]["state"] == "running"
    assert list(tmp_path.iterdir()) == [out]


def test_a_collapsed_network_is_warned_of(source):
    source.publish(grown(6, spread=0.003, collapsed=True))
    lines = run("watch", "--once", *at(source))
    assert "warning: the output of test has collapsed" in lines.stdout
    told = json.loads(run("watch", "--once", "--json", *at(source)).stdout)
    assert told["collapsed"] is True and told["spread"] == 0.003
    source.publish(grown(7, spread=0.2))
    assert "warning" not in run("watch", "--once", *at(source)).stdout


def test_once_without_an_image_fails_and_says_why(source):
    done = run("watch", "--once", *at(source))
    assert done.returncode == 1
    assert "no image yet" in done.stderr and done.stderr.count("\n") == 1


def test_once_without_a_daemon_fails_and_says_what_to_check():
    settings = free_settings()
    done = run(
        *("watch", "--once", "--timeout", "0.5"),
        *("--results", settings.endpoint, "--resync", settings.resync_endpoint),
    )
    assert done.returncode == 1
    assert "is ptycho-streamd running" in done.stderr and "Traceback" not in done.stderr


def test_once_prints_json_for_programs(source):
    source.publish(FINAL)
    done = run("watch", "--once", "--json", *at(source))
    (said,) = [json.loads(text) for text in done.stdout.splitlines()]
    assert said["scan_id"] == SCANS[0] and said["final"] and said["frames"] == 6
    assert said["shape_yx"] == [TILE_PX, 4 * TILE_PX]


def test_until_complete_ends_with_the_scan(source, tmp_path):
    out = tmp_path / "image.npz"
    process = subprocess.Popen(
        command("watch", "--until-complete", "--out", out, "--timeout", 20, *at(source)),
        stdout=subprocess.PIPE,
        text=True,
    )
    for step in range(1, 7):
        source.publish(grown(step))
        time.sleep(0.1)
    assert process.poll() is None
    source.publish(FINAL)
    said, _ = process.communicate(timeout=15)
    assert process.returncode == 0
    assert "complete: 6 frames" in said.splitlines()[-1]
    with np.load(out, allow_pickle=False) as saved:
        assert saved["frame_numbers"].size == 6


def test_until_complete_next_passes_over_a_scan_that_is_over(source):
    source.publish(FINAL)
    process = subprocess.Popen(
        command("watch", "--until-complete", "--next", "--json", "--timeout", 20, *at(source)),
        stdout=subprocess.PIPE,
        text=True,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.5)
    source.publish(grown(3, SCANS[1], state="aborted", final=True))
    said, _ = process.communicate(timeout=15)
    last = json.loads(said.splitlines()[-1])
    assert (last["scan_id"], last["state"], last["final"]) == (SCANS[1], "aborted", True)


def test_until_complete_gives_up_in_time(source):
    source.publish(grown(3))
    done = run("watch", "--until-complete", "--timeout", "1", *at(source))
    assert done.returncode == 1
    assert "no final image" in done.stderr


def test_a_terminal_shows_a_table_and_a_picture(source):
    mine, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    environment |= {"COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(
        command("watch", "--until-complete", *at(source)),
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    seen = bytearray()

    def read():
        try:
            while chunk := os.read(mine, 65536):
                seen.extend(chunk)
        except OSError:
            pass  # the other end is closed: how a terminal says the end

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 7):
        source.publish(grown(step))
        time.sleep(0.1)
    source.publish(replace(FINAL, **SUSPECT))
    assert process.wait(20) == 0
    reader.join()
    os.close(mine)
    text = seen.decode()
    assert "refined, 2.2 sweeps" in text and "probe suspect" in text
    assert "a corrected probe explains 70% of it" in text
    assert "R 0.21, 0.12 of Poisson noise alone, excess 0.09" in text and "12.5 nm" in text
    assert f"scan {SCANS[0]}" in text and "complete (final)" in text and "siemens star" in text
    assert "\u2580" in text and "38;2;" in text


def test_the_interrupt_key_ends_watching_without_an_error(source):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("these tests run in the background, where the interrupt key is ignored")
    source.publish(grown(3))
    with subprocess.Popen(
        command("watch", *at(source)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, complaints = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, complaints) == (0, "")


def test_export_writes_arrays_and_a_picture(source, tmp_path):
    source.publish(FINAL)
    files = [tmp_path / "image.npz", tmp_path / "preview.png"]
    done = run("export", *files, "--json", *at(source))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == [str(file) for file in files]
    with Picture.open(files[1]) as picture:
        assert picture.size == (2 * 4 * TILE_PX + 8, TILE_PX)
    assert sorted(tmp_path.iterdir()) == files


def test_export_of_a_scan_before_the_newest(source, tmp_path):
    source.publish(FINAL)
    source.publish(grown(2, SCANS[1]))
    out = tmp_path / "image.npz"
    assert run("export", out, "--scan", SCANS[0], *at(source)).returncode == 0
    with np.load(out, allow_pickle=False) as saved:
        assert str(saved["scan_id"]) == SCANS[0]


def test_export_refuses_other_formats_as_wrong_usage(tmp_path):
    done = run("export", tmp_path / "image.bmp")
    assert done.returncode == 2
    assert ".cxi or .h5" in done.stderr


def test_export_into_a_folder_that_is_not_there(source, tmp_path):
    source.publish(FINAL)
    done = run("export", tmp_path / "no" / "image.npz", *at(source))
    assert done.returncode == 1
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr


SUSPECT = {
    "layer": "refined",
    "sweeps": 2.25,
    "verdict": "probe suspect",
    "reasons": ("64 frames misfit by 0.080", "a corrected probe explains 70% of it"),
    "trust": {
        "r_factor": 0.21,
        "r_poisson": 0.12,
        "excess": 0.09,
        "resolution_nm": 12.5,
        "beyond_the_table": 1.5,
    },
}


def test_layer_verdict_and_reasons_are_told_in_words_and_as_json(source):
    source.publish(grown(6, **SUSPECT))
    said = run("watch", "--once", *at(source)).stdout
    assert "refined, 2.2 sweeps" in said and "verdict: probe suspect" in said
    assert "R 0.2100, excess 0.0900, resolution 12.5 nm" in said
    for reason in SUSPECT["reasons"]:
        assert f"  {reason}\n" in said
    told = json.loads(run("watch", "--once", "--json", *at(source)).stdout)
    assert (told["layer"], told["sweeps"]) == ("refined", 2.25)
    assert told["verdict"] == "probe suspect" and told["reasons"] == list(SUSPECT["reasons"])
    assert told["trust"] == SUSPECT["trust"]


def watching(source, *words):
    process = subprocess.Popen(
        command("watch", *words, *at(source)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline()
    return process


def test_fail_on_ends_with_status_3_as_soon_as_the_verdict_comes(source, tmp_path):
    out = tmp_path / "bad.npz"
    source.publish(grown(3, verdict="undecided", reasons=("only 3 frames",)))
    words = ("--until-complete", "--fail-on", "frames bad", "--fail-on", "probe-suspect")
    process = watching(source, *words, "--out", out)
    source.publish(grown(4, verdict="good"))
    source.publish(grown(5, verdict="undersampled"))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    counts = {"committed": 6, "expected": 120}
    source.publish(grown(6, counts=counts, **SUSPECT))
    said, complaints = process.communicate(timeout=10)
    assert process.returncode == 3
    assert said.count("verdict: probe suspect") == 1
    assert complaints == (
        f"failed: scan {SCANS[0]}: probe suspect after 6 of 120 frames: "
        "64 frames misfit by 0.080; a corrected probe explains 70% of it\n"
    )
    with np.load(out, allow_pickle=False) as saved:
        assert saved["frame_numbers"].size == 6


def test_fail_on_waits_for_frames_and_for_the_verdict_to_stand(source):
    source.publish(grown(3, **SUSPECT))
    process = watching(source, "--fail-on", "suspect", "--after", 5, "--hold", "0.4")
    source.publish(grown(5, verdict="orientation suspect"))
    time.sleep(0.2)
    source.publish(grown(6, verdict="good"))
    source.publish(grown(7, **SUSPECT))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.7)  # no image says that it still stands
    for step in range(8, 100):
        source.publish(grown(step, **SUSPECT))
        if process.poll() is not None:
            break
        time.sleep(0.1)
    _, complaints = process.communicate(timeout=10)
    assert process.returncode == 3
    assert "probe suspect after" in complaints


def test_fail_on_judges_the_last_image_however_few_frames_it_has(source):
    source.publish(grown(6, state="complete", final=True, **SUSPECT))
    words = ("--until-complete", "--fail-on", "suspect", "--after", 1000, "--hold", 60)
    done = run("watch", *words, *at(source))
    assert done.returncode == 3 and "probe suspect" in done.stderr


def test_a_scan_that_goes_well_ends_with_status_0(source):
    source.publish(grown(6, state="complete", final=True, verdict="good"))
    done = run("watch", "--until-complete", "--fail-on", "suspect", *at(source))
    assert (done.returncode, done.stderr) == (0, "")
    assert run("watch", "--once", "--fail-on", "good", *at(source)).returncode == 3


def test_an_unknown_verdict_is_wrong_usage_that_lists_those_there_are(source):
    done = run("watch", "--fail-on", "awful", *at(source))
    assert done.returncode == 2 and "orientation suspect" in " ".join(done.stderr.split())
    assert run("watch", "--after", "5", *at(source)).returncode == 2


def test_the_coarse_picture_keeps_shape_and_marks_the_unseen():
    object_yx = np.full((100, 300), np.exp(0.3j), np.complex64)
    object_yx[:, 200:] = np.nan
    small = shrunk(object_yx, 40, 60)
    assert small.shape == (20, 60)
    assert np.isnan(small[:, 40:]).all() and np.allclose(small[:, :40], np.exp(0.3j))
    assert len(phase_picture(object_yx, 20, 60).plain.splitlines()) == 10
    assert phase_picture(np.zeros((0, 0), np.complex64), 20, 60).plain == "nothing seen yet"
