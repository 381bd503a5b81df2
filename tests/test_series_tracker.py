"""Where a series begins in a stream that does not say so: numbers, names and silences."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.messages import EncodedImage, Frame, Message, ScanEnd, ScanStart, Undecodable
from ptycho_stream.wire.message_numbers import MAX_GAP, MessageNumbers
from ptycho_stream.wire.series_tracker import SeriesTracker

IMAGE = EncodedImage(b"", "raw", "<u2", (4, 6))


class Clock:
    """Seconds that a test sets."""

    now_s = 100.0

    def __call__(self) -> int:
        return int(self.now_s * 1e9)


def words(messages: list[Message]) -> list[str]:
    """``start run``, ``end run`` and the frames' numbers."""
    out = []
    for message in messages:
        match message:
            case ScanStart():
                out.append(f"start {message.series}")
            case ScanEnd():
                out.append(f"end {message.series}")
            case Frame():
                out.append(str(message.number))
            case _:
                out.append(type(message).__name__)
    return out


def told(tracker: SeriesTracker, numbers, series: str = "run") -> list[str]:
    out: list[str] = []
    for number in numbers:
        out += words(tracker.take(Frame(series, number, IMAGE)))
    return out


def test_the_first_frame_begins_a_series_of_its_shape_and_type():
    start, frame = SeriesTracker("psi").take(Frame("run", 0, IMAGE))
    assert start == ScanStart("psi", "run", None, (4, 6), "<u2")
    assert frame == Frame("run", 0, IMAGE)


def test_a_stream_joined_in_the_middle_has_no_start_as_it_may_go_on_with_a_recovered_scan():
    assert told(SeriesTracker("psi"), [7, 8]) == ["7", "8"]


def test_numbers_that_start_again_are_a_new_series_and_no_frame_is_lost():
    tracker = SeriesTracker("psi")
    assert told(tracker, [0, 1, 2, 3]) == ["start run", "0", "1", "2", "3"]
    assert told(tracker, [0, 1]) == []  # may be doubled ones
    assert told(tracker, [2]) == ["end run", "start run", "0", "1", "2"]
    assert told(tracker, [3, 4]) == ["3", "4"]


def test_they_do_so_when_the_first_ones_are_lost():
    tracker = SeriesTracker("psi")
    told(tracker, range(20))
    assert told(tracker, [2, 3, 5]) == ["end run", "start run", "2", "3", "5"]


def test_they_do_so_where_the_series_before_has_holes():
    tracker = SeriesTracker("psi")
    told(tracker, [0, 1, 3, 4, 6, 7])
    assert told(tracker, [0, 1, 2]) == ["end run", "start run", "0", "1", "2"]
    assert told(tracker, [3, 4, 5, 6, 7, 8]) == ["3", "4", "5", "6", "7", "8"]


def test_a_doubled_frame_and_one_that_fills_a_hole_are_no_new_series():
    tracker = SeriesTracker("psi")
    told(tracker, [0, 1, 3, 4, 5])
    assert told(tracker, [1, 2]) == []
    assert told(tracker, [6, 2]) == ["1", "2", "6"]
    assert told(tracker, [7]) == ["2", "7"]


def test_doubled_frames_are_no_new_series():
    tracker = SeriesTracker("psi")
    told(tracker, range(10))
    assert told(tracker, [9]) == ["9"]
    assert told(tracker, [4, 5, 10, 10, 11]) == ["4", "5", "10", "10", "11"]
    assert told(tracker, [5, 4, 3, 12]) == ["5", "4", "3", "12"]


def test_late_frames_are_no_new_series():
    tracker = SeriesTracker("psi")
    assert told(tracker, [0, 3, 1, 2, 5, 4]) == ["start run", "0", "3", "1", "2", "5", "4"]


def test_a_number_far_back_is_a_new_series_at_once():
    tracker = SeriesTracker("psi")
    told(tracker, range(3000))
    assert told(tracker, [0]) == ["end run", "start run", "0"]


def test_another_name_is_a_new_series_and_late_frames_of_the_former_keep_theirs():
    tracker = SeriesTracker("odin")
    told(tracker, [0, 1], "a")
    assert told(tracker, [0], "b") == ["end a", "start b", "0"]
    (late,) = tracker.take(Frame("a", 2, IMAGE))
    assert isinstance(late, Frame) and late.series == "a"
    assert told(tracker, [1], "b") == ["1"]
    assert told(tracker, [0], "a") == ["end b", "start a", "0"]


def test_after_a_silence_the_first_number_that_came_before_is_a_new_series():
    clock = Clock()
    tracker = SeriesTracker("psi", silence_ns=10_000_000_000, clock=clock)
    told(tracker, range(5))
    clock.now_s += 11
    assert told(tracker, [0]) == ["end run", "start run", "0"]
    clock.now_s += 11
    assert told(tracker, [1]) == ["1"]  # the same one, after a pause: whoever records it decides


def test_numbers_count_from_the_first_one():
    tracker = SeriesTracker("pva", first_number=1)
    assert told(tracker, [1, 2, 4]) == ["start run", "0", "1", "3"]
    (refused,) = tracker.take(Frame("run", 0, IMAGE))
    assert isinstance(refused, Undecodable) and "first_number" in refused.detail


def test_a_counter_that_never_starts_again_counts_from_what_comes_first():
    clock = Clock()
    tracker = SeriesTracker("psi", "any", 10_000_000_000, clock)
    assert told(tracker, [700, 701, 703]) == ["start run", "0", "1", "3"]
    clock.now_s += 11
    assert told(tracker, [704, 705]) == ["end run", "start run", "0", "1"]
    assert told(tracker, [40]) == ["end run", "start run", "0"]


def test_a_series_that_is_started_and_ended_from_outside():
    tracker = SeriesTracker("pva", first_number=1)
    assert words(tracker.start("run")) == ["start run"]
    assert told(tracker, [1, 2]) == ["0", "1"]
    assert words(tracker.end()) == ["end run"]
    assert told(tracker, [3]) == ["2"]  # late, of the one that was ended
    assert words(tracker.start("run")) == ["start run"]
    assert told(tracker, [1]) == ["0"]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5000)), max_size=200))
@settings(max_examples=60, deadline=None)
def test_whatever_comes_no_frame_appears_that_did_not_come(sent):
    tracker = SeriesTracker("psi")
    came = [m for name, n in sent for m in tracker.take(Frame(name, n, IMAGE))] + tracker.end()
    frames = [(m.series, m.number) for m in came if isinstance(m, Frame)]
    assert sorted(frames) == sorted(sent)
    open_series = None
    for message in came:
        if isinstance(message, ScanStart):
            assert open_series is None
            open_series = message.series
        elif isinstance(message, ScanEnd):
            open_series = None


def test_lost_messages_are_counted_once_they_cannot_come_any_more():
    numbers = MessageNumbers()
    assert [numbers.take(n) for n in (5, 6, 9, 7)] == [0, 0, 0, 0]
    assert sum(numbers.take(n) for n in range(10, 90)) == 1  # 8
    assert numbers.take(92) == 0
    assert numbers.settle() == 2
    assert numbers.take(92 + MAX_GAP + 10) == 0  # counts anew
    assert numbers.begin(0) == 0
    assert numbers.take(1) == 0
