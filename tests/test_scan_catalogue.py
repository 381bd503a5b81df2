"""The catalogue: listing, leases, the retention limit, and batch files used again."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
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

from ptycho_stream.errors import ScanLocked, ScanNotFound, StoreError
from ptycho_stream.geometry import View
from ptycho_stream.scans import Catalogue, ScanReader, ScanWriter, new_scan_id
from ptycho_stream.scans.leases import live_holders
from ptycho_stream.scans.spare import SpareFiles

PLENTY = 10**12
FILE_BYTES = FRAMES_PER_FILE * make_frame(0).nbytes


def stored(root: Path) -> list[str]:
    return [header.scan_id for header in Catalogue(root).scans()]


def inodes(directory: Path) -> set[int]:
    return {path.stat().st_ino for path in directory.glob("*.bin")}


def test_scans_are_listed_newest_first(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    assert (catalogue.scans(), catalogue.latest()) == ([], None)
    first, second = make_scan(tmp_path, 1, series="7"), make_scan(tmp_path, 1, series="8")
    assert [header.series for header in catalogue.scans()] == ["8", "7"]
    latest = catalogue.latest()
    assert latest is not None and latest.scan_id == second
    with catalogue.open(first) as reader:
        assert reader.header.series == "7"


def test_changes_are_noticed_cheaply(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    catalogue.scans()
    assert not catalogue.changed()
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        for change in (
            lambda: writer.update_header(state="running"),
            lambda: writer.update_header(metadata={"comment": "again"}),
            lambda: writer.seal("complete", {}),
        ):
            catalogue.scans()
            assert not catalogue.changed()
            change()
            assert catalogue.changed()
    assert catalogue.scans()[0].state == "complete"
    catalogue.retain(0)
    assert catalogue.scans() == []


def test_a_scan_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    broken, whole = make_scan(tmp_path, 1), make_scan(tmp_path, 1)
    for name in ("scan.json", "scan.copy.json"):
        (tmp_path / "scans" / broken / name).write_text("{")
    (tmp_path / "scans" / "notes.txt").write_text("not a scan")
    assert stored(tmp_path) == [whole]


def test_retention_deletes_the_oldest_sealed_scans(tmp_path: Path) -> None:
    scans = [make_scan(tmp_path, 150) for _ in range(4)]
    assert Catalogue(tmp_path).retain(PLENTY).deleted == ()
    limit = int(3.5 * 2 * FILE_BYTES)
    report = Catalogue(tmp_path).retain(limit)
    assert report.deleted == (scans[0],)
    assert report.kept_bytes <= limit
    assert stored(tmp_path) == scans[:0:-1]
    for scan_id in scans[1:]:
        with ScanReader.open(tmp_path, scan_id) as reader:
            assert_bit_exact(reader)


def test_retention_leaves_a_scan_that_is_being_written(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(10))
        assert Catalogue(tmp_path).retain(0).deleted == ()
        writer.commit()
    assert Catalogue(tmp_path).retain(0).deleted == ()  # nor one that can be recovered
    assert stored(tmp_path) == [writer.scan_id]


def test_what_is_kept_is_what_the_files_take(tmp_path: Path) -> None:
    make_scan(tmp_path, 150)
    report = Catalogue(tmp_path).retain(PLENTY)
    on_disk = sum(p.stat().st_blocks * 512 for p in tmp_path.rglob("*") if p.is_file())
    assert report.kept_bytes == pytest.approx(on_disk, abs=4096)


def test_a_lease_keeps_a_scan(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    scan_id = make_scan(tmp_path, 10)
    with catalogue.lease(scan_id, "reconstruct"), catalogue.lease(scan_id, "export") as second:
        assert live_holders(tmp_path / "scans" / scan_id) == ["export", "reconstruct"]
        second.release()
        assert catalogue.retain(0).deleted == ()
        assert live_holders(tmp_path / "scans" / scan_id) == ["reconstruct"]
    assert live_holders(tmp_path / "scans" / scan_id) == []
    assert catalogue.retain(0).deleted == (scan_id,)


def test_a_lease_ends_with_its_process(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    scan_id = make_scan(tmp_path, 10)
    process = start_process("hold", tmp_path, scan_id)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    assert catalogue.retain(0).deleted == ()
    assert live_holders(tmp_path / "scans" / scan_id) == ["training"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert live_holders(tmp_path / "scans" / scan_id) == []
    assert catalogue.retain(0).deleted == (scan_id,)


def test_leases_that_cannot_be_had(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    for scan_id in (new_scan_id(), "../.."):
        with pytest.raises(ScanNotFound):
            catalogue.lease(scan_id, "export")
    with pytest.raises(StoreError, match="lease holder"):
        catalogue.lease(make_scan(tmp_path, 1), "a/b")


def test_the_view_of_a_sealed_scan_can_be_corrected(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    scan_id = make_scan(tmp_path, 3, views=(View(size_px=32),))
    with catalogue.open(scan_id) as reader:
        view = reader.header.view.next(orientation="rotate180")
        catalogue.add_view(scan_id, view)
        assert reader.refresh()
        assert reader.header.view == view
        assert reader.header.view.version == 2
        assert_bit_exact(reader)
    with ScanWriter.create(tmp_path, make_header()) as writer, pytest.raises(ScanLocked):
        catalogue.add_view(writer.scan_id, view)


def test_files_of_deleted_scans_are_written_again(tmp_path: Path) -> None:
    old = make_scan(tmp_path, 350)
    files = inodes(tmp_path / "scans" / old)
    spare = SpareFiles(tmp_path)
    for path in (tmp_path / "scans" / old).glob("*.bin"):
        spare.put(path)
    assert spare.total_bytes() >= 4 * FILE_BYTES
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(1000, 1350))
        writer.seal("complete", {})
    assert files & inodes(tmp_path / "scans" / writer.scan_id)
    with ScanReader.open(tmp_path, writer.scan_id) as reader:
        assert_bit_exact(reader)
        with pytest.raises(StoreError):
            reader.frame(350)  # what an older scan left there is nobody's business


def test_prepared_files_that_were_not_needed_become_spares(tmp_path: Path) -> None:
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        assert writer.wait_prepared(20)
        write_frames(writer, range(10))
        writer.seal("complete", {})
    assert len(inodes(tmp_path / "scans" / writer.scan_id)) == 1
    assert len(inodes(tmp_path / "spare")) == 3


def test_retention_counts_and_limits_the_spares(tmp_path: Path) -> None:
    scans = [make_scan(tmp_path, 350) for _ in range(3)]
    limit = 11 * FILE_BYTES
    report = Catalogue(tmp_path).retain(limit)
    assert report.deleted == (scans[0],)
    assert len(inodes(tmp_path / "spare")) == 1  # a tenth of the limit
    assert report.kept_bytes <= limit
    assert Catalogue(tmp_path).retain(0).kept_bytes < FILE_BYTES
    assert list(tmp_path.rglob("*.bin")) == []


def test_room_is_made_of_spares_first_and_then_of_the_oldest_scans(tmp_path: Path) -> None:
    scans = [make_scan(tmp_path, 350) for _ in range(4)]
    catalogue = Catalogue(tmp_path)
    spare_bytes = SpareFiles(tmp_path).total_bytes()
    assert spare_bytes >= FILE_BYTES
    assert catalogue.make_room(spare_bytes).deleted == ()
    with catalogue.lease(scans[0], "export"):
        report = catalogue.make_room(FILE_BYTES)
        assert report.deleted == (scans[1],)
        assert report.freed_bytes >= FILE_BYTES
        # The newest one stays: somebody has just recorded it.
        assert catalogue.make_room(PLENTY).deleted == (scans[2],)
    assert stored(tmp_path) == [scans[3], scans[0]]
    assert list((tmp_path / "spare").iterdir()) == []


def test_a_file_that_somebody_still_maps_is_not_written_again(tmp_path: Path) -> None:
    scan_id = make_scan(tmp_path, 150)
    with ScanReader.open(tmp_path, scan_id) as reader:
        mapped = reader.frames(slice(100, 150))
    unmapped, still_mapped = sorted((tmp_path / "scans" / scan_id).glob("*.bin"))
    spare = SpareFiles(tmp_path)
    assert spare.put(unmapped) == 0
    assert spare.put(still_mapped) == FILE_BYTES  # deleted instead
    with ScanWriter.create(tmp_path, make_header(), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(1000, 1400))
        writer.seal("complete", {})
    np.testing.assert_array_equal(mapped[0], make_frame(100))


def test_files_that_are_kept_elsewhere_by_a_link_are_not_written_again(tmp_path: Path) -> None:
    scan_id = make_scan(tmp_path, 150)
    directory, kept = tmp_path / "scans" / scan_id, tmp_path / "kept"
    kept.mkdir()
    linked, moved = sorted(directory.glob("frames-*.bin"))
    (kept / linked.name).hardlink_to(linked)
    moved.rename(kept / moved.name)
    moved.symlink_to(kept / moved.name)
    spare = SpareFiles(tmp_path)
    spares = spare.total_bytes()
    assert (spare.put(linked), spare.put(moved)) == (0, 0)
    assert spare.total_bytes() == spares
    assert inodes(tmp_path / "spare").isdisjoint(inodes(kept))
    assert not linked.exists() and not moved.is_symlink()
    assert len(inodes(kept)) == 2


def test_a_scan_that_cannot_be_locked_does_not_stop_retention(tmp_path: Path) -> None:
    stuck, old = make_scan(tmp_path, 10), make_scan(tmp_path, 10)
    lock = tmp_path / "scans" / stuck / "lock"
    lock.unlink()
    lock.mkdir()  # cannot be opened, whoever we are
    assert Catalogue(tmp_path).retain(0).deleted == (old,)
    assert stored(tmp_path) == [stuck]


def test_files_of_others_among_the_spares_do_not_stop_retention(tmp_path: Path) -> None:
    scan_id = make_scan(tmp_path, 10)
    (tmp_path / "spare" / "not-ours.bin").touch()
    assert Catalogue(tmp_path).retain(0).deleted == (scan_id,)
    assert inodes(tmp_path / "spare") == {(tmp_path / "spare" / "not-ours.bin").stat().st_ino}


def test_a_spare_file_is_taken_once(tmp_path: Path) -> None:
    scan_id = make_scan(tmp_path, 10)
    spare = SpareFiles(tmp_path)
    kept_before = len(inodes(tmp_path / "spare"))
    for path in (tmp_path / "scans" / scan_id).glob("*.bin"):
        spare.put(path)
    taken = [tmp_path / f"taken-{number}" for number in range(kept_before + 3)]
    assert [spare.take(FILE_BYTES, path) for path in taken] == [True] * (kept_before + 1) + [
        False
    ] * 2
    assert not spare.take(FILE_BYTES, taken[0])
    assert len({path.stat().st_ino for path in taken[: kept_before + 1]}) == kept_before + 1


def test_deleting_that_was_interrupted_is_finished(tmp_path: Path) -> None:
    scan_id = make_scan(tmp_path, 10)
    scans = tmp_path / "scans"
    (scans / scan_id).rename(scans / f".old-{scan_id}")
    assert stored(tmp_path) == []
    assert Catalogue(tmp_path).retain(PLENTY).freed_bytes > 0
    assert list(scans.iterdir()) == []


def test_a_folder_that_cannot_be_deleted_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scans = tmp_path / "scans"
    stuck, loose = (scans / f".old-{make_scan(tmp_path, 10)}" for _ in range(2))
    for folder in (stuck, loose):
        (scans / folder.name.removeprefix(".old-")).rename(folder)
    delete = shutil.rmtree

    def refuse(path: Path) -> None:
        if path == stuck:
            raise PermissionError(13, "Permission denied", str(path))
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert Catalogue(tmp_path).retain(PLENTY).freed_bytes > 0
    assert list(scans.iterdir()) == [stuck]
    assert f"{stuck} cannot be deleted" in caplog.text
    monkeypatch.undo()
    Catalogue(tmp_path).retain(PLENTY)
    assert not list(scans.iterdir())
