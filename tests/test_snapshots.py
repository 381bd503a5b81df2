"""Named snapshots: an image as it was, kept with its scan."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from results_source import SCANS, grown
from scan_samples import make_scan

from ptycho_stream.errors import ControlError, FileFormatError, ScanNotFound
from ptycho_stream.scans import Catalogue
from ptycho_streamd import snapshots
from ptycho_streamd.snapshots import list_snapshots, snapshot, take_snapshot

TRUSTED = {
    "layer": "refined",
    "sweeps": 3.0,
    "trust": {"r_factor": 0.14},
    "verdict": "good",
    "reasons": ("it fits",),
}


def test_it_holds_the_image_with_probe_trust_and_verdict(tmp_path: Path) -> None:
    path = take_snapshot(grown(6, **TRUSTED), tmp_path, "at-noon")
    assert path == tmp_path / "snapshots" / "at-noon.npz"
    with np.load(path, allow_pickle=False) as held:
        assert held["probe"].shape == (2, 8, 8) and held["frame_numbers"].size == 6
        said = json.loads(str(held["metadata"]))["ptycho_stream"]
    assert {name: said[name] for name in ("layer", "sweeps", "trust", "verdict")} == {
        name: TRUSTED[name] for name in ("layer", "sweeps", "trust", "verdict")
    }
    assert list(path.parent.iterdir()) == [path]


def test_it_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = take_snapshot(grown(1), tmp_path, "a")
    before = path.read_bytes()
    with pytest.raises(ControlError, match="--force") as refused:
        take_snapshot(grown(2), tmp_path, "a")
    assert refused.value.code == "exists" and path.read_bytes() == before
    take_snapshot(grown(2), tmp_path, "a", force=True)
    assert [held["frames"] for held in list_snapshots(tmp_path)] == [2]


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "a\n", "x" * 65, "ä"])
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ControlError, match="no name for a snapshot") as refused:
        take_snapshot(grown(1), tmp_path, name)
    assert refused.value.code == "bad_arguments" and not list(tmp_path.iterdir())


def test_there_is_none_of_an_image_without_a_pixel(tmp_path: Path) -> None:
    with pytest.raises(ScanNotFound, match="no image"):
        take_snapshot(grown(0), tmp_path, "a")


def test_a_scan_has_a_bounded_number_of_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(snapshots, "MAX_SNAPSHOTS", 2)
    for name in "ab":
        take_snapshot(grown(1), tmp_path, name)
    with pytest.raises(ControlError, match="delete some"):
        take_snapshot(grown(1), tmp_path, "c")
    take_snapshot(grown(1), tmp_path, "a", force=True)


def test_they_are_listed_oldest_first_also_beside_a_damaged_one(tmp_path: Path) -> None:
    assert list_snapshots(tmp_path) == []
    for at_s, name in ((3, "late"), (1, "early")):
        path = take_snapshot(grown(at_s, **TRUSTED), tmp_path, name)
        os.utime(path, (at_s, at_s))
    (path.parent / "torn.npz").write_bytes(b"PK")
    early, late, torn = list_snapshots(tmp_path)
    assert (early["name"], early["frames"], early["verdict"]) == ("early", 1, "good")
    assert (late["name"], late["taken_ns"], late["problem"]) == ("late", 3_000_000_000, "")
    assert torn["name"] == "torn" and "not readable" in torn["problem"]


def test_a_request_names_scan_and_file(tmp_path: Path) -> None:
    (tmp_path / "scans" / SCANS[0]).mkdir(parents=True)
    arguments = {"name": "a", "scan_id": None, "force": False}
    told = snapshot(arguments, lambda scan_id: grown(6, **TRUSTED), tmp_path)
    assert told["scan_id"] == SCANS[0] and told["verdict"] == "good"
    assert Path(told["path"]).is_relative_to(tmp_path / "scans" / SCANS[0])


def test_a_folder_that_is_gone_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot make"):
        take_snapshot(grown(1), tmp_path / "deleted", "a")


def test_the_retention_limit_counts_them_and_deletes_them_with_their_scan(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    directory = catalogue.directory(make_scan(tmp_path, frames=3))
    before = catalogue.retain(10**12).kept_bytes
    path = take_snapshot(grown(6), directory, "a")
    assert catalogue.retain(10**12).kept_bytes - before >= path.stat().st_size
    assert catalogue.retain(0).deleted == (directory.name,)
    assert not directory.exists()
