"""The join of frames and positions: by absolute number, in whichever order they come."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.scans.join import Join, PositionLimits
from ptycho_stream.scans.records import (
    FRAME_RECORD,
    PAIR_FLAG_JUMP,
    PAIR_FLAG_OUT_OF_EXTENT,
    PAIR_RECORD,
    POSITION_RECORD,
)

LIMITS = PositionLimits(max_extent_m=1e-2, max_step_m=1e-3)


def where(numbers: list[int], shift_m: float = 0.0) -> np.ndarray:
    return np.array([[n * 1e-7 + shift_m, -n * 1e-7] for n in numbers]).reshape(-1, 2)


@settings(max_examples=200)
@given(
    frames=st.lists(st.integers(0, 60).map(lambda n: n * 700), unique=True),
    batches=st.lists(st.lists(st.integers(0, 60).map(lambda n: n * 700), max_size=8), max_size=12),
    data=st.data(),
)
def test_every_frame_with_a_position_is_paired_once_in_any_order(frames, batches, data):
    join = Join(LIMITS)
    steps = [("frame", n) for n in frames] + [("positions", b) for b in batches]
    slots: dict[int, int] = {}
    made: dict[int, tuple[int, float, float]] = {}
    for kind, value in data.draw(st.permutations(steps)):
        if kind == "frame":
            slots[value] = len(slots)
            pair = join.frame(value, slots[value])
            if pair:
                assert value not in made
                made[value] = (slots[value], pair.y_m, pair.x_m)
        else:
            for pair in join.positions(np.array(value, np.int64), where(value), 5):
                number = int(pair["number"])
                assert number not in made
                made[number] = (int(pair["slot"]), float(pair["y_m"]), float(pair["x_m"]))
    known = {n for batch in batches for n in batch}
    assert set(made) == set(frames) & known
    assert join.positioned == len(made)
    for number, (slot, y_m, x_m) in made.items():
        assert (slot, [y_m, x_m]) == (slots[number], where([number])[0].tolist())


def test_a_corrected_position_makes_a_pair_of_the_next_revision():
    join = Join(LIMITS)
    join.frame(3, 0)
    assert join.positions(np.array([3]), where([3]), 1)["revision"].tolist() == [0]
    assert not len(join.positions(np.array([3]), where([3]), 1))
    (pair,) = join.positions(np.array([3]), where([3], 1e-6), 2)
    assert (pair["revision"], pair["paired_monotonic_ns"]) == (1, 2)
    assert join.positioned == 1


def test_of_a_number_that_is_twice_in_a_batch_the_last_counts():
    join = Join(LIMITS)
    join.frame(3, 0)
    (pair,) = join.positions(np.array([3, 3]), np.array([[1e-6, 0], [2e-6, 0]]), 1)
    assert pair["y_m"] == 2e-6


def test_positions_that_are_no_numbers_are_as_if_never_sent():
    join = Join(LIMITS)
    for number in range(3):
        join.frame(number, number)
    bad = np.array([[np.nan, 0.0], [np.inf, 0.0], [0.0, 0.0]])
    assert join.positions(np.arange(3), bad, 1)["number"].tolist() == [2]
    assert join.invalid == 2
    assert join.frame_with_position(9, 3, np.nan, 0.0) is None
    assert join.invalid == 3


def test_an_outlier_is_flagged_and_its_successor_is_not():
    join = Join(LIMITS)
    for number in range(5):
        join.frame(number, number)
    positions = where(list(range(5)))
    positions[2] = (5e-3, 0.0)
    pairs = join.positions(np.arange(5), positions, 1)
    assert pairs["flags"].tolist() == [0, 0, PAIR_FLAG_JUMP, 0, 0]
    assert join.jumps == 1


def test_a_move_that_is_meant_is_flagged_once():
    join = Join(LIMITS)
    flags = [
        pair.flags
        for n in range(6)
        if (pair := join.frame_with_position(n, n, 0.0 if n < 3 else 5e-3, n * 1e-7))
    ]
    assert flags == [0, 0, 0, PAIR_FLAG_JUMP, 0, 0]


def test_a_position_out_of_extent_is_flagged():
    join = Join(LIMITS)
    join.frame(0, 0)
    (pair,) = join.positions(np.array([0]), np.array([[0.0, 1.0]]), 1)
    assert pair["flags"] == PAIR_FLAG_OUT_OF_EXTENT
    assert join.out_of_extent == 1


def test_a_recovered_join_makes_the_pairs_that_were_lost():
    frames = np.zeros(3, FRAME_RECORD)
    frames["number"], frames["slot"] = [4, 5, 6], [0, 1, 2]
    positions = np.zeros(3, POSITION_RECORD)
    positions["number"], positions["y_m"] = [4, 5, 9], [1e-6, 2e-6, 3e-6]
    first = Join(LIMITS)
    first.frame(4, 0)
    pairs = first.positions(np.array([4]), np.array([[1e-6, 0.0]]), 1)
    join = Join(LIMITS)
    lost = join.restore(frames, positions, pairs)
    assert lost["number"].tolist() == [5]
    assert join.positioned == 2
    found = join.frame(9, 3)
    assert found is not None
    assert found.y_m == 3e-6


def test_sparse_numbers_cost_memory_for_themselves_only():
    join = Join(LIMITS)
    numbers = np.arange(20_000) * 1_000_000
    tracemalloc.start()
    join.positions(numbers, np.zeros((20_000, 2)), 1)
    assert tracemalloc.get_traced_memory()[0] < 20_000_000
    tracemalloc.stop()
    pair = join.frame(19_999_000_000, 0)
    assert pair is not None


def test_positions_without_frames_are_held_within_a_bound():
    join = Join(LIMITS, max_waiting=100)
    join.frame(500, 0)
    pairs = join.positions(np.arange(400, 600), where(list(range(400, 600))), 1)
    assert pairs["number"].tolist() == [500]
    assert join.invalid == 200 - 101
    assert join.frame(450, 1) is not None
    assert join.frame(590, 2) is None
    assert join.positions(np.array([590, 7]), where([590, 7]), 1)["number"].tolist() == [590]


def test_inline_positions_that_were_logged_are_paired_again():
    frames = np.zeros(3, FRAME_RECORD)
    frames["number"], frames["slot"] = [0, 1, 2], [0, 1, 2]
    first, again = Join(LIMITS), Join(LIMITS)
    logged = np.zeros(3, POSITION_RECORD)
    for n in range(3):
        pair = first.frame_with_position(n, n, n * 1e-6, 2e-6)
        assert pair is not None
        logged["number"][n], logged["y_m"][n], logged["x_m"][n] = n, pair.y_m, pair.x_m
    lost = again.restore(frames, logged, np.zeros(0, PAIR_RECORD))
    assert lost["number"].tolist() == [0, 1, 2]
    assert lost["y_m"].tolist() == [0.0, 1e-6, 2e-6]
