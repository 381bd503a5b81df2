"""Positions of a path that is known: of any frame, by its number, without a table."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ptycho_stream.settings import GeneratedSettings
from ptycho_stream.wire.generated_positions import GeneratedPositions, path_yx_m

STEP = (2e-6, 1e-6)


def path(kind: str = "raster", **fields: Any) -> GeneratedSettings:
    shape = {} if kind == "spiral" else {"shape_yx": (2, 3)}
    return GeneratedSettings(**{"kind": kind, "step_yx_m": STEP, **shape, **fields})


def points(of: GeneratedSettings, frames: int) -> list[tuple[float, float]]:
    """In steps, from the origin, rounded; without those that have none."""
    where = path_yx_m(of, np.arange(frames)) - np.asarray(of.origin_yx_m)
    steps = np.round(where[~np.isnan(where[:, 0])] / STEP, 6) + 0.0
    return [(y, x) for y, x in steps.tolist()]


def test_a_raster_goes_the_same_way_in_each_row():
    assert points(path(), 6) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_a_snake_goes_there_and_back():
    assert points(path("snake"), 6) == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)]


def test_the_fast_axis_may_be_y():
    found = points(path("snake", fast_axis="y"), 6)
    assert found == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2)]


def test_a_path_may_be_turned_mirrored_and_moved():
    turned = path(angle_deg=90.0, step_yx_m=(1e-6, 1e-6), origin_yx_m=(5e-6, 7e-6))
    # from x towards y: what went along x goes along y, and what went along y along -x
    np.testing.assert_allclose(
        path_yx_m(turned, np.array([0, 1, 3])) * 1e6, [(5, 7), (6, 7), (5, 6)], atol=1e-9
    )
    mirrored = path(step_yx_m=(-2e-6, 1e-6))
    np.testing.assert_allclose(path_yx_m(mirrored, np.array([5])), [(-2e-6, 2e-6)])


def test_frames_of_a_point_are_all_there_and_those_beyond_the_last_have_none():
    where = path_yx_m(path(frames_per_point=4), np.arange(26))
    assert len(np.unique(where[:4], axis=0)) == 1
    assert (where[3] != where[4]).any()
    np.testing.assert_array_equal(np.isnan(where[:, 0]), np.arange(26) >= 24)


def test_a_spiral_fills_its_area_evenly():
    where = path_yx_m(path("spiral"), np.arange(2000))
    inside = np.hypot(where[:, 0] / STEP[0], where[:, 1] / STEP[1])
    np.testing.assert_array_equal(where[0], (0, 0))
    for reach in (5, 10, 20):  # so many points are there as the area has steps
        assert np.count_nonzero(inside < reach) == pytest.approx(np.pi * reach**2, rel=0.05)
    steps = where[:300] / STEP
    distance = np.linalg.norm(steps[:, None] - steps[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 0.5


def test_a_spiral_may_have_an_edge():
    where = path_yx_m(path("spiral", radius_m=1e-5), np.arange(500))
    known = ~np.isnan(where[:, 0])
    assert 100 < known.sum() < 500
    assert np.hypot(*where[known].T).max() <= 1e-5


@settings(max_examples=100)
@given(
    kind=st.sampled_from(["raster", "snake", "spiral"]),
    frames=st.lists(st.integers(0, 5000) | st.integers(0, 2**40), max_size=30),
    per_point=st.integers(1, 5),
)
def test_one_by_one_in_any_order_they_are_the_same(kind, frames, per_point):
    shape = {} if kind == "spiral" else {"shape_yx": (40, 50)}
    of = path(kind, frames_per_point=per_point, angle_deg=3.0, **shape)
    generated = GeneratedPositions(of)
    wanted = path_yx_m(of, np.array(frames, np.int64)).tolist()
    for frame, (y, x) in zip(frames, wanted, strict=True):
        found = generated.of(frame)
        assert found is None if np.isnan(y) else found == pytest.approx((y, x), rel=1e-12)


def test_an_endless_scan_takes_no_memory():
    generated = GeneratedPositions(path("spiral"))
    tracemalloc.start()
    for frame in range(0, 10_000_000, 200_000):
        assert generated.of(frame) is not None
    assert tracemalloc.get_traced_memory()[0] < 3_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "raster", "shape_yx": None}, "needs shape_yx"),
        ({"kind": "raster", "radius_m": 1e-6}, "is of a spiral"),
        ({"kind": "spiral", "shape_yx": (2, 3)}, "a spiral has radius_m"),
        ({"kind": "spiral", "fast_axis": "y"}, "leave it out for a spiral"),
        ({"step_yx_m": (0.0, 1e-6)}, "one place"),
        ({"shape_yx": (0, 5)}, "greater than 0"),
        ({"frames_per_point": 0}, "greater than or equal to 1"),
    ],
)
def test_what_is_no_path_is_refused(fields, said):
    with pytest.raises(ValidationError, match=said):
        path(**fields)
