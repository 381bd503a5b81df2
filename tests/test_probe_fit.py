"""A probe is fitted to a few frames: its defocus, and the light in its far field."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from image_bench import SIZE

from ptycho_stream.errors import ProbeError
from ptycho_stream.geometry import ORIENTATIONS, View
from ptycho_stream.physics.optics_probe import probe_of_optics
from ptycho_stream.physics.probe import Probe, defocused, distance_m
from ptycho_stream.reconstruct.neighbourhood import Neighbours, finished, nearest_frames
from ptycho_stream.reconstruct.pattern import far_field_yx
from ptycho_stream.reconstruct.probe_fit import CLEARLY, fitting, with_far_field
from ptycho_stream.settings import ZonePlateSettings
from ptycho_stream.simulate.experiment import simulate_experiment

FRAMES = 32
PIXEL_YX = (1.0, 1.0)


def some_frames(seed: int) -> tuple[Neighbours, Probe]:
    """Frames of a simulated scan that lie together, and their probe."""
    experiment = simulate_experiment(seed=seed, frames=80, size_px=SIZE)
    position_yx_px = experiment.positions_yx_m / np.asarray(experiment.pixel_yx_m)
    near = nearest_frames(position_yx_px, FRAMES)
    counts = np.asarray(experiment.counts)[near]
    blank = np.ones(counts.shape, np.complex64)
    return Neighbours(counts, position_yx_px[near], blank), experiment.probe


@pytest.mark.parametrize(("seed", "phase_rad"), [(5, 2.0), (6, -3.0), (7, 6.0)])
def test_the_defocus_is_found(seed: int, phase_rad: float) -> None:
    frames, probe = some_frames(seed)
    told = defocused(probe, phase_rad)
    found = finished(fitting(frames, told, PIXEL_YX))
    assert found.far_field == "as told" and not found.rather_turned
    assert found.excess < 0.5 * found.told_excess
    assert found.probe.overlap(probe) > 0.97 > told.overlap(probe) + 0.05
    assert found.refined.overlap(probe) > 0.97
    for fitted in (found.probe, found.refined):
        assert fitted.photons == pytest.approx(told.photons, rel=1e-3)


@pytest.mark.parametrize("pixel_yx_m", [(20e-9, 20e-9), (20e-9, 30e-9)])
@pytest.mark.parametrize("further_m", [60e-6, -90e-6])
def test_defocus_in_metres_is_that_of_the_optics(
    further_m: float, pixel_yx_m: tuple[float, float]
) -> None:
    energy_eV, told_m = 8000.0, 300e-6
    told, true = (
        probe_of_optics(
            ZonePlateSettings(diameter_m=120e-6, outer_zone_width_m=60e-9, defocus_m=defocus_m),
            energy_eV,
            pixel_yx_m,
            SIZE,
        )
        for defocus_m in (told_m, told_m + further_m)
    )
    phase_rad = further_m / distance_m(told, 1.0, energy_eV, pixel_yx_m)
    moved = defocused(told, phase_rad, pixel_yx_m)
    assert moved.overlap(true) > 0.99 > 0.985 > told.overlap(true)


def test_probes_overlap_whatever_their_photons_phase_and_place() -> None:
    _, probe = some_frames(5)
    alike = Probe(np.roll(probe.modes, (3, -5), axis=(1, 2)) * np.complex64(2j))
    assert alike.overlap(probe) == pytest.approx(1.0, abs=1e-5)
    assert defocused(probe, 4.0).overlap(probe) < 0.9


def dimmed(probe: Probe) -> Probe:
    """With light in a small part of the aperture only."""
    frequency = np.fft.fftfreq(probe.size_px)
    k2 = frequency[:, None] ** 2 + frequency[None, :] ** 2
    modes = np.fft.ifft2(np.fft.fft2(probe.modes) * np.exp(-k2 / (2 * 0.06**2)))
    return Probe(modes.astype(np.complex64)).normalised(probe.photons)


def test_the_far_field_is_taken_from_the_frames() -> None:
    frames, probe = some_frames(7)
    told = dimmed(probe)
    found = finished(fitting(frames, told, PIXEL_YX))
    assert found.far_field == "as measured" and abs(found.defocus_rad) < 1
    assert not found.rather_turned
    assert found.excess < 0.7 * found.told_excess
    assert found.probe.overlap(probe) > told.overlap(probe) + 0.1


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_nothing_is_better_than_a_true_probe(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptycho_stream.reconstruct.probe_fit.POOR", -1.0)  # try all the same
    frames, probe = some_frames(seed)
    found = finished(fitting(frames, probe, PIXEL_YX))
    assert found.excess > 0.9 * found.told_excess


@pytest.mark.parametrize("seed", [5, 7])
def test_a_detector_that_is_turned_is_not_taken_for_another_probe(seed: int) -> None:
    frames, probe = some_frames(seed)
    for orientation in ORIENTATIONS[1:]:
        view = View(SIZE, orientation=orientation)
        found = finished(
            fitting(replace(frames, counts=view.apply(frames.counts)), probe, PIXEL_YX)
        )
        assert found.rather_turned or found.excess > CLEARLY * found.told_excess


def test_pixels_that_do_not_measure_keep_the_far_field_of_the_probe() -> None:
    frames, probe = some_frames(5)
    valid = np.ones((SIZE, SIZE), bool)
    valid[:, SIZE // 2 - 1 : SIZE // 2 + 2] = False
    counts = frames.counts.copy()
    counts[:, ~valid] = 60_000
    far = far_field_yx(with_far_field(probe, counts, valid))
    told, mean = far_field_yx(probe), frames.counts.mean(0)
    shares = [a[valid] / a[valid].sum() for a in (far, mean)]
    np.testing.assert_allclose(shares[0], shares[1], atol=1e-6)
    shares = [a[~valid] / a[~valid].sum() for a in (far, told)]
    np.testing.assert_allclose(shares[0], shares[1], atol=1e-6)
    assert far[~valid].sum() / far.sum() == pytest.approx(told[~valid].sum() / told.sum(), rel=1e-3)


def test_counts_that_are_none_are_left_out_of_the_far_field() -> None:
    frames, probe = some_frames(5)
    counts = frames.counts.astype(np.float32)
    expected = with_far_field(probe, counts[1:])
    counts[0] = np.nan
    np.testing.assert_array_equal(with_far_field(probe, counts).modes, expected.modes)


def test_dark_frames_tell_of_no_far_field() -> None:
    frames, probe = some_frames(5)
    with pytest.raises(ProbeError):
        with_far_field(probe, np.zeros_like(frames.counts))
