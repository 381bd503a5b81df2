"""The life of scans, written as lists of events and the instructions that follow."""

from __future__ import annotations

import tracemalloc
from itertools import count
from typing import Any

import numpy as np
import pytest

from ptycho_stream.messages import Positions, PositionsStart, ScanStart, Undecodable
from ptycho_stream.scans import scan_events as ev
from ptycho_stream.scans.epochs import MAX_EPOCHS, MAX_TOLD, EpochBook
from ptycho_stream.scans.frame_ledger import FrameLedger
from ptycho_stream.scans.state_machine import SUPERSEDED, ScanRules, ScanStateMachine

S = 1_000_000_000
SHAPE = (8, 8)


class Machine:
    """A machine with scan ids A, B, C ... and a clock that the test turns."""

    def __init__(self, **rules: Any) -> None:
        defaults = {
            "wait_ns": 10 * S,
            "match_window_ns": 60 * S,
            "resume_ns": 30 * S,
            "silence_ns": 60 * S,
            "positions_stream": True,
        }
        names = (chr(ord("A") + n) for n in count())
        self.machine = ScanStateMachine(ScanRules(**{**defaults, **rules}), lambda: next(names))
        self.now_ns = 0
        self.positioned: dict[str, int] = {}

    def later(self, seconds: float) -> list[ev.Instruction]:
        self.now_ns += int(seconds * S)
        return self.feed(ev.Tick(self.now_ns))

    def feed(self, event: ev.Event) -> list[ev.Instruction]:
        return [i for i in self.machine.handle(event) if not isinstance(i, ev.Say)]

    def start(self, series: str = "1", expected: int | None = None, **fields: Any) -> list[Any]:
        fields = {"frame_shape_yx": SHAPE, "dtype": "<u2", **fields}
        return self.feed(ev.SeriesStarted(self.now_ns, ScanStart("d", series, expected, **fields)))

    def frame(self, number: int, series: str = "1", shape: Any = SHAPE, dtype: str = "<u2") -> Any:
        return self.feed(ev.FrameArrived(self.now_ns, series, number, shape, dtype))

    def frames(self, numbers: range, series: str = "1") -> None:
        for number in numbers:
            self.frame(number, series)

    def end(self, series: str = "1") -> list[Any]:
        return self.feed(ev.SeriesEnded(self.now_ns, series))

    def positions(self, epoch: str, numbers: range, series: str | None = None) -> list[Any]:
        return self.feed(ev.PositionsArrived(self.now_ns, positions(epoch, numbers, series)))

    def positioned_frames(self, scan_id: str, frames: int) -> list[Any]:
        return self.feed(ev.FramesPositioned(self.now_ns, scan_id, frames))

    def recovered(self, scan_id: str = "R", state: Any = "running", **fields: Any) -> list[Any]:
        values = {"numbers": np.arange(5, dtype=np.uint64), "positioned": 0, "epoch": None}
        values |= {"reason": "", **fields}
        start = ScanStart("d", "1", 10, SHAPE, "<u2")
        return self.feed(ev.ScanRecovered(self.now_ns, scan_id, state, start, **values))


def positions(epoch: str, numbers: range, series: str | None = None) -> Positions:
    return Positions(epoch, series, np.array(numbers, np.int64), np.zeros((len(numbers), 2)))


def kinds(instructions: list[ev.Instruction]) -> list[str]:
    return [type(i).__name__ for i in instructions]


def sealed(instructions: list[ev.Instruction]) -> ev.SealScan:
    (seal,) = [i for i in instructions if isinstance(i, ev.SealScan)]
    return seal


@pytest.fixture
def m() -> Machine:
    return Machine()


# ---- a scan that goes well ---------------------------------------------------------------------


def test_a_message_of_no_series_counts_for_the_scan_that_is_armed():
    m = Machine()
    m.start()
    m.feed(ev.MessageUndecodable(0, Undecodable("malformed", "")))
    m.frame(0)
    m.positioned_frames("A", 1)
    assert sealed(m.end()).counts["malformed"] == 1


def test_a_scan_is_opened_by_its_header_and_complete_when_every_frame_has_a_position(m: Machine):
    (opening,) = m.start(expected=3)
    assert (opening.scan_id, opening.state, opening.joined_late) == ("A", "armed", False)
    assert m.frame(0) == [ev.SetState("A", "running"), ev.StoreFrame("A")]
    assert m.frame(1) == [ev.StoreFrame("A")]
    assert m.frame(2) == [ev.StoreFrame("A")]
    assert kinds(m.positions("e", range(3), "1")) == ["BindEpoch", "StorePositions"]
    assert m.positioned_frames("A", 2) == []
    assert m.end() == [ev.SetState("A", "draining")]
    seal = sealed(m.positioned_frames("A", 3))
    assert (seal.state, seal.reason) == ("complete", "")
    assert seal.counts["frames"] == 3
    assert seal.counts["missing"] == seal.counts["unpositioned"] == 0
    assert not m.machine.open_scans


def test_a_scan_whose_positions_were_there_first_is_complete_at_its_end(m: Machine):
    m.start()
    m.frames(range(3))
    m.positions("e", range(3), "1")
    m.positioned_frames("A", 3)
    assert sealed(m.end()).state == "complete"


def test_without_a_position_stream_a_scan_is_sealed_at_its_end():
    m = Machine(positions_stream=False)
    m.start()
    m.frames(range(3))
    m.positioned_frames("A", 2)
    assert sealed(m.end()).counts["unpositioned"] == 1


def test_a_header_without_shape_is_opened_by_the_first_frame(m: Machine):
    assert m.start(frame_shape_yx=None, dtype=None) == []
    opening, state, store = m.frame(0)
    assert isinstance(opening, ev.OpenScan)
    assert opening.start.frame_shape_yx == SHAPE
    assert (state, store) == (ev.SetState("A", "running"), ev.StoreFrame("A"))


def test_a_header_that_announces_other_frames_is_corrected_by_the_first_one(m: Machine):
    m.start(dtype="<u4")
    m.positions("e", range(3), "1")
    opening, bound, state, store = m.frame(0)
    assert bound == ev.BindEpoch("B", "e")
    assert (opening.scan_id, opening.replaces, opening.start.dtype) == ("B", "A", "<u2")
    assert (state, store) == (ev.SetState("B", "running"), ev.StoreFrame("B"))
    assert m.positions("e", range(3, 4), "1")[0].scan_id == "B"


def test_an_odd_first_frame_that_does_not_decode_leaves_the_scan_to_the_good_ones(m: Machine):
    m.start()
    assert m.frame(0, shape=(8, 7))[0].replaces == "A"
    assert m.feed(ev.FrameLost(0, "B", 0, "undecodable")) == [ev.SetState("B", "armed")]
    out = m.frame(1)
    assert kinds(out) == ["OpenScan", "SetState", "StoreFrame"]
    assert (out[0].start.frame_shape_yx, out[0].replaces) == (SHAPE, "B")
    assert m.frame(2) == [ev.StoreFrame("C")]
    assert m.frame(3, shape=(8, 7)) == [ev.DropFrame("wrong_shape")]


def test_a_good_shape_with_a_damaged_first_blob_keeps_its_layout(m: Machine):
    m.start()
    m.frame(0)
    m.feed(ev.FrameLost(0, "A", 0, "undecodable"))
    assert m.frame(1) == [ev.SetState("A", "running"), ev.StoreFrame("A")]


def test_frames_of_ever_new_shapes_do_not_make_ever_new_scans(m: Machine):
    m.start()
    opened = 0
    for n in range(50):
        out = m.frame(n, shape=(8, 9 + n))
        opened += kinds(out).count("OpenScan")
        for store in out:
            if isinstance(store, ev.StoreFrame):
                m.feed(ev.FrameLost(0, store.scan_id, n, "undecodable"))
    assert opened < 20
    assert kinds(m.frame(50))[-1] == "StoreFrame"
    assert m.frame(51) == [m.frame(52)[-1]]


def test_an_epoch_follows_a_scan_that_is_laid_out_anew(m: Machine):
    m.start()
    m.positions("e", range(2), "1")
    assert ev.BindEpoch("B", "e") in m.frame(0, shape=(8, 7))
    assert kinds(m.positions("e", range(2, 4))) == ["StorePositions"]


def test_two_spellings_of_a_dtype_are_the_same(m: Machine):
    m.start(dtype="uint16")
    assert kinds(m.frame(0)) == ["SetState", "StoreFrame"]
    assert kinds(m.frame(1)) == ["StoreFrame"]


# ---- frames that are not as they should be -----------------------------------------------------


def test_duplicates_disorder_and_holes_are_counted_and_never_shift_a_frame(m: Machine):
    m.start(expected=6)
    m.frame(0)
    m.frame(3)
    assert m.frame(1) == [ev.StoreFrame("A", out_of_order=True)]
    assert m.frame(3) == [ev.DropFrame("duplicate")]
    m.positioned_frames("A", 3)
    counts = sealed(m.end()).counts
    assert (counts["frames"], counts["duplicate"], counts["out_of_order"]) == (3, 1, 1)
    assert counts["missing"] == 3  # 2, 4, 5


def test_a_frame_of_another_shape_or_dtype_is_dropped_and_counted(m: Machine):
    m.start()
    m.frame(0)
    assert m.frame(1, shape=(8, 9)) == [ev.DropFrame("wrong_shape")]
    assert m.frame(1, dtype="<u4") == [ev.DropFrame("wrong_shape")]
    assert m.frame(1) == [ev.StoreFrame("A")]
    m.positioned_frames("A", 2)
    assert sealed(m.end()).counts["wrong_shape"] == 2


def test_a_frame_that_does_not_decode_is_a_hole_and_may_come_again(m: Machine):
    m.start()
    m.frames(range(3))
    m.feed(ev.FrameLost(0, "A", 1, "undecodable"))
    m.feed(ev.MessageUndecodable(0, Undecodable("malformed", "")))
    m.positioned_frames("A", 2)
    counts = sealed(m.end()).counts
    assert (counts["frames"], counts["missing"], counts["undecodable"]) == (2, 1, 1)
    assert counts["malformed"] == 1


def test_a_series_without_header_is_joined_late_and_says_so(m: Machine):
    opening, *rest = m.frame(7, "9")
    assert opening.joined_late
    assert kinds(rest) == ["SetState", "StoreFrame"]
    m.positioned_frames("A", 1)
    assert sealed(m.end("9")).counts["missing"] == 7


def test_an_end_without_a_scan_is_nothing(m: Machine):
    assert m.end("5") == []


# ---- several scans -----------------------------------------------------------------------------


def test_a_start_without_an_end_before_it_interrupts_the_former_scan(m: Machine):
    m.start("1")
    m.frames(range(3))
    out = m.start("2")
    assert out[0] == ev.SetState("A", "draining", SUPERSEDED)
    assert out[1].scan_id == "B"
    m.frame(0, "2")
    seal = sealed(m.positioned_frames("A", 3))
    assert (seal.scan_id, seal.state, seal.reason) == ("A", "interrupted", SUPERSEDED)
    assert list(m.machine.open_scans) == ["B"]


def test_a_series_number_that_starts_again_is_another_scan(m: Machine):
    m.start("1")
    m.frames(range(3))
    m.end()
    m.start("1")
    assert m.frame(0) == [ev.SetState("B", "running"), ev.StoreFrame("B")]
    assert m.frame(1) == [ev.StoreFrame("B")]


def test_an_armed_scan_without_frames_is_aborted_by_the_next_start(m: Machine):
    m.start("1")
    out = m.start("1")
    assert (sealed(out).scan_id, sealed(out).state) == ("A", "aborted")
    assert kinds(m.end()) == ["SealScan"]


def test_late_frames_go_to_a_draining_scan_and_are_dropped_after_it(m: Machine):
    m.start()
    m.frames(range(3))
    m.end()
    assert m.frame(3) == [ev.StoreFrame("A")]
    m.positioned_frames("A", 4)
    assert m.frame(4) == [ev.DropFrame("closed")]


# ---- positions ---------------------------------------------------------------------------------


def test_positions_before_their_scan_wait_for_it(m: Machine):
    m.feed(ev.EpochStarted(0, PositionsStart("e", "1")))
    assert m.positions("e", range(2), "1") == []
    assert m.positions("e", range(2, 4), "1") == []
    out = m.start("1")
    assert kinds(out) == ["OpenScan", "BindEpoch", "StorePositions", "StorePositions"]


def test_positions_of_another_series_wait_although_a_scan_is_open(m: Machine):
    m.start("1")
    assert m.positions("e", range(2), "2") == []
    assert kinds(m.start("2"))[-2:] == ["BindEpoch", "StorePositions"]


def test_an_epoch_without_a_series_belongs_to_the_scan_armed_nearest(m: Machine):
    m.start("1")
    m.frame(0)
    m.later(20)
    m.start("2")
    m.now_ns += 2 * S
    assert m.positions("e", range(2))[0] == ev.BindEpoch("B", "e")


def test_an_epoch_without_a_series_and_a_scan_near_it_belongs_to_none():
    m = Machine(silence_ns=1000 * S)
    m.start("1")
    m.frame(0)
    m.later(61)
    assert m.positions("e", range(2)) == []
    assert m.later(61) == [ev.DropPositions("e", 2)]
    assert m.positions("e", range(2, 5)) == [ev.DropPositions("e", 3)]


def test_an_epoch_stays_with_its_scan_and_a_scan_takes_one_epoch(m: Machine):
    m.start("1")
    m.frame(0)
    m.positions("e1", range(1), "1")
    assert m.positions("e2", range(1), "1") == []
    m.end()
    seal = sealed(m.positioned_frames("A", 1))
    assert seal.state == "complete"
    assert m.positions("e1", range(3), "1") == [ev.DropPositions("e1", 3)]
    assert ev.BindEpoch("B", "e2") in m.start("1")


def test_late_positions_of_an_aborted_scan_do_not_reach_the_next_of_its_series(m: Machine):
    m.start("1")
    m.frames(range(3))
    m.feed(ev.AbortRequested(m.now_ns))
    m.positions("late", range(3), "1")
    assert kinds(m.start("1")) == ["OpenScan"]
    m.frame(0)
    assert m.positions("own", range(1), "1")[0] == ev.BindEpoch("B", "own")
    assert m.positions("late", range(3), "1")[-1] == ev.DropPositions("late", 3)


def test_positions_sent_ahead_after_an_aborted_scan_are_found_at_the_end(m: Machine):
    m.start("1")
    m.frames(range(3))
    m.feed(ev.AbortRequested(m.now_ns))
    m.positions("ahead", range(2), "1")
    m.start("1")
    m.frames(range(2))
    assert kinds(m.end()) == ["SetState", "BindEpoch", "StorePositions"]
    assert sealed(m.positioned_frames("B", 2)).state == "complete"


def test_a_scan_without_positions_is_unmatched_after_its_wait(m: Machine):
    m.start()
    m.frames(range(3))
    m.end()
    assert m.later(9.9) == []
    seal = sealed(m.later(0.2))
    assert (seal.state, seal.counts["unpositioned"]) == ("unmatched", 3)


def test_a_scan_with_some_positions_is_complete_after_its_wait(m: Machine):
    m.start()
    m.frames(range(3))
    m.positioned_frames("A", 2)
    m.end()
    seal = sealed(m.later(10))
    assert (seal.state, seal.counts["unpositioned"]) == ("complete", 1)


def test_an_epoch_that_is_over_ends_the_wait(m: Machine):
    m.start()
    m.frames(range(3))
    m.positions("e", range(2), "1")
    m.positioned_frames("A", 2)
    m.end()
    assert sealed(m.feed(ev.EpochEnded(m.now_ns, "e"))).counts["unpositioned"] == 1


def test_positions_of_a_series_that_does_not_come_are_not_kept_for_a_later_one(m: Machine):
    m.positions("stale", range(4), "1")
    assert m.later(59) == []
    assert m.later(2) == [ev.DropPositions("stale", 4)]
    assert kinds(m.start("1")) == ["OpenScan"]
    assert m.positions("stale", range(4, 6), "1") == [ev.DropPositions("stale", 2)]
    assert m.positions("own", range(4), "1")[0] == ev.BindEpoch("A", "own")


def test_an_epoch_that_still_sends_is_not_stale(m: Machine):
    for n in range(5):
        m.positions("e", range(n, n + 1), "1")
        assert m.later(40) == []
    assert kinds(m.start("1"))[:2] == ["OpenScan", "BindEpoch"]


def test_an_epoch_that_a_scan_holds_outlives_any_number_of_others(m: Machine):
    m.start("1")
    m.frame(0)
    m.positions("own", range(1), "1")
    dropped = [i for n in range(MAX_EPOCHS + 1) for i in m.positions(f"e{n}", range(3), f"s{n}")]
    assert dropped == [ev.DropPositions("e0", 3), ev.DropPositions("e1", 3)]
    assert kinds(m.positions("own", range(1, 2))) == ["StorePositions"]
    assert m.end() == [ev.SetState("A", "draining")]
    assert sealed(m.positioned_frames("A", 1)).state == "complete"


def test_positions_that_no_scan_wants_are_held_within_a_bound():
    book = EpochBook(S, max_held=10)
    first = book.begin("first", "1", 0)
    assert book.hold(first, positions("first", range(8))) == []
    second = book.begin("second", "2", 0)
    assert book.hold(second, positions("second", range(8))) == [("first", 8)]


# ---- positions that are measured ---------------------------------------------------------------


@pytest.fixture
def measured() -> Machine:
    return Machine(positions_measured=True)


def epoch_started(m: Machine, epoch: str, series: str | None = None, **fields: Any) -> list[Any]:
    return m.feed(ev.EpochStarted(m.now_ns, PositionsStart(epoch, series, **fields)))


def test_batches_without_positions_are_not_held_and_match_nothing(measured: Machine):
    """Each would take memory, and none would count for the bound of what is held."""
    m = measured
    epoch_started(m, "p")
    for _ in range(3):
        assert m.positions("p", range(0)) == []
    held = m.machine._epochs["p"].held
    assert held == []
    m.start("1")
    m.frames(range(3))
    assert kinds(m.positions("p", range(3))) == ["BindEpoch", "StorePositions"]


def test_an_epoch_armed_ahead_of_its_scan_is_not_taken_by_one_that_had_none(measured: Machine):
    """Of the first scan all positions were lost, and the next one's positioner is armed first."""
    m = measured
    m.start("1")
    m.frames(range(3))
    m.end()
    m.later(2)
    assert epoch_started(m, "next") == []
    m.later(1)
    assert kinds(m.start("2")) == ["OpenScan"]
    m.frame(0, "2")
    assert kinds(m.positions("next", range(2))) == ["BindEpoch", "StorePositions"]
    assert m.machine.open_scans["B"].epoch == "next"
    assert sealed(m.later(10)).state == "unmatched"


def test_measured_positions_may_come_long_after_both_were_armed(measured: Machine):
    m = measured
    epoch_started(m, "e")
    m.later(10)
    m.start("1")
    m.later(500)
    m.frame(0)
    assert m.positions("e", range(1))[0] == ev.BindEpoch("A", "e")


def test_measured_positions_whose_start_and_whose_scan_come_late_are_found(measured: Machine):
    m = measured
    m.positions("e", range(3))
    assert kinds(m.start("1")) == ["OpenScan"]
    assert kinds(m.frame(0)) == ["SetState", "BindEpoch", "StorePositions", "StoreFrame"]
    m.frames(range(1, 3))
    m.positioned_frames("A", 3)
    m.end()
    m.start("2")
    m.frames(range(3), "2")
    m.end("2")
    epoch_started(m, "f")
    assert kinds(m.positions("f", range(3))) == ["BindEpoch", "StorePositions"]


def test_an_armed_epoch_that_sends_nothing_does_not_keep_a_scan_from_its_own(measured: Machine):
    m = measured
    epoch_started(m, "trial")
    m.feed(ev.EpochEnded(m.now_ns, "trial"))
    m.start("1")
    epoch_started(m, "own")
    m.frame(0)
    assert m.positions("own", range(1))[0] == ev.BindEpoch("A", "own")


def test_a_run_that_was_over_before_the_first_frame_is_not_taken_for_the_scans(measured: Machine):
    """An alignment, between the detector's arming and the scan, or before both."""
    m = measured
    m.positions("before", range(9))
    m.feed(ev.EpochEnded(m.now_ns, "before"))
    m.later(3)
    m.start("1")
    assert m.positions("between", range(9)) == []
    m.feed(ev.EpochEnded(m.now_ns, "between"))
    m.later(3)
    assert kinds(m.frame(0)) == ["SetState", "StoreFrame"]
    assert m.positions("own", range(1))[0] == ev.BindEpoch("A", "own")


def test_frames_far_behind_their_positions_get_them_when_none_come_any_more(measured: Machine):
    m = measured
    m.positions("e", range(3))
    m.feed(ev.EpochEnded(m.now_ns, "e"))
    m.later(4)
    m.start("1")
    m.frames(range(3))
    assert kinds(m.end()) == ["SetState"]
    assert kinds(m.later(10)) == ["BindEpoch", "StorePositions"]
    assert sealed(m.positioned_frames("A", 3)).state == "complete"


def test_a_scan_whose_positions_are_lost_takes_none_that_were_over_long_before(measured: Machine):
    m = measured
    m.positions("alignment", range(3))
    m.feed(ev.EpochEnded(m.now_ns, "alignment"))
    m.later(30)
    m.start("1")
    m.frames(range(3))
    assert m.end() == [ev.SetState("A", "draining")]
    assert sealed(m.later(10)).state == "unmatched"


def test_positions_behind_their_frames_reach_the_scan_that_has_ended(measured: Machine):
    """Though the next positioner was armed meanwhile, whose scan has not come."""
    m = measured
    m.start("1")
    epoch_started(m, "own")
    m.frames(range(3))
    m.end()
    m.later(2)
    epoch_started(m, "next")
    m.later(1)
    assert m.positions("own", range(3))[0] == ev.BindEpoch("A", "own")
    assert sealed(m.positioned_frames("A", 3)).state == "complete"
    m.start("2")
    m.frame(0, "2")
    assert m.positions("next", range(1))[0] == ev.BindEpoch("B", "next")


def test_of_two_runs_that_were_over_a_scan_takes_the_one_nearer_to_its_frames(measured: Machine):
    m = measured
    for name in ("alignment", "own"):
        m.positions(name, range(3))
        m.feed(ev.EpochEnded(m.now_ns, name))
        m.later(3)
    m.start("1")
    m.frames(range(3))
    m.end()
    assert m.later(10)[0] == ev.BindEpoch("A", "own")


def test_an_alignment_is_not_taken_for_a_run_that_was_armed_and_lost(measured: Machine):
    m = measured
    m.positions("alignment", range(3))
    m.feed(ev.EpochEnded(m.now_ns, "alignment"))
    m.later(3)
    epoch_started(m, "lost")
    m.start("1")
    m.frames(range(3))
    m.end()
    assert sealed(m.later(10)).state == "unmatched"


def test_a_run_that_begins_long_after_the_first_frame_is_another_scans(measured: Machine):
    """Of a scan whose own was lost, within the time for matching but not for waiting."""
    m = measured
    m.start("1")
    m.frame(0)
    m.later(11)
    epoch_started(m, "later")
    assert m.positions("later", range(1)) == []
    m.end()
    seal = sealed(m.later(10))
    assert seal.state == "unmatched"
    assert "epoch later" in seal.reason and "armed 11.0 s after it" in seal.reason
    assert "positions.wait_s = 10" in seal.reason


def test_an_epoch_with_a_series_is_its_scans_from_the_start(measured: Machine):
    measured.start("1")
    assert epoch_started(measured, "e", "1") == [ev.BindEpoch("A", "e")]


def test_an_epoch_that_was_joined_belongs_to_the_scan_that_runs(measured: Machine):
    """However long ago that was armed: the daemon has lost sight of the positioner, not of it."""
    m = measured
    m.start("1")
    m.frame(0)
    for n in range(1, 5):
        m.later(50)
        m.frame(n)
    epoch_started(m, "joined", joined=True)
    assert m.positions("joined", range(1))[0] == ev.BindEpoch("A", "joined")


def test_one_that_was_not_joined_was_armed_too_late_for_it_and_the_scan_says_so(measured: Machine):
    m = measured
    m.start("1")
    m.frame(0)
    for n in range(1, 5):
        m.later(50)
        m.frame(n)
    epoch_started(m, "other")
    assert m.positions("other", range(1)) == []
    m.end()
    seal = sealed(m.later(11))
    assert seal.state == "unmatched"
    assert "epoch other" in seal.reason and "200.0 s after it" in seal.reason
    assert "positions.match_window_s = 60" in seal.reason


def test_an_epoch_armed_too_early_is_said_with_its_scan(measured: Machine):
    m = measured
    epoch_started(m, "early")
    m.later(100)
    m.start("1")
    m.frame(0)
    m.positions("early", range(1))
    assert m.later(1) == [ev.DropPositions("early", 1)]
    m.end()
    assert "100.0 s before it" in sealed(m.later(11)).reason


def test_a_joined_epoch_goes_on_with_the_scan_that_had_positions_before_a_restart(
    measured: Machine,
):
    m = measured
    m.recovered(epoch="panda 12:00")
    epoch_started(m, "joined", joined=True)
    out = m.positions("joined", range(5, 7))
    assert out[0] == ev.BindEpoch("R", "joined")
    assert kinds(out) == ["BindEpoch", "StorePositions"]
    m.frames(range(5, 7))
    m.positioned_frames("R", 7)
    assert sealed(m.end()).state == "complete"


def test_after_a_restart_a_joined_epoch_takes_no_scan_from_one_that_goes_on(measured: Machine):
    m = measured
    m.recovered(epoch="own")
    m.positions("own", range(5, 6))
    epoch_started(m, "joined", joined=True)
    assert m.positions("joined", range(2)) == []


def test_an_epoch_that_begins_after_a_restart_is_another_scans(measured: Machine):
    m = measured
    m.recovered(epoch="panda 12:00")
    epoch_started(m, "panda 12:30")
    assert m.positions("panda 12:30", range(2)) == []
    m.start("2")
    assert ev.BindEpoch("A", "panda 12:30") in m.frame(0, "2")


# ---- what an epoch says of itself --------------------------------------------------------------


def test_metadata_of_an_epoch_go_to_its_scan_whenever_they_come(m: Machine):
    epoch_started(m, "e", "1", metadata={"sample": "star", "energy": 1})
    _, bound = m.start("1", metadata={"energy": 2})
    assert bound == ev.BindEpoch("A", "e", {"sample": "star"})
    again = epoch_started(m, "e", metadata={"operator": "me"})
    assert again == [ev.BindEpoch("A", "e", {"operator": "me"})]
    assert epoch_started(m, "e") == []


def test_metadata_follow_a_scan_that_is_laid_out_anew(m: Machine):
    epoch_started(m, "e", "1", metadata={"sample": "star"})
    m.start("1")
    assert ev.BindEpoch("B", "e", {"sample": "star"}) in m.frame(0, shape=(8, 7))


def test_metadata_that_wait_for_scans_are_bounded():
    book = EpochBook(S)
    epochs = [book.begin(f"e{n}", None, 0) for n in range(MAX_TOLD + 1)]
    for epoch in epochs:
        book.tell(epoch, {"sample": epoch.name})
    assert book.told(epochs[0]) == {}
    assert book.told(epochs[-1]) == {"sample": f"e{MAX_TOLD}"}


def test_what_is_lost_of_an_epoch_is_counted_in_its_own_scan(m: Machine):
    m.start("1")
    m.frames(range(2))
    m.positions("e", range(2), "1")
    m.start("2")
    m.frame(0, "2")
    for epoch in ("e", "unheard of"):
        m.feed(ev.MessageUndecodable(m.now_ns, Undecodable("torn", "", epoch=epoch, count=3)))
    assert sealed(m.positioned_frames("A", 2)).counts["torn"] == 3


# ---- people ------------------------------------------------------------------------------------


def test_a_scan_armed_by_hand_lends_the_next_series_its_name_and_metadata(m: Machine):
    assert m.feed(ev.StartRequested(0, None, 7, {"sample": "x"})) == [ev.Accepted("A")]
    (opening,) = m.start(metadata={"sample": "y", "run": 1})
    assert opening.scan_id == "A"
    assert opening.start.expected_frames == 7
    assert opening.start.metadata == {"sample": "x", "run": 1}


def test_stop_ends_a_scan_and_drops_what_still_comes(m: Machine):
    m.start(expected=100)
    m.frames(range(3))
    assert m.feed(ev.StopRequested(0))[0] == ev.Accepted("A")
    assert m.frame(3) == [ev.DropFrame("closed")]
    seal = sealed(m.positioned_frames("A", 3))
    assert (seal.state, seal.counts["missing"]) == ("complete", 0)
    assert m.frame(4) == [ev.DropFrame("closed")]


def test_abort_seals_at_once_and_the_rest_of_the_series_is_no_new_scan(m: Machine):
    m.start()
    m.frames(range(3))
    assert sealed(m.feed(ev.AbortRequested(0, "A"))).state == "aborted"
    assert m.frame(3) == [ev.DropFrame("closed")]
    assert m.end() == []


def test_abort_without_an_id_is_of_the_running_scan_and_says_which(m: Machine):
    m.start("1")
    m.frames(range(3))
    m.end("1")
    (refusal,) = m.feed(ev.AbortRequested(0))
    assert refusal.code == "not_found"
    m.start("2")
    m.frame(0, "2")
    out = m.feed(ev.AbortRequested(0))
    assert (out[0], sealed(out).scan_id) == (ev.Accepted("B"), "B")
    out = m.feed(ev.AbortRequested(0, "A"))
    assert (out[0], sealed(out).scan_id) == (ev.Accepted("A"), "A")


def test_a_scan_armed_by_hand_is_given_up_by_abort(m: Machine):
    m.feed(ev.StartRequested(0))
    assert m.feed(ev.AbortRequested(0)) == [ev.Accepted("A")]
    assert m.start()[0].scan_id == "B"


@pytest.mark.parametrize("event", [ev.StopRequested(0), ev.AbortRequested(0, "X")])
def test_a_request_about_no_scan_is_refused(m: Machine, event: ev.Event):
    (refusal,) = m.feed(event)
    assert refusal.code == "not_found"


# ---- disks and restarts ------------------------------------------------------------------------


def test_a_scan_that_cannot_be_written_is_interrupted_and_the_rest_of_it_dropped(m: Machine):
    m.start()
    m.frames(range(3))
    seal = sealed(m.feed(ev.ScanFailed(0, "A", "the disk is full")))
    assert (seal.state, seal.reason) == ("interrupted", "the disk is full")
    assert m.frame(3) == [ev.DropFrame("disk_full")]


def test_new_scans_are_refused_without_room_and_joined_once_there_is_some(m: Machine):
    m.feed(ev.RoomChanged(0, has_room=False))
    assert m.start() == []
    assert m.frame(0) == [ev.DropFrame("disk_full")]
    assert m.machine.refusing
    m.feed(ev.RoomChanged(0, has_room=True))
    assert kinds(m.frame(1)) == ["OpenScan", "SetState", "StoreFrame"]


def test_a_recovered_scan_goes_on_and_what_was_in_flight_is_missing(m: Machine):
    m.recovered()
    assert m.frame(8) == [ev.StoreFrame("R")]
    m.positioned_frames("R", 6)
    assert sealed(m.end()).counts["missing"] == 4  # 5, 6, 7 and 9


def test_a_recovered_scan_whose_numbers_start_again_is_another_one(m: Machine):
    m.recovered()
    out = m.frame(0)
    assert sealed(out).scan_id == "R"
    assert sealed(out).state == "interrupted"
    assert kinds(out)[1:] == ["OpenScan", "SetState", "StoreFrame"]


def test_a_recovered_scan_whose_stream_stays_silent_is_interrupted(m: Machine):
    m.recovered()
    assert m.later(29) == []
    assert sealed(m.later(2)).state == "interrupted"


def test_a_recovered_scan_keeps_its_epoch(m: Machine):
    m.recovered(epoch="e")
    assert kinds(m.positions("e", range(5, 7))) == ["StorePositions"]


def test_a_recovered_draining_scan_still_waits_for_its_positions(m: Machine):
    m.recovered(state="draining", reason=SUPERSEDED)
    m.later(5)
    seal = sealed(m.positioned_frames("R", 5))
    assert (seal.state, seal.reason) == ("interrupted", SUPERSEDED)


def test_a_lost_end_message_is_made_up_for_when_all_frames_are_there(m: Machine):
    m.start(expected=3)
    m.frames(range(3))
    m.positioned_frames("A", 3)
    assert m.later(9) == []
    assert sealed(m.later(2)).state == "complete"


def test_a_scan_whose_stream_falls_silent_is_interrupted_and_later_frames_make_a_new_one(
    m: Machine,
):
    m.start(expected=10)
    m.frames(range(3))
    m.positions("e", range(3), "1")
    m.positioned_frames("A", 3)
    assert m.later(59) == []
    seal = sealed(m.later(2))
    assert (seal.state, seal.counts["missing"]) == ("interrupted", 0)
    assert "no frame came for 60 s" in seal.reason
    (opening, *_) = m.frame(3)
    assert (opening.scan_id, opening.joined_late) == ("B", True)


def test_a_silent_scan_that_was_joined_late_ends_too_and_one_that_is_armed_does_not(m: Machine):
    m.frame(7)
    m.later(61)
    assert sealed(m.later(10)).state == "interrupted"
    m.start("2")
    assert m.later(1000) == []


def test_a_recovered_scan_that_had_fallen_silent_is_still_interrupted(m: Machine):
    m.start()
    m.frames(range(5))
    (ending,) = m.later(61)
    other = Machine()
    other.recovered(state="draining", reason=ending.reason)
    assert sealed(other.positioned_frames("R", 5)).state == "interrupted"


def test_a_stop_of_the_daemon_seals_everything(m: Machine):
    m.start("1")
    m.frames(range(3))
    m.start("2")
    seals = {i.scan_id: i.state for i in m.feed(ev.Shutdown(0)) if isinstance(i, ev.SealScan)}
    assert seals == {"A": "interrupted", "B": "aborted"}


# ---- the ledger --------------------------------------------------------------------------------


def test_the_ledger_holds_wild_numbers_without_the_memory_in_between():
    ledger = FrameLedger()
    assert ledger.take(0)
    assert ledger.take(2**40)
    assert not ledger.take(0)
    assert 5 not in ledger
    assert ledger.missing() == 2**40 - 1


def test_many_wild_numbers_cost_the_ledger_little_memory():
    ledger = FrameLedger()
    tracemalloc.start()
    for n in range(10_000):
        ledger.take(n * 10_000)
    assert tracemalloc.get_traced_memory()[0] < 10_000_000
    tracemalloc.stop()
