"""Ingest as a process: what its sockets are sent is in the store, bit by bit, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from beamline import (
    Beamline,
    check_scan,
    headers,
    pixels,
    position,
    positions,
    sealed_headers,
)
from daemon_harness import DaemonHarness, wait_for
from scan_samples import make_header

from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.writer import ScanWriter
from ptycho_stream.wire import DectrisV1Encoder, NativeEncoder


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonHarness]:
    """A daemon for the DECTRIS dialect with native positions, without reconstruction."""
    settings = {"detector": {"dialect": "dectris-v1"}}
    with DaemonHarness(tmp_path, settings, stages=("ingest",)) as harness:
        yield harness


@pytest.fixture
def line(daemon: DaemonHarness) -> Iterator[Beamline]:
    with Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as beamline:
        yield beamline


def native_daemon(folder: Path, **tables: object) -> DaemonHarness:
    return DaemonHarness(folder, tables, stages=("ingest",))  # type: ignore[arg-type]


def sealed(daemon: DaemonHarness, count: int, timeout_s: float = 20.0) -> list:
    catalogue = Catalogue(daemon.data)
    try:
        return wait_for(lambda: sealed_headers(catalogue, count), timeout_s, f"{count} scans")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{daemon.ingest()}\n{daemon.log}") from None


def test_every_frame_is_stored_bit_by_bit_and_joined_with_its_position(daemon, line):
    line.dectris(1, key=1, numbers=range(300))
    line.send_positions(range(300))
    (header,) = sealed(daemon, 1)
    assert header.state == "complete", header.reason
    assert header.expected_frames == 300
    assert header.counts["frames"] == header.counts["positioned"] == 300
    assert header.pixel_yx_m is not None
    check_scan(Catalogue(daemon.data), header.scan_id, 1, range(300))
    daemon.metric("ptycho_stream_frames_received_total", 300)
    daemon.metric("ptycho_stream_frames_committed_total", 300)
    daemon.metric("ptycho_stream_positions_received_total", 300)
    daemon.metric('ptycho_stream_scans_sealed_total{state="complete"}', 1)


def test_frames_so_large_that_few_make_a_batch_are_all_counted(tmp_path):
    tables = {"data": {"frames_per_file": 4}, "positions": {"source": "inline"}}
    with (
        native_daemon(tmp_path, **tables) as d,
        Beamline(d.detector_endpoint, d.positions_endpoint) as line,
    ):
        encoder = NativeEncoder("1", encoding="bslz4")
        line.send(encoder.scan_start(5))
        for number in range(5):
            frame = np.full((4096, 4096), number, np.uint8)  # 16 MiB: four make a batch
            line.send(encoder.frame(number, frame, position(number)))
        line.send(encoder.scan_end())
        (header,) = sealed(d, 1)
        assert header.counts["frames"] == 5
        d.metric("ptycho_stream_frames_committed_total", 5)


def test_scans_follow_each_other_with_series_numbers_that_start_again(daemon, line):
    """Positions before, during and after their frames; an aborted scan in between."""
    line.send_positions(range(60), "1", "before")
    daemon.metric("ptycho_stream_positions_received_total", 60)
    line.dectris(1, key=1, numbers=range(60))
    line.dectris(2, key=2, numbers=range(30), end=False)
    line.send_positions(range(60), "2", "during")
    line.dectris(2, key=2, numbers=range(30, 60), start=False)
    sealed(daemon, 2)
    line.dectris(1, key=3, numbers=range(25), end=False, expected=60)
    wait_for(lambda: daemon.ingest()["scans"])
    wait_for(lambda: daemon.ingest()["scans"][0]["frames"] == 25)
    with daemon.control() as control:
        running = daemon.ingest()["scan_id"]
        assert control.abort() == {"scan_id": running}
    line.dectris(1, key=3, numbers=range(25, 30), start=False, end=False)
    line.dectris(1, key=4, numbers=range(60))
    time.sleep(0.3)
    line.send_positions(range(60), "1", "after")
    found = sealed(daemon, 4)
    assert [h.state for h in found] == ["complete", "complete", "aborted", "complete"]
    catalogue = Catalogue(daemon.data)
    for key, (header, count) in enumerate(zip(found, (60, 60, 25, 60), strict=True), 1):
        check_scan(catalogue, header.scan_id, key, range(count))
        if header.state == "complete":
            assert header.counts["positioned"] == 60
    daemon.metric('ptycho_stream_frames_dropped_total{reason="closed"}', 5)


def test_a_second_start_without_an_end_interrupts_the_first_scan(daemon, line):
    line.dectris(1, key=1, numbers=range(20), end=False, expected=50)
    line.dectris(2, key=2, numbers=range(20))
    line.send_positions(range(20), "1", "first")
    line.send_positions(range(20), "2", "second")
    first, second = sealed(daemon, 2)
    assert (first.state, first.reason) == ("interrupted", "superseded by a new start")
    assert second.state == "complete"
    check_scan(Catalogue(daemon.data), first.scan_id, 1, range(20))
    check_scan(Catalogue(daemon.data), second.scan_id, 2, range(20))


def test_duplicates_disorder_and_holes_are_counted(daemon, line):
    line.dectris(1, key=1, numbers=[0, 1, 5, 3, 3, 4], expected=10)
    line.send_positions(range(10))
    (header,) = sealed(daemon, 1)
    assert header.counts["missing"] == 5
    check_scan(Catalogue(daemon.data), header.scan_id, 1, [0, 1, 5, 3, 4])
    daemon.metric("ptycho_stream_frames_duplicate_total", 1)
    assert 'frames_dropped_total{reason="duplicate"}' not in str(daemon.metrics())
    assert "frame 3 of series 1, (64, 64) <u2, is dropped: its number has come before" in daemon.log
    daemon.metric("ptycho_stream_frames_out_of_order_total", 2)
    daemon.metric("ptycho_stream_frames_missing_total", 5)


def test_bad_input_costs_itself_only(daemon, line):
    encoder = DectrisV1Encoder(1, "bs16-lz4<")
    line.dectris(1, key=1, numbers=range(5), end=False, expected=12)
    nested = b'{"htype":"dimage-1.0","series":1,"frame":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    line.send([b"{not json"])
    line.send([nested])
    head, array, blob, times = encoder.frame(5, pixels(1, 5))
    line.send([head, array, blob[: len(blob) // 2], times])
    line.send([head, array, bytes(b ^ 0x55 for b in blob), times])
    absurd = array.replace(b"64", b"4000000000")
    line.send([head, absurd, blob, times])
    line.send(encoder.frame(6, pixels(1, 6, (64, 32))))
    line.send(encoder.frame(6, pixels(1, 6).astype(np.uint32)))
    line.dectris(1, key=1, numbers=range(7, 12), start=False)
    line.send_positions(range(12))
    (header,) = sealed(daemon, 1)
    check_scan(Catalogue(daemon.data), header.scan_id, 1, [*range(5), *range(7, 12)])
    assert header.counts["missing"] == 2
    assert header.counts["wrong_shape"] >= 1
    assert "frame 6 of series 1, (64, 32) <u2, is dropped: the frames of its scan" in daemon.log

    def undecodable() -> float:
        name = "ptycho_stream_messages_undecodable"
        return sum(v for key, v in daemon.metrics().items() if key.startswith(name))

    wait_for(lambda: undecodable() >= 4, what="the count of bad messages")
    assert daemon.status()["stages"]["ingest"]["restarts"] == 0


def test_positions_that_are_nan_or_absurd_are_counted_and_flagged(daemon, line):
    line.dectris(1, key=1, numbers=range(10))
    encoder = NativeEncoder("1", "e1")
    where = positions(range(10))
    where[3] = np.nan
    where[5] = (0.5, 0.0)
    line.positioner.send_multipart(encoder.positions_start())
    line.positioner.send_multipart(encoder.positions(range(10), where))
    daemon.metric("ptycho_stream_positions_invalid_total", 1)
    daemon.metric('ptycho_stream_positions_flagged_total{reason="jump"}', 1)
    assert "1 positions are invalid (NaN" in daemon.log
    assert "1 positions are beyond reconstruct.max_extent_m" in daemon.log
    assert "1 positions are further than reconstruct.max_step_m" in daemon.log
    line.positioner.send_multipart(encoder.positions_end())
    (header,) = sealed(daemon, 1)
    assert header.counts["unpositioned"] == 1
    with Catalogue(daemon.data).open(header.scan_id) as reader:
        flags = {int(p["number"]): int(p["flags"]) for p in reader.pairs()}
    assert flags.pop(5) == 3
    assert set(flags.values()) == {0}
    daemon.metric("ptycho_stream_positions_invalid_total", 1)
    daemon.metric('ptycho_stream_positions_flagged_total{reason="extent"}', 1)


def test_an_odd_first_frame_does_not_cost_the_scan(daemon, line):
    line.send_positions(range(10))
    line.dectris(1, key=1, numbers=[], end=False, expected=10)
    head, array, blob, times = DectrisV1Encoder(1, "bs16-lz4<").frame(0, pixels(1, 0, (64, 63)))
    line.send([head, array, blob[: len(blob) // 2], times])
    line.dectris(1, key=1, numbers=range(1, 10), start=False)
    *aborted, header = sealed(daemon, 3)
    assert {h.state for h in aborted} == {"aborted"}
    assert (header.state, header.counts["missing"]) == ("complete", 1)
    check_scan(Catalogue(daemon.data), header.scan_id, 1, range(1, 10))
    assert header.counts["positioned"] == 9


def test_a_scan_whose_end_is_lost_is_interrupted_after_a_silence(tmp_path):
    tables = {"detector": {"silence_s": 1.0}, "positions": {"source": "inline"}}
    with (
        native_daemon(tmp_path, **tables) as d,
        Beamline(d.detector_endpoint, d.positions_endpoint) as line,
    ):
        encoder = NativeEncoder("7")
        line.send(encoder.scan_start(30))
        for n in range(5):
            line.send(encoder.frame(n, pixels(1, n), position(n)))
        (header,) = sealed(d, 1)
        assert header.state == "interrupted"
        assert "no frame came for 1 s (detector.silence_s)" in header.reason
        line.send(encoder.frame(9, pixels(1, 9), position(9)))
        _, second = sealed(d, 2)
        assert second.joined_late
        check_scan(Catalogue(d.data), second.scan_id, 1, [9])


def test_ever_new_epochs_do_not_cost_a_scan_its_own(daemon, line):
    line.dectris(1, key=1, numbers=range(10), end=False, expected=20)
    line.send_positions(range(10), "1", "own", end=False)
    daemon.metric("ptycho_stream_positions_received_total", 10)
    for n in range(4200):
        encoder = NativeEncoder(f"other {n}", f"other {n}")
        line.positioner.send_multipart(encoder.positions([n], positions([n])))
    line.dectris(1, key=1, numbers=range(10, 20), start=False)
    line.send_positions(range(10, 20), "1", "own")
    (header,) = sealed(daemon, 1)
    assert (header.state, header.counts["positioned"]) == ("complete", 20)
    assert daemon.status()["stages"]["ingest"]["restarts"] == 0


def test_a_scan_without_positions_is_unmatched(daemon, line):
    line.dectris(1, key=1, numbers=range(10))
    (header,) = sealed(daemon, 1)
    assert header.state == "unmatched"
    daemon.metric("ptycho_stream_frames_unpositioned_total", 10)


def test_a_daemon_started_in_mid_series_joins_it(tmp_path):
    daemon = DaemonHarness(tmp_path, {"detector": {"dialect": "dectris-v1"}}, stages=("ingest",))
    with daemon, Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as line:
        line.dectris(4, key=1, numbers=range(20, 40), start=False)
        line.send_positions(range(40), "4")
        (header,) = sealed(daemon, 1)
        assert header.joined_late
        check_scan(Catalogue(daemon.data), header.scan_id, 1, range(20, 40))


def test_inline_positions_and_metadata_come_with_the_frames(tmp_path):
    with (
        native_daemon(tmp_path, positions={"source": "inline"}, metadata={"beamline": "X"}) as d,
        Beamline(d.detector_endpoint, d.positions_endpoint) as line,
    ):
        encoder = NativeEncoder("7", encoding="lz4")
        line.send(encoder.scan_start(30, metadata={"sample": "star"}))
        for n in range(30):
            line.send(encoder.frame(n, pixels(1, n), position(n)))
        line.send(encoder.scan_end())
        (header,) = sealed(d, 1)
        assert header.state == "complete"
        assert dict(header.metadata) == {"beamline": "X", "sample": "star"}
        check_scan(Catalogue(d.data), header.scan_id, 1, range(30))
        assert header.counts["positioned"] == header.counts["positions"] == 30
        d.metric("ptycho_stream_positions_received_total", 30)


def test_positions_of_a_file_are_joined(tmp_path):
    np.savez(tmp_path / "path.npz", positions_yx_m=positions(range(40)))
    tables = {"source": "file", "path": "path.npz"}
    with (
        native_daemon(tmp_path, positions=tables) as d,
        Beamline(d.detector_endpoint, d.positions_endpoint) as line,
    ):
        line.native("1", 1, range(40))
        (header,) = sealed(d, 1)
        assert header.counts["positioned"] == 40


def test_a_crop_about_the_beam_centre_is_stored(tmp_path):
    with (
        native_daemon(
            tmp_path, detector={"crop_yx_px": [32, 32]}, positions={"source": "inline"}
        ) as d,
        Beamline(d.detector_endpoint, d.positions_endpoint) as line,
    ):
        line.native("1", 1, range(5))
        (header,) = sealed(d, 1)
        assert header.frame_shape_yx == (32, 32)
        assert header.crop_corner_yx_px == (16, 16)
        with Catalogue(d.data).open(header.scan_id) as reader:
            np.testing.assert_array_equal(reader.frame(4), pixels(1, 4)[16:48, 16:48])


# ---- people ------------------------------------------------------------------------------------


def test_a_scan_is_armed_stopped_and_aborted_by_hand(daemon, line):
    with daemon.control() as control:
        control.start(metadata={"sample": "mine"})
        line.dectris(1, key=1, numbers=range(10), end=False, expected=100)
        line.send_positions(range(10))
        wait_for(lambda: [s for s in daemon.ingest()["scans"] if s["positioned"] == 10])
        running = daemon.ingest()["scan_id"]
        assert control.stop() == {"scan_id": running}
        (header,) = sealed(daemon, 1)
        assert (header.state, header.metadata["sample"]) == ("complete", "mine")
        assert header.counts["missing"] == 0
        with pytest.raises(Exception, match="no scan is running"):
            control.abort()


def test_endpoints_are_known_without_taking_a_frame(daemon, line):
    def peers() -> dict:
        with daemon.control() as control:
            return {e["name"]: e["peers"] for e in control.endpoints()}

    wait_for(lambda: peers() == {"positions": 1, "detector": 1})
    line.dectris(1, key=1, numbers=range(50))
    line.send_positions(range(50))
    assert sealed(daemon, 1)[0].counts["missing"] == 0


def test_a_view_changed_in_the_settings_reaches_the_open_scan(daemon, line):
    line.dectris(1, key=1, numbers=range(10), end=False, expected=100)
    wait_for(lambda: daemon.ingest()["scans"])
    daemon.write_config({"view": {"orientation": "flip_y"}})
    daemon.hangup()
    catalogue = Catalogue(daemon.data)
    wait_for(lambda: headers(catalogue)[0].view.orientation == "flip_y")
    assert headers(catalogue)[0].view.version == 2


# ---- kills and disks ---------------------------------------------------------------------------


def test_a_killed_ingest_goes_on_with_the_scan_and_counts_what_was_in_flight(daemon, line):
    """The epoch of positions stays with the scan, although its series is not named again."""
    line.dectris(1, key=1, numbers=range(200), end=False, expected=400)
    line.send_positions(range(200), end=False)
    wait_for(lambda: (daemon.ingest().get("scans") or [{}])[0].get("positioned", 0) == 200)
    line.dectris(1, key=1, numbers=range(200, 300), start=False, end=False)
    killed = daemon.stage_pid("ingest")
    daemon.kill("ingest")
    line.dectris(1, key=1, numbers=range(300, 390), start=False, end=False)  # all may be lost
    wait_for(lambda: daemon.stage_pid("ingest") != killed and daemon.ingest())
    wait_for(lambda: all(e["peers"] for e in daemon.ingest().get("endpoints", [{"peers": 0}])))
    line.dectris(1, key=1, numbers=range(390, 400), start=False)
    line.send_positions(range(200, 400), name_series=False)
    (header,) = sealed(daemon, 1)
    counts = header.counts
    assert header.state == "complete"
    assert counts["frames"] + counts["missing"] == 400
    assert counts["frames"] > 200
    assert counts["unpositioned"] == 0
    with Catalogue(daemon.data).open(header.scan_id) as reader:
        numbers = reader.records()["number"].tolist()
    assert len(numbers) == counts["frames"]
    check_scan(Catalogue(daemon.data), header.scan_id, 1, numbers)
    daemon.metric('ptycho_stream_stage_restarts_total{stage="ingest"}', 1)
    daemon.metric("ptycho_stream_scans_recovered_total", 1)


def test_after_a_kill_of_everything_the_committed_frames_are_there(tmp_path):
    tables = {"detector": {"dialect": "dectris-v1"}, "data": {"resume_s": 1.0}}
    daemon = DaemonHarness(tmp_path, tables, stages=("ingest",))
    daemon.start()
    try:
        with Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as line:
            line.dectris(1, key=1, numbers=range(100), end=False, expected=400)
            line.send_positions(range(100), end=False)
            catalogue = Catalogue(daemon.data)
            wait_for(lambda: headers(catalogue))
            scan_id = headers(catalogue)[0].scan_id
            with catalogue.open(scan_id) as reader:
                wait_for(lambda: reader.committed >= 50)
                daemon.kill()
                committed = reader.committed
        daemon.start()
        (header,) = sealed(daemon, 1)
        assert header.state == "interrupted"
        assert header.counts["frames"] >= committed
        check_scan(catalogue, scan_id, 1, range(header.counts["frames"]))
    finally:
        daemon.stop()


def test_sigterm_drains_and_seals_within_five_seconds(daemon, line):
    line.dectris(1, key=1, numbers=range(100), end=False, expected=400)
    line.send_positions(range(100))
    wait_for(lambda: (daemon.ingest().get("scans") or [{}])[0].get("frames") == 100)
    begun_s = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - begun_s < 5
    (header,) = headers(Catalogue(daemon.data))
    assert (header.state, header.reason) == ("interrupted", "the daemon was stopped")
    assert header.counts["positioned"] == 100
    check_scan(Catalogue(daemon.data), header.scan_id, 1, range(100))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def health(daemon: DaemonHarness) -> tuple[int, list[str]]:
    """Status of ``/healthz`` and the problems that it names."""
    try:
        with urllib.request.urlopen(daemon.url("/healthz"), timeout=5) as answer:
            return answer.status, json.load(answer)["problems"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["problems"]


def test_a_full_disk_interrupts_the_scan_and_after_space_is_freed_the_next_works(
    tmp_path, small_disk
):
    """Frames that were committed stay, what happened is said everywhere, nothing is restarted."""
    tables = {
        "data": {"directory": str(small_disk), "min_free_bytes": 3_000_000, "frames_per_file": 32},
        "positions": {"source": "inline"},
    }
    with (
        native_daemon(tmp_path, **tables) as d,
        Beamline(d.detector_endpoint, d.positions_endpoint) as line,
    ):
        others = small_disk / "others"
        others.write_bytes(bytes(3_500_000))
        assert health(d) == (200, [])
        line.native("1", 1, range(1500))
        (header,) = sealed(d, 1)
        assert header.state == "interrupted"
        assert "full" in header.reason
        stored = header.counts["frames"]
        check_scan(Catalogue(d.data), header.scan_id, 1, range(stored))
        wait_for(lambda: d.ingest().get("refusing"))
        d.metric("ptycho_stream_scans_refused_state", 1)
        status, problems = health(d)
        assert status == 503 and "data.min_free_bytes" in problems[0]
        assert d.status()["state"] == "degraded"
        line.native("2", 2, range(10))
        wait_for(
            lambda: (
                d.metrics().get('ptycho_stream_frames_dropped_total{reason="disk_full"}', 0)
                == 10 + 1500 - stored
            )
        )
        assert len(headers(Catalogue(d.data))) == 1
        others.unlink()
        wait_for(lambda: health(d) == (200, []))
        d.metric("ptycho_stream_scans_refused_state", 0)
        line.native("3", 3, range(10))
        _, after = sealed(d, 2)
        assert after.state == "unmatched" and after.counts["frames"] == 10
        check_scan(Catalogue(d.data), after.scan_id, 3, range(10))
        check_scan(Catalogue(d.data), header.scan_id, 1, range(stored))
        assert d.status()["stages"]["ingest"]["restarts"] == 0


@pytest.mark.slow
def test_old_scans_make_room_for_new_ones_before_those_are_refused(tmp_path, small_disk):
    tables = {
        "data": {"directory": str(small_disk), "min_free_bytes": 3_000_000, "frames_per_file": 32},
        "positions": {"source": "inline"},
    }
    with (
        native_daemon(tmp_path, **tables) as d,
        Beamline(d.detector_endpoint, d.positions_endpoint) as line,
    ):
        catalogue = Catalogue(d.data)
        for n in range(6):
            line.native(str(n), n, range(150))
            wait_for(
                lambda n=n: [h for h in headers(catalogue) if h.series == str(n) and h.sealed],
                what=f"scan {n}\n{d.log}",
            )
            time.sleep(1.2)
        newest = headers(catalogue)[-1]
        assert newest.counts["frames"] == 150
        check_scan(catalogue, newest.scan_id, 5, range(150))
        assert "was deleted: less than data.min_free_bytes were free" in d.log


def test_a_stored_scan_of_absurd_shape_does_not_keep_ingest_from_starting(tmp_path):
    daemon = native_daemon(tmp_path, positions={"source": "inline"})
    with ScanWriter.create(daemon.data, make_header()) as writer:
        path = daemon.data / "scans" / writer.scan_id / "scan.json"
    changes = {"frame_shape_yx": [2**40, 2**40], "expected_frames": 2**100}
    raw = json.loads(path.read_text())
    del raw["check"]
    path.write_text(json.dumps(raw | changes))
    with daemon, Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as line:
        line.native("1", 1, range(5))
        absurd, good = sealed(daemon, 2)
        assert (absurd.state, good.counts["frames"]) == ("interrupted", 5)
        daemon.metric("ptycho_stream_scans_unrecoverable_total", 1)
        assert daemon.status()["stages"]["ingest"]["restarts"] == 0


def test_ingest_and_supervisor_do_without_torch():
    root = Path(__file__).parents[1]
    code = (
        "import sys, ptycho_streamd.ingest, ptycho_streamd.supervisor; "
        "sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'daemon'}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
