"""Scan paths: even, centred, seeded, and each with what makes it its kind."""

import numpy as np
import pytest

from ptycho_stream.simulate.scan_paths import PATH_KINDS, fly_lines, jittered_raster, spiral

STEP_PX = 5.0


def nearest_px(path):
    distance = np.linalg.norm(path[:, None] - path[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    return distance.min(1)


@pytest.mark.parametrize("kind", PATH_KINDS)
@pytest.mark.parametrize("frames", [1, 7, 400])
def test_every_path_is_seeded_and_about_the_origin(kind, frames):
    chosen = PATH_KINDS[kind]

    def path(seed):
        return chosen.draw(np.random.default_rng(seed), frames, STEP_PX, chosen.jitter)

    points = path(0)
    assert points.shape == (frames, 2) and np.isfinite(points).all()
    assert np.abs(points.mean(0)).max() < 2.5 * STEP_PX
    np.testing.assert_array_equal(points, path(0))
    if frames > 1 and kind != "raster":
        assert not np.array_equal(points, path(1))


@pytest.mark.parametrize("kind", PATH_KINDS)
def test_neighbours_are_about_a_step_away_and_the_area_is_filled(kind):
    chosen = PATH_KINDS[kind]
    points = chosen.draw(np.random.default_rng(0), 400, STEP_PX, chosen.jitter)
    assert 0.6 * STEP_PX < np.median(nearest_px(points)) < 1.2 * STEP_PX
    assert np.ptp(points, axis=0).prod() == pytest.approx(400 * STEP_PX**2, rel=0.5)


def test_a_raster_without_jitter_is_exact():
    points = jittered_raster(np.random.default_rng(0), 100, STEP_PX, 0.0)
    np.testing.assert_allclose(nearest_px(points), STEP_PX)


def test_the_spiral_grows_outwards():
    radius = np.linalg.norm(spiral(np.random.default_rng(0), 200, STEP_PX, 0.0), axis=1)
    assert (np.diff(radius) > 0).all()


def test_fly_lines_have_gaps_and_turn_at_their_ends():
    points = fly_lines(np.random.default_rng(0), 900, STEP_PX, 0.25)
    moves = np.diff(points[:, 1])
    along = np.abs(moves) < 1.01 * STEP_PX
    gaps = np.abs(moves) > 1.5 * STEP_PX
    assert 0.9 < along.mean() < 1
    assert gaps.any()
    directions = np.sign(moves[along])
    assert 0.4 < (directions > 0).mean() < 0.6, "there and back"
