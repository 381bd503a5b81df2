"""Which frames go through a network together."""

import numpy as np
import pytest

from ptycho_stream.reconstruct.groups import GroupFormer

REACH_M = 10.0


def raster(rows=8, columns=10, seed=0, jitter=0.1):
    y, x = np.mgrid[:rows, :columns].reshape(2, -1).astype(float)
    rng = np.random.default_rng(seed)
    return np.stack([y, x], 1) + rng.uniform(-jitter, jitter, (rows * columns, 2))


def formed(position_yx_m, former):
    return [
        group
        for index, (y_m, x_m) in enumerate(position_yx_m.tolist())
        if (group := former.arrive(index, y_m, x_m)) is not None
    ]


@pytest.mark.parametrize("group_frames", [2, 4, 9])
def test_groups_are_neighbours_and_a_frame_is_in_one_only(group_frames):
    position = raster()
    groups = formed(position, GroupFormer(group_frames, 4, REACH_M))
    members = [index for group in groups for index in group]
    assert len(members) == len(set(members)) > 0.7 * len(position)
    nearest = max(4, 2 * group_frames)
    for group in groups:
        assert len(group) == group_frames
        there = position[: max(group) + 1]  # those that had come
        distance = np.hypot(*(there - position[group[0]]).T)
        assert set(group[1:]) <= set(np.argsort(distance)[1 : nearest + 1].tolist())


def test_the_nearest_unused_frames_are_taken():
    former = GroupFormer(2, 4, REACH_M)
    places = [(0, 0), (0, 8), (0, 3), (0, 5)]
    groups = [former.arrive(index, *place) for index, place in enumerate(places)]
    assert groups == [None, (1, 0), None, (3, 2)]


def test_a_waiting_frame_gets_its_group_from_the_frame_it_waited_for():
    """Frame 0 has too few unused neighbours; the late frame lies among other, used ones."""
    former = GroupFormer(2, 4, 2.0)
    assert former.arrive(0, 0.0, 0.0) is None
    assert former.arrive(1, 0.0, 5.0) is None  # out of reach
    assert former.arrive(2, 0.0, 6.0) == (2, 1)
    assert former.arrive(3, 0.0, 1.5) == (3, 0)


def test_frames_beyond_the_window_are_no_partners():
    former = GroupFormer(2, 4, 1.0)
    assert formed(np.array([[0, 0], [0, 1.5], [3, 0], [-2, 0]]), former) == []


def test_leftovers_take_any_nearest_frames():
    position = raster(2, 3, jitter=0)
    former = GroupFormer(4, 4, REACH_M)
    assert formed(position, former) == [(3, 0, 1, 2)]
    left = former.leftover(5)
    assert left[0] == 5 and set(left[1:]) == {1, 2, 4}


def test_a_scan_of_fewer_frames_than_a_group_fills_up_with_the_frame_itself():
    former = GroupFormer(4, 4, REACH_M)
    assert formed(np.array([[0.0, 0.0], [0.0, 100.0]]), former) == []
    assert former.leftover(0) == (0, 1, 0, 0)


def test_equal_positions_and_equal_distances_are_no_trouble():
    groups = formed(np.zeros((9, 2)), GroupFormer(4, 4, REACH_M))
    assert groups == [(3, 2, 1, 0), (7, 6, 5, 4)]


@pytest.mark.parametrize("cut", [1, 13, 40, 79])
def test_a_former_that_is_restored_goes_on_as_the_one_before(cut):
    position = raster(seed=3)
    through = formed(position, GroupFormer(4, 4, REACH_M))
    before = GroupFormer(4, 4, REACH_M)
    first = formed(position[:cut], before)
    used = np.array([index for group in first for index in group], np.int64)
    waiting = np.setdiff1d(np.arange(cut), used)
    after = GroupFormer(4, 4, REACH_M)
    after.restore(used, waiting, position[np.concatenate([used, waiting])])
    rest = [
        group
        for index in range(cut, len(position))
        if (group := after.arrive(index, *position[index].tolist())) is not None
    ]
    assert first + rest == through


def test_the_search_grid_finds_what_a_plain_search_finds():
    rng = np.random.default_rng(5)
    position = rng.uniform(-30, 30, (400, 2)) * np.where(rng.random((400, 1)) < 0.5, 0.1, 1)
    former = GroupFormer(4, 4, REACH_M)
    former.restore(np.arange(400), np.empty(0, np.int64), position)
    for index in range(0, 400, 7):
        distance = np.hypot(*(position - position[index]).T)
        order = [i for i in np.argsort(distance, kind="stable").tolist() if i != index]
        expected = [i for i in order if distance[i] <= REACH_M][:8]
        assert former._near(index, 8) == expected


def test_a_scan_that_rests_on_a_place_looks_at_its_newest_frames_only():
    former = GroupFormer(2, 4, REACH_M)
    groups = formed(np.zeros((400, 2)), former)
    assert len(groups) == 200 and groups[-1] == (399, 398)
    assert former._near(399, 4) == [398, 397, 396, 395]
