"""The predictor: frames as the store's view gives them in, patches and weights out."""

import gc
import threading
import time

import numpy as np
import pytest
import torch

from ptycho_stream.errors import ModelError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.network import Network, Prediction
from ptycho_stream.physics.probe import shifted_modes, spectrum_of
from ptycho_stream.reconstruct import devices
from ptycho_stream.reconstruct.device_batches import bucket_sizes
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.workers import Workers
from ptycho_stream.simulate.experiment import simulate_experiment


@pytest.fixture(scope="module")
def scan():
    return simulate_experiment(seed=2, frames=20, size_px=64, photons=1e6)


@pytest.fixture(scope="module")
def network():
    return ModelRegistry().load()[0]


def _corners(scan):
    """Whole-pixel window corners in the object, and what they leave over."""
    size = scan.counts.shape[-1]
    corner = (scan.positions_yx_m - scan.origin_yx_m) / scan.pixel_yx_m - (size - 1) / 2
    whole = np.floor(corner + 0.5).astype(int)
    return whole, corner - whole


@pytest.mark.usefixtures("place")
def test_patches_resemble_the_sample(scan, network):
    whole, shift = _corners(scan)
    patches, weights = Predictor(network, scan.probe).predict(scan.counts, shift)
    size = scan.counts.shape[-1]
    for patch, weight, (y, x) in zip(patches, weights, whole, strict=True):
        truth = scan.object[y : y + size, x : x + size]
        patch = patch * np.exp(1j * np.angle((weight * truth * patch.conj()).sum()))
        flat = truth[weight > 0.1].mean()
        error = (weight * np.abs(patch - truth) ** 2).sum()
        assert error < 0.8 * (weight * np.abs(flat - truth) ** 2).sum() + 0.02 * weight.sum()


@pytest.mark.usefixtures("place")
def test_a_patch_does_not_depend_on_its_batch(scan, network):
    _, shift = _corners(scan)
    together, weights = Predictor(network, scan.probe, batch_size=16).predict(scan.counts, shift)
    alone = Predictor(network, scan.probe, batch_size=3)
    for start, stop in ((0, 1), (1, 8), (8, 20)):
        patches, part = alone.predict(scan.counts[start:stop], shift[start:stop])
        np.testing.assert_allclose(patches, together[start:stop], rtol=0, atol=2e-5)
        np.testing.assert_allclose(part, weights[start:stop], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.float32, np.float64])
def test_any_dtype_and_any_strides(scan, network, dtype):
    _, shift = _corners(scan)
    predictor = Predictor(network, scan.probe)
    expected, _ = predictor.predict(scan.counts[:4], shift[:4])
    strided = np.zeros((4, 80, 80), dtype)
    strided[:, 8:72, 8:72] = scan.counts[:4]
    strided.flags.writeable = False
    patches, _ = predictor.predict(strided[:, 8:72, 8:72], shift[:4])
    np.testing.assert_array_equal(patches, expected)


@pytest.mark.usefixtures("place")
def test_masked_pixels_may_hold_the_dtypes_maximum(scan, network):
    _, shift = _corners(scan)
    valid = np.ones((64, 64), bool)
    valid[20:23] = False
    bad = scan.counts[:4].copy()
    bad[:, ~valid] = 65535
    predictor = Predictor(network, scan.probe)
    expected, _ = predictor.predict(scan.counts[:4], shift[:4], valid)
    patches, _ = predictor.predict(bad, shift[:4], valid)
    np.testing.assert_array_equal(patches, expected)


class _HalfSure(Network):
    def settings_json(self):
        return {}

    def stages(self, amplitude, probe, valid):
        return [Prediction(torch.ones_like(amplitude) + 0j, torch.full_like(amplitude, 0.5))]


@pytest.mark.usefixtures("place")
def test_the_weight_is_the_shifted_probes_intensity_times_the_confidence(scan):
    shift = np.array([[0.4, -0.3]])
    _, weights = Predictor(_HalfSure(), scan.probe).predict(scan.counts[:1], shift)
    modes = shifted_modes(spectrum_of(scan.probe), torch.as_tensor(shift, dtype=torch.float32))
    power = modes[0].abs().square().sum(0).numpy()
    np.testing.assert_allclose(weights[0], 0.5 * power / scan.probe.power_yx.max(), atol=1e-6)
    assert weights.dtype == np.float32


@pytest.mark.usefixtures("place")
def test_the_weighted_mean_of_a_patch_has_no_phase(scan, network):
    _, shift = _corners(scan)
    patches, weights = Predictor(network, scan.probe).predict(scan.counts, shift)
    mean = (patches * weights).sum((1, 2)) / weights.sum((1, 2))
    np.testing.assert_allclose(np.angle(mean), 0, atol=1e-4)


@pytest.fixture
def torch_threads():
    """Sets torch's threads, and the old number again in the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _worker_threads(besides=()):
    named = [one for one in threading.enumerate() if one.name.startswith("predict")]
    return [one for one in named if one not in besides]


def test_the_number_of_workers_does_not_change_the_result_by_a_bit(scan, network, torch_threads):
    _, shift = _corners(scan)
    torch_threads(1)
    alone = Predictor(network, scan.probe).predict_judged(scan.counts, shift)
    for workers in (2, 3):
        torch_threads(workers)
        with Predictor(network, scan.probe) as predictor:
            shared = predictor.predict_judged(scan.counts, shift)
        np.testing.assert_array_equal(shared.patches, alone.patches)
        np.testing.assert_array_equal(shared.weights, alone.weights)
        np.testing.assert_array_equal(shared.verdicts.spread, alone.verdicts.spread)


def test_patches_made_on_a_device_are_those_of_the_host(scan, network, monkeypatch):
    """In batches that are filled up, and with more of them than there are slots."""
    _, shift = _corners(scan)
    valid = np.random.default_rng(0).random((64, 64)) > 0.02
    # Batches of other sizes round otherwise, which flips roundings to bfloat16.
    monkeypatch.setattr(type(network), "half_precision", False)
    host = Predictor(network, scan.probe, batch_size=6)
    monkeypatch.setattr(devices, "computes_on_host", lambda _: False)
    device = Predictor(network, scan.probe, batch_size=6)
    for frames in (20, 1, 5, 6, 9):
        here, there = (
            one.predict_judged(scan.counts[:frames], shift[:frames], valid)
            for one in (host, device)
        )
        np.testing.assert_allclose(there.patches, here.patches, rtol=0, atol=5e-4)
        np.testing.assert_allclose(there.weights, here.weights, rtol=0, atol=5e-4)
        np.testing.assert_allclose(there.verdicts.spread, here.verdicts.spread, rtol=1e-3)
        np.testing.assert_allclose(there.verdicts.demand, here.verdicts.demand, rtol=1e-3)
        np.testing.assert_array_equal(there.verdicts.collapsed, here.verdicts.collapsed)


class _InFours(_HalfSure):
    """Shows each frame the mean of its group, so that groups that are torn apart are seen."""

    group_frames = 4

    def stages(self, amplitude, probe, valid):
        size = amplitude.shape[-1]
        groups = amplitude.reshape(-1, 4, size, size).mean(1).repeat_interleave(4, 0)
        return [Prediction(groups + 0j, torch.ones_like(groups))]


def test_groups_stay_whole_on_a_device(scan, monkeypatch):
    here = Predictor(_InFours(), scan.probe, batch_size=13).predict(scan.counts, np.zeros((20, 2)))
    monkeypatch.setattr(devices, "computes_on_host", lambda _: False)
    there = Predictor(_InFours(), scan.probe, batch_size=13).predict(scan.counts, np.zeros((20, 2)))
    np.testing.assert_allclose(there[0], here[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("most", "group", "sizes"),
    [(1, 1, [1]), (16, 1, [1, 4, 16]), (6, 1, [1, 4, 6]), (48, 4, [4, 16, 48])],
)
def test_batches_have_few_sizes(most, group, sizes):
    assert bucket_sizes(most, group) == sizes


class _Failing(_HalfSure):
    def stages(self, amplitude, probe, valid):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_worker_raises_comes_out_and_the_predictor_goes_on(scan, torch_threads, workers):
    torch_threads(workers)
    with Predictor(_Failing(), scan.probe, batch_size=4) as predictor:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="out of memory"):
                predictor.predict(scan.counts, np.zeros((20, 2)))


def test_workers_end_when_closed_and_when_forgotten(scan, network, torch_threads):
    torch_threads(2)
    others = _worker_threads()
    predictor = Predictor(network, scan.probe)
    predictor.warm_up()
    predictor.close()
    assert not _worker_threads(others)
    predictor = Predictor(network, scan.probe)
    predictor.warm_up()
    assert len(_worker_threads(others)) == 2
    del predictor
    gc.collect()
    deadline_s = time.monotonic() + 10
    while _worker_threads(others) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not _worker_threads(others)


def test_a_worker_computes_on_one_core_and_the_caller_as_before(torch_threads):
    torch_threads(3)
    with Workers(2) as workers:
        told = [workers.submit(torch.get_num_threads) for _ in range(8)]
        assert {one.result() for one in told} == {1}
    assert torch.get_num_threads() == 3


def test_patches_are_judged_in_whole_batches(scan, network, torch_threads):
    torch_threads(2)
    flat = Predictor(_HalfSure(), scan.probe, batch_size=20)
    assert flat.predict_judged(scan.counts, np.zeros((20, 2))).verdicts.collapsed.all()


@pytest.mark.usefixtures("place")
def test_no_frames_give_no_patches(scan, network):
    patches, weights = Predictor(network, scan.probe).predict(scan.counts[:0], np.zeros((0, 2)))
    assert patches.shape == weights.shape == (0, 64, 64)


@pytest.mark.usefixtures("place")
def test_warm_up_runs(scan, network):
    Predictor(network, scan.probe, batch_size=2).warm_up()


@pytest.mark.usefixtures("place")
def test_shapes_that_do_not_fit_are_refused(scan, network):
    predictor = Predictor(network, scan.probe)
    with pytest.raises(ModelError, match="probe needs"):
        predictor.predict(scan.counts[:2, :32, :32], np.zeros((2, 2)))
    with pytest.raises(ModelError, match="shifts"):
        predictor.predict(scan.counts[:2], np.zeros((3, 2)))
    with pytest.raises(ModelError, match="mask"):
        predictor.predict(scan.counts[:2], np.zeros((2, 2)), np.ones((32, 32), bool))
    with pytest.raises(ModelError, match="batch"):
        Predictor(network, scan.probe, batch_size=0)
