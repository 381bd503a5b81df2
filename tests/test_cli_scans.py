"""``ptycho-stream scans``: what it finds, says, repairs and leaves alone, without a daemon."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from scan_samples import FRAMES_PER_FILE, make_frame, make_header, make_scan, write_frames

from ptycho_stream.cli import main
from ptycho_stream.files.detector_frames import write_detector_frames
from ptycho_stream.scans import Catalogue, ScanReader, ScanWriter
from ptycho_stream.scans.records import stamp


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, str, Path]:
    """A data directory, a scan in it, and the scan's folder."""
    scan_id = make_scan(tmp_path, 150)
    return tmp_path, scan_id, tmp_path / "scans" / scan_id


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def verify(root: Path, capsys: pytest.CaptureFixture[str], status: int) -> dict[str, list[dict]]:
    before = contents(root)
    assert main(["scans", "verify", "--data", str(root), "--json"]) == status
    assert contents(root) == before, "verify changes nothing"
    return json.loads(capsys.readouterr().out)


def test_whole_scans_are_said_to_be_whole(store, capsys):
    root, scan_id, _ = store
    assert verify(root, capsys, 0) == {scan_id: []}
    assert main(["scans", "verify", scan_id, "--data", str(root)]) == 0
    assert capsys.readouterr().out == f"{scan_id}: whole\n"


@pytest.mark.parametrize(
    ("name", "at", "part", "what"),
    [
        ("frames-000001.bin", 1920 * 7 + 5, "frames-*.bin", "slots 107 "),
        ("frames.rec", 33 * 72 + 2, "frames.rec", "slots 33 "),
        ("positions.log", 5 * 56 + 9, "positions.log", "records 5 "),
        ("pairs.log", 6 * 64 + 9, "pairs.log", "records 6 "),
        ("counters", 9, "counters", "1174 records are counted and frames.rec holds 150"),
        ("counters", 0, "counters", "not a counters file"),
        ("scan.json", 40, "scan.json", "scan.json"),
    ],
)
def test_damage_is_found_and_told_with_what_to_do(store, capsys, name, at, part, what):
    root, scan_id, folder = store
    flip(folder / name, at)
    (fault,) = verify(root, capsys, 1)[scan_id]
    assert fault["part"] == part
    assert what in fault["what"]
    assert "scans recover" in fault["advice"] or "backup" in fault["advice"]
    assert main(["scans", "verify", scan_id, "--data", str(root)]) == 1
    told = capsys.readouterr().out
    assert f"{scan_id}: 1 fault(s)" in told and fault["advice"] in told


def test_files_of_views_masks_and_saved_images_are_looked_at(store, capsys, tmp_path):
    root, scan_id, folder = store
    (folder / "mask.npy").write_bytes(b"no mask")
    (folder / "reconstruct.npz").write_bytes(b"PK no image")
    faults = verify(root, capsys, 1)[scan_id]
    assert [fault["part"] for fault in faults] == ["mask.npy", "reconstruct.npz"]
    assert f"ctl reprocess {scan_id}" in faults[1]["advice"]


def test_a_pair_of_a_frame_that_is_not_there_is_found(store, capsys):
    root, scan_id, folder = store
    with ScanReader.open(root, scan_id) as reader:
        pairs = reader.pairs()
    pairs["number"][7] = 9
    stamp(pairs)
    (folder / "pairs.log").write_bytes(pairs.tobytes())
    (fault,) = verify(root, capsys, 1)[scan_id]
    assert fault["what"] == "records 7 name frames that are not there"
    assert main(["scans", "recover", scan_id, "--data", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped_pairs"] == 1, "as the advice says"
    verify(root, capsys, 0)


def test_recover_brings_back_what_is_whole(store, capsys):
    root, scan_id, folder = store
    for name, at in (("frames.rec", 33 * 72 + 2), ("pairs.log", 6 * 64 + 9), ("scan.json", 40)):
        flip(folder / name, at)
    (folder / "counters").write_bytes(b"")
    assert main(["scans", "recover", scan_id, "--data", str(root), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["whole_frames"], report["lost_frames"], report["dropped_pairs"]) == (149, 1, 2)
    assert verify(root, capsys, 0) == {scan_id: []}
    header = Catalogue(root).scans()[0]
    assert (header.state, header.counts["frames"]) == ("complete", 149)
    with ScanReader.open(root, scan_id) as reader:
        assert reader.verify() == [33]
        assert len(reader.pairs()) == 148


def test_what_recovery_marked_as_lost_is_left_out_of_an_export(tmp_path):
    scan_id = make_scan(tmp_path, 40, detector="fluo")
    flip(tmp_path / "scans" / scan_id / "frames.rec", 33 * 72 + 2)
    assert main(["scans", "recover", scan_id, "--data", str(tmp_path)]) == 0
    with ScanReader.open(tmp_path, scan_id) as reader:
        assert write_detector_frames(tmp_path / "fluo.h5", reader, None) == 39
    with h5py.File(tmp_path / "fluo.h5") as file:
        numbers = file["entry/data/frame_number"][:].tolist()
        assert numbers == [*range(33), *range(34, 40)]
        for pixels, number in zip(file["entry/data/data"], numbers, strict=True):
            np.testing.assert_array_equal(pixels, make_frame(number))


def test_an_open_scan_is_looked_at_as_far_as_it_is_committed(tmp_path, capsys):
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(20))
        writer.commit()
        write_frames(writer, range(20, 30))
        assert writer.wait_prepared(20)
        assert verify(tmp_path, capsys, 0) == {writer.scan_id: []}
        assert main(["scans", "recover", writer.scan_id, "--data", str(tmp_path)]) == 1
        assert "is being written" in capsys.readouterr().err
    assert main(["scans", "recover", writer.scan_id, "--data", str(tmp_path)]) == 0
    assert Catalogue(tmp_path).scans()[0].state == "interrupted"


def test_scans_are_listed_and_shown(store, capsys):
    root, scan_id, _ = store
    assert main(["scans", "list", "--data", str(root)]) == 0
    assert scan_id in capsys.readouterr().out
    assert main(["scans", "list", "--data", str(root), "--json"]) == 0
    assert [header["scan_id"] for header in json.loads(capsys.readouterr().out)] == [scan_id]
    assert main(["scans", "show", scan_id, "--data", str(root), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["committed"], shown["pairs"]) == ("complete", 150, 150)


def test_delete_leaves_alone_what_is_in_use(store, capsys):
    root, scan_id, folder = store
    command = ["scans", "delete", scan_id, "--data", str(root), "--yes"]
    with Catalogue(root).lease(scan_id, "training"):
        assert main(command) == 1
        assert "in use by training" in capsys.readouterr().err.replace("\n", " ")
    assert main(command) == 0
    assert not folder.exists()
    assert main(command) == 1


def test_delete_takes_the_scans_beside_with_it(store, capsys):
    root, scan_id, folder = store
    beside, other = (make_scan(root, 5, detector=name, beside=scan_id) for name in ("fluo", "apd"))
    command = ["scans", "delete", "--data", str(root), "--yes", "--json"]
    with Catalogue(root).lease(beside, "export"):
        assert main([*command, scan_id]) == 1
        assert folder.exists() and "in use by export" in capsys.readouterr().err.replace("\n", " ")
    assert main([*command, other]) == 0
    assert json.loads(capsys.readouterr().out)["deleted"] == [other]
    assert main([*command, scan_id]) == 0
    deleted = json.loads(capsys.readouterr().out)
    assert deleted["deleted"] == [scan_id, beside] and deleted["freed_bytes"] > 0
    assert Catalogue(root).ids() == []


def test_a_data_directory_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["scans", "verify", "--data", str(tmp_path / "nowhere")]) == 1
    assert "there is no data directory" in capsys.readouterr().err


def test_a_saved_image_with_any_bit_flipped_is_told_or_whole(store, capsys):
    from ptycho_stream.reconstruct.saved_image import STATE_FILE, state_problem, write_state

    _, _, folder = store
    arrays = {"current.a": np.arange(40.0), "current.b": np.ones((3, 4), np.complex64)}
    write_state(folder, arrays)
    whole = (folder / STATE_FILE).read_bytes()
    told = 0
    for at in range(0, len(whole), 3):
        flip(folder / STATE_FILE, at)
        told += bool(state_problem(folder))
        (folder / STATE_FILE).write_bytes(whole)
    assert state_problem(folder) == ""
    assert told > 0.5 * len(whole) / 3
