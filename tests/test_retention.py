"""Scans are deleted for their age: which, when, and not because a clock was wrong for a moment."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scan_samples import FRAMES_PER_FILE, make_header, make_scan

from ptycho_stream.errors import StoreError
from ptycho_stream.scans import Catalogue, ScanWriter, new_scan_id
from ptycho_stream.scans.header import read_header, write_header
from ptycho_stream.scans.ulid import UlidGenerator
from ptycho_stream.settings import DataSettings
from ptycho_streamd import housekeeping
from ptycho_streamd.housekeeping import Housekeeper

DAY_NS = 86_400 * 10**9
PLENTY = 10**12


def aged_scan(root: Path, days: float, **more: object) -> str:
    scan_id = make_scan(root, 5, **more)
    directory = root / "scans" / scan_id
    ended_ns = time.time_ns() - int(days * DAY_NS)
    write_header(directory, replace(read_header(directory), ended_ns=ended_ns))
    return scan_id


def stored(root: Path) -> set[str]:
    return {header.scan_id for header in Catalogue(root).scans()}


def test_scans_that_ended_long_ago_go_but_for_open_and_leased_ones(tmp_path: Path) -> None:
    old, leased, young = (aged_scan(tmp_path, days) for days in (31, 40, 29))
    catalogue = Catalogue(tmp_path)
    with (
        ScanWriter.create(tmp_path, make_header(created_ns=0), FRAMES_PER_FILE) as writer,
        catalogue.lease(leased, "export"),
    ):
        report = catalogue.retain(PLENTY, time.time_ns() - 30 * DAY_NS)
        assert report.deleted == (old,)
        assert stored(tmp_path) == {leased, young, writer.scan_id}
    assert catalogue.retain(PLENTY).deleted == ()


def test_scans_beside_one_another_go_when_all_are_old_and_nobody_holds_one(tmp_path: Path) -> None:
    old = aged_scan(tmp_path, 31)
    beside_old = aged_scan(tmp_path, 31, detector="fluo", beside=old)
    main = aged_scan(tmp_path, 31)
    slow = aged_scan(tmp_path, 29, detector="fluo", beside=main)
    held = aged_scan(tmp_path, 31)
    beside_held = aged_scan(tmp_path, 31, detector="fluo", beside=held)
    catalogue = Catalogue(tmp_path)
    with catalogue.lease(beside_held, "export"):
        report = catalogue.retain(PLENTY, time.time_ns() - 30 * DAY_NS)
        assert set(report.deleted) == {old, beside_old}
        assert catalogue.retain(0).deleted == (main, slow)
    assert stored(tmp_path) == {held, beside_held}
    assert catalogue.retain(0).deleted == (held, beside_held)


class Clock:
    """Wall clock and monotonic clock of a housekeeper, in seconds."""

    def __init__(self) -> None:
        self.ahead_s = time.time() - time.monotonic()
        self.now_s = time.monotonic()

    def time(self) -> float:
        return self.now_s + self.ahead_s

    def time_ns(self) -> int:
        return int(self.time() * 1e9)

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(housekeeping, "time", clock)
    return clock


def test_age_counts_when_the_clock_has_been_steady_for_an_hour(
    tmp_path: Path, clock: Clock
) -> None:
    keeper = Housekeeper(DataSettings(directory=tmp_path, retention_days=30.0))
    assert keeper._ended_before_ns() == 0
    clock.now_s += 3700
    assert keeper._ended_before_ns() == pytest.approx(clock.time_ns() - 30 * DAY_NS, abs=10**9)
    clock.ahead_s += 10 * 365 * 86_400  # somebody sets the clock to another decade
    assert keeper._ended_before_ns() == 0
    clock.now_s += 1800
    assert keeper._ended_before_ns() == 0
    clock.ahead_s -= 10 * 365 * 86_400  # and back
    assert keeper._ended_before_ns() == 0
    for _ in range(8):
        clock.now_s += 500
        clock.ahead_s += 0.2  # NTP at work
        before_ns = keeper._ended_before_ns()
    assert before_ns == pytest.approx(clock.time_ns() - 30 * DAY_NS, abs=10**9)


def test_without_a_limit_no_scan_is_too_old(tmp_path: Path, clock: Clock) -> None:
    keeper = Housekeeper(DataSettings(directory=tmp_path))
    clock.now_s += 10_000
    assert keeper._ended_before_ns() == 0


def test_housekeeping_that_has_ended_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Housekeeper(DataSettings(directory=tmp_path, sync_interval_ms=1)) as keeper:
        keeper.check()

        def gone(path: Path) -> None:
            raise OSError(errno.EIO, "the disk is gone")

        monkeypatch.setattr(housekeeping.os, "statvfs", gone)
        keeper._thread.join(5)
        with pytest.raises(StoreError, match="the disk is gone"):
            keeper.check()


def test_new_scans_sort_after_older_ones_also_when_the_clock_was_set_back() -> None:
    newest = new_scan_id()
    generator = UlidGenerator()
    of_tomorrow = "7" + newest[1:]
    generator.go_on_after(of_tomorrow)
    ids = [generator() for _ in range(3)]
    assert sorted(ids) == ids and ids[0] > of_tomorrow
