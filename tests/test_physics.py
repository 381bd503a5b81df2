"""Probe, forward model and likelihood: conventions that every other part relies on."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ptycho_stream.errors import ProbeError
from ptycho_stream.physics.forward import (
    amplitude_nll,
    far_field,
    intensity,
    mode_sum,
    modulus_correction,
    poisson_nll,
)
from ptycho_stream.physics.probe import Probe, load_probe, shifted_modes, spectrum_of
from ptycho_stream.simulate.probes import random_probe, zone_plate_probe


@pytest.fixture
def golden():
    folder = os.environ.get("PTYCHO_STREAM_DATA")
    if folder is None:
        pytest.skip("PTYCHO_STREAM_DATA is not set: no golden forward model to compare with")
    with np.load(Path(folder) / "ptychopinn_forward_golden.npz") as held:
        return {name: held[name] for name in held.files}


def _waves(seed, *shape):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def test_forward_model_matches_the_golden_vector(golden):
    obj = torch.as_tensor(golden["x_real"] + 1j * golden["x_imag"])[0]
    probe = torch.as_tensor(golden["probe_real"] + 1j * golden["probe_imag"])[None, None]
    scale = float(golden["scale"].squeeze())
    model = intensity(scale * probe, obj)
    centred = torch.fft.fftshift(model, dim=(-2, -1))
    expected = torch.as_tensor(golden["expected_forward"])[0]
    torch.testing.assert_close(centred, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_poisson_likelihood_matches_the_golden_figure(golden):
    expected = torch.as_tensor(golden["expected_forward"]).double()
    counts = torch.as_tensor(golden["I_raw"]).double()
    assert float(poisson_nll(expected, counts)) == pytest.approx(116484.445, rel=1e-6)


@pytest.mark.parametrize("likelihood", [poisson_nll, amplitude_nll])
def test_masked_pixels_do_not_count_in_the_likelihoods(likelihood):
    expected, counts = torch.rand(1, 8, 8) + 1, torch.ones(1, 8, 8)
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    valid[0, 2, 3] = False
    poisoned = counts.clone()
    poisoned[0, 2, 3] = 1e9
    assert likelihood(expected, poisoned, valid) == likelihood(expected, counts, valid)
    poisoned[0, 2, 3] = -1.0
    assert likelihood(expected, poisoned, valid) == likelihood(expected, counts, valid)


def test_photons_are_the_same_in_both_planes():
    probe = random_probe(np.random.default_rng(0), 64, modes=3, photons=1e5)
    model = intensity(torch.as_tensor(probe.modes)[None], torch.ones(1, 64, 64) + 0j)
    assert float(model.sum()) == pytest.approx(1e5, rel=1e-4)


def test_modes_add_incoherently():
    modes, obj = torch.as_tensor(_waves(0, 1, 2, 32, 32)), torch.as_tensor(_waves(1, 1, 32, 32))
    apart = intensity(modes[:, :1], obj) + intensity(modes[:, 1:], obj)
    torch.testing.assert_close(intensity(modes, obj), apart)


def test_the_truth_needs_no_correction():
    probe, obj = torch.as_tensor(_waves(0, 1, 2, 32, 32)), torch.as_tensor(_waves(1, 4, 32, 32))
    amplitude = intensity(probe, obj).sqrt()
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    correction = modulus_correction(probe, probe.conj(), obj, amplitude, valid, 1e-9)
    assert float(correction.abs().max()) < 1e-3


def test_masked_pixels_ask_for_no_correction():
    probe, obj = torch.as_tensor(_waves(0, 1, 1, 32, 32)), torch.as_tensor(_waves(1, 1, 32, 32))
    amplitude = intensity(probe, obj).sqrt()
    amplitude[0, 5, 6] = 1e6
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    valid[0, 5, 6] = False
    correction = modulus_correction(probe, probe.conj(), obj, amplitude, valid, 1e-9)
    assert float(correction.abs().max()) < 1e-3


def _double(seed, *shape):
    return torch.as_tensor(_waves(seed, *shape)).to(torch.complex128)


def _some_invalid(*shape):
    valid = torch.ones(*shape, dtype=torch.bool)
    valid[..., 1, 2] = False
    return valid


def test_the_mean_error_matches_the_golden_figure(golden):
    expected = torch.as_tensor(golden["expected_forward"]).double()
    counts = torch.as_tensor(golden["I_raw"]).double()
    # The fixture's second figure: mean absolute error of the squared model, as its makers had it.
    assert float((expected.square() - counts).abs().mean()) == pytest.approx(178.5500, rel=1e-5)


def test_parseval_holds_for_any_object_and_any_modes():
    probe, obj = _double(0, 1, 3, 32, 32), _double(1, 2, 32, 32)
    exit_photons = (probe * obj.unsqueeze(1)).abs().square().sum((1, 2, 3))
    torch.testing.assert_close(intensity(probe, obj).sum((1, 2)), exit_photons)


@pytest.mark.parametrize("likelihood", [poisson_nll, amplitude_nll])
def test_gradients_of_model_and_likelihoods_are_those_of_finite_differences(likelihood):
    probe = _double(0, 2, 2, 4, 4).requires_grad_()
    obj = _double(1, 2, 4, 4).requires_grad_()
    counts = torch.poisson(intensity(probe, obj).detach() + 1)
    valid = _some_invalid(1, 4, 4)
    assert torch.autograd.gradcheck(intensity, (probe, obj))
    assert torch.autograd.gradcheck(
        lambda p, o: likelihood(intensity(p, o), counts, valid), (probe, obj)
    )


def test_the_modulus_correction_is_the_gradient_of_the_amplitude_likelihood():
    probe, obj = _double(0, 1, 3, 16, 16), _double(1, 2, 16, 16).requires_grad_()
    amplitude, valid = torch.rand(2, 16, 16, dtype=torch.float64) * 2, _some_invalid(1, 16, 16)
    likelihood = amplitude_nll(intensity(probe, obj), amplitude.square(), valid, floor=1e-6)
    (gradient,) = torch.autograd.grad(likelihood, obj)
    correction = modulus_correction(probe, probe.conj(), obj.detach(), amplitude, valid, 1e-6)
    torch.testing.assert_close(gradient, -4 * correction)


def test_the_poisson_gradient_is_the_known_one():
    """By O it is 2 sum P* IFFT[(1 - k / I) FFT(P O)] (Thibault and Guizar-Sicairos 2012)."""
    probe, obj = _double(0, 1, 2, 16, 16), _double(1, 1, 16, 16).requires_grad_()
    counts, valid = torch.rand(1, 16, 16, dtype=torch.float64) * 9, _some_invalid(1, 16, 16)
    (gradient,) = torch.autograd.grad(poisson_nll(intensity(probe, obj), counts, valid), obj)
    waves = far_field(probe, obj.detach())
    share = torch.where(valid, 1 - counts / mode_sum(waves), 0.0)
    back = torch.fft.ifft2(waves * share.unsqueeze(1), norm="ortho")
    torch.testing.assert_close(gradient, 2 * (probe.conj() * back).sum(1))


def test_both_likelihoods_are_least_at_the_counts():
    counts = torch.full((1, 4, 4), 50.0, dtype=torch.float64)
    for likelihood in (poisson_nll, amplitude_nll):
        at = likelihood(counts, counts)
        assert likelihood(1.05 * counts, counts) > at
        assert likelihood(0.95 * counts, counts) > at


def test_both_likelihoods_agree_near_bright_counts():
    """2 (sqrt k - sqrt l)^2 and the Poisson excess share (k - l)^2 / (2 l) to second order."""
    counts = torch.full((1, 4, 4), 1e6, dtype=torch.float64)
    expected = counts + 1000
    poisson = poisson_nll(expected, counts) - poisson_nll(counts, counts)
    amplitude = amplitude_nll(expected, counts)
    assert float(amplitude) == pytest.approx(float(poisson), rel=1e-2)
    assert float(amplitude) == pytest.approx(16 * 0.5, rel=1e-2)


def test_dark_pixels_have_a_finite_gradient():
    expected = torch.zeros(1, 4, 4, requires_grad=True)
    amplitude_nll(expected, torch.ones(1, 4, 4)).backward()
    assert expected.grad is not None and torch.isfinite(expected.grad).all()


def test_a_whole_pixel_shift_rolls_the_probe_towards_larger_indices():
    probe = zone_plate_probe(64)
    moved = shifted_modes(spectrum_of(probe), torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    down, left = np.roll(probe.modes, 1, 1), np.roll(probe.modes, -2, 2)
    np.testing.assert_allclose(moved[0].numpy(), down, atol=1e-4)
    np.testing.assert_allclose(moved[1].numpy(), left, atol=1e-4)


def test_a_shift_keeps_the_photons():
    probe = random_probe(np.random.default_rng(1), 64, modes=2, photons=1e4)
    moved = shifted_modes(spectrum_of(probe), torch.tensor([[0.37, -0.21]]))
    assert float(moved.abs().square().sum()) == pytest.approx(1e4, rel=1e-4)


def test_normalised_probe_carries_the_photons_asked_for():
    probe = Probe(_waves(2, 3, 16, 16)).normalised(1234.0)
    assert probe.photons == pytest.approx(1234.0, rel=1e-5)
    assert probe.power_yx.shape == (16, 16)
    assert probe.size_px == 16
    with pytest.raises(ProbeError, match="photons"):
        probe.normalised(0)


def test_leading_modes_keep_their_scale():
    probe = Probe(_waves(2, 3, 16, 16))
    np.testing.assert_array_equal(probe.leading(2).modes, probe.modes[:2])
    with pytest.raises(ProbeError, match="3 modes"):
        probe.leading(4)


@pytest.mark.parametrize(
    ("key", "shape"),
    [("probe", (1, 1, 1, 2, 16, 16)), ("probe", (2, 16, 16)), ("probeGuess", (16, 16))],
)
def test_probes_are_read_from_npz(tmp_path, key, shape):
    waves = _waves(3, *shape)
    np.savez(tmp_path / "p.npz", **{key: waves})
    probe = load_probe(tmp_path / "p.npz")
    np.testing.assert_array_equal(probe.modes, waves.reshape(-1, 16, 16))


def test_probes_are_read_from_ptychodus_products(tmp_path):
    waves = _waves(3, 2, 3, 16, 16)
    with h5py.File(tmp_path / "product.h5", "w") as file:
        file["probe"] = waves
    np.testing.assert_array_equal(load_probe(tmp_path / "product.h5").modes, waves[0])


def _nan():
    waves = _waves(0, 1, 8, 8)
    waves[0, 1, 1] = np.nan
    return waves


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((1, 8, 8), np.complex64), "zero"),
        (_nan(), "NaN"),
        (_waves(0, 1, 8, 9), "square"),
        (_waves(0, 2, 2, 8, 8), "square"),
        (np.ones((8, 8)), "complex"),
    ],
)
def test_unusable_probes_are_refused(tmp_path, array, said):
    np.savez(tmp_path / "p.npz", probe=array)
    with pytest.raises(ProbeError, match=said):
        load_probe(tmp_path / "p.npz")


def test_a_missing_probe_file_is_named(tmp_path):
    with pytest.raises(ProbeError, match=r"nowhere\.npz"):
        load_probe(tmp_path / "nowhere.npz")


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", data=np.ones(3))
    np.savez_compressed(tmp_path / "cut.npz", probe=_waves(0, 1, 64, 64))
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("text.npz", "other.npz", "cut.npz"):
        with pytest.raises(ProbeError, match=name):
            load_probe(tmp_path / name)
