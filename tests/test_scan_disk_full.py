"""A full disk is an error that says so; what was committed stays readable and the scan can end."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from scan_samples import (
    FRAMES_PER_FILE,
    assert_bit_exact,
    make_frame,
    make_header,
    make_scan,
    start_process,
    write_frames,
)

from ptycho_stream.errors import DiskFull
from ptycho_stream.scans import Catalogue, ScanReader, ScanWriter, new_scan_id
from ptycho_stream.scans.records import FRAME_RECORD


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def write_until_full(writer: ScanWriter) -> int:
    """Returns how many frames were taken before the disk was full."""
    with pytest.raises(DiskFull, match=r"bytes are free\): make room"):
        write_frames(writer, range(10_000), pairs=False)
    return writer.committed + writer.pending


def test_a_scan_on_a_full_disk_keeps_its_frames_and_ends(small_disk: Path) -> None:
    with ScanWriter.create(small_disk, make_header(), frames_per_file=200) as writer:
        taken = write_until_full(writer)
        with pytest.raises(DiskFull):  # it stays so, and nothing is lost by asking again
            writer.commit()
        assert writer.committed + writer.pending == taken
        with ScanReader.open(small_disk, writer.scan_id) as reader:
            assert reader.committed == writer.committed > FRAMES_PER_FILE
            assert reader.verify() == []
            fill_up(small_disk)  # so that the scan ends on what it has set aside
            pending = writer.pending
            header = writer.seal("interrupted", {"missing": 7}, reason="the disk is full")
            assert header.counts["dropped_disk_full"] == pending > 0
            assert header.counts["missing"] == 7
            assert reader.refresh() and reader.header == header
            assert_bit_exact(reader)


def test_a_disk_filled_by_others_to_the_last_byte(small_disk: Path) -> None:
    with ScanWriter.create(small_disk, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(150))
        writer.commit()
        fill_up(small_disk)
        with pytest.raises(DiskFull):
            writer.update_header(state="draining")
        assert writer.header.state == "armed"
        header = writer.seal("interrupted", {}, reason="the disk is full")
    with ScanReader.open(small_disk, writer.scan_id) as reader:
        assert reader.header == header
        assert_bit_exact(reader)


def fill_up(disk: Path) -> None:
    with (disk / "others").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            return


def test_no_scan_begins_on_a_full_disk_and_nothing_is_left_of_it(small_disk: Path) -> None:
    first = make_scan(small_disk, 10)
    fill_up(small_disk)
    with pytest.raises(DiskFull):
        ScanWriter.create(small_disk, make_header(), FRAMES_PER_FILE)
    assert [path.name for path in (small_disk / "scans").iterdir()] == [first]


def test_writing_goes_on_when_there_is_room_again(small_disk: Path) -> None:
    with ScanWriter.create(small_disk, make_header(), FRAMES_PER_FILE) as writer:
        blocker = small_disk / "blocker"
        blocker.write_bytes(bytes(1_500_000))
        taken = write_until_full(writer)
        blocker.unlink()
        write_frames(writer, range(taken, taken + 100))
        writer.seal("complete", {})
    with ScanReader.open(small_disk, writer.scan_id) as reader:
        assert reader.committed == taken + 100
        assert_bit_exact(reader)


def test_retention_makes_room(small_disk: Path) -> None:
    oldest, *_ = [make_scan(small_disk, 400) for _ in range(3)]
    assert Catalogue(small_disk).retain(2_000_000).deleted == (oldest,)
    with ScanWriter.create(small_disk, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(500))
        writer.seal("complete", {})


def test_a_scan_is_recovered_on_a_full_disk(small_disk: Path) -> None:
    with ScanWriter.create(small_disk, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(150))
    fill_up(small_disk)
    again, report = ScanWriter.recover(small_disk, writer.scan_id)
    assert report.frames == 150
    again.seal("interrupted", {})


def test_a_limit_on_the_size_of_files_counts_as_full(tmp_path: Path) -> None:
    scan_id = new_scan_id()
    limit = 2 * FRAMES_PER_FILE * make_frame(0).nbytes
    process = start_process("fill", tmp_path, scan_id, limit)
    output, _ = process.communicate(timeout=40)
    said = json.loads(output)
    with ScanReader.open(tmp_path, scan_id) as reader:
        record = FRAME_RECORD.itemsize
        assert limit // record - 64 < reader.committed <= limit // record
        assert said["dropped_disk_full"] == said["taken"] - reader.committed
        assert "make room" in said["reason"]
        assert reader.verify(slice(0, None, 50)) == []
