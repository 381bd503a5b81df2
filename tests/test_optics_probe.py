"""Probes made from the settings' optics: as wide as formulas say, on either side of the focus."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scan_samples import make_header

from ptycho_stream.errors import ProbeError
from ptycho_stream.geometry import wavelength_m
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.optics_probe import probe_of_optics
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.recipe import Recipe, load_recipe, told_probe
from ptycho_stream.settings import (
    GaussianSettings,
    OpticsSettings,
    PinholeSettings,
    ProbeSettings,
    Settings,
    ZonePlateSettings,
)

ENERGY_EV, PIXEL_M, SIZE = 8800.0, 10e-9, 128
WAVELENGTH_M = wavelength_m(ENERGY_EV)
PLATE = ZonePlateSettings(
    diameter_m=160e-6, outer_zone_width_m=50e-9, central_stop_m=60e-6, defocus_m=150e-6
)
PINHOLE = PinholeSettings(diameter_m=500e-9, distance_m=200e-6)
GAUSSIAN = GaussianSettings(fwhm_m=200e-9, defocus_m=500e-6)


def made(
    optics: OpticsSettings, pixel_yx_m: tuple[float, float] = (PIXEL_M, PIXEL_M), size: int = SIZE
) -> Probe:
    return probe_of_optics(optics, ENERGY_EV, pixel_yx_m, size, photons=2e5)


def middle_line(power: np.ndarray, axis: int = 1) -> np.ndarray:
    """The profile through the centre of a picture, at N / 2, along an axis."""
    return np.take(power, len(power) // 2, axis=1 - axis).astype(np.float64)


def fwhm_px(power: np.ndarray, axis: int = 1) -> float:
    line = middle_line(power, axis)
    above = line >= line.max() / 2
    first, last = np.flatnonzero(above)[[0, -1]]
    half = line.max() / 2
    left = first - (line[first] - half) / (line[first] - line[first - 1])
    right = last + (line[last] - half) / (line[last] - line[last + 1])
    return float(right - left)


def propagated(probe: Probe, distance_m: float) -> np.ndarray:
    """The first mode so far downstream: without Fresnel's approximation."""
    k = np.fft.fftfreq(probe.size_px, PIXEL_M)
    root = np.sqrt(1 / WAVELENGTH_M**2 - k[:, None] ** 2 - k**2) - 1 / WAVELENGTH_M
    wave = np.fft.fft2(probe.modes[0].astype(np.complex128))
    return np.fft.ifft2(wave * np.exp(2j * np.pi * distance_m * root))


@pytest.mark.parametrize("optics", [PLATE, PINHOLE, GAUSSIAN])
def test_a_probe_is_one_mode_in_the_middle_with_the_photons_asked_for(optics):
    probe = made(optics)
    assert probe.modes.shape == (1, SIZE, SIZE) and probe.modes.dtype == np.complex64
    assert probe.photons == pytest.approx(2e5, rel=1e-5)
    index, power = np.arange(SIZE), probe.power_yx / probe.power_yx.sum()
    assert power.sum(1) @ index == pytest.approx((SIZE - 1) / 2, abs=0.05)
    assert power.sum(0) @ index == pytest.approx((SIZE - 1) / 2, abs=0.05)
    np.testing.assert_array_equal(probe.modes, made(optics).modes)


def test_a_zone_plate_in_focus_makes_the_airy_disc_of_its_outermost_zone():
    """Full width at half maximum 1.03 wavelength / (2 NA), and 2 NA = wavelength / zone width."""
    plate = ZonePlateSettings(diameter_m=160e-6, outer_zone_width_m=80e-9)
    assert fwhm_px(made(plate).power_yx) * PIXEL_M == pytest.approx(1.03 * 80e-9, rel=0.04)


@pytest.mark.parametrize("optics", [PLATE, GAUSSIAN])
@pytest.mark.parametrize("sign", [1, -1])
def test_positive_defocus_is_downstream(optics, sign):
    focus = made(optics.model_copy(update={"defocus_m": 0.0}))
    distance_m = sign * optics.defocus_m
    defocused = made(optics.model_copy(update={"defocus_m": distance_m})).modes[0]
    wave = propagated(focus, distance_m)
    alike = abs(np.vdot(wave, defocused)) / np.linalg.norm(wave) / np.linalg.norm(defocused)
    assert alike > 0.999
    # Light runs apart behind the focus, and together before it.
    index = np.arange(SIZE) - (SIZE - 1) / 2
    slope = np.angle(defocused[:, 1:] * defocused[:, :-1].conj())
    weight = np.abs(defocused[:, 1:] * defocused[:, :-1]) * (index[1:] - 0.5)
    assert np.sign((slope * weight).sum()) == sign


def test_a_pinhole_is_a_disc_near_by_and_an_airy_disc_far_away():
    near = made(PinholeSettings(diameter_m=500e-9, distance_m=0))
    assert fwhm_px(near.power_yx) * PIXEL_M == pytest.approx(500e-9, rel=0.03)
    spectrum = np.fft.fftshift(np.abs(np.fft.fft2(near.modes[0], (1024, 1024))) ** 2)
    line = middle_line(spectrum)[512:]
    first = int(np.argmax(np.diff(line) > 0))
    assert first / (1024 * PIXEL_M) == pytest.approx(1.22 / 500e-9, rel=0.03)

    diameter_m, distance_m = 100e-9, 250e-6  # far: the Fresnel number is 0.07
    far = made(PinholeSettings(diameter_m=diameter_m, distance_m=distance_m))
    line = middle_line(far.power_yx)[SIZE // 2 :]
    first = int(np.argmax(np.diff(line) > 0)) + 0.5
    assert first * PIXEL_M == pytest.approx(1.22 * WAVELENGTH_M * distance_m / diameter_m, rel=0.06)


def test_a_pinhole_casts_the_shadow_that_fresnel_computed():
    """Against a propagation of a hard disc with four times finer pixels in a wider window."""
    size, fine, pixel_m = SIZE, 1024, PIXEL_M / 2
    index = np.arange(fine) - (fine - 1) / 2
    disc = np.hypot(index[:, None], index) * pixel_m <= PINHOLE.diameter_m / 2
    k = np.fft.fftfreq(fine, pixel_m)
    phase = -np.pi * WAVELENGTH_M * PINHOLE.distance_m * (k[:, None] ** 2 + k**2)
    wave = np.fft.ifft2(np.fft.fft2(disc) * np.exp(1j * phase))
    coarse = wave.reshape(fine // 2, 2, fine // 2, 2).mean((1, 3))
    edge = (len(coarse) - size) // 2
    truth, found = coarse[edge:-edge, edge:-edge], made(PINHOLE).modes[0]
    alike = abs(np.vdot(truth, found)) / np.linalg.norm(truth) / np.linalg.norm(found)
    assert alike > 0.995


def test_a_gaussian_beam_is_as_wide_as_told_and_widens_by_its_rayleigh_range():
    waist = made(GaussianSettings(fwhm_m=200e-9))
    assert fwhm_px(waist.power_yx) * PIXEL_M == pytest.approx(200e-9, rel=0.01)
    radius_m = 200e-9 / np.sqrt(2 * np.log(2))
    rayleigh_m = np.pi * radius_m**2 / WAVELENGTH_M
    for distance_m in (rayleigh_m, -rayleigh_m):
        wide = made(GaussianSettings(fwhm_m=200e-9, defocus_m=distance_m))
        assert fwhm_px(wide.power_yx) * PIXEL_M == pytest.approx(np.sqrt(2) * 200e-9, rel=0.01)


@pytest.mark.parametrize("optics", [PLATE, PINHOLE, GAUSSIAN])
@pytest.mark.parametrize("pixel_yx_m", [(10e-9, 15e-9), (15e-9, 10e-9)])
def test_pixels_that_are_not_square_leave_the_beam_round(optics, pixel_yx_m):
    probe = made(optics, pixel_yx_m)
    index, power = np.arange(SIZE) - (SIZE - 1) / 2, probe.power_yx / probe.power_yx.sum()
    rms_m = [np.sqrt(power.sum(1 - axis) @ (index * pixel_yx_m[axis]) ** 2) for axis in (0, 1)]
    assert rms_m[0] == pytest.approx(rms_m[1], rel=0.03)
    square = made(optics)
    power = square.power_yx / square.power_yx.sum()
    assert rms_m[0] == pytest.approx(np.sqrt(power.sum(1) @ (index * PIXEL_M) ** 2), rel=0.05)


@pytest.mark.parametrize(
    ("optics", "said"),
    [
        (PLATE.model_copy(update={"outer_zone_width_m": 9e-9}), "wider outermost zone"),
        (PLATE.model_copy(update={"defocus_m": -800e-6}), "128 px holds: come nearer to the focus"),
        (PINHOLE.model_copy(update={"diameter_m": 20e-9}), "at least 3"),
        (PINHOLE.model_copy(update={"diameter_m": 1.3e-6}), "128 px holds: bring the pinhole"),
        (PINHOLE.model_copy(update={"distance_m": 0.01}), "128 px holds: bring the pinhole"),
        (GAUSSIAN.model_copy(update={"fwhm_m": 10e-9, "defocus_m": 0.0}), "a wider beam"),
        (GAUSSIAN.model_copy(update={"defocus_m": 0.01}), "128 px holds: come nearer to the waist"),
    ],
)
def test_optics_that_do_not_suit_the_pixels_are_refused(optics, said):
    with pytest.raises(ProbeError, match=said):
        made(optics)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    settings = Settings.model_validate(
        {"probe": {"optics": PLATE.model_dump()}, "reconstruct": {"size_px": SIZE}}
    )
    return load_recipe(settings)


BEAM = {
    "size_px": SIZE,
    "pixel_yx_m": (PIXEL_M, PIXEL_M),
    "geometry": DetectorGeometry(photon_energy_eV=ENERGY_EV),
}


def test_each_scan_gets_the_probe_of_its_own_energy_and_pixels(recipe):
    header = make_header(**BEAM)
    made_for = recipe.made_for(header)
    assert made_for.probe_digest == recipe.made_for(header).probe_digest
    alike = made(PLATE).normalised(made_for.probe.photons).modes
    np.testing.assert_allclose(made_for.probe.modes, alike, atol=1e-4 * np.abs(alike).max())
    for change in (
        {"geometry": DetectorGeometry(photon_energy_eV=9000.0)},
        {"pixel_yx_m": (11e-9, 11e-9)},
    ):
        other = recipe.made_for(make_header(**BEAM | change))
        assert other.probe_digest != made_for.probe_digest
        # A refined probe begins the next scan as long as the settings name the same optics.
        assert other.origin_digest == made_for.origin_digest == recipe.origin_digest
    assert (
        recipe.made_for(
            make_header(**BEAM | {"size_px": 64, "pixel_yx_m": (2e-8, 2e-8)})
        ).probe.size_px
        == 64
    )


def test_training_takes_the_same_probe_as_the_image(recipe, tmp_path):
    header = make_header(**BEAM)
    found = told_probe(ProbeSettings(optics=PLATE), header)
    np.testing.assert_array_equal(found.modes, recipe.made_for(header).probe.modes)
    np.savez(tmp_path / "probe.npz", probe=np.concatenate([found.modes, found.modes]))
    of_file = told_probe(ProbeSettings(path=tmp_path / "probe.npz", modes=1), header)
    np.testing.assert_array_equal(of_file.modes, found.modes)


def test_a_scan_that_the_optics_do_not_suit_says_so(recipe):
    with pytest.raises(ProbeError, match=r"does not suit scan .*wider outermost zone"):
        recipe.made_for(make_header(**BEAM | {"pixel_yx_m": (6e-8, 6e-8)}))
    with pytest.raises(ProbeError, match=r"no photon energy.*\[geometry\]"):
        recipe.made_for(make_header(**BEAM | {"geometry": DetectorGeometry()}))
    # Without a pixel size there is no image, for a reason of its own.
    assert recipe.made_for(make_header(**BEAM | {"pixel_yx_m": None})) is recipe


def test_other_optics_and_a_file_have_other_origins(recipe):
    network, manifest = ModelRegistry().load()
    same = Recipe(network, manifest.name, "", recipe.probe, None, torch.device("cpu"), 16)
    assert same.origin_digest == same.probe_digest != recipe.origin_digest
    assert same.made_for(make_header(**BEAM)) is same
