"""Frames in on one side, the image out on the other: the whole daemon, undisturbed and disturbed.

The scan is simulated at 64 x 64 pixels; detector, positioner and subscriber are the real ones.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for
from live_scan import (
    FRAMES,
    Line,
    assert_same_image,
    check_committed_frames,
    line,
    newest_scan,
    playing,
    simulated,
    undisturbed,
)

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.results import Image
from ptycho_stream.scans import Catalogue
from ptycho_stream.simulate.score import nrmse_to_truth

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    return simulated(seed=3)


@pytest.fixture(scope="module")
def different_scans() -> list[ScanFile]:
    """Five samples, at places that overlap only in part; all with the same probe."""
    return [simulated(seed=10 + number, moved_px=17.3 * number) for number in range(5)]


@pytest.fixture
def daemon(tmp_path: Path, scan: ScanFile) -> Iterator[DaemonHarness]:
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    settings = {
        "detector": {"dialect": "dectris-v1"},
        "reconstruct": {"save_interval_s": 0.3},
    }
    with DaemonHarness(tmp_path, settings) as harness:
        yield harness


def record(daemon: DaemonHarness, scan: ScanFile) -> Image:
    """Play a scan; its final image."""
    after = Catalogue(daemon.data).latest() if daemon.data.exists() else None
    with line(daemon) as beamline:
        beamline.play(scan)
        known = "" if after is None else after.scan_id
        return beamline.results.wait_complete(after=known, timeout_s=60)


def error(image: Image, scan: ScanFile) -> float:
    """Against the sample that the scan was simulated with."""
    assert scan.object is not None and scan.object_origin_yx_m is not None
    return nrmse_to_truth(image, scan.object, scan.object_origin_yx_m)


class Stopwatch:
    """When a scan's first frame, and when its first positions, were sent (monotonic seconds)."""

    def __init__(self, beamline: Line) -> None:
        self.frame_s = self.positions_s = float("inf")
        self._send = beamline.positions.send
        beamline.positions.send = self.send  # type: ignore[method-assign]

    def frame(self, _sent: int) -> None:
        self.frame_s = min(self.frame_s, time.monotonic())

    def send(self, *batch: object) -> None:
        self.positions_s = min(self.positions_s, time.monotonic())
        self._send(*batch)  # type: ignore[arg-type]

    @property
    def first_positioned_s(self) -> float:
        return max(self.frame_s, self.positions_s)


def test_a_scan_becomes_an_image_while_it_runs(daemon, scan):
    seen = []
    with line(daemon, rate_hz=60) as beamline:
        watch = Stopwatch(beamline)
        with playing(beamline, scan, on_frame=watch.frame):
            for image in beamline.results:
                seen.append((time.monotonic(), image))
                if image.final:
                    break
    first_s, first = seen[0]
    final = seen[-1][1]
    assert first_s - watch.first_positioned_s < 1.0
    assert len(first.frame_numbers) < FRAMES / 2 and first.state == "running"
    assert final.complete and sorted(final.frame_numbers.tolist()) == list(range(FRAMES))
    assert len(seen) >= 8
    assert scan.object is not None and scan.object_origin_yx_m is not None
    assert nrmse_to_truth(final, scan.object, scan.object_origin_yx_m) < 0.3
    assert final.metadata["sample"] == "simulated"
    daemon.metric("ptycho_stream_frames_reconstructed_total", FRAMES)
    daemon.metric("ptycho_stream_frame_latency_seconds_count", FRAMES)
    status = daemon.status()["stages"]["reconstruct"]["status"]
    assert 0 < status["latency_p50_ms"] <= status["latency_p99_ms"]


@pytest.mark.slow
def test_scans_in_a_row_do_not_mix(daemon, different_scans, tmp_path):
    """Series numbers start again at 1; positions come before, during and after; two are aborted."""
    course = [("before", None), ("after", 40), ("after", None), ("during", 33), ("during", None)]
    finals: list[Image] = []
    with line(daemon) as beamline:
        for scan, (timing, stop_after) in zip(different_scans, course, strict=True):
            known = max((image.scan_id for image in finals), default="")
            beamline.play(scan, timing=timing, series=1, stop_after=stop_after)
            if stop_after is not None:
                wait_for(lambda: daemon.ingest()["scans"], what="a running scan")
                with daemon.control() as control:
                    control.abort()
            finals.append(beamline.results.wait_complete(timeout_s=30, after=known))
    states = [image.state for image in finals]
    assert states == ["complete", "aborted", "complete", "aborted", "complete"]
    for scan, image, (_, stop_after) in zip(different_scans, finals, course, strict=True):
        sent = list(range(stop_after or FRAMES))
        committed = check_committed_frames(daemon.settings, image.scan_id, scan)
        shown = sorted(image.frame_numbers.tolist())
        assert set(shown) <= set(committed) <= set(sent)
        if stop_after is None:
            assert shown == sent
        assert np.array_equal(image.positions_yx_m, scan.positions_yx_m[image.frame_numbers])
        quiet = undisturbed(daemon.settings, image.scan_id, tmp_path / image.scan_id)
        assert_same_image(image, quiet)


def test_the_first_image_comes_within_a_second_of_the_first_positioned_frame(
    daemon, different_scans
):
    """Of each scan, whenever its positions come."""
    after = ""
    with line(daemon, rate_hz=100) as beamline:
        for scan, timing in zip(different_scans, ("during", "after", "before"), strict=False):
            watch = Stopwatch(beamline)
            with playing(beamline, scan, timing=timing, on_frame=watch.frame):
                first = next(image for image in beamline.results if image.scan_id > after)
                late_s = time.monotonic() - watch.first_positioned_s
            assert late_s < 1.0, f"positions {timing} their frames"
            final = beamline.results.wait_complete(first.scan_id, timeout_s=30)
            assert sorted(final.frame_numbers.tolist()) == list(range(FRAMES))
            after = final.scan_id


def test_the_last_partial_batch_is_reconstructed(daemon, scan):
    """149 frames are no multiple of any batch, and the scan ends without another frame."""
    with line(daemon) as beamline:
        beamline.play(scan, stop_after=FRAMES - 1)
        wait_for(
            lambda: daemon.metrics().get("ptycho_stream_frames_reconstructed_total") == FRAMES - 1,
            20,
            "the last frame's reconstruction",
        )


@pytest.mark.parametrize("stage", ["reconstruct", "ingest"])
def test_a_killed_stage_goes_on(daemon, scan, stage, tmp_path):
    with line(daemon, rate_hz=40) as beamline:
        with playing(beamline, scan):
            time.sleep(1.5)
            daemon.kill(stage)
            killed_s = time.monotonic()
            wait_for(
                lambda: daemon.status()["stages"][stage]["alive"], 20, f"{stage} is alive again"
            )
            assert time.monotonic() - killed_s < 10
        final = beamline.results.wait_complete(timeout_s=40)
    numbers = check_committed_frames(daemon.settings, final.scan_id, scan)
    with Catalogue(daemon.data).open(final.scan_id) as reader:
        assert reader.header.counts["missing"] == FRAMES - len(numbers)
        positioned = sorted(reader.pairs()["number"].tolist())
    assert sorted(final.frame_numbers.tolist()) == positioned
    assert len(numbers) == FRAMES if stage == "reconstruct" else len(numbers) > FRAMES // 2
    assert_same_image(final, undisturbed(daemon.settings, final.scan_id, tmp_path / "again"))
    assert daemon.metrics()[f'ptycho_stream_stage_restarts_total{{stage="{stage}"}}'] == 1


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_stages_killed_at_random_change_nothing(daemon, scan, seed, tmp_path):
    rng = np.random.default_rng(seed)
    with line(daemon, rate_hz=40) as beamline:
        with playing(beamline, scan):
            for _ in range(2):
                time.sleep(rng.uniform(0.2, 1.0))
                stage = str(rng.choice(["ingest", "reconstruct"]))
                daemon.kill(stage)
                wait_for(lambda name=stage: daemon.status()["stages"][name]["alive"], 20, stage)
        final = beamline.results.wait_complete(newest_scan(daemon), timeout_s=40)
    numbers = check_committed_frames(daemon.settings, final.scan_id, scan)
    header = Catalogue(daemon.data).open(final.scan_id).header
    assert header.counts["missing"] == FRAMES - len(numbers)
    assert_same_image(final, undisturbed(daemon.settings, final.scan_id, tmp_path / "again"))


@pytest.mark.slow
def test_everything_killed_at_once_recovers(daemon, scan, tmp_path):
    """Ingest stands still before the kill, so that frames are in flight for certain."""
    with line(daemon, rate_hz=40) as beamline, playing(beamline, scan):
        time.sleep(1.5)
        os.kill(daemon.stage_pid("ingest"), signal.SIGSTOP)
        time.sleep(0.5)
        with Catalogue(daemon.data).open(newest_scan(daemon)) as reader:
            committed = set(reader.records()["number"].tolist())
        daemon.kill()
        daemon.start()
    with line(daemon) as beamline:
        final = beamline.results.wait_complete(newest_scan(daemon), timeout_s=40)
    assert final.state == "complete"  # the stream's end came
    numbers = check_committed_frames(daemon.settings, final.scan_id, scan)
    assert len(committed) > 20 and committed < set(numbers)
    with Catalogue(daemon.data).open(final.scan_id) as reader:
        positioned = sorted(reader.pairs()["number"].tolist())
        counts = reader.header.counts
    assert 0 < counts["missing"] == FRAMES - len(numbers)
    assert counts["unpositioned"] == len(numbers) - len(positioned)
    assert sorted(final.frame_numbers.tolist()) == positioned
    daemon.metric("ptycho_stream_frames_missing_total", counts["missing"])
    assert_same_image(final, undisturbed(daemon.settings, final.scan_id, tmp_path / "again"))


@pytest.mark.slow
def test_after_a_restart_the_last_image_is_still_there(daemon, scan):
    with line(daemon) as beamline:
        beamline.play(scan)
        before = beamline.results.wait_complete(timeout_s=30)
    assert daemon.stop() == 0
    daemon.start()
    with line(daemon) as beamline:
        after = beamline.results.latest(timeout_s=10)
        daemon.metric("ptycho_stream_results_subscribers", 1)
    with line(daemon) as beamline:  # nothing is published any more: this one has to ask
        assert beamline.results.latest(timeout_s=10) is not None
        wait_for(lambda: daemon.metrics().get("ptycho_stream_results_resyncs_total", 0) >= 1)
    assert after is not None and after.scan_id == before.scan_id and after.complete
    assert np.array_equal(after.object_yx, before.object_yx, equal_nan=True)


def test_sigterm_in_mid_scan_seals_within_five_seconds(daemon, scan):
    with line(daemon, rate_hz=100) as beamline:
        player = threading.Thread(target=beamline.play, args=(scan,), kwargs={"stop_after": 100})
        player.start()
        player.join()
        started_s = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - started_s < 5
    header = Catalogue(daemon.data).latest()
    assert header is not None and header.state == "interrupted"
    check_committed_frames(daemon.settings, header.scan_id, scan)


def test_sighup_with_another_probe_opens_a_new_generation(daemon, scan, tmp_path):
    with line(daemon, rate_hz=50) as beamline, playing(beamline, scan):
        first = next(iter(beamline.results))
        np.savez(tmp_path / "other.npz", probe=scan.probe * np.exp(0.5j))
        daemon.write_config({"probe": {"path": "other.npz"}})
        os.kill(daemon.pid, signal.SIGHUP)
        final = beamline.results.wait_complete(timeout_s=40)
    assert first.content.generation == 1 and final.content.generation == 2
    assert sorted(final.frame_numbers.tolist()) == list(range(FRAMES))


@pytest.mark.slow
def test_a_missing_probe_is_said_and_costs_no_frame(daemon, scan, tmp_path):
    daemon.stop()
    probe = tmp_path / "probe.npz"
    probe.rename(tmp_path / "later.npz")
    daemon.start()
    with line(daemon) as beamline:
        beamline.play(scan)
        daemon.metric("ptycho_stream_frames_committed_total", FRAMES)
        status = wait_for(lambda: daemon.status()["stages"]["reconstruct"]["status"].get("problem"))
        assert "probe.npz" in status
        (tmp_path / "later.npz").rename(probe)
        final = beamline.results.wait_complete(timeout_s=40)
    assert sorted(final.frame_numbers.tolist()) == list(range(FRAMES))
