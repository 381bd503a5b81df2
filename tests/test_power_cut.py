"""What ``durable`` promises, kept by a disk that forgets everything that was not synced.

In one kind of test the disk is a model of what POSIX promises at the least (``power_cut.py``), in
the other a real file system in an image file, which is copied under a writer that stands still.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from power_cut import PowerCut
from scan_samples import make_frame, make_header, make_scan, start_process, write_frames

from ptycho_stream.scans import Catalogue, ScanReader, ScanWriter, new_scan_id
from ptycho_stream.scans.inspection import inspect_scan
from ptycho_stream.scans.spare import SpareFiles


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PowerCut]:
    (tmp_path / "data" / "scans").mkdir(parents=True)
    cut = PowerCut(tmp_path / "data", monkeypatch)
    yield cut
    cut.close()


def check_promise(root: Path, scan_id: str, durable: int, positions: int) -> None:
    """Every durable frame and every position synced with it is there, and nothing that is wrong."""
    recovered, failed = Catalogue(root).recover_all()
    assert not failed
    (found,) = recovered
    with found.writer as writer:
        assert writer.scan_id == scan_id
        assert found.report.frames >= durable
        with ScanReader.open(root, scan_id, verify_reads=True) as reader:
            damaged = set(reader.verify())
            assert damaged.isdisjoint(range(durable))
            for slot in set(range(reader.committed)) - damaged:
                number = int(reader.records(slot, slot + 1)["number"][0])
                np.testing.assert_array_equal(reader.frame(slot), make_frame(number))
                assert number == slot
            held = reader.positions()["number"].tolist()
            assert held[:positions] == list(range(positions))
            for pair in reader.pairs():
                assert pair["slot"] not in damaged and pair["slot"] == pair["number"]
        write_frames(writer, range(1000, 1007))  # and it goes on
        writer.seal("interrupted", {})
    with ScanReader.open(root, scan_id) as reader:
        assert set(reader.verify()) == damaged


@pytest.mark.parametrize("seed", range(4))
def test_every_durable_frame_is_there_after_a_power_cut(
    disk: PowerCut, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    root = tmp_path / "data"
    if seed % 2:  # batch files that held other frames before
        former = make_scan(root, 40, frame_shape_yx=(24, 40))
        spare = SpareFiles(root)
        spare.make_directory()
        for path in (root / "scans" / former).glob("frames-*.bin"):
            spare.put(path)
        Catalogue(root).retain(0)
    writer = ScanWriter.create(root, make_header(), 7)
    number = durable = 0
    for _ in range(12):
        count = rng.randint(1, 9)
        write_frames(writer, range(number, number + count))
        number += count
        writer.commit()
        if rng.random() < 0.5:
            durable = writer.sync()
            assert durable == number == writer.durable
        for worst in (True, False):
            left = disk.remains(tmp_path / "left", None if worst else rng)
            check_promise(left, writer.scan_id, durable, durable)
    assert disk.syncs > 10
    header = writer.seal("complete", {})
    left = disk.remains(tmp_path / "left")
    with ScanReader.open(left, writer.scan_id) as reader:
        assert reader.header == header and header.counts["frames"] == number
        assert (reader.committed, reader.pair_count, reader.position_count) == (number,) * 3
    assert inspect_scan(left / "scans" / writer.scan_id, lambda _: None) == []


def test_a_view_is_there_after_a_power_cut(disk: PowerCut, tmp_path: Path) -> None:
    writer = ScanWriter.create(tmp_path / "data", make_header(), 7)
    writer.update_header(state="running", metadata={"sample": "star"})
    left = disk.remains(tmp_path / "left")
    assert Catalogue(left).scans()[0] == writer.header
    writer.close()


@pytest.fixture
def image_disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An ext4 in a file: (the file, where it is mounted)."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    image, mounted = tmp_path / "disk.img", tmp_path / "disk"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(96 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    if not try_to_mount(image, mounted):
        pytest.skip("this machine has no loop devices")
    try:
        yield image, mounted
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def try_to_mount(image: Path, at: Path) -> bool:
    # commit=300: the journal is written when something is synced, and not every 5 s.
    command = ["mount", "-o", "loop,commit=300", str(image), str(at)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def copied_still(image: Path, to: Path) -> bytes:
    """The disk at one moment: copied until two copies in a row are the same."""
    before = b""
    while True:
        now = image.read_bytes()
        if now == before:
            to.write_bytes(now)
            return now
        before = now


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_durable_frame_is_there_on_a_real_file_system(
    image_disk: tuple[Path, Path], tmp_path: Path
) -> None:
    """A writer in a process of its own syncs every 20 ms and is stopped at random moments."""
    image, mounted = image_disk
    rng = random.Random(3)
    scan_id, unsynced = new_scan_id(), 0
    for turn in range(8):
        process = start_process("write", mounted, scan_id, turn)
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        try:
            with ScanReader.open(mounted, scan_id) as reader:
                time.sleep(rng.uniform(0.02, 0.3))
                process.send_signal(signal.SIGSTOP)
                durable, committed = reader.durable, reader.committed
                copied_still(image, tmp_path / "cut.img")
        finally:
            process.kill()
            process.communicate()
        unsynced += committed - durable
        at = tmp_path / f"cut-{turn}"
        at.mkdir()
        assert try_to_mount(tmp_path / "cut.img", at)
        try:
            writer, report = ScanWriter.recover(at, scan_id)
            with writer, ScanReader.open(at, scan_id) as reader:
                assert report.frames >= durable
                assert set(reader.verify()).isdisjoint(range(durable))
                for slot in range(durable):
                    number = int(reader.records(slot, slot + 1)["number"][0])
                    np.testing.assert_array_equal(reader.frame(slot), make_frame(number))
        finally:
            subprocess.run(["umount", str(at)], check=True)
    assert unsynced > 0, "no cut came between a commit and its sync"
