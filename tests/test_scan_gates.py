"""Beam monitor, gates and dark frames on their way into a scan: order, crashes, counters, views."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beamline import SHAPE, pixels, position
from daemon_harness import DaemonHarness
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_samples import crashed_copy

from ptycho_stream.messages import EncodedImage, Frame, Gate, Positions, ScanStart
from ptycho_stream.scans.join import Join, PositionLimits
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import (
    FRAME_RECORD,
    PAIR_FLAG_GATED,
    PAIR_RECORD,
    POSITION_GATE_OPEN,
    POSITION_GATE_SKIP,
    POSITION_RECORD,
)
from ptycho_stream.scans.scan_events import OpenScan
from ptycho_stream.scans.ulid import new_scan_id
from ptycho_stream.scans.view_data import view_data
from ptycho_stream.scans.writer import ScanWriter
from ptycho_stream.settings import Settings
from ptycho_streamd.recorder import Recorder

LIMITS = PositionLimits(max_extent_m=1e-2, max_step_m=1e-3)


def where(numbers: list[int]) -> np.ndarray:
    return np.array([[n * 1e-7, -n * 1e-7] for n in numbers]).reshape(-1, 2)


@settings(max_examples=150, deadline=None)
@given(
    own=st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 3.5])), min_size=8, max_size=8),
    told=st.lists(
        st.tuples(
            st.sampled_from([0, POSITION_GATE_OPEN, POSITION_GATE_SKIP]),
            st.sampled_from([0.0, 7.0]),
        ),
        min_size=8,
        max_size=8,
    ),
    order=st.permutations(range(16)),
)
def test_what_frames_and_positioner_say_meets_in_any_order(own, told, order):
    """Numbers 0 to 7: each frame and each position once, alone in its message."""
    join = Join(LIMITS)
    pairs: dict[int, tuple[int, float]] = {}
    for step in order:
        number = step % 8
        if step < 8:
            skip, i0 = own[number]
            pair = join.frame(number, number, i0, skip=skip)
            if pair is not None:
                pairs[number] = (pair.flags, pair.i0)
        else:
            gate, i0 = told[number]
            made = join.positions(
                np.array([number]), where([number]), 1, np.array([i0]), np.array([gate], np.uint64)
            )
            for pair in made:
                pairs[number] = (int(pair["flags"]), float(pair["i0"]))
    gated = [own[n][0] or told[n][0] == POSITION_GATE_SKIP for n in range(8)]
    assert {n: bool(flags & PAIR_FLAG_GATED) for n, (flags, _) in pairs.items()} == dict(
        enumerate(gated)
    )
    assert join.gated == sum(gated) and join.spared == 0 and join.positioned == 8
    for number, (_, reading) in pairs.items():
        said = {own[number][1], told[number][1]} - {0.0}
        assert reading in said if said else reading == 0.0


def test_a_gate_that_is_corrected_makes_a_revised_pair():
    join = Join(LIMITS)
    join.frame(3, 0)
    one, at = np.array([3]), where([3])
    open_, skip = (np.array([g], np.uint64) for g in (POSITION_GATE_OPEN, POSITION_GATE_SKIP))
    assert join.positions(one, at, 1)["flags"].tolist() == [0]
    again = join.positions(one, at, 2, gate=skip)
    assert (again["flags"][0], again["revision"][0]) == (PAIR_FLAG_GATED, 1)
    assert len(join.positions(one, at, 3)) == 0  # says nothing of gates: as it was
    assert join.gated == 1
    assert join.positions(one, at, 4, gate=open_)["flags"].tolist() == [0]
    assert join.positions(one, at, 5, np.array([2.5]))["i0"].tolist() == [2.5]
    assert join.gated == 0


def test_frames_that_need_no_position_are_told_apart_from_those_that_lack_one():
    join = Join(LIMITS)
    join.frame(0, 0, skip=True)
    join.frame(1, 1)
    join.dark_frame()
    assert (join.gated, join.dark, join.spared, join.positioned) == (1, 1, 2, 0)
    join.positions(np.array([0]), where([0]), 1)
    assert (join.spared, join.positioned) == (1, 1)
    frames = np.zeros(3, FRAME_RECORD)
    frames["number"], frames["slot"], frames["flags"] = [0, 1, 9], [0, 1, 2], [2, 0, 1]
    logs = np.zeros(0, POSITION_RECORD), np.zeros(0, PAIR_RECORD)
    again = Join(LIMITS)
    assert len(again.restore(frames, *logs)) == 0
    assert (again.gated, again.dark, again.spared) == (1, 1, 2)


def frame(number: int, gate: Gate = "open", i0: float | None = None, inline: bool = True) -> Frame:
    image = EncodedImage(pixels(1, number).tobytes(), "raw", "<u2", SHAPE)
    where = position(number) if inline else None
    return Frame("1", number, image, where, i0=i0, gate=gate)


class Bench:
    """A recorder without a daemon."""

    def __init__(self, folder: Path, view: dict[str, Any]) -> None:
        self.settings: Settings = DaemonHarness(folder, {"view": view}).settings
        self.root = folder / "data"

    def open(self, **metadata: Any) -> Recorder:
        start = ScanStart("", "1", None, SHAPE, "<u2", metadata=metadata)
        opening = OpenScan(new_scan_id(), start, "running", joined_late=False)
        return Recorder.create(self.root, opening, self.settings)

    def seal(self, recorder: Recorder) -> dict[str, int]:
        recorder.commit()
        recorder.finish_view()
        header = recorder.writer.seal("complete", recorder.final_counts({}))
        return dict(header.counts)


def background_of(recorder: Recorder, root: Path) -> np.ndarray | None:
    digest = recorder.header.view.background
    directory = root / "scans" / recorder.header.scan_id
    return None if digest is None else view_data(directory, digest)


def mean_of(numbers: range) -> np.ndarray:
    return np.mean([pixels(1, n) for n in numbers], axis=0)


def test_dark_frames_become_the_background_before_the_frame_that_follows_them(tmp_path):
    bench = Bench(tmp_path, {"background": "dark-frames"})
    recorder = bench.open()
    for number in range(3):
        recorder.store(frame(number, "dark"), 1, 1)
    assert recorder.header.view.background is None
    recorder.store(frame(3), 1, 1)
    np.testing.assert_allclose(background_of(recorder, bench.root), mean_of(range(3)))
    for number in (4, 5):  # not twice as many yet
        recorder.store(frame(number, "dark"), 1, 1)
        recorder.store(frame(10 + number), 1, 1)
    assert len(recorder.header.views) == 2
    counts = bench.seal(recorder)
    dark = np.mean([pixels(1, n) for n in (0, 1, 2, 4, 5)], axis=0)
    np.testing.assert_allclose(background_of(recorder, bench.root), dark)
    assert (counts["dark"], counts["gated"], counts["frames"]) == (5, 0, 8)
    with ScanReader.open(bench.root, recorder.header.scan_id) as reader:
        assert sorted(reader.pairs()["number"].tolist()) == [3, 14, 15]
        assert reader.records()["flags"].tolist() == [1, 1, 1, 0, 1, 0, 1, 0]


def test_dark_frames_are_only_kept_where_nobody_asks_for_a_background(tmp_path):
    bench = Bench(tmp_path, {})
    recorder = bench.open()
    recorder.store(frame(0, "dark"), 1, 1)
    recorder.store(frame(1), 1, 1)
    assert bench.seal(recorder)["dark"] == 1
    assert len(recorder.header.views) == 1 and recorder.header.view.background is None


def test_a_dark_series_is_the_background_of_the_scans_after_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    bench = Bench(tmp_path, {"background": "dark-frames"})
    dark = bench.open(dark=True)
    for number in range(4):
        dark.store(frame(number), 1, 1)  # whatever they say of themselves
    assert bench.seal(dark)["dark"] == 4
    with ScanReader.open(bench.root, dark.header.scan_id) as reader:
        assert reader.pair_count == 0
    for _ in range(2):  # also after a restart: it lies in the data directory
        after = bench.open()
        np.testing.assert_allclose(background_of(after, bench.root), mean_of(range(4)))
        after.store(frame(0), 1, 1)
        assert len(after.header.views) == 1
        bench.seal(after)
    assert "is the background of scans after it" in caplog.text


def test_a_dark_series_of_another_layout_is_not_used_and_the_log_says_so(tmp_path, caplog):
    bench = Bench(tmp_path, {"background": "dark-frames"})
    dark = bench.open(dark=True)
    dark.store(frame(0), 1, 1)
    bench.seal(dark)
    table = {"crop_yx_px": (32, 32)}
    cropped = bench.settings.model_copy(
        update={"detector": bench.settings.detector.model_copy(update=table)}
    )
    start = ScanStart("", "1", None, SHAPE, "<u2")
    opening = OpenScan(new_scan_id(), start, "running", joined_late=False)
    recorder = Recorder.create(bench.root, opening, cropped)
    assert recorder.header.view.background is None
    assert "is not used: record a new one" in caplog.text
    recorder.writer.close()
    (bench.root / "dark.npz").write_bytes(b"damaged")
    after = bench.open()
    assert after.header.view.background is None and "cannot be read" in caplog.text
    after.writer.close()


def test_the_scale_is_set_by_the_first_readings_and_corrected_by_all(tmp_path):
    bench = Bench(tmp_path, {})
    recorder = bench.open()
    for number in range(31):
        recorder.store(frame(number, i0=2.0), 1, 1)
    recorder.commit()
    assert recorder.header.view.i0_reference is None
    recorder.store(frame(31, i0=2.0), 1, 1)
    recorder.commit()
    assert recorder.header.view.i0_reference == 2.0
    numbers = np.arange(32, 132)
    for number in numbers.tolist():
        recorder.store(frame(number, inline=False), 1, 1)
    told = Positions("e", "1", numbers, where(numbers.tolist()), np.full(100, 3.0))
    recorder.add_positions(told)
    bench.seal(recorder)
    assert [view.i0_reference for view in recorder.header.views] == [None, 2.0, 3.0]
    with ScanReader.open(bench.root, recorder.header.scan_id) as reader:
        i0 = dict(
            zip(reader.pairs()["number"].tolist(), reader.pairs()["i0"].tolist(), strict=True)
        )
        assert i0 == {n: 2.0 if n < 32 else 3.0 for n in range(132)}
        assert set(reader.positions()["i0"].tolist()) == {0.0, 3.0}


@pytest.mark.parametrize("i0", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_readings_that_are_none_scale_nothing(tmp_path, i0):
    bench = Bench(tmp_path, {})
    recorder = bench.open()
    for number in range(40):
        recorder.store(frame(number, i0=i0), 1, 1)
    bench.seal(recorder)
    assert recorder.header.view.i0_reference == (1e300 if i0 == 1e300 else None)


def test_readings_are_kept_and_not_used_where_the_settings_say_so(tmp_path):
    bench = Bench(tmp_path, {"use_i0": False})
    recorder = bench.open()
    for number in range(40):
        recorder.store(frame(number, i0=2.0), 1, 1)
    bench.seal(recorder)
    assert recorder.header.view.i0_reference is None


@pytest.fixture
def crashed(tmp_path: Path) -> Iterator[tuple[Bench, Recorder]]:
    """A scan with dark, gated and other frames, taken over after a crash."""
    bench = Bench(tmp_path, {"background": "dark-frames"})
    recorder = bench.open()
    for number in range(3):
        recorder.store(frame(number, "dark"), 1, 1)
    recorder.store(frame(3, i0=2.0, inline=False), 1, 1)
    recorder.store(frame(4, "skip", inline=False), 1, 1)
    recorder.store(frame(5, "skip"), 1, 1)
    skip = np.array([True])
    recorder.add_positions(Positions("e", "1", np.array([9]), where([9]), None, skip))
    recorder.commit()
    copy = crashed_copy(bench.root, tmp_path / "copy")
    recorder.writer.close()
    writer, _ = ScanWriter.recover(copy, recorder.header.scan_id)
    bench.root = copy
    with writer:
        yield bench, Recorder.resume(copy, writer, bench.settings)


def test_after_a_crash_a_scan_knows_what_it_knew(crashed):
    bench, again = crashed
    assert (again.join.dark, again.join.gated, again.join.spared) == (3, 2, 4)
    again.add_positions(Positions("e", "1", np.array([3]), where([3])))
    again.store(frame(9, inline=False), 1, 1)
    again.store(frame(10, "dark"), 1, 1)
    counts = bench.seal(again)
    assert (counts["dark"], counts["gated"], counts["frames"]) == (4, 3, 8)
    with ScanReader.open(bench.root, again.header.scan_id) as reader:
        pairs = {int(p["number"]): (int(p["flags"]), float(p["i0"])) for p in reader.pairs()}
    assert pairs == {5: (PAIR_FLAG_GATED, 0.0), 3: (0, 2.0), 9: (PAIR_FLAG_GATED, 0.0)}
    dark = np.mean([pixels(1, n) for n in (0, 1, 2, 10)], axis=0)
    np.testing.assert_allclose(background_of(again, bench.root), dark)


def test_files_that_cannot_be_used_are_logged_and_the_scan_is_recorded(tmp_path, caplog):
    np.save(tmp_path / "flat.npy", np.ones((3, 3)))
    np.save(tmp_path / "bad.npy", np.eye(*SHAPE))
    bench = Bench(
        tmp_path,
        {
            "flat_field_path": "flat.npy",
            "background_path": "missing.npy",
            "bad_pixels_path": "bad.npy",
        },
    )
    recorder = bench.open()
    recorder.store(frame(0), 1, 1)
    bench.seal(recorder)
    view = recorder.header.view
    assert (view.flat_field, view.background) == (None, None) and view.bad_pixels is not None
    assert "without view.flat_field" in caplog.text and "3 x 3 where" in caplog.text
    assert "without view.background" in caplog.text and "there is no file" in caplog.text


def test_a_change_of_the_settings_files_makes_another_view(tmp_path):
    np.save(tmp_path / "bad.npy", np.eye(*SHAPE))
    bench = Bench(tmp_path, {})
    recorder = bench.open()
    recorder.store(frame(0), 1, 1)
    assert not recorder.change_view(bench.settings)
    view = bench.settings.view.model_copy(update={"bad_pixels_path": tmp_path / "bad.npy"})
    changed = bench.settings.model_copy(update={"view": view})
    assert recorder.change_view(changed) and not recorder.change_view(changed)
    assert recorder.header.view.version == 2 and recorder.header.view.bad_pixels is not None
    added = recorder.request_view({"bad_pixels_yx": [[0, 5]]})
    mask = view_data(bench.root / "scans" / recorder.header.scan_id, str(added.bad_pixels))
    assert mask[0, 5] and mask[0, 0] and mask.sum() == SHAPE[0] + 1
    assert recorder.request_view({"bad_pixels": "none"}).bad_pixels is None
    recorder.writer.close()
