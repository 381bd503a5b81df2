"""Writing a scan: what is shown when, to whom, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scan_samples import (
    FRAMES_PER_FILE,
    SHAPE_YX,
    assert_bit_exact,
    make_frame,
    make_header,
    start_process,
    write_frames,
)

from ptycho_stream.errors import ScanLocked, ScanSealed, StoreError
from ptycho_stream.geometry import View
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.scans import PAIR_RECORD, ScanReader, ScanWriter, new_scan_id


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_frames_appear_at_the_commit_and_are_durable_after_the_sync(tmp_path: Path) -> None:
    with (
        ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer,
        ScanReader.open(tmp_path, writer.scan_id) as reader,
    ):
        write_frames(writer, range(30))
        assert (writer.pending, reader.committed, reader.pair_count) == (30, 0, 0)
        assert writer.commit() == 30
        assert (writer.pending, reader.committed, reader.pair_count) == (0, 30, 30)
        assert (reader.position_count, reader.durable) == (30, 0)
        assert writer.sync() == 30
        assert reader.durable == 30
        assert_bit_exact(reader)


def test_a_full_buffer_is_committed_by_the_next_frame(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(64))
        assert writer.committed == 0
        write_frames(writer, range(64, 65))
        assert (writer.committed, writer.pending) == (64, 1)


def test_a_batch_may_straddle_files(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), frames_per_file=7) as writer:
        write_frames(writer, range(60))
        writer.commit()
        write_frames(writer, range(60, 100))
        writer.seal("complete", {})
    with ScanReader.open(tmp_path, writer.scan_id) as reader:
        assert reader.committed == 100
        assert_bit_exact(reader)


def test_frames_can_be_decoded_straight_into_the_writers_buffer(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        writer.next_buffer()[...] = make_frame(5)
        slot = writer.append_buffered(5, 10, 20, start_ns=1, stop_ns=2, flags=4)
        writer.commit()
        with ScanReader.open(tmp_path, writer.scan_id) as reader:
            record = reader.records()[slot]
            np.testing.assert_array_equal(reader.frame(slot), make_frame(5))
    names = ("number", "received_ns", "received_monotonic_ns", "start_ns", "stop_ns", "flags")
    assert [int(record[name]) for name in names] == [5, 10, 20, 1, 2, 4]


def test_times_that_are_unknown_are_minus_one(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(1))
        writer.commit()
        record = writer.records()[0]
        assert (record["start_ns"], record["stop_ns"]) == (-1, -1)


def test_a_frames_own_position_is_logged_before_the_frame(tmp_path: Path) -> None:
    """A writer that dies between the two leaves a position without its frame, never the reverse."""
    with (
        ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer,
        ScanReader.open(tmp_path, writer.scan_id) as reader,
    ):
        writer.append_positions(np.array([7]), np.array([[7e-6, 0.0]]), 1)
        writer.append_position(8, 8e-6, 1e-6, 2)
        writer.append(8, make_frame(8), 0, 0)
        before: list[int] = []
        commit_frames = writer._commit_within_file

        def watched() -> None:
            before.append(reader.position_count)
            commit_frames()

        writer._commit_within_file = watched  # type: ignore[method-assign]
        writer.commit()
        assert before == [2]
        assert reader.positions()["number"].tolist() == [7, 8]
        assert reader.positions()["x_m"].tolist() == [0.0, 1e-6]


def test_a_frame_of_absurd_size_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no frame is so large"):
        ScanWriter.create(tmp_path, make_header(frame_shape_yx=(2**40, 2**40)))
    assert list((tmp_path / "scans").glob("*")) == []


def test_pairs_can_be_appended_as_an_array(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(3), pairs=False)
        pairs = np.zeros(3, PAIR_RECORD)
        pairs["number"] = pairs["slot"] = [2, 1, 0]
        pairs["y_m"] = [1.5, 2.5, 3.5]
        writer.append_pairs(pairs)
        writer.commit()
        with ScanReader.open(tmp_path, writer.scan_id) as reader:
            assert reader.pairs()["y_m"].tolist() == [1.5, 2.5, 3.5]
            assert reader.pairs(1, 2)["slot"].tolist() == [1]


def test_wrong_shape_or_dtype_is_refused_and_takes_no_slot(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        for pixels in (
            np.zeros((3, 3), "<u2"),
            np.zeros(SHAPE_YX, "<u4"),
            np.zeros(SHAPE_YX, ">u2"),
        ):
            with pytest.raises(StoreError, match="begin a new scan"):
                writer.append(0, pixels, 0, 0)
        assert writer.pending == 0


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4", ">u2", "<i4", "<f4"])
def test_frames_keep_the_detectors_dtype(tmp_path: Path, dtype: str) -> None:
    pixels = np.arange(12).reshape(3, 4).astype(dtype)
    header = make_header(dtype=dtype, frame_shape_yx=(3, 4))
    with ScanWriter.create(tmp_path, header, FRAMES_PER_FILE) as writer:
        writer.append(0, pixels, 0, 0)
        writer.seal("complete", {})
    with ScanReader.open(tmp_path, writer.scan_id) as reader:
        assert reader.frame(0).dtype == np.dtype(dtype)
        np.testing.assert_array_equal(reader.frame(0), pixels)


def test_large_frames_make_smaller_batches_and_files(tmp_path: Path) -> None:
    header = make_header(frame_shape_yx=(4096, 4096), dtype="<u4")
    with ScanWriter.create(tmp_path, header) as writer:
        assert writer.header.frames_per_file == 2
        for number in range(2):
            writer.next_buffer()[...] = number
            writer.append_buffered(number, 0, 0)
        assert (writer.committed, writer.pending) == (1, 1)


def test_a_reader_in_another_process_follows_while_frames_come(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        follower = start_process("follow", tmp_path, writer.scan_id)
        assert follower.stdout is not None
        assert follower.stdout.readline() == "following\n"
        for start in range(0, 3000, 17):
            write_frames(writer, range(start, min(start + 17, 3000)))
            writer.commit()
        writer.seal("complete", {})
        output, _ = follower.communicate(timeout=30)
    assert json.loads(output) == {"frames": 3000}


def test_syncing_in_another_thread_while_committing(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        ended = threading.Event()
        durable: list[int] = []

        def sync_often() -> None:
            while not ended.wait(0.001):
                durable.append(writer.sync())

        thread = threading.Thread(target=sync_often)
        thread.start()
        for start in range(0, 2000, 10):
            write_frames(writer, range(start, start + 10))
            assert writer.durable <= writer.commit()
        ended.set()
        thread.join()
        assert durable == sorted(durable)
        assert writer.sync() == writer.durable == 2000
        # Files that are durable as a whole need no descriptor any more.
        held = [
            path for path in Path("/proc/self/fd").iterdir() if "frames-0000" in str(path.resolve())
        ]
        assert len(held) < 8


def test_a_failed_sync_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_once(fd: int) -> None:
        monkeypatch.undo()
        raise OSError(errno.EIO, "Input/output error")

    writer = ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE)
    write_frames(writer, range(10))
    writer.commit()
    monkeypatch.setattr(os, "fdatasync", fail_once)
    for problem in ("Input/output error", "earlier sync"):
        with pytest.raises(StoreError, match=problem):
            writer.sync()
    assert (writer.committed, writer.durable) == (10, 0)
    with pytest.raises(StoreError, match="recover it"):
        writer.seal("complete", {})
    again, report = ScanWriter.recover(tmp_path, writer.scan_id)
    with again:
        assert (report.frames, again.sync()) == (10, 10)


def test_there_is_one_writer(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        with pytest.raises(ScanLocked, match=r"written by process \d+"):
            ScanWriter.recover(tmp_path, writer.scan_id)
        write_frames(writer, range(3))
        writer.commit()
    again, report = ScanWriter.recover(tmp_path, writer.scan_id)
    with again:
        assert report.frames == again.committed == 3


def test_a_scan_id_is_used_once(tmp_path: Path) -> None:
    header = make_header()
    with ScanWriter.create(tmp_path, header), pytest.raises(StoreError, match="exists already"):
        ScanWriter.create(tmp_path, header)


def test_sealing_ends_a_scan(tmp_path: Path) -> None:
    writer = ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE)
    writer.update_header(state="running")
    write_frames(writer, range(5))
    header = writer.seal("aborted", {"missing": 3}, reason="stopped by the operator")
    assert (header.state, header.counts, header.reason) == (
        "aborted",
        {"missing": 3, "frames": 5},
        "stopped by the operator",
    )
    assert header.ended_ns is not None
    assert writer.sync() == 0
    for act in (
        writer.next_buffer,
        lambda: writer.update_header(state="running"),
        lambda: writer.seal("complete", {}),
        lambda: ScanWriter.recover(tmp_path, writer.scan_id),
    ):
        with pytest.raises(ScanSealed):
            act()
    with ScanReader.open(tmp_path, writer.scan_id) as reader:
        assert reader.header == header
        assert (reader.committed, reader.durable) == (5, 5)


def test_what_is_paired_at_the_last_moment_is_counted(tmp_path: Path) -> None:
    """A frame's pair may wait for the seal, as on a full disk, when the frame itself is written."""
    with ScanWriter.create(tmp_path, make_header()) as writer:
        write_frames(writer, range(3), pairs=False)
        writer.commit()
        writer.append_pair(0, 0, 1e-6, 2e-6, 0)
        header = writer.seal("interrupted", {"positioned": 0, "unpositioned": 3})
    assert (header.counts["positioned"], header.counts["unpositioned"]) == (1, 2)


def test_a_scan_is_sealed_only_by_seal(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header()) as writer:
        with pytest.raises(ScanSealed):
            writer.update_header(state="complete")
        with pytest.raises(StoreError, match="cannot end running"):
            writer.seal("running", {})
    with pytest.raises(ScanSealed):
        ScanWriter.create(tmp_path, make_header(state="complete"))


def test_readers_see_header_changes_when_they_look(tmp_path: Path) -> None:
    with (
        ScanWriter.create(tmp_path, make_header()) as writer,
        ScanReader.open(tmp_path, writer.scan_id) as reader,
    ):
        assert not reader.refresh()
        view = View(size_px=32, center_yx_px=(11.0, 20.0), orientation="transpose")
        writer.update_header(state="running", views=(view, view.next(orientation="flip_y")))
        assert reader.header.state == "armed"
        assert reader.refresh()
        assert reader.header == writer.header
        assert reader.header.view.orientation == "flip_y"


def test_a_header_survives_its_file(tmp_path: Path) -> None:
    header = make_header(
        expected_frames=1000,
        detector_shape_yx=(512, 1028),
        crop_corner_yx_px=(3, 4),
        geometry=DetectorGeometry(1.5, 8000.0, (75e-6, 75e-6), (255.5, 514.0), 0.01, None),
        pixel_yx_m=(1e-8, 2e-8),
        views=(View(size_px=32),),
        metadata={"sample": "Siemensstern µ", "angle": 1.5, "nested": {"list": [1, None]}},
        joined_late=True,
    )
    with (
        ScanWriter.create(tmp_path, header) as writer,
        ScanReader.open(tmp_path, writer.scan_id) as reader,
    ):
        assert reader.header == replace(header, frames_per_file=1024)


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_id": "../elsewhere"},
        {"state": "lost"},
        {"frame_shape_yx": (0, 5)},
        {"dtype": "object"},
        {"dtype": "nonsense"},
        {"frames_per_file": 0},
        {"format_version": 99},
    ],
)
def test_headers_that_no_scan_can_have_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(StoreError, match="wrong header"):
        make_header(**changes)


def test_metadata_that_are_not_json_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be JSON"):
        ScanWriter.create(tmp_path, make_header(metadata={"blob": b"bytes"}))
    assert list((tmp_path / "scans").iterdir()) == []


def test_bad_pixels_are_kept_with_the_scan(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE_YX, bool)
    mask[3, 4] = True
    with (
        ScanWriter.create(tmp_path, make_header(), bad_pixels=mask) as writer,
        ScanReader.open(tmp_path, writer.scan_id) as reader,
    ):
        np.testing.assert_array_equal(reader.bad_pixels, mask)
    with pytest.raises(StoreError, match="crop it"):
        ScanWriter.create(tmp_path, make_header(), bad_pixels=mask[1:])
    with (
        ScanWriter.create(tmp_path, make_header()) as writer,
        ScanReader.open(tmp_path, writer.scan_id) as reader,
    ):
        assert reader.bad_pixels is None


def test_files_are_prepared_ahead_from_the_creation_on(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        assert writer.wait_prepared(timeout_s=20)
        directory = tmp_path / "scans" / writer.scan_id
        assert len(list(directory.glob("frames-*.bin"))) == 4
        write_frames(writer, range(FRAMES_PER_FILE + 1))
        writer.commit()
        assert writer.wait_prepared(timeout_s=20)
        files = list(directory.glob("frames-*.bin"))
        assert len(files) == 5
        size = FRAMES_PER_FILE * make_frame(0).nbytes
        assert {path.stat().st_size for path in files} == {size}
        assert all(path.stat().st_blocks * 512 >= size for path in files)


def test_no_more_files_are_prepared_than_frames_are_expected(tmp_path: Path) -> None:
    header = make_header(expected_frames=150)
    with ScanWriter.create(tmp_path, header, FRAMES_PER_FILE) as writer:
        assert writer.wait_prepared(timeout_s=20)
        directory = tmp_path / "scans" / writer.scan_id
        assert len(list(directory.glob("frames-*.bin"))) == 2
        write_frames(writer, range(250))  # the detector may send more all the same
        writer.seal("complete", {})
    with ScanReader.open(tmp_path, writer.scan_id) as reader:
        assert_bit_exact(reader)


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = open_files(), threading.active_count()
    for _ in range(3):
        with ScanWriter.create(tmp_path, make_header(), frames_per_file=10) as writer:
            write_frames(writer, range(95))
            writer.commit()
            with ScanReader.open(tmp_path, writer.scan_id) as reader:
                reader.frames(slice(None))
        writer, _ = ScanWriter.recover(tmp_path, writer.scan_id)
        writer.seal("complete", {})
        for _ in range(2):
            with pytest.raises(ScanSealed):
                ScanWriter.recover(tmp_path, writer.scan_id)
    assert (open_files(), threading.active_count()) == before


def test_scan_ids_sort_by_time() -> None:
    ids = [new_scan_id() for _ in range(1000)]
    assert ids == sorted(set(ids))


def test_the_store_needs_no_torch() -> None:
    code = "import sys, ptycho_stream.scans; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
