"""Self-diagnosis: which way round detector and positions are, the pattern's centre, bad pixels."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from ptycho_stream.errors import GeometryError
from ptycho_stream.geometry import ORIENTATIONS, orient
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.diagnosis import MIN_FRAMES, choose_frames, diagnose
from ptycho_stream.reconstruct.layouts import (
    Layout,
    composed,
    layout_classes,
    matrix_of,
    probe_symmetries,
)
from ptycho_stream.reconstruct.pattern import find_bad_pixels, find_centre
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.simulate.experiment import simulate_experiment

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, _BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def network():
    return ModelRegistry().load()[0]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_matrix_moves_points_as_orienting_moves_pixels(orientation):
    image = np.zeros((5, 5))
    image[1, 4] = 1
    moved = np.argwhere(orient(image, orientation))[0] - 2
    assert np.array_equal(moved, matrix_of(orientation) @ [-1, 2])


def test_orientations_compose_like_their_matrices():
    for first in ORIENTATIONS:
        for then in ORIENTATIONS:
            both = matrix_of(composed(first, then))
            assert np.array_equal(both, matrix_of(then) @ matrix_of(first))


def test_a_probe_without_symmetry_tells_all_64_ways():
    rng = np.random.default_rng(1)
    waves = rng.normal(size=(1, 16, 16)) + 1j * rng.normal(size=(1, 16, 16))
    lopsided = Probe(waves.astype(np.complex64))
    assert probe_symmetries(lopsided) == (("identity", False),)
    assert len(layout_classes(lopsided)) == 64
    assert len(layout_classes(lopsided, swaps=False)) == 16


def test_a_round_probe_leaves_few_ways_to_tell():
    y, x = np.indices((32, 32)) - 15.5
    real = Probe(np.exp(-(y**2 + x**2) / 40)[None].astype(np.complex64))
    assert len(probe_symmetries(real)) == 16
    classes = layout_classes(real)
    assert sum(map(len, classes)) == 64
    assert classes[0][0] == Layout(), "what is set comes first"
    assert len(classes) == 4
    focus = Probe((real.modes * np.exp(0.05j * (y**2 + x**2))).astype(np.complex64))
    assert len(layout_classes(focus)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 5])
def test_random_faults_are_named(network, number):
    """benchmarks/diagnosis.py has a hundred."""
    benchmark = script("diagnosis")
    experiment, fault = benchmark.draw_case(number, 64)
    finding = benchmark.find(experiment, fault, network)
    assert finding.decided, finding.reason
    assert benchmark.is_right(finding, fault)
    assert finding.fits_as_set == any(
        Layout() in (t.layout, *t.equivalent) and fault in (t.layout, *t.equivalent)
        for t in finding.trials
    )


def test_nothing_is_said_of_too_little(network):
    experiment = simulate_experiment(frames=16, size_px=64)
    predictor = Predictor(network, experiment.probe)
    pixel = experiment.pixel_yx_m

    def told(counts, positions):
        return diagnose(counts, positions, pixel, predictor)

    positions = experiment.positions_yx_m
    few = told(experiment.counts[: MIN_FRAMES - 1], positions[: MIN_FRAMES - 1])
    dark = told(0 * experiment.counts, positions)
    nowhere = told(experiment.counts, np.full((16, 2), np.nan))
    line = told(experiment.counts, positions * [0, 1])
    same = told(experiment.counts, np.zeros((16, 2)))
    for finding in (few, dark, nowhere, line, same):
        assert not finding.decided and finding.best is None
        assert finding.fits_as_set
    assert "line" in line.reason and "too few" in dark.reason


def test_frames_of_one_line_are_waited_out():
    line = np.stack([np.zeros(100), np.arange(100.0)], 1)
    assert choose_frames(line) is None
    assert choose_frames(line[:3]) is None
    raster = np.concatenate([line + np.array([k, 0]) for k in range(100)])
    chosen = choose_frames(raster)
    assert chosen is not None and len(chosen) == 64
    assert np.ptp(raster[chosen], axis=0).min() >= 7
    raster[:200] = np.nan
    chosen = choose_frames(raster)
    assert chosen is not None and np.isfinite(raster[chosen]).all()
    spiral = np.random.default_rng(0).normal(size=(100, 2))
    assert np.array_equal(choose_frames(spiral), np.arange(64))


@pytest.mark.interop
@pytest.mark.timeout(240)
@pytest.mark.parametrize("orientation", ["identity", "rotate90", "flip_y"])
def test_the_measured_star_is_as_it_is_told_and_turned_frames_are_found_out(network, orientation):
    folder = os.environ.get("PTYCHO_STREAM_DATA")
    if folder is None:
        pytest.skip("PTYCHO_STREAM_DATA is not set: no measured frames to look at")
    star, benchmark = script("zero_shot"), script("diagnosis")
    counts, corner, probe = star.load_scan(Path(folder))
    chosen = choose_frames(corner)
    assert chosen is not None
    view = benchmark.View(128, orientation=benchmark.inverse(orientation))
    predictor = Predictor(network, probe)
    position = corner[chosen] * 1e-8
    finding = diagnose(view.apply(counts[chosen]), position, (1e-8, 1e-8), predictor)
    assert finding.decided and finding.best is not None
    assert finding.best.layout == Layout(orientation, "identity")
    assert finding.fits_as_set == (orientation == "identity")


def test_the_centre_of_the_pattern_is_found_to_a_fraction_of_a_pixel():
    experiment = simulate_experiment(frames=36, size_px=64)
    mean = experiment.counts.mean(0)
    found = find_centre(mean, experiment.probe)
    assert np.hypot(*(np.array(found.center_yx_px) - 32)) < 0.5
    assert found.match > 0.8
    wide = np.zeros((90, 100))
    wide[11:75, 20:84] = mean
    valid = np.ones(wide.shape, bool)
    valid[40:42] = False
    moved = find_centre(np.where(valid, wide, 1e9), experiment.probe, valid)
    assert np.hypot(*(np.array(moved.center_yx_px) - [43, 52])) < 0.5


def test_dark_frames_have_no_centre():
    experiment = simulate_experiment(frames=1, size_px=32)
    with pytest.raises(GeometryError, match="dark"):
        find_centre(np.zeros((32, 32)), experiment.probe)


def test_hot_and_dead_pixels_are_found_and_no_others():
    experiment = simulate_experiment(frames=64, size_px=64, photons=1e6)
    counts = experiment.counts.astype(np.int64)
    assert find_bad_pixels(counts).bad.sum() <= 1
    counts[:, 5, 7] += 40
    counts[:, 50, 60] = 60_000
    counts[:, 33, 30] = 0
    found = find_bad_pixels(counts)
    assert found.hot[5, 7] and found.hot[50, 60]
    assert found.dead[33, 30]
    assert found.bad.sum() <= 4
    assert not find_bad_pixels(counts[:0]).bad.any()
    valid = ~found.bad
    assert find_bad_pixels(counts, valid).bad.sum() == 0
