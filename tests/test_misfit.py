"""Misfit of a stitched object: the definition, noise, masks, edges, and the measured reference."""

import math

import numpy as np
import pytest
import torch

from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.fourier import centred
from ptycho_stream.physics.probe import Probe, shifted_modes, spectrum_of
from ptycho_stream.reconstruct.misfit import Misfit, stitched_misfit
from ptycho_stream.simulate.experiment import simulate_experiment

SIZE = 32


@pytest.fixture(scope="module")
def scan():
    """A simulated scan: experiment, corners on the true object, sub-pixel shifts."""
    experiment = simulate_experiment(seed=3, frames=40, size_px=SIZE)
    origin = np.asarray(experiment.origin_yx_m) / experiment.pixel_yx_m
    top = experiment.positions_yx_m / experiment.pixel_yx_m - origin - (SIZE - 1) / 2
    corner = np.rint(top).astype(np.int64)
    return experiment, corner, top - corner


def figures(scan, obj=None, **changes):
    experiment, corner, shift = scan
    given = {"probe": experiment.probe} | changes
    obj = experiment.object if obj is None else obj
    return stitched_misfit(obj, corner, shift, lambda i: experiment.counts[i], **given)


def test_the_true_object_explains_all_but_the_noise(scan):
    misfit = figures(scan)
    assert misfit.frames == 40 and misfit.skipped == 0
    assert abs(misfit.excess) < 0.003
    assert misfit.r_poisson > 0.01
    wrong = figures(scan, np.ones_like(scan[0].object))
    assert wrong.excess > 0.02 and wrong.deviance > 4 * misfit.deviance


def test_figures_follow_their_definition(scan):
    """Against plain numpy in double precision, frame by frame."""
    experiment, corner, shift = scan
    obj = experiment.object * np.exp(0.3j * np.abs(experiment.object)).astype(np.complex64)
    difference = roots = deviance = 0.0
    modes = np.fft.fft2(experiment.probe.modes.astype(np.complex128))
    f = np.fft.fftfreq(SIZE)
    for counts, (y, x), (dy, dx) in zip(experiment.counts, corner, shift, strict=True):
        probe = np.fft.ifft2(modes * np.exp(-2j * np.pi * (f[:, None] * dy + f[None] * dx)))
        waves = np.fft.fft2(probe * obj[y : y + SIZE, x : x + SIZE], norm="ortho")
        model = np.fft.fftshift((np.abs(waves) ** 2).sum(0))
        measured = counts.astype(float)
        difference += np.abs(np.sqrt(measured) - np.sqrt(model)).sum()
        roots += np.sqrt(measured).sum()
        log = np.where(measured > 0, measured * np.log(np.maximum(measured, 1e-9) / model), 0)
        deviance += 2 * (log - (measured - model)).sum()
    misfit = figures(scan, obj)
    assert misfit.r_factor == pytest.approx(difference / roots, rel=1e-4)
    assert misfit.deviance == pytest.approx(deviance / experiment.counts.size, rel=1e-3)


def test_masked_pixels_do_not_count(scan):
    experiment, corner, shift = scan
    valid = np.ones((SIZE, SIZE), bool)
    valid[3, 5] = valid[10:12] = False
    spoilt = experiment.counts.copy()
    spoilt[:, ~valid] = 60000
    clean = figures(scan, valid=valid)
    misfit = stitched_misfit(
        experiment.object, corner, shift, lambda i: spoilt[i], experiment.probe, valid
    )
    assert misfit == clean
    assert misfit.pixels == 40 * int(valid.sum())


def test_frames_outside_the_seen_area_are_skipped(scan):
    experiment, corner, _ = scan
    obj = experiment.object.copy()
    y, x = corner[7]
    obj[y + SIZE // 2, x + SIZE // 2] = np.nan
    misfit = figures(scan, obj)
    assert 0 < misfit.skipped < 40 and misfit.frames == 40 - misfit.skipped
    nothing = figures(scan, np.full_like(obj, np.nan))
    assert nothing.frames == 0 and nothing.skipped == 40 and math.isnan(nothing.excess)
    assert figures(scan, obj[:8, :8]).frames == 0


def test_misfits_of_parts_add_up(scan):
    experiment, corner, shift = scan
    parts = Misfit()
    for part in (slice(0, 15), slice(15, 40)):
        counts = experiment.counts[part]
        parts = parts + stitched_misfit(
            experiment.object, corner[part], shift[part], counts.__getitem__, experiment.probe
        )
    whole = figures(scan)
    assert parts.frames == whole.frames
    assert parts.r_factor == pytest.approx(whole.r_factor, rel=1e-9)


def test_all_modes_are_simulated():
    rng = np.random.default_rng(0)
    modes = rng.standard_normal((2, 2, SIZE, SIZE))
    probe = Probe((modes[0] + 1j * modes[1]).astype(np.complex64)).normalised(1e6)
    obj = np.ones((SIZE, SIZE), np.complex64)
    shift = np.array([[0.3, -0.2]], np.float32)
    expected = intensity(
        shifted_modes(spectrum_of(probe), torch.as_tensor(shift)), torch.as_tensor(obj)[None]
    )
    counts = rng.poisson(centred(expected).numpy())
    corner = np.zeros((1, 2), np.int64)
    both = stitched_misfit(obj, corner, shift, lambda i: counts[i], probe)
    one = stitched_misfit(obj, corner, shift, lambda i: counts[i], probe.leading(1))
    assert abs(both.excess) < 0.02 and one.excess > 0.1


def test_the_measured_reference_has_its_known_figures(data_folder):
    """R 0.1346, Poisson 0.1179, deviance 1.05 with three modes; excess 0.087 with the first."""
    from make_siemens_star import REFERENCE, siemens_star

    scan = siemens_star(data_folder, modes=3)
    with np.load(data_folder / REFERENCE) as held:
        obj = held["object"].astype(np.complex64)
        size = scan.counts.shape[-1]
        top = held["positions_yx_px"] + held["origin_yx_px"] - (size - 1) / 2
    corner = np.rint(top).astype(np.int64)
    for modes, excess in ((3, 0.0167), (1, 0.087)):
        probe = Probe(scan.probe[:modes])
        misfit = stitched_misfit(obj, corner, top - corner, lambda i: scan.counts[i], probe)
        assert misfit.excess == pytest.approx(excess, abs=0.002)
        if modes == 3:
            assert misfit.r_factor == pytest.approx(0.1346, abs=0.0015)
            assert misfit.deviance == pytest.approx(1.05, abs=0.03)
