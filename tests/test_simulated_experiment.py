"""The scan simulator: consistent geometry, honest noise, repeatable, and varied."""

import numpy as np
import pytest
import torch

from ptycho_stream.errors import GeometryError, ProbeError
from ptycho_stream.geometry import object_pixel_yx_m
from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.probe import shifted_modes, spectrum_of
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.probes import random_probe, zone_plate_probe
from ptycho_stream.simulate.samples import random_sample, showcase_sample
from ptycho_stream.simulate.scan_paths import jittered_raster


@pytest.fixture(scope="module")
def scan():
    return simulate_experiment(seed=3, frames=30, size_px=64, photons=2e5)


def test_the_same_seed_gives_the_same_counts(scan):
    again = simulate_experiment(seed=3, frames=30, size_px=64, photons=2e5)
    other = simulate_experiment(seed=4, frames=30, size_px=64, photons=2e5)
    np.testing.assert_array_equal(scan.counts, again.counts)
    assert not np.array_equal(scan.counts, other.counts)


def test_frames_are_uint16_centred_and_carry_the_photons(scan):
    assert scan.counts.shape == (30, 64, 64)
    assert scan.counts.dtype == np.uint16
    sums = scan.counts.sum((1, 2))
    assert 0.5 * 2e5 < sums.mean() < 2e5 * 1.02
    middle = scan.counts.sum(0)[16:48, 16:48].sum()
    assert middle > 0.8 * scan.counts.sum()


def test_counts_are_poisson_about_the_model_at_the_true_positions(scan):
    size = 64
    corner = (scan.positions_yx_m - scan.origin_yx_m) / scan.pixel_yx_m - (size - 1) / 2
    whole = np.floor(corner + 0.5).astype(int)
    shift = torch.as_tensor((corner - whole).astype(np.float32))
    patches = np.stack([scan.object[y : y + size, x : x + size] for y, x in whole])
    modes = shifted_modes(spectrum_of(scan.probe), shift)
    expected = intensity(modes, torch.as_tensor(patches)).double().numpy()
    expected = np.fft.fftshift(expected, axes=(-2, -1))
    bright = expected > 20
    score = (scan.counts[bright] - expected[bright]) / np.sqrt(expected[bright])
    assert abs(score.mean()) < 0.05
    assert score.std() == pytest.approx(1, abs=0.05)


def test_the_geometry_is_consistent(scan):
    assert scan.pixel_yx_m == object_pixel_yx_m(
        scan.photon_energy_eV, scan.detector_distance_m, scan.detector_pixel_yx_m, 64
    )
    whole = np.asarray(scan.origin_yx_m) / scan.pixel_yx_m
    np.testing.assert_allclose(whole, np.round(whole), atol=1e-6)


def test_neighbours_overlap(scan):
    steps = np.linalg.norm(np.diff(scan.positions_yx_m, axis=0), axis=1) / scan.pixel_yx_m[0]
    assert steps.max() < 64 / 12 * 1.8


def test_bright_frames_get_a_wider_dtype():
    scan = simulate_experiment(frames=1, size_px=32, photons=1e9)
    assert scan.counts.dtype == np.uint32
    assert scan.counts.max() > 65535


def test_a_given_probe_and_sample_are_used():
    rng = np.random.default_rng(0)
    probe, sample = random_probe(rng, 32, modes=2), random_sample(rng, (128, 128))
    scan = simulate_experiment(frames=4, size_px=32, probe=probe, sample=sample, photons=1e4)
    assert scan.probe.photons == pytest.approx(1e4, rel=1e-4)
    assert len(scan.probe.modes) == 2
    np.testing.assert_array_equal(scan.object, sample)


def test_what_cannot_be_simulated_is_refused():
    small = np.ones((40, 40), np.complex64)
    with pytest.raises(GeometryError, match="sample"):
        simulate_experiment(frames=100, size_px=32, sample=small)
    with pytest.raises(GeometryError, match="probe"):
        simulate_experiment(frames=4, size_px=32, probe=zone_plate_probe(64))
    with pytest.raises(GeometryError, match="0 frames"):
        simulate_experiment(frames=0)
    with pytest.raises(ProbeError, match="photons"):
        simulate_experiment(frames=4, size_px=32, photons=-1)


def test_the_path_fills_a_square_in_small_steps():
    path = jittered_raster(np.random.default_rng(0), 100, 4.0, jitter=0.25)
    assert path.shape == (100, 2)
    assert np.abs(path).max() <= 4.0 * (4.5 + 0.25)
    assert np.linalg.norm(np.diff(path, axis=0), axis=1).max() < 4.0 * 1.7


@pytest.mark.parametrize("seed", range(12))
def test_random_samples_are_transmissions(seed):
    sample = random_sample(np.random.default_rng(seed), (96, 80))
    assert sample.shape == (96, 80)
    assert sample.dtype == np.complex64
    assert np.abs(sample).max() <= 1 + 1e-5
    assert np.abs(sample).min() > 0.35


def test_the_showcase_has_structure():
    sample = showcase_sample(np.random.default_rng(0), (128, 128))
    assert np.angle(sample).std() > 0.2


@pytest.mark.parametrize("seed", range(8))
def test_random_probes_are_orthogonal_centred_and_normalised(seed):
    probe = random_probe(np.random.default_rng(seed), 64, modes=3, photons=1e5)
    assert probe.photons == pytest.approx(1e5, rel=1e-4)
    flat = probe.modes.reshape(3, -1)
    gram = np.abs(flat.conj() @ flat.T)
    assert gram[0, 0] > gram[1, 1] > gram[2, 2]
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-3 * gram[0, 0]
