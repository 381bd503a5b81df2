"""The encoder-decoder network: shape, normalisation, groups, and that it does not collapse."""

import numpy as np
import pytest
import torch

from ptycho_stream.errors import ModelError
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.cnn import CnnNetwork, CnnSettings
from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.probe import Probe, shifted_modes, spectrum_of
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.simulate.experiment import simulate_experiment


@pytest.fixture(scope="module")
def scan():
    return simulate_experiment(seed=3, frames=32, size_px=64, photons=1e5)


@pytest.fixture
def tensors(scan):
    """Amplitude (8, 64, 64), probe (1, 1, 64, 64) and mask of the first frames."""
    counts = torch.as_tensor(scan.counts[:8].astype(np.float32))
    amplitude = torch.fft.ifftshift(counts.sqrt(), dim=(-2, -1))
    return amplitude, torch.as_tensor(scan.probe.modes)[None], torch.ones(1, 64, 64).bool()


def network(seed=0, **settings):
    torch.manual_seed(seed)
    return CnnNetwork(CnnSettings(**({"n_filters_scale": 1} | settings))).eval()


def test_the_size_is_that_of_the_published_network():
    weights = sum(p.numel() for p in CnnNetwork(CnnSettings(size_px=64)).parameters())
    assert weights == pytest.approx(2.34e6, rel=0.01)


@pytest.mark.parametrize(
    ("size_px", "levels"), [(32, 2), (64, 3), (96, 3), (128, 4), (224, 4), (256, 5), (544, 5)]
)
def test_the_depth_follows_the_frame_and_any_multiple_of_32_works(size_px, levels):
    made = network(size_px=size_px)
    assert made.settings.levels == levels
    frames = torch.rand(1, size_px, size_px)
    probe = torch.ones(1, 1, size_px, size_px, dtype=torch.complex64)
    with torch.no_grad():
        found = made(frames, probe, torch.ones(1, size_px, size_px).bool())
    assert found.obj.shape == frames.shape and found.obj.dtype == torch.complex64
    assert torch.isfinite(found.obj.abs()).all()


@pytest.mark.parametrize("activation", ["sigmoid", "swish", "softplus", "relu"])
@pytest.mark.parametrize("gridsize", [1, 2])
def test_an_untrained_network_is_not_collapsed(tensors, activation, gridsize):
    with torch.no_grad():
        found = network(amp_activation=activation, gridsize=gridsize)(*tensors)
    modulus = found.obj.abs()
    assert 0.7 < modulus.mean() < 1.1
    assert found.obj.std((-2, -1)).min() > 0.005  # from pixel to pixel
    assert found.obj.std(0).mean() > 0.003  # from frame to frame
    assert torch.equal(found.confidence, torch.ones_like(modulus))


def test_photons_and_masked_pixels_do_not_matter(tensors):
    amplitude, probe, valid = tensors
    made = network()
    with torch.no_grad():
        expected = made(amplitude, probe, valid).obj
        brighter = made(amplitude * 30, probe * 30, valid).obj
        valid = valid.clone()
        valid[:, 10:13] = False
        one, other = amplitude.clone(), amplitude.clone()
        one[:, 10:13], other[:, 10:13] = 1e4, 0.0
        torch.testing.assert_close(made(one, probe, valid), made(other, probe, valid))
    torch.testing.assert_close(brighter, expected, rtol=1e-4, atol=1e-5)


def test_frames_of_a_group_come_out_in_their_order(tensors):
    """Each frame has a channel of its own, in and out, and groups do not see each other."""
    amplitude, probe, valid = tensors
    made = network(gridsize=2)
    assert made.group_frames == 4
    with torch.no_grad():
        both = made(amplitude, probe, valid).obj
        second = made(amplitude[4:], probe, valid).obj
        turned = made(amplitude.roll(4, 0), probe, valid).obj
        swapped = made(amplitude[[0, 2, 1, 3]], probe, valid).obj
    torch.testing.assert_close(both[4:], second)
    torch.testing.assert_close(turned, both.roll(4, 0))
    assert not torch.allclose(swapped, both[[0, 2, 1, 3]], atol=1e-4)


def test_patches_follow_the_fraction_of_the_probes_shift(tensors, scan):
    """The frames do not show it, so a patch has to be moved with the probe that is given."""
    amplitude, _, valid = tensors
    made = network()
    spectrum = spectrum_of(scan.probe)
    moved, resting = torch.tensor([[0.4, -0.3]]), torch.zeros(1, 2)
    with torch.no_grad():
        there = made(amplitude[:1], shifted_modes(spectrum, moved), valid).obj[0]
        here = made(amplitude[:1], shifted_modes(spectrum, resting), valid).obj[0]
    expected = (
        (0.6 * 0.7) * here
        + (0.4 * 0.7) * here.roll(1, 0)
        + (0.6 * 0.3) * here.roll(-1, 1)
        + (0.4 * 0.3) * here.roll((1, -1), (0, 1))
    )
    torch.testing.assert_close(there[2:-2, 2:-2], expected[2:-2, 2:-2], rtol=0, atol=2e-3)


def test_a_foreign_models_patches_stay_in_the_window_of_its_probe(tensors, scan):
    """Given where the probe's centre of intensity lay in its window, nothing is moved."""
    amplitude, probe, valid = tensors
    off_center = probe.roll((3, -2), (-2, -1))
    found = network()._offset_px(off_center.abs().square().sum(1), 1)
    at_home = network()._offset_px(probe.abs().square().sum(1), 1)
    torch.testing.assert_close(found - at_home, torch.tensor([[3.0, -2.0]]), atol=1e-3, rtol=0)
    told = network(probe_center_yx_px=tuple(found[0].tolist()))
    with torch.no_grad():
        one = told(amplitude, off_center, valid).obj
    reference = network(probe_center_yx_px=tuple(at_home[0].tolist()))
    with torch.no_grad():
        torch.testing.assert_close(one, reference(amplitude, probe, valid).obj, atol=1e-4, rtol=0)


def test_the_confidence_head_starts_at_one_half_and_learns(tensors):
    made = network(confidence=True)
    found = made(*tensors)
    torch.testing.assert_close(found.confidence, torch.full_like(found.confidence, 0.5))
    error = 0.1 * (1 / found.confidence - 1).sqrt()
    (error - 0.02).abs().mean().backward()
    assert made.log_error is not None and made.log_error.bias is not None
    assert made.log_error.bias.grad is not None and (made.log_error.bias.grad > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(("size_px", "gridsize"), [(64, 1), (64, 2), (128, 1)])
def test_training_through_the_forward_model_falls_and_does_not_collapse(size_px, gridsize):
    scan = simulate_experiment(seed=1, frames=32, size_px=size_px, photons=1e6)
    frames = scan.counts[: 512 // size_px]
    counts = torch.as_tensor(frames.astype(np.float32))
    amplitude = torch.fft.ifftshift(counts.sqrt(), dim=(-2, -1))
    probe, valid = torch.as_tensor(scan.probe.modes)[None], torch.ones(1, size_px, size_px).bool()
    made = network(size_px=size_px, gridsize=gridsize).train()
    optimiser = torch.optim.Adam(made.parameters(), 1e-3)
    losses = []
    for _ in range(40):
        found = made(amplitude, probe, valid)
        modelled = intensity(probe, found.obj).clamp_min(1e-6).sqrt()
        loss = (modelled - amplitude).square().sum() / amplitude.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]
    predictor = Predictor(made, scan.probe)
    verdicts = predictor.predict_judged(frames, np.zeros((len(frames), 2))).verdicts
    assert verdicts.demand.max() > 0.1  # there is something to see
    assert not verdicts.collapsed.any() and verdicts.spread.min() > 0.05, verdicts


def test_it_is_saved_and_loaded_by_the_registry(tensors, tmp_path):
    made = network(gridsize=2, confidence=True, amp_activation="swish")
    registry = ModelRegistry(tmp_path)
    registry.save(made, Manifest("mine", "cnn", made.settings_json()))
    loaded, manifest = registry.load("mine")
    assert manifest.settings["gridsize"] == 2 and loaded.group_frames == 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(*tensors), made(*tensors))


def test_settings_come_back_from_json():
    settings = CnnSettings(size_px=96, amp_activation="relu", probe_center_yx_px=(0.5, -1.0))
    assert CnnSettings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"size_px": 100}, "multiple of 32"),
        ({"gridsize": 0}, "gridsize"),
        ({"gridsize": True}, "gridsize"),
        ({"n_filters_scale": 1.5}, "n_filters_scale"),
        ({"amp_activation": "tanh"}, "amp_activation"),
        ({"confidence": 1}, "confidence"),
        ({"probe_center_yx_px": [1]}, "probe_center_yx_px"),
        ({"probe_center_yx_px": 3}, "make no sense"),
        ({"depth": 3}, "depth"),
    ],
)
def test_senseless_settings_are_refused_by_name(values, named):
    with pytest.raises(ModelError, match=named):
        CnnSettings.from_json(values)


@pytest.mark.parametrize(
    ("frames", "probe", "valid", "said"),
    [
        ((4, 32, 32), (1, 1, 64, 64), (1, 64, 64), "made for"),
        ((3, 64, 64), (1, 1, 64, 64), (1, 64, 64), "groups of 4"),
        ((4, 64, 64), (1, 64, 64), (1, 64, 64), "probe"),
        ((4, 64, 64), (1, 1, 64, 64), (64, 64), "mask"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(frames, probe, valid, said):
    with pytest.raises(ModelError, match=said):
        network(gridsize=2)(
            torch.zeros(frames), torch.zeros(probe, dtype=torch.complex64), torch.ones(valid).bool()
        )


def test_the_predictor_passes_whole_groups_only(scan):
    predictor = Predictor(network(gridsize=2), Probe(scan.probe.modes), batch_size=6)
    assert predictor.batch_size == 4
    with pytest.raises(ModelError, match="groups of 4"):
        predictor.predict(scan.counts[:6], np.zeros((6, 2)))
    apart = Predictor(network(gridsize=2), Probe(scan.probe.modes), batch_size=1)
    together = Predictor(network(gridsize=2), Probe(scan.probe.modes), batch_size=16)
    one, other = (p.predict(scan.counts[:16], np.zeros((16, 2)))[0] for p in (apart, together))
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
