"""The unrolled network: shapes, invariances, and what an untrained one does."""

import numpy as np
import pytest
import torch

from ptycho_stream.errors import ModelError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.unrolled import UnrolledNetwork, UnrolledSettings
from ptycho_stream.physics.forward import intensity
from ptycho_stream.simulate.probes import random_probe, zone_plate_probe
from ptycho_stream.simulate.samples import random_sample


@pytest.fixture(scope="module")
def network():
    return ModelRegistry().load()[0]


def _frames(size=64, frames=3, modes=1, photons=1e6):
    rng = np.random.default_rng(5)
    probe = torch.as_tensor(random_probe(rng, size, modes=modes, photons=photons).modes)[None]
    obj = torch.as_tensor(np.stack([random_sample(rng, (size, size)) for _ in range(frames)]))
    valid = torch.ones(1, size, size, dtype=torch.bool)
    return intensity(probe, obj).sqrt(), probe, valid, obj


@pytest.mark.parametrize(("size", "modes"), [(32, 1), (64, 3), (96, 2), (160, 1)])
def test_any_multiple_of_32_and_any_number_of_modes(network, size, modes):
    amplitude, probe, valid, _ = _frames(size, modes=modes)
    with torch.inference_mode():
        obj = network(amplitude, probe, valid).obj
    assert obj.shape == amplitude.shape
    assert obj.dtype == torch.complex64
    assert torch.isfinite(torch.view_as_real(obj)).all()


def test_only_the_noise_level_depends_on_the_photons(network):
    amplitude, probe, valid, _ = _frames()
    untrained = UnrolledNetwork()
    with torch.inference_mode():
        few = untrained(amplitude, probe, valid).obj
        many = untrained(amplitude * 50, probe * 50, valid).obj
        levels = network.noise(torch.tensor([0.1, 1e3]), torch.tensor([0.4, 4e3]))
    torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-3)
    steps = network.settings.steps
    short, long = levels[:, -1, :steps].exp().mean((1, 2, 3))
    assert short < long


def test_one_probe_for_all_frames_equals_one_each(network):
    amplitude, probe, valid, _ = _frames()
    each = probe.expand(len(amplitude), -1, -1, -1).contiguous()
    with torch.inference_mode():
        torch.testing.assert_close(
            network(amplitude, each, valid).obj,
            network(amplitude, probe, valid).obj,
            rtol=1e-4,
            atol=1e-4,
        )


def test_masked_pixels_may_hold_anything(network):
    amplitude, probe, valid, _ = _frames()
    valid = valid.clone()
    valid[:, 10:14] = False
    poisoned = amplitude.clone()
    poisoned[:, 10:14] = 1e4
    with torch.inference_mode():
        torch.testing.assert_close(
            network(poisoned, probe, valid).obj, network(amplitude, probe, valid).obj
        )


@pytest.mark.parametrize(("size", "modes"), [(32, 1), (64, 3), (96, 2)])
@pytest.mark.parametrize("one_probe", [True, False])
def test_inference_says_what_the_network_says(network, size, modes, one_probe):
    amplitude, probe, valid, _ = _frames(size, modes=modes)
    valid = valid.clone()
    valid[:, 10:14] = False
    if not one_probe:  # nor one mask
        valid = valid.repeat(3, 1, 1)
        valid[1, :9] = False
        amplitude[0, 10] = torch.nan  # masked
        probe = probe * torch.tensor([0.9, 1.0, 1.1])[:, None, None, None]
    inference = network.inference(torch.float32)
    with torch.inference_mode():
        expected = network(amplitude, probe, valid)
        for _ in range(2):  # its buffers are used again
            found = inference(amplitude, probe, valid)
            torch.testing.assert_close(found.obj, expected.obj, rtol=0, atol=1e-3)
            torch.testing.assert_close(found.confidence, expected.confidence, rtol=0, atol=1e-3)


def test_inference_takes_other_settings_and_shapes_in_turn():
    torch.manual_seed(1)
    network = UnrolledNetwork(UnrolledSettings(stages=2, steps=1, channels=(7, 8, 9), memory=3))
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    inference = network.inference(torch.float32)
    with torch.inference_mode():
        for size, frames in ((64, 3), (32, 2), (64, 3)):
            amplitude, probe, valid, _ = _frames(size, frames)
            expected, found = (one(amplitude, probe, valid) for one in (network, inference))
            torch.testing.assert_close(found.obj, expected.obj, rtol=1e-4, atol=1e-4)


def test_inference_in_bfloat16_is_close(network):
    amplitude, probe, valid, _ = _frames(64)
    with torch.inference_mode():
        exact = network.inference(torch.float32)(amplitude, probe, valid)
        rough = network.inference(torch.bfloat16)(amplitude, probe, valid)
    weight = exact.confidence * probe.abs().square().sum(1)
    error = (weight * (rough.obj - exact.obj).abs()).sum() / weight.sum()
    assert float(error) < 0.01


def test_the_network_trains(network):
    """Nothing that inference does in place gets in the way of gradients."""
    amplitude, probe, valid, obj = _frames(32)
    trained = UnrolledNetwork(UnrolledSettings(stages=2, channels=(8, 8, 8)))
    for stage in trained.stages(amplitude, probe, valid):
        (stage.obj - obj).abs().mean().backward(retain_graph=True)
    gradients = [parameter.grad for parameter in trained.correctors.parameters()]
    assert all(one is not None and torch.isfinite(one).all() for one in gradients)


def test_an_untrained_network_is_plain_alternating_projection():
    amplitude, probe, valid, obj = _frames()
    network = UnrolledNetwork()
    with torch.inference_mode():
        stages = network.stages(amplitude, probe, valid)
        misfits = [float((intensity(probe, s.obj).sqrt() - amplitude).norm()) for s in stages]
        start = float((intensity(probe, torch.ones_like(obj)).sqrt() - amplitude).norm())
    assert misfits[0] < start
    assert misfits == sorted(misfits, reverse=True)


def test_a_flat_object_is_seen_flat(network):
    probe = torch.as_tensor(zone_plate_probe(128, 1e6).modes)[None]
    valid = torch.ones(1, 128, 128, dtype=torch.bool)
    with torch.inference_mode():
        obj = network(intensity(probe, torch.ones(1, 128, 128) + 0j).sqrt(), probe, valid).obj
    power = probe.abs().square().sum(1)
    mean = (power * obj).sum() / power.sum()
    error = (power * (obj / mean - 1).abs()).sum() / power.sum()
    assert abs(float(mean.abs()) - 1) < 0.05
    assert float(error) < 0.05


def test_settings_survive_json():
    settings = UnrolledSettings(stages=2, channels=(8, 8, 8))
    assert UnrolledSettings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize(
    ("values", "said"),
    [({"depth": 3}, "depth"), ({"stages": 0}, "stages"), ({"channels": [8, 8]}, "channels")],
)
def test_settings_that_make_no_sense_are_refused(values, said):
    with pytest.raises(ModelError, match=said):
        UnrolledSettings.from_json(values)


def test_shapes_that_do_not_fit_are_refused(network):
    amplitude, probe, valid, _ = _frames(64)
    for form in (network, network.inference(torch.float32)):
        with pytest.raises(ModelError, match="multiple of 32"):
            form(amplitude[:, :60, :60], probe, valid)
        with pytest.raises(ModelError, match="probe"):
            form(amplitude, probe[..., :32, :32], valid)
        with pytest.raises(ModelError, match="mask"):
            form(amplitude, probe, valid[..., :32])
