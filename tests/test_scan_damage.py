"""A disk that forgets: bits flipped anywhere in any file of a store never become a wrong frame.

Each round flips bits in one file of a store whose writer went down, recovers it, and reads all
that can be read.  What cannot is told: by the report of recovery, ``verify`` or the catalogue.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scan_samples import (
    SHAPE_YX,
    crashed_copy,
    make_frame,
    make_header,
    write_frames,
)

from ptycho_stream.errors import CorruptRecord, StoreError
from ptycho_stream.geometry import View
from ptycho_stream.scans import Catalogue, Progress, ScanReader, ScanWriter
from ptycho_stream.scans.inspection import inspect_scan
from ptycho_stream.scans.view_data import keep_view_data

FRAMES = 12
LOGS = ("frames.rec", "positions.log", "pairs.log")


@pytest.fixture(scope="module")
def crashed() -> Iterator[tuple[Path, str]]:
    """A store whose writer went down with 12 frames committed, 8 of them durable."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        live = Path(name) / "live"
        mask = np.zeros(SHAPE_YX, bool)
        mask[3, 4] = True
        writer = ScanWriter.create(live, make_header(expected_frames=FRAMES), 5, mask)
        directory = live / "scans" / writer.scan_id
        digest = keep_view_data(directory, mask)
        writer.update_header(state="running", views=(View(size_px=16, bad_pixels=digest),))
        Progress(live, writer.scan_id, "export").save({"done": 3})
        write_frames(writer, range(8))
        writer.commit()
        writer.sync()
        write_frames(writer, range(8, FRAMES))
        writer.commit()
        writer.wait_prepared(20)
        with Catalogue(live).lease(writer.scan_id, "somebody"):
            yield crashed_copy(live, Path(name) / "crashed"), writer.scan_id
        writer.close()


def flipped(path: Path, rng: random.Random, bits: int) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(bits):
        at = rng.randrange(8 * len(data))
        data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def whole_slots(root: Path, scan_id: str, *, trusted: list[int]) -> list[int]:
    """Numbers of the frames that can be read; each is as it was written, each is there once.

    With checked reads, and by ``trusted`` slots also without.
    """
    numbers: list[int] = []
    with (
        ScanReader.open(root, scan_id, verify_reads=True) as checked,
        ScanReader.open(root, scan_id) as plain,
    ):
        damaged = set(checked.verify())
        for slot in range(checked.committed):
            try:
                frame = checked.frame(slot)
            except CorruptRecord:
                assert slot in damaged
                continue
            assert slot not in damaged
            number = int(checked.records(slot, slot + 1)["number"][0])
            np.testing.assert_array_equal(frame, make_frame(number))
            np.testing.assert_array_equal(plain.frame(slot), frame)
            numbers.append(number)
        for pair in checked.pairs():
            if pair["slot"] not in damaged:
                slot = int(pair["slot"])
                assert checked.records(slot, slot + 1)["number"][0] == pair["number"]
                number = int(pair["number"])
                assert (pair["y_m"], pair["x_m"]) == (number * 1e-6, -number * 1e-6)
        for position in checked.positions():
            assert position["y_m"] == position["number"] * 1e-6
    assert len(set(numbers)) == len(numbers)
    assert set(trusted) <= set(numbers)
    return numbers


def check_recovery(root: Path, scan_id: str, path: Path) -> bool:
    """Recover; whether something was lost, and then that it was told."""
    recovered, failed = Catalogue(root).recover_all()
    if failed:
        assert failed == [scan_id] and not recovered
        return True
    (found,) = recovered
    with found.writer:
        report = found.report
        untouched = path.suffix not in (".rec", ".bin")
        trusted = list(range(FRAMES)) if untouched else []
        numbers = whole_slots(root, scan_id, trusted=trusted)
        # One file was hit by a few bits: a few frames at most are gone, and each is accounted for.
        gone = FRAMES - len(numbers)
        assert gone <= 3
        unread = len(found.writer.records()) - len(numbers)
        assert gone == report.lost_frames + report.dropped_records + unread
        if path.name in LOGS[1:]:
            dropped = {"positions.log": report.dropped_positions, "pairs.log": report.dropped_pairs}
            assert dropped[path.name] > 0
        return gone > 0


def damaged_rounds(crashed: tuple[Path, str], seed: int, rounds: int) -> None:
    source, scan_id = crashed
    rng = random.Random(seed)
    names = sorted(
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and path.stat().st_size
    )
    assert len(names) >= 12
    root, losses = source.parent / f"hit-{seed}", 0
    for number in range(rounds):
        crashed_copy(source, root)
        path = root / names[number % len(names)]
        flipped(path, rng, rng.choice((1, 1, 2, 3)))
        losses += check_recovery(root, scan_id, path)
    assert losses > rounds // 20


def test_flipped_bits_become_no_wrong_frame(crashed: tuple[Path, str]) -> None:
    damaged_rounds(crashed, seed=1, rounds=150)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(2, 6))
def test_flipped_bits_become_no_wrong_frame_in_many_rounds(
    crashed: tuple[Path, str], seed: int
) -> None:
    damaged_rounds(crashed, seed, rounds=5000)


@pytest.mark.parametrize("filler", [b"\x00", None], ids=["zeros", "noise"])
@pytest.mark.parametrize("log", LOGS)
def test_a_tail_overwritten_from_any_byte_of_the_last_record(
    crashed: tuple[Path, str], log: str, filler: bytes | None
) -> None:
    source, scan_id = crashed
    whole = (source / "scans" / scan_id / log).read_bytes()
    size = len(whole) // FRAMES
    rng = random.Random(7)
    root = source.parent / "tail"
    for at in range(len(whole) - size, len(whole)):
        crashed_copy(source, root)
        rest = len(whole) - at
        tail = rng.randbytes(rest) if filler is None else filler * rest
        if tail == whole[at:]:
            continue  # a checksum of any run may end like this: nothing is damaged
        (root / "scans" / scan_id / log).write_bytes(whole[:at] + tail)
        writer, report = ScanWriter.recover(root, scan_id)
        with writer:
            lost = log == "frames.rec"
            assert report.frames == (FRAMES - 1 if lost else FRAMES)
            assert (report.dropped_records, report.dropped_positions) == (lost, log == LOGS[1])
            assert report.dropped_pairs == (log != LOGS[1])
            whole_slots(root, scan_id, trusted=list(range(report.frames)))


def test_a_damaged_record_in_the_middle_costs_its_frame_only(crashed: tuple[Path, str]) -> None:
    source, scan_id = crashed
    root = crashed_copy(source, source.parent / "middle")
    path = root / "scans" / scan_id / "frames.rec"
    data = bytearray(path.read_bytes())
    data[3 * 72 + 2] ^= 16
    path.write_bytes(data)
    for again in (1, 0):  # what is marked once is not told again
        writer, report = ScanWriter.recover(root, scan_id)
        with writer:
            assert (report.lost_frames, report.frames, report.whole_frames) == (again, 12, 11)
            assert writer.records()["number"].tolist() == [*range(3), *range(4, 12)]
    (catalogue := Catalogue(root)).recover(scan_id)
    header = catalogue.scans()[0]
    assert (header.state, header.counts["frames"], header.counts["missing"]) == (
        "interrupted",
        11,
        1,
    )
    assert inspect_scan(catalogue.directory(scan_id), lambda _: None) == []


def test_a_header_that_was_altered_is_replaced_by_its_copy(crashed: tuple[Path, str]) -> None:
    """A flipped bit turns `<u2` into `>u2`, which is sound and would make all frames wrong."""
    source, scan_id = crashed
    root = crashed_copy(source, source.parent / "header")
    path = root / "scans" / scan_id / "scan.json"
    path.write_text(path.read_text().replace('"<u2"', '">u2"'))
    (fault,) = inspect_scan(path.parent, lambda _: None)
    assert fault.part == "scan.json" and f"scans recover {scan_id}" in fault.advice
    assert check_recovery(root, scan_id, path) is False
    Catalogue(root).recover(scan_id)
    assert '"<u2"' in path.read_text() and not inspect_scan(path.parent, lambda _: None)


def test_a_scan_whose_header_and_copy_are_damaged_is_told_and_left_alone(
    crashed: tuple[Path, str],
) -> None:
    source, scan_id = crashed
    root = crashed_copy(source, source.parent / "both")
    for name in ("scan.json", "scan.copy.json"):
        (root / "scans" / scan_id / name).write_text("{")
    assert Catalogue(root).recover_all() == ([], [scan_id])
    assert Catalogue(root).recover_all(lambda header: header is not None) == ([], [])
    (fault,) = inspect_scan(root / "scans" / scan_id, lambda _: None)
    assert "backup" in fault.advice
    assert (root / "scans" / scan_id / "frames.rec").stat().st_size == FRAMES * 72


def test_a_file_cut_short_while_it_is_mapped_is_an_error(crashed: tuple[Path, str]) -> None:
    source, scan_id = crashed
    root = crashed_copy(source, source.parent / "cut")
    writer, _ = ScanWriter.recover(root, scan_id)
    with writer, ScanReader.open(root, scan_id) as reader:
        reader.frames(slice(0, 5))
        os.truncate(root / "scans" / scan_id / "frames-000000.bin", 4096)
        with pytest.raises(StoreError, match="cut short"):
            reader.frames(slice(0, 5))
        assert reader.verify() == [2, 3, 4]  # two frames of 1920 bytes are left
        with ScanReader.open(root, scan_id, verify_reads=True) as checked:
            np.testing.assert_array_equal(checked.frame(1), make_frame(1))
            with pytest.raises(CorruptRecord, match=r"\[2, 3\]"):
                checked.frames([0, 2, 3])


def test_a_hole_in_a_file_is_found(crashed: tuple[Path, str]) -> None:
    source, scan_id = crashed
    root = crashed_copy(source, source.parent / "hole")
    path = root / "scans" / scan_id / "frames-000001.bin"
    data = path.read_bytes()
    with path.open("wb") as file:  # the second frame was never written: it is a hole
        file.write(data[:1920])
        file.seek(3840)
        file.write(data[3840:])
    writer, report = ScanWriter.recover(root, scan_id)
    with writer, ScanReader.open(root, scan_id) as reader:
        assert report.lost_frames == 0  # it was durable: recovery does not look at its pixels
        assert reader.verify() == [6]
        with (
            ScanReader.open(root, scan_id, verify_reads=True) as checked,
            pytest.raises(CorruptRecord, match=r"pixels of slots \[6\]"),
        ):
            checked.frames(slice(None))
