"""Pre-training: repeatable, resumable, and its loss really falls."""

import numpy as np
import pytest
import torch

from ptycho_stream.errors import ModelError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.unrolled import UnrolledSettings
from ptycho_stream.training.budget import Budget
from ptycho_stream.training.losses import frame_errors
from ptycho_stream.training.pretrain import pretrain
from ptycho_stream.training.synthetic import SyntheticSettings, synthetic_batch

# Lightning speaks of its own deprecations and of loaders without workers.
pytestmark = pytest.mark.filterwarnings("ignore")

_NETWORK = UnrolledSettings(stages=2, steps=2, channels=(8, 8, 8), memory=2)
_DATA = SyntheticSettings(sizes_px=(32,), frames=4, photons=(1e5, 1e6, 1e7))


def _train(folder, steps, **changes):
    arguments = {"settings": _NETWORK, "data": _DATA, "workers": 0, "progress": False}
    return pretrain(folder, Budget(steps=steps), seed=3, threads=1, **(arguments | changes))


def test_batches_are_pure_functions_of_seed_and_number():
    one, two = (synthetic_batch(5, 7, SyntheticSettings()) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.amplitude, synthetic_batch(5, 8, SyntheticSettings()).amplitude)


def test_batches_fit_the_network():
    for number in range(8):
        batch = synthetic_batch(1, number, SyntheticSettings())
        frames, size = len(batch.amplitude), batch.amplitude.shape[-1]
        assert batch.obj.shape == batch.valid.shape == (frames, size, size)
        assert batch.probe.shape[0] == frames
        assert batch.obj.dtype == batch.probe.dtype == torch.complex64
        assert float(batch.weight.max()) == pytest.approx(1)
        assert (batch.amplitude[~batch.valid] == 0).all()


def test_the_error_ignores_a_patchs_phase_and_nothing_else():
    obj = torch.polar(torch.rand(2, 8, 8) + 0.5, torch.rand(2, 8, 8))
    weight = torch.rand(2, 8, 8)
    turned = obj * np.exp(0.7j)
    absolute, relative = frame_errors(turned.to(torch.complex64), obj, weight)
    assert float(absolute.max()) < 1e-3
    assert float(relative.max()) < 1e-3
    _, half = frame_errors(0.5 * obj, obj, weight)
    assert float(half[0]) == pytest.approx(0.5, rel=1e-3)


def test_frames_of_one_sample_may_be_asked_to_agree_on_a_phase():
    obj = torch.polar(torch.ones(4, 8, 8), torch.rand(4, 8, 8))
    weight = torch.ones(4, 8, 8)
    together, apart = obj * np.exp(0.7j), obj.clone()
    apart[1::2] *= np.exp(0.7j)
    assert float(frame_errors(together, obj, weight, 4)[1].max()) < 1e-3
    assert float(frame_errors(apart, obj, weight, 1)[1].max()) < 1e-3
    assert float(frame_errors(apart, obj, weight, 2)[1].min()) > 0.2


def test_training_is_repeatable_and_its_rate_falls(tmp_path):
    first, second = (_train(tmp_path / name, 4) for name in ("a", "b"))
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name])
    assert first.metrics["val_nrmse"] > 0
    assert first.training["steps"] == 4
    assert (tmp_path / "a" / "metrics.csv").stat().st_size > 0


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    whole = _train(tmp_path / "whole", 6, validate_every=4)
    (interrupted,) = (tmp_path / "whole").glob("*step=4.ckpt")
    resumed = _train(tmp_path / "rest", 6, validate_every=4, resume=interrupted)
    assert resumed.training["steps"] == 6
    for name, tensor in whole.network.state_dict().items():
        torch.testing.assert_close(tensor, resumed.network.state_dict()[name])


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    short = _train(tmp_path / "short", 1)
    longer = _train(tmp_path / "long", 150)
    assert longer.metrics["val_error"] < 0.97 * short.metrics["val_error"]


def test_a_wall_clock_budget_ends_the_run(tmp_path):
    result = pretrain(
        tmp_path,
        Budget(minutes=0.02),
        settings=_NETWORK,
        data=_DATA,
        workers=0,
        progress=False,
    )
    assert result.training["seconds"] < 20


def test_a_trained_model_goes_to_the_registry(tmp_path):
    result = _train(tmp_path / "run", 2)
    registry = ModelRegistry(tmp_path / "models")
    manifest = result.save(registry, "mine")
    network, loaded = registry.load("mine")
    assert loaded == manifest
    assert loaded.seed == 3
    assert torch.equal(network.step_size, result.network.step_size)


@pytest.mark.parametrize("given", [{}, {"steps": 0}, {"steps": 1, "minutes": 1.0}])
def test_a_budget_is_one_positive_figure(given):
    with pytest.raises(ModelError, match="budget"):
        Budget(**given)


def test_resuming_from_nothing_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"gone\.ckpt"):
        _train(tmp_path, 2, resume=tmp_path / "gone.ckpt")
