"""Reading a scan: views where possible, errors instead of crashes where not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scan_samples import FRAMES_PER_FILE, assert_bit_exact, make_frame, make_header, make_scan
from scan_samples import write_frames as write

from ptycho_stream.errors import CorruptRecord, ScanNotFound, StoreError
from ptycho_stream.scans import Progress, ScanReader, ScanWriter, new_scan_id


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[ScanReader]:
    """A sealed scan of 250 frames in three files, open for reading."""
    with ScanReader.open(tmp_path, make_scan(tmp_path, 250)) as opened:
        yield opened


def test_frames_are_views_of_the_map(reader: ScanReader) -> None:
    frame, run = reader.frame(3), reader.frames(slice(120, 180))
    for array in (frame, run):
        assert not array.flags.owndata
        assert not array.flags.writeable
    np.testing.assert_array_equal(frame, make_frame(3))
    np.testing.assert_array_equal(run[-1], make_frame(179))
    assert np.shares_memory(run[5], reader.frame(125))


@pytest.mark.parametrize(
    "slots",
    [
        slice(95, 205),
        [249, 0, 100],
        np.array([5, 5, 4], np.uint32),
        range(0, 250, 3),
        [],
        slice(9, 3),
    ],
)
def test_any_slots_can_be_gathered(reader: ScanReader, slots: object) -> None:
    frames = reader.frames(slots)  # type: ignore[arg-type]
    wanted = list(range(250))[slots] if isinstance(slots, slice) else [int(s) for s in slots]  # type: ignore[attr-defined]
    assert frames.shape == (len(wanted), *reader.header.frame_shape_yx)
    for frame, number in zip(frames, wanted, strict=True):
        np.testing.assert_array_equal(frame, make_frame(number))


@pytest.mark.parametrize("word", [1, 3, 4])
@pytest.mark.parametrize("bit", [40, 62])
def test_no_memory_is_taken_for_what_an_altered_counter_promises(
    tmp_path: Path, word: int, bit: int
) -> None:
    scan_id = make_scan(tmp_path, 5)
    with (tmp_path / "scans" / scan_id / "counters").open("r+b") as file:
        file.seek(8 * word)
        file.write((5 | 1 << bit).to_bytes(8, "little"))
    with ScanReader.open(tmp_path, scan_id) as reader:
        ask = {1: reader.records, 3: reader.positions, 4: reader.pairs}[word]
        with pytest.raises(CorruptRecord, match="scans recover"):
            ask()
        assert len(ask(0, 5)) == 5
        if word == 1:
            for read in (reader.frames, reader.verify):
                with pytest.raises(CorruptRecord, match="scans recover"):
                    read(slice(None))
            assert len(reader.frames(slice(0, 5))) == 5
            assert reader.verify(slice(0, 5)) == []


def test_what_is_not_committed_cannot_be_read(reader: ScanReader) -> None:
    for ask in (
        lambda: reader.frame(250),
        lambda: reader.frame(-1),
        lambda: reader.frames([0, 250]),
        lambda: reader.records(0, 251),
        lambda: reader.pairs(240, 260),
        lambda: reader.positions(-3, 5),
        lambda: reader.verify([250]),
    ):
        with pytest.raises(StoreError, match="committed ones"):
            ask()
    assert len(reader.records(250, 250)) == 0


def test_frames_handed_out_outlive_the_reader_and_the_scan(tmp_path: Path) -> None:
    scan_id = make_scan(tmp_path, 10)
    with ScanReader.open(tmp_path, scan_id) as reader:
        frame = reader.frame(7)
    for path in (tmp_path / "scans" / scan_id).iterdir():
        path.unlink()
    np.testing.assert_array_equal(frame, make_frame(7))


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), frames_per_file=1) as writer:
        write(writer, range(300))
        writer.seal("complete", {})
    code = (
        "import resource, sys; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "from ptycho_stream.scans import ScanReader\n"
        "reader = ScanReader.open(Path(sys.argv[1]), sys.argv[2])\n"
        "assert reader.frames(slice(None)).shape[0] == 300 and reader.verify() == []\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, writer.scan_id], check=True)


@pytest.mark.parametrize("name", ["frames-000001.bin", "counters"])
def test_a_file_cut_short_is_an_error_and_no_sigbus(tmp_path: Path, name: str) -> None:
    scan_id = make_scan(tmp_path, 150)
    os.truncate(tmp_path / "scans" / scan_id / name, 100)

    def read_all() -> None:
        with ScanReader.open(tmp_path, scan_id) as reader:
            reader.frames(slice(None))

    with pytest.raises(StoreError, match="short"):
        read_all()


def test_a_batch_file_cut_short_is_found_by_verify(tmp_path: Path) -> None:
    scan_id = make_scan(tmp_path, 150)
    os.truncate(tmp_path / "scans" / scan_id / "frames-000001.bin", 100)
    with ScanReader.open(tmp_path, scan_id) as reader:
        assert reader.verify() == list(range(100, 150))


def test_scans_that_are_not_there(tmp_path: Path) -> None:
    for scan_id in (new_scan_id(), "../../etc", "", "x" * 26):
        with pytest.raises(ScanNotFound):
            ScanReader.open(tmp_path, scan_id)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"geometry": 3}', "[" * 100_000])
def test_a_damaged_header_is_said_to_be_damaged(tmp_path: Path, text: str) -> None:
    scan_id = make_scan(tmp_path, 1)
    for name in ("scan.json", "scan.copy.json"):
        (tmp_path / "scans" / scan_id / name).write_text(text)
    with pytest.raises(StoreError, match=r"scan\.json: not a scan header"):
        ScanReader.open(tmp_path, scan_id)


def test_a_scan_deleted_while_it_is_read(tmp_path: Path, reader: ScanReader) -> None:
    first = reader.frame(0)
    for path in reader.directory.iterdir():
        path.unlink()
    np.testing.assert_array_equal(first, make_frame(0))
    with pytest.raises(ScanNotFound, match="hold a lease"):
        reader.frame(200)
    with pytest.raises(ScanNotFound):
        reader.refresh()


def test_a_read_only_store_can_be_read(tmp_path: Path, reader: ScanReader) -> None:
    reader.directory.chmod(0o555)
    try:
        with ScanReader.open(tmp_path, reader.scan_id) as second:
            assert_bit_exact(second)
    finally:
        reader.directory.chmod(0o755)


def test_progress_survives_its_process(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        scan_id = writer.scan_id
        progress = Progress(tmp_path, scan_id, "export")
        assert progress.load() is None
        progress.save({"frames": 10, "formats": ["npz"]})
        progress.save({"frames": 20, "formats": ["npz"]})
    assert Progress(tmp_path, scan_id, "export").load() == {"frames": 20, "formats": ["npz"]}
    assert Progress(tmp_path, scan_id, "training").load() is None
    for name in ("", "../export", "Export"):
        with pytest.raises(StoreError, match="progress name"):
            Progress(tmp_path, scan_id, name)
    (tmp_path / "scans" / scan_id / "progress-export.json").write_text("{")
    with pytest.raises(StoreError, match="delete it"):
        Progress(tmp_path, scan_id, "export").load()


def test_a_record_that_was_looked_at_too_early_is_read_again(tmp_path: Path) -> None:
    """As on processors that may show the counter before the record."""
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        write(writer, range(3))
        writer.commit()
        writer._counters.committed = 4
        with ScanReader.open(tmp_path, writer.scan_id) as reader:
            with pytest.raises(CorruptRecord, match=r"\[3\]"):
                reader.frame(3)
            write(writer, range(3, 4))
            writer.commit()
            np.testing.assert_array_equal(reader.frame(3), make_frame(3))
