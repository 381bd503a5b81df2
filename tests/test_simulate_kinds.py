"""Samples and probes by name: finite, varied, in range, and pure functions of the seed."""

import numpy as np
import pytest

from ptycho_stream.errors import ProbeError, SettingsError
from ptycho_stream.physics.optics import ZonePlate, frequencies
from ptycho_stream.physics.probe import Probe
from ptycho_stream.simulate.grid import grid_of
from ptycho_stream.simulate.optics import NOLL_TERMS, OPTICS, zernike_phase
from ptycho_stream.simulate.probes import (
    PROBE_KINDS,
    WIDE_PROBES,
    ProbeMix,
    probe_of_kind,
    random_probe,
    zone_plate_probe,
)
from ptycho_stream.simulate.samples import (
    SAMPLE_KINDS,
    WIDE_SAMPLES,
    SampleMix,
    random_sample,
    sample_of_kind,
)
from ptycho_stream.simulate.solids import thickness_px

# Mean (re, im) and pixel [17, 40] of the samples that trained unrolled-v2, seeds 0 to 7.
PINNED_SAMPLES = [
    (0.8922, -0.0136, 0.4816, 0.7964),
    (0.9409, 0.0000, 0.9473, 0.0061),
    (0.9487, -0.0075, 0.8248, 0.3028),
    (0.8456, 0.0256, 0.7151, -0.3310),
    (0.9762, 0.0003, 0.9744, -0.0112),
    (0.8924, 0.0051, 0.7755, -0.4071),
    (0.7680, -0.0093, 0.6949, 0.1631),
    (0.9286, 0.0049, 0.9810, 0.1263),
]
# |pixel [0, 30, 33]| and |pixel [1, 20, 30]| of the probes, seeds 0 to 5.
PINNED_PROBES = [
    (1.6267, 0.2953),
    (7.2851, 1.0686),
    (4.5382, 1.2520),
    (5.3253, 1.1257),
    (3.0704, 0.9772),
    (8.9005, 0.4182),
]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", [*SAMPLE_KINDS, "random"])
@pytest.mark.parametrize("shape", [(72, 100), (128, 128)])
def test_every_kind_of_sample_is_a_seeded_transmission(kind, shape):
    sample = sample_of_kind(rng(1), shape, kind)
    assert sample.shape == shape and sample.dtype == np.complex64
    assert np.isfinite(sample).all()
    assert sample.std() > 1e-3
    assert np.abs(sample).max() <= 1 + 1e-5 and np.abs(sample).min() > 0.35
    np.testing.assert_array_equal(sample, sample_of_kind(rng(1), shape, kind))
    assert not np.array_equal(sample, sample_of_kind(rng(2), shape, kind))


@pytest.mark.parametrize("kind", SAMPLE_KINDS)
def test_every_kind_has_the_strength_that_was_asked_for(kind):
    sample = sample_of_kind(rng(3), (64, 64), kind, phase_rad=0.5, absorption=0.7)
    phase, loss = np.angle(sample), -np.log(np.abs(sample))
    assert phase.min() == pytest.approx(0, abs=1e-5) and phase.max() == pytest.approx(0.5, abs=1e-4)
    assert loss.min() == pytest.approx(0, abs=1e-5) and loss.max() == pytest.approx(0.7, abs=1e-4)


def test_absorption_follows_the_phase_or_does_not():
    def correlation(relation):
        sample = sample_of_kind(rng(4), (128, 128), "perlin", phase_rad=1, relation=relation)
        return np.corrcoef(np.angle(sample).ravel(), -np.log(np.abs(sample)).ravel())[0, 1]

    assert correlation("matching") > 0.999
    assert abs(correlation("unrelated")) < 0.6
    assert abs(correlation("unrelated")) < correlation("mixed") < 0.99


def test_weak_and_strong_samples_are_drawn():
    weak = SampleMix(("cells",), weak=1.0, absorbing=0.0)
    strong = SampleMix(("cells",), strong=1.0)
    for seed in range(5):
        spread = np.ptp(np.angle(random_sample(rng(seed), (64, 64), weak)))
        assert 0.03 * 0.9 <= spread <= 0.2
        turned = random_sample(rng(seed), (64, 64), strong)
        assert np.ptp(np.unwrap(np.angle(turned).ravel())) > 1.2


@pytest.mark.parametrize("seed", range(20))
def test_the_wide_mixture_makes_transmissions(seed):
    sample = random_sample(rng(seed), (96, 80), WIDE_SAMPLES)
    assert np.isfinite(sample).all() and sample.std() > 1e-4
    assert np.abs(sample).min() > 0.35 and np.abs(sample).max() <= 1 + 1e-5


def test_the_wide_mixture_names_every_kind_but_the_showcase():
    assert set(WIDE_SAMPLES.kinds) == set(SAMPLE_KINDS) - {"showcase"}
    assert {name for name, _ in WIDE_PROBES.kinds} == set(OPTICS)


@pytest.mark.parametrize("seed", range(8))
def test_the_same_seed_draws_the_samples_it_always_drew(seed):
    sample = random_sample(rng(seed), (72, 64))
    found = (*_parts(sample.mean()), *_parts(sample[17, 40]))
    assert found == pytest.approx(PINNED_SAMPLES[seed], abs=3e-4)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_seed_draws_the_probes_it_always_drew(seed):
    modes = np.abs(random_probe(rng(seed), 64, modes=2, photons=1e4).modes)
    assert (modes[0, 30, 33], modes[1, 20, 30]) == pytest.approx(PINNED_PROBES[seed], abs=1e-3)


def _parts(value):
    return value.real, value.imag


def test_unknown_names_and_strengths_are_refused():
    with pytest.raises(SettingsError, match="no sample 'bread'; there are showcase"):
        sample_of_kind(rng(), (32, 32), "bread")
    with pytest.raises(SettingsError, match="absorption"):
        sample_of_kind(rng(), (32, 32), "bars", absorption=-1)
    with pytest.raises(SettingsError, match="bread"):
        SampleMix(("bars", "bread"))
    with pytest.raises(SettingsError, match="no kind"):
        SampleMix(())
    with pytest.raises(SettingsError, match="no probe 'torch'; there are zone-plate"):
        probe_of_kind(rng(), 32, "torch")
    with pytest.raises(SettingsError, match="torch"):
        ProbeMix((("torch", 1.0),))
    with pytest.raises(SettingsError, match="sum to 1"):
        ProbeMix((("gaussian", 0.5),))


@pytest.mark.parametrize("kind", PROBE_KINDS)
@pytest.mark.parametrize("size", [64, 128])
def test_every_kind_of_probe_stays_in_its_window_and_on_the_detector(kind, size):
    for seed in range(4):
        probe = probe_of_kind(rng(seed), size, kind, modes=2, photons=1e5)
        assert probe.photons == pytest.approx(1e5, rel=1e-4)
        assert len(probe.modes) == 2
        power = probe.power_yx
        assert power.max() > 4 * power.mean(), "a probe is no plane wave"
        assert _rim(power) < 0.08, f"seed {seed}: beam at the window's rim"
        far = sum(
            np.abs(np.fft.fftshift(np.fft.fft2(mode, norm="ortho"))) ** 2 for mode in probe.modes
        )
        assert _rim(far) < 0.02, f"seed {seed}: far field at the detector's rim"
    np.testing.assert_array_equal(
        probe.modes, probe_of_kind(rng(3), size, kind, modes=2, photons=1e5).modes
    )


def _rim(power):
    """Share of a picture's sum that lies in its outer eighth."""
    edge = len(power) // 16
    return 1 - power[edge:-edge, edge:-edge].sum() / power.sum()


def test_a_zone_plate_of_a_beamline_makes_the_cone_that_its_optics_say():
    """A 160 um plate of 60 nm zones at 8.8 keV: the beam is z * wavelength / dr wide at z."""
    pixel_m, defocus_m = 20e-9, 400e-6
    plate = ZonePlate.of_optics(
        diameter_m=160e-6,
        outermost_zone_m=60e-9,
        stop_diameter_m=60e-6,
        defocus_m=defocus_m,
        photon_energy_eV=8800,
        pixel_m=pixel_m,
    )
    probe = zone_plate_probe(256, 1e6, plate)
    far = np.abs(np.fft.fft2(probe.modes[0], norm="ortho"))
    ky, kx = frequencies(256)
    k = np.hypot(ky, kx)
    lit = far > 0.5 * far.max()
    assert k[lit].max() == pytest.approx(pixel_m / (2 * 60e-9), rel=0.04)
    assert k[lit].min() == pytest.approx(plate.radius * 60 / 160, rel=0.1)
    index = np.arange(256) - 127.5
    radius = np.hypot(index[:, None], index[None, :])
    width_px = 1.40891e-10 / (2 * 60e-9) * defocus_m / pixel_m
    order = np.argsort(radius.ravel())
    held = np.cumsum(probe.power_yx.ravel()[order])
    outer = radius.ravel()[order][np.searchsorted(held, 0.9 * held[-1])]
    assert outer == pytest.approx(width_px, rel=0.12)


def test_zone_plates_that_do_not_fit_are_refused():
    with pytest.raises(ProbeError, match=r"below 0\.5"):
        ZonePlate(0.6, 0.1, (0, 0))
    with pytest.raises(ProbeError, match="stop"):
        ZonePlate(0.3, 0.3, (0, 0))
    with pytest.raises(ProbeError, match="64 px holds"):
        zone_plate_probe(64, plate=ZonePlate(0.2, 0.05, (60, 60)))


def test_zernike_terms_are_orthonormal_over_the_aperture():
    size, radius = 256, 0.4
    ky, kx = frequencies(size)
    inside = np.hypot(ky, kx) < radius
    terms = np.stack([zernike_phase(row, size, radius)[inside] for row in np.eye(len(NOLL_TERMS))])
    products = terms @ terms.T / inside.sum()
    np.testing.assert_allclose(products, np.eye(len(NOLL_TERMS)), atol=0.02)


def test_a_box_seen_along_its_edge_is_as_thick_as_it_is():
    normals = np.array(
        [[s if k == axis else 0 for k in range(3)] for axis in range(3) for s in (1, -1)]
    )
    away = np.array([5, 5, 7, 7, 9, 9], float)
    thickness = thickness_px(normals, away, grid_of((41, 41)))
    assert thickness[20, 20] == pytest.approx(10, rel=0.05)
    assert (thickness > 1).sum() == pytest.approx(14 * 18, rel=0.15)
    assert thickness[0, 0] == 0


def test_drawn_probes_are_probes():
    assert isinstance(random_probe(rng(), 64, mix=WIDE_PROBES), Probe)
