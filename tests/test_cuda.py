"""Predictor and canvas on a GPU: the same patches and sums as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.unrolled import UnrolledNetwork
from ptycho_stream.reconstruct.canvas import Canvas, half_of
from ptycho_stream.reconstruct.device_canvas import canvas_on
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.simulate.experiment import simulate_experiment

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="torch finds no CUDA device: nothing to compare the CPU to",
)


@pytest.mark.parametrize("size_px", [64, 128])
def test_patches_on_cuda_are_those_of_the_cpu(
    size_px: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = simulate_experiment(seed=2, frames=20, size_px=size_px)
    shift_yx_px = np.random.default_rng(1).uniform(-0.5, 0.5, (20, 2)).astype(np.float32)
    valid = np.ones((size_px, size_px), bool)
    valid[20:23] = False
    made = {}
    # Neither rounds as the other does in low precision.
    monkeypatch.setattr(UnrolledNetwork, "half_precision", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for device in ("cpu", "cuda"):
        network = ModelRegistry().load()[0]
        predictor = Predictor(network, scan.probe, device, batch_size=8)
        for _ in range(3):  # eager, recorded, played
            made[device] = predictor.predict(scan.counts, shift_yx_px, valid)
    patches, weights = made["cuda"]
    expected, expected_weights = made["cpu"]
    np.testing.assert_allclose(weights, expected_weights, rtol=0, atol=1e-3)
    for patch, reference, weight in zip(patches, expected, weights, strict=True):
        error = np.linalg.norm(weight * (patch - reference))
        assert error <= 1e-3 * np.linalg.norm(weight * reference)


def test_sums_on_cuda_are_those_of_the_host() -> None:
    rng = np.random.default_rng(3)
    patches = (rng.normal(size=(64, 64, 64)) + 1j).astype(np.complex64)
    weights = rng.random((64, 64, 64), np.float32)
    corner = rng.integers(-300, 300, (64, 2))
    host, device = Canvas(50), canvas_on("cuda", 50)
    for canvas in (host, device):
        for rows in np.array_split(np.arange(64), 3):
            canvas.add(patches[rows], weights[rows], corner[rows], half_of(rows))
    assert device.versions == host.versions
    for index in host.versions:
        for sums, wanted in zip(device.sums(index), host.sums(index), strict=True):
            np.testing.assert_allclose(sums, wanted, atol=1e-4)
