"""The simulated sensor: faults land where they should, and the dose that is told was measured."""

import numpy as np
import pytest
import torch

from ptycho_stream.errors import SettingsError
from ptycho_stream.simulate.experiment import mean_dose, simulate_experiment
from ptycho_stream.simulate.sensor import SensorSettings, draw_sensor

SIZE = 64


def counted(settings, rate=50.0, frames=200, seed=0):
    """A sensor and its counts of frames that expect ``rate`` photons everywhere."""
    sensor = draw_sensor(np.random.default_rng(seed), SIZE, settings)
    generator = torch.Generator().manual_seed(seed)
    counts = sensor.count(torch.full((frames, SIZE, SIZE), rate), generator)
    return sensor, counts.numpy()


def test_an_ideal_sensor_counts_photons():
    sensor, counts = counted(SensorSettings())
    assert not sensor.bad.any()
    assert counts.mean() == pytest.approx(50, rel=1e-2)
    assert counts.var() == pytest.approx(50, rel=2e-2)
    np.testing.assert_array_equal(counts, np.rint(counts))


def test_the_same_seed_gives_the_same_sensor_and_counts():
    settings = SensorSettings(gap_px=3, hot=0.01, dead=0.01)
    first, counts = counted(settings, frames=2)
    second, again = counted(settings, frames=2)
    other, _ = counted(settings, frames=2, seed=1)
    np.testing.assert_array_equal(first.bad, second.bad)
    np.testing.assert_array_equal(counts, again)
    assert not np.array_equal(first.bad, other.bad)


@pytest.mark.parametrize("seed", range(5))
def test_gaps_are_whole_lines_along_both_axes_that_count_nothing(seed):
    sensor, counts = counted(SensorSettings(gap_px=4, module_px=20), frames=5, seed=seed)
    rows, columns = sensor.gaps.all(1), sensor.gaps.all(0)
    assert rows.any() and columns.any()
    np.testing.assert_array_equal(sensor.gaps, rows[:, None] | columns[None, :])
    period = np.flatnonzero(np.diff(rows.astype(int)) == 1)
    assert (np.diff(period) == 24).all()
    assert (counts[:, sensor.gaps] == 0).all()
    assert counts[:, ~sensor.gaps].min() > 0


def test_dead_and_hot_pixels_are_as_many_as_asked_and_behave_so():
    sensor, counts = counted(SensorSettings(dead=0.03, hot=0.02))
    assert sensor.dead.mean() == pytest.approx(0.03, abs=0.008)
    assert sensor.hot.mean() == pytest.approx(0.02, abs=0.008)
    assert not (sensor.dead & sensor.hot).any()
    assert (counts[:, sensor.dead] == 0).all()
    assert counts[:, sensor.hot].mean(0).min() > 50 + 90
    good = ~sensor.bad
    assert counts[:, good].mean() == pytest.approx(50, rel=1e-2)


def test_the_beam_stop_hides_the_middle():
    sensor, counts = counted(SensorSettings(beam_stop_px=5, background=2), frames=5)
    middle = SIZE // 2
    assert sensor.stop[middle, middle] and sensor.stop[middle, middle + 4]
    assert not sensor.stop[middle, middle + 5]
    assert (counts[:, sensor.stop] == 0).all()
    assert sensor.stop.sum() == 69  # points of the grid less than 5 from one of them


def test_background_adds_and_saturation_cuts():
    _, counts = counted(SensorSettings(background=7))
    assert counts.mean() == pytest.approx(57, rel=1e-2)
    _, counts = counted(SensorSettings(saturation=40))
    assert counts.max() == 40


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hot": 0.9}, "hot"),
        ({"dead": -0.1}, "dead"),
        ({"background": float("nan")}, "background"),
        ({"module_px": 20}, "module_px"),
        ({"saturation": 0}, "saturation"),
        ({"gap_px": 4, "module_px": 0}, "module_px"),
    ],
)
def test_impossible_sensors_are_refused(settings, words):
    with pytest.raises(SettingsError, match=words):
        SensorSettings(**settings)


def test_a_gap_wider_than_the_frame_is_refused():
    with pytest.raises(SettingsError, match="gap_px"):
        draw_sensor(np.random.default_rng(0), SIZE, SensorSettings(gap_px=2 * SIZE))


def test_a_sensor_that_sees_nothing_is_refused():
    with pytest.raises(SettingsError, match="cover"):
        draw_sensor(np.random.default_rng(0), SIZE, SensorSettings(beam_stop_px=100))


@pytest.mark.parametrize("photons", [1e2, 1e4, 1e7])
def test_the_dose_told_is_the_mean_of_the_good_pixels_sums(photons):
    scan = simulate_experiment(
        frames=12,
        size_px=32,
        photons=photons,
        sensor=SensorSettings(gap_px=2, hot=0.01, dead=0.01, beam_stop_px=2),
    )
    assert scan.bad_pixels is not None
    dose = scan.counts[:, ~scan.bad_pixels].sum(1, dtype=np.int64).mean()
    assert scan.metadata["dose_photons"] == pytest.approx(dose)
    assert 0.2 * photons < dose < photons
    whole = simulate_experiment(frames=12, size_px=32, photons=photons)
    assert whole.bad_pixels is None
    assert whole.metadata["dose_photons"] == whole.counts.sum((1, 2), dtype=np.int64).mean()
    assert whole.metadata["dose_photons"] == mean_dose(whole.counts, None)
    assert 0.6 * photons < whole.metadata["dose_photons"] < 1.1 * photons


@pytest.mark.parametrize("path", ["raster", "spiral", "fly"])
def test_scans_go_along_every_path(path):
    scan = simulate_experiment(frames=30, size_px=32, path=path, photons=1e4)
    assert len(scan.counts) == 30
    assert scan.metadata["path"] == path
    assert np.isfinite(scan.positions_yx_m).all()


def test_an_unknown_path_is_refused():
    with pytest.raises(SettingsError, match="no path 'walk'; there are raster"):
        simulate_experiment(frames=4, size_px=32, path="walk")
