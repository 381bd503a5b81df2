"""One scan as ingest writes it: what a crash or a failing disk leaves, and how it is ended then."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from beamline import SHAPE, pixels, position
from daemon_harness import DaemonHarness
from scan_samples import FRAMES_PER_FILE, crashed_copy, make_header, write_frames

from ptycho_stream.errors import StoreError
from ptycho_stream.messages import EncodedImage, Frame, ScanStart
from ptycho_stream.scans.join_logs import JoinLogs
from ptycho_stream.scans.scan_events import OpenScan, SealScan
from ptycho_stream.scans.ulid import new_scan_id
from ptycho_stream.scans.writer import ScanWriter
from ptycho_streamd.recorder import PositionCounts, Recorder
from ptycho_streamd.unsealed import RETRY_NS, Unsealed


def frame(number: int, position_yx_m: tuple[float, float] | None) -> Frame:
    image = EncodedImage(pixels(1, number).tobytes(), "raw", "<u2", SHAPE)
    return Frame("1", number, image, position_yx_m)


def test_inline_positions_survive_a_crash_between_frames_and_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DaemonHarness(tmp_path).settings
    start = ScanStart("", "1", None, SHAPE, "<u2")
    opening = OpenScan(new_scan_id(), start, "running", joined_late=False)
    recorder = Recorder.create(tmp_path / "data", opening, settings)
    with recorder.writer:
        for number in range(10):
            recorder.store(frame(number, position(number)), 1, 1)
        with monkeypatch.context() as patch:
            patch.setattr(JoinLogs, "commit_pairs", lambda _self: None)
            recorder.commit()
        copy = crashed_copy(tmp_path / "data", tmp_path / "copy")
    writer, report = ScanWriter.recover(copy, opening.scan_id)
    with writer:
        assert report.frames == 10
        assert len(writer.pairs()) == 0
        again = Recorder.resume(copy, writer, settings)
        assert (again.join.positioned, again.position_count) == (10, 10)
        pairs = writer.pairs()
        assert [(p["y_m"], p["x_m"]) for p in pairs] == [position(n) for n in pairs["number"]]
        assert again.new_positions() is None


def test_positions_are_counted_as_they_come(tmp_path: Path) -> None:
    settings = DaemonHarness(tmp_path).settings
    start = ScanStart("", "1", None, SHAPE, "<u2")
    opening = OpenScan(new_scan_id(), start, "running", joined_late=False)
    recorder = Recorder.create(tmp_path / "data", opening, settings)
    with recorder.writer:
        assert recorder.new_positions() is None
        for number, where in enumerate([(0.0, 0.0), (np.nan, 0.0), (0.5, 0.0), None]):
            recorder.store(frame(number, where), 1, 1)
        assert recorder.new_positions() == PositionCounts(3, 1, 1, 1)
        assert recorder.new_positions() is None


def test_a_scan_whose_sync_failed_is_recovered_and_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_once(fd: int) -> None:
        monkeypatch.undo()
        raise OSError(errno.EIO, "Input/output error")

    writer = ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE)
    write_frames(writer, range(10))
    writer.commit()
    monkeypatch.setattr(os, "fdatasync", fail_once)
    with pytest.raises(StoreError):
        writer.sync()
    counts = {"frames": 12, "missing": 1}
    with pytest.raises(StoreError):
        writer.seal("interrupted", counts)
    unsealed = Unsealed(tmp_path)
    unsealed.add(SealScan(writer.scan_id, "interrupted", counts, "the disk failed"), 0)
    (header,) = unsealed.retry(0)
    assert (header.state, header.reason) == ("interrupted", "the disk failed")
    assert header.counts["frames"] == 10
    assert header.counts["missing"] == 3
    assert header.counts["positioned"] == 10
    assert unsealed.retry(10 * RETRY_NS) == []


def test_a_scan_that_was_sealed_after_all_is_not_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What failed came after the header: a sync of the folder, say."""
    writer = ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE)
    header = writer.seal("complete", {})
    unsealed = Unsealed(tmp_path)
    unsealed.add(SealScan(writer.scan_id, "complete", {}, ""), 0)
    assert unsealed.retry(0) == [header]
    assert unsealed.retry(10 * RETRY_NS) == []
    assert "cannot be sealed" not in caplog.text


def test_a_scan_that_cannot_be_recovered_yet_is_tried_again(tmp_path: Path) -> None:
    unsealed = Unsealed(tmp_path)
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        unsealed.add(SealScan(writer.scan_id, "aborted", {}, ""), 0)
        assert unsealed.retry(0) == []
    assert unsealed.retry(RETRY_NS // 2) == []
    (header,) = unsealed.retry(RETRY_NS)
    assert header.state == "aborted"


def test_a_scan_that_is_gone_is_not_tried_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unsealed = Unsealed(tmp_path)
    gone = new_scan_id()
    unsealed.add(SealScan(gone, "aborted", {}, ""), 0)
    assert unsealed.retry(0) == []
    assert f"scan {gone} is gone" in caplog.text
    caplog.clear()
    assert unsealed.retry(10 * RETRY_NS) == []
    assert not caplog.text
