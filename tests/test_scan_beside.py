"""Scans of stored detectors find the scan that they belong to, and go with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scan_samples import make_header, make_scan, write_frames

from ptycho_stream.errors import SettingsError
from ptycho_stream.scans import Catalogue, ScanHeader, ScanWriter
from ptycho_stream.scans.beside import scan_beside
from ptycho_stream.scans.join import FramesAlone, PositionLimits
from ptycho_stream.settings import Settings, StoredDetector

BY_TIME = StoredDetector(name="fluo", match_window_s=60.0)
BY_SERIES = StoredDetector(name="fluo", match="series", match_window_s=60.0)


def scan(
    at_s: float, ended_s: float | None = None, detector: str = "", **more: object
) -> ScanHeader:
    ended_ns = None if ended_s is None else int(ended_s * 1e9)
    return make_header(created_ns=int(at_s * 1e9), ended_ns=ended_ns, detector=detector, **more)


def found(
    mine: ScanHeader, *others: ScanHeader, how: StoredDetector = BY_TIME
) -> ScanHeader | None:
    scan_id = scan_beside(mine, [mine, *others], how)
    return next((other for other in others if other.scan_id == scan_id), None)


def test_the_nearest_in_time_is_taken_whichever_came_first() -> None:
    mine = scan(100, detector="fluo")
    before, after = scan(90), scan(103)
    assert found(mine, before) is before
    assert found(mine, before, after) is after
    assert found(mine, scan(30)) is None
    assert found(mine) is None


def test_one_that_was_over_before_is_not_it() -> None:
    mine = scan(100, detector="fluo")
    over, ending = scan(50, ended_s=99), scan(50, ended_s=101)
    assert found(mine, over) is None
    assert found(mine, over, ending) is ending


def test_a_scan_has_one_of_each_detector_beside_it() -> None:
    mine, main = scan(100, detector="fluo"), scan(101)
    assert found(mine, main, scan(99, detector="fluo", beside=main.scan_id)) is None
    assert found(mine, main, scan(99, detector="other", beside=main.scan_id)) is main


def test_one_that_was_laid_out_anew_is_not_it() -> None:
    mine = scan(100, detector="fluo")
    replaced = scan(100, ended_s=101, state="aborted")
    given_up = scan(101, ended_s=110, state="aborted", counts={"frames": 3})
    assert found(mine, replaced) is None
    assert found(mine, replaced, given_up) is given_up


def test_detectors_that_share_their_series_are_matched_by_it() -> None:
    mine = scan(100, detector="fluo", series="scan-8")
    near, same = scan(100, series="scan-7"), scan(120, series="scan-8")
    assert found(mine, near, same, how=BY_SERIES) is same
    assert found(mine, near, how=BY_SERIES) is None
    assert found(mine, scan(200, series="scan-8"), how=BY_SERIES) is None


def test_frames_alone_need_no_position() -> None:
    join = FramesAlone(PositionLimits(1.0, 1.0))
    assert join.frame(0, 0) is None
    assert join.frame_with_position(1, 1, 0.0, 0.0) is None
    join.dark_frame()
    assert (join.positioned, join.spared, join.dark, join.gated) == (0, 3, 1, 0)


def test_scans_beside_are_deleted_with_theirs(tmp_path: Path) -> None:
    old = make_scan(tmp_path, 10)
    beside = make_scan(tmp_path, 10, detector="fluo", beside=old)
    alone = make_scan(tmp_path, 10, detector="fluo")
    new = make_scan(tmp_path, 10)
    late = make_scan(tmp_path, 10, detector="fluo", beside=new)
    catalogue = Catalogue(tmp_path)
    latest = catalogue.latest()
    assert latest is not None and latest.scan_id == new
    with catalogue.lease(old, "somebody"), catalogue.lease(new, "somebody"):
        assert catalogue.retain(0).deleted == (alone,)
    assert set(catalogue.make_room(10**9).deleted) == {old, beside}
    assert {header.scan_id for header in catalogue.scans()} == {new, late}
    assert set(catalogue.retain(0).deleted) == {new, late}


@pytest.mark.parametrize(("detector", "unpositioned"), [("", 4), ("fluo", 0)])
def test_frames_of_a_stored_detector_are_not_said_to_lack_positions(
    tmp_path: Path, detector: str, unpositioned: int
) -> None:
    """Nor those that are committed by the seal itself."""
    with ScanWriter.create(tmp_path, make_header(detector=detector), 10) as writer:
        write_frames(writer, range(4), pairs=False)
        counts = {"positioned": 0, "unpositioned": unpositioned}
        header = writer.seal("complete", counts)
    assert header.counts == counts | {"frames": 4}


@pytest.mark.parametrize(
    ("detectors", "said"),
    [
        ([{"name": "a"}, {"name": "a", "endpoint": "tcp://127.0.0.1:5"}], "names one twice"),
        ([{"name": "a", "endpoint": "tcp://127.0.0.1:9999"}], "each other's frames"),
        ([{"name": "No Good"}], "more_detectors"),
        ([{"endpoint": "tcp://127.0.0.1:5"}], "more_detectors"),
        (
            [{"name": "a", "attach": "bind", "endpoint": "tcp://127.0.0.1:9600"}],
            "more_detectors.a.endpoint",
        ),
    ],
)
def test_detectors_that_cannot_work_are_refused(detectors: list[dict], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings.model_validate({"probe": {"path": "p.npz"}, "more_detectors": detectors})


def test_two_detectors_may_subscribe_to_one_publisher() -> None:
    shared = {"dialect": "odin", "socket": "sub", "endpoint": "tcp://127.0.0.1:5020"}
    settings = Settings.model_validate(
        {
            "probe": {"path": "p.npz"},
            "detector": {**shared, "odin": {"dataset": "threshold_1"}},
            "more_detectors": [{**shared, "name": "high", "odin": {"dataset": "threshold_2"}}],
            "positions": {"source": "native", "endpoint": "tcp://127.0.0.1:6"},
            "geometry": {"photon_energy_eV": 8800.0},
        }
    )
    assert settings.of_detector("") is settings
    high = settings.of_detector("high")
    assert high.detector.odin.dataset == "threshold_2"
    assert not high.positions.is_stream
    assert high.geometry.photon_energy_eV is None
    with pytest.raises(SettingsError, match="'low'"):
        settings.of_detector("low")


def test_headers_of_before_have_no_detector() -> None:
    old = scan(1).to_json().replace(b'"detector": "",', b"").replace(b'"beside": null,', b"")
    assert b"beside" not in old
    header = ScanHeader.from_json(old)
    assert (header.detector, header.beside) == ("", None)
    assert np.dtype(header.dtype) == np.uint16
