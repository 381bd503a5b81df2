"""After a crash: every committed frame is there and bit-exact, torn tails are cut and counted."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scan_samples import (
    FRAMES_PER_FILE,
    assert_bit_exact,
    crashed_copy,
    make_frame,
    make_header,
    start_process,
    write_frames,
)

from ptycho_stream.errors import CorruptRecord, StoreError
from ptycho_stream.scans import (
    FRAME_RECORD,
    PAIR_RECORD,
    POSITION_RECORD,
    Catalogue,
    RecoveryReport,
    ScanReader,
    ScanWriter,
    new_scan_id,
)
from ptycho_stream.scans.records import intact, stamp

LOGS = {"frames.rec": FRAME_RECORD, "positions.log": POSITION_RECORD, "pairs.log": PAIR_RECORD}


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of crashes are slow on a disk."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture
def crashed(memory_path: Path) -> tuple[Path, str]:
    """A store whose writer went down with 6 frames committed, 4 of them durable."""
    with ScanWriter.create(memory_path / "live", make_header(expected_frames=6), 5) as writer:
        write_frames(writer, range(4))
        writer.commit()
        writer.sync()
        write_frames(writer, range(4, 6))
        writer.commit()
        writer.wait_prepared(20)
        return crashed_copy(memory_path / "live", memory_path / "crashed"), writer.scan_id


def alter(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.slow
def test_a_writer_killed_at_any_time_loses_no_committed_frame(tmp_path: Path) -> None:
    scan_id = new_scan_id()
    chance = random.Random(4)
    frames = 0
    for round_number in range(8):
        process = start_process("write", tmp_path, scan_id, round_number)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        with ScanReader.open(tmp_path, scan_id) as reader:
            end = time.monotonic() + chance.uniform(0.0, 0.15)
            while time.monotonic() < end:
                reader.records(max(reader.committed - 10, 0))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            committed, durable, pairs = reader.committed, reader.durable, reader.pair_count
            writer, report = ScanWriter.recover(tmp_path, scan_id)
            with writer:
                assert report.frames >= committed >= durable >= frames
                assert report.frames == committed + report.adopted_frames
                assert writer.pairs().size >= pairs
                assert_bit_exact(reader)  # opened before the crash, goes on after it
            frames = report.frames
    assert frames > 500
    writer, _ = ScanWriter.recover(tmp_path, scan_id)
    writer.seal("interrupted", {}, reason="killed")
    with ScanReader.open(tmp_path, scan_id) as reader:
        numbers = reader.records()["number"]
        assert len(np.unique(numbers)) == len(numbers) == frames
        assert_bit_exact(reader)


def test_what_was_written_but_not_yet_committed_is_adopted(crashed: tuple[Path, str]) -> None:
    root, scan_id = crashed
    alter(root / "scans" / scan_id / "counters", 16, b"\0")  # as if killed before the counter
    alter(root / "scans" / scan_id / "counters", 8, (5).to_bytes(8, "little"))
    writer, report = ScanWriter.recover(root, scan_id)
    with writer:
        assert (report.frames, report.adopted_frames, report.dropped_records) == (6, 1, 0)


@pytest.mark.parametrize("log", LOGS)
def test_a_log_cut_at_any_byte_of_its_last_record(
    crashed: tuple[Path, str], memory_path: Path, log: str
) -> None:
    size = LOGS[log].itemsize
    for keep in range(size):
        root, scan_id = crashed_copy(crashed[0], memory_path / "cut"), crashed[1]
        path = root / "scans" / scan_id / log
        with path.open("r+b") as file:
            cut = file.read()[5 * size + keep : 6 * size]
            file.truncate(5 * size + keep)
        if any(cut):
            assert_recovered_without_last(root, scan_id, log, dropped=1 if keep else 0)
            continue
        # Recovery reads zeros where the file ends: of those alone nothing is lost.
        writer, report = ScanWriter.recover(root, scan_id)
        with writer, ScanReader.open(root, scan_id) as reader:
            assert report == RecoveryReport(6, 6, 0, 0, 0, 0, 0)
            assert_bit_exact(reader)


@pytest.mark.parametrize("log", LOGS)
def test_a_log_overwritten_at_any_byte_of_its_last_record(
    crashed: tuple[Path, str], memory_path: Path, log: str
) -> None:
    size = LOGS[log].itemsize
    for at in range(size):
        root, scan_id = crashed_copy(crashed[0], memory_path / "altered"), crashed[1]
        path = root / "scans" / scan_id / log
        old = path.read_bytes()[5 * size + at]
        alter(path, 5 * size + at, bytes([old ^ 0x40]))
        assert_recovered_without_last(root, scan_id, log, dropped=1)


def assert_recovered_without_last(root: Path, scan_id: str, log: str, dropped: int) -> None:
    writer, report = ScanWriter.recover(root, scan_id)
    with writer:
        lost_frame = log == "frames.rec"
        assert report.frames == writer.committed == (5 if lost_frame else 6)
        assert report.dropped_records == (dropped if lost_frame else 0)
        assert report.dropped_positions == (dropped if log == "positions.log" else 0)
        # The pair of a frame that is gone must go too: its slot will be another frame's.
        assert report.dropped_pairs == (1 if lost_frame else dropped if log == "pairs.log" else 0)
        assert len(writer.pairs()) == (6 if log == "positions.log" else 5)
        write_frames(writer, range(6, 20))
        writer.commit()
        with ScanReader.open(root, scan_id) as reader:
            assert_bit_exact(reader)
        writer.seal("interrupted", {})


def test_pixels_that_never_reached_the_disk_cut_the_tail(crashed: tuple[Path, str]) -> None:
    root, scan_id = crashed
    file = root / "scans" / scan_id / "frames-000001.bin"
    alter(file, 100, b"\xff\xff")
    writer, report = ScanWriter.recover(root, scan_id)
    with writer:
        assert (report.frames, report.dropped_records, report.dropped_pairs) == (5, 1, 1)


def test_a_batch_file_that_is_gone_or_short_cuts_the_tail(crashed: tuple[Path, str]) -> None:
    root, scan_id = crashed
    file = root / "scans" / scan_id / "frames-000001.bin"
    with file.open("r+b") as short:
        short.truncate(10)
    writer, report = ScanWriter.recover(root, scan_id)
    with writer:
        assert report.frames == 5
        write_frames(writer, range(5, 12))
        writer.commit()
        with ScanReader.open(root, scan_id) as reader:
            assert_bit_exact(reader)


def test_after_power_loss_every_durable_frame_is_there(crashed: tuple[Path, str]) -> None:
    """Pages reach the disk in any order: record 4 did not, record 5 did."""
    root, scan_id = crashed
    path = root / "scans" / scan_id / "frames.rec"
    alter(path, 4 * FRAME_RECORD.itemsize, bytes(FRAME_RECORD.itemsize))
    writer, report = ScanWriter.recover(root, scan_id)
    with writer:
        assert (report.frames, report.lost_frames, report.dropped_records) == (6, 1, 0)
        assert report.dropped_pairs == 1
        assert writer.records()["number"].tolist() == [0, 1, 2, 3, 5]
        assert writer.durable == 4
        with ScanReader.open(root, scan_id) as reader:
            assert reader.verify() == [4]
            np.testing.assert_array_equal(reader.frame(5), make_frame(5))
            with pytest.raises(CorruptRecord, match=r"\[4\]"):
                reader.frame(4)
        header = writer.seal("interrupted", {})
    assert header.counts["frames"] == 5


@pytest.mark.parametrize("content", [b"", bytes(4096), b"\xff" * 4096])
def test_the_counters_are_not_believed(crashed: tuple[Path, str], content: bytes) -> None:
    root, scan_id = crashed
    (root / "scans" / scan_id / "counters").write_bytes(content)
    writer, report = ScanWriter.recover(root, scan_id)
    with writer:
        assert report.frames == 6
        with ScanReader.open(root, scan_id) as reader:
            assert_bit_exact(reader)


def test_counters_that_promise_too_much_are_lowered(crashed: tuple[Path, str]) -> None:
    root, scan_id = crashed
    counters = root / "scans" / scan_id / "counters"
    for word in (1, 2, 3, 4):
        alter(counters, 8 * word, (1000).to_bytes(8, "little"))
    writer, report = ScanWriter.recover(root, scan_id)
    with writer:
        assert (report.frames, len(writer.pairs())) == (6, 6)
        assert writer.durable == 0, "nobody vouches for it"
        assert writer.sync() == writer.durable == 6


def test_a_crash_before_the_first_frame(memory_path: Path) -> None:
    with ScanWriter.create(memory_path / "live", make_header()) as writer:
        root = crashed_copy(memory_path / "live", memory_path / "crashed")
    again, report = ScanWriter.recover(root, writer.scan_id)
    with again:
        assert (report.frames, report.dropped_records) == (0, 0)
        write_frames(again, range(3))
        again.seal("complete", {})


def test_a_temporary_file_that_its_writer_takes_away_meanwhile_is_no_fault(
    crashed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, scan_id = crashed
    found = Path.glob

    def with_one_that_goes(self: Path, pattern: str) -> list[Path]:
        return [*found(self, pattern), self / pattern.replace("*", "gone")]

    monkeypatch.setattr(Path, "glob", with_one_that_goes)
    writer, report = ScanWriter.recover(root, scan_id)
    writer.close()
    assert report.whole_frames == 6


def test_what_a_crash_leaves_half_made_is_swept_up(crashed: tuple[Path, str]) -> None:
    root, scan_id = crashed
    directory = root / "scans" / scan_id
    (directory / "frames-000009.new").write_bytes(b"x")
    (directory / "scan.json.4194305.tmp").write_bytes(b"{")  # there is no such process
    alive = directory / f"reconstruct.json.{os.getpid()}.tmp"
    alive.write_bytes(b"{")
    writer, _ = ScanWriter.recover(root, scan_id)
    with writer:
        assert not list(directory.glob("*.new"))
        assert list(directory.glob("*.tmp")) == [alive], "another process is at work on it"


@pytest.mark.parametrize("bit", range(64))
def test_a_changed_count_of_durable_frames_trusts_no_pixels(
    crashed: tuple[Path, str], memory_path: Path, bit: int
) -> None:
    """Pixels that never reached the disk are found, though the counter says that they did."""
    root, scan_id = crashed_copy(crashed[0], memory_path / "bit"), crashed[1]
    directory = root / "scans" / scan_id
    at = 16 + bit // 8
    old = (directory / "counters").read_bytes()[at]
    alter(directory / "counters", at, bytes([old ^ 1 << bit % 8]))
    alter(directory / "frames-000001.bin", 100, b"\xff\xff")
    writer, report = ScanWriter.recover(root, scan_id)
    with writer:
        assert (report.frames, report.dropped_records) == (5, 1)


def test_the_catalogue_recovers_what_nobody_writes(tmp_path: Path) -> None:
    live = ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE)
    dead = ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE)
    write_frames(dead, range(10))
    dead.close()
    with live:
        (recovered,), failed = Catalogue(tmp_path).recover_all()
        assert failed == []
        assert recovered.writer.scan_id == dead.scan_id
        assert recovered.report.frames == 10
        recovered.writer.seal("interrupted", {}, reason="the writer died")
    states = {header.scan_id: header.state for header in Catalogue(tmp_path).scans()}
    assert states == {live.scan_id: "armed", dead.scan_id: "interrupted"}


def test_a_header_of_absurd_shape_is_sealed_and_others_are_recovered(tmp_path: Path) -> None:
    scan_ids: list[str] = []
    for _ in range(3):
        with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
            scan_ids.append(writer.scan_id)
    path = tmp_path / "scans" / scan_ids[0] / "scan.json"
    raw = json.loads(path.read_text())
    del raw["check"]
    path.write_text(json.dumps(raw | {"frame_shape_yx": [2**40, 2**40]}))
    (tmp_path / "scans" / scan_ids[1] / "counters").unlink()
    (tmp_path / "scans" / scan_ids[1] / "counters").mkdir()
    (recovered,), failed = Catalogue(tmp_path).recover_all()
    with recovered.writer as writer:
        assert writer.scan_id == scan_ids[2]
    assert failed == [scan_ids[1], scan_ids[0]]
    header = Catalogue(tmp_path).scans()[-1]
    assert (header.scan_id, header.state) == (scan_ids[0], "interrupted")
    assert "no frame is so large" in header.reason


def test_bit_flips_are_found(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(120))
        writer.seal("complete", {})
    directory = tmp_path / "scans" / writer.scan_id
    frame_bytes = writer.header.frame_bytes
    data = (directory / "frames-000001.bin").read_bytes()
    alter(
        directory / "frames-000001.bin", 7 * frame_bytes + 5, bytes([data[7 * frame_bytes + 5] ^ 1])
    )
    records = (directory / "frames.rec").read_bytes()
    at = 33 * FRAME_RECORD.itemsize + 2
    alter(directory / "frames.rec", at, bytes([records[at] ^ 1]))
    with ScanReader.open(tmp_path, writer.scan_id) as reader:
        assert reader.verify() == [33, 107]
        assert reader.verify([1, 2, 107]) == [107]
        with pytest.raises(StoreError, match="record 33"):
            reader.records()
        with pytest.raises(StoreError, match=r"slots \[33\]"):
            reader.frame(33)
        assert len(reader.records(34, 120)) == 86
        assert len(reader.frames([30, 40])) == 2  # damage elsewhere is not in the way


@given(
    log=st.sampled_from(sorted(LOGS)),
    content=st.binary(min_size=72, max_size=72),
    bit=st.integers(min_value=0, max_value=56 * 8 - 1),
)
def test_every_single_bit_of_a_record_matters(log: str, content: bytes, bit: int) -> None:
    dtype = LOGS[log]
    records = np.frombuffer(content[: dtype.itemsize], dtype).copy()
    stamp(records)
    assert intact(records).all()
    words = bytearray(records.tobytes())
    words[bit // 8] ^= 1 << bit % 8
    assert not intact(np.frombuffer(bytes(words), dtype)).any()


def test_a_record_of_zeros_is_never_intact() -> None:
    for dtype in LOGS.values():
        assert not intact(np.zeros(3, dtype)).any()
