"""The unsupervised loss: stitching, phases, masks, gradients, and that it knows the truth."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from training_scans import SIZE, make_experiment

from ptycho_stream.networks.network import Prediction
from ptycho_stream.training.losses import confidence_loss, expected_error
from ptycho_stream.training.overlap import (
    Mosaic,
    amplitude_misfit,
    overlap_misfits,
    stitched_patches,
)
from ptycho_stream.training.scan_data import scan_batch
from ptycho_stream.training.scan_frames import ScanFrames


@dataclass
class _Scan:
    """Just enough of a scan for ``ScanFrames.counts``."""

    frames: np.ndarray

    def counts(self, slots):
        return self.frames[slots]


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(frames=30)


def batch_and_truth(experiment, valid=None):
    """Twelve neighbouring frames, and the true patches under them."""
    origin = np.asarray(experiment.origin_yx_m) / experiment.pixel_yx_m
    top = experiment.positions_yx_m / experiment.pixel_yx_m - origin - (SIZE - 1) / 2
    corner = np.rint(top).astype(np.int64)
    frames = ScanFrames(
        scan=_Scan(experiment.counts),
        probe=experiment.probe,
        valid=np.ones((SIZE, SIZE), bool) if valid is None else valid,
        slot=np.arange(30),
        number=np.arange(30),
        corner_yx_px=corner,
        shift_yx_px=(top - corner).astype(np.float32),
    )
    indices = frames.nearest(14, 12, np.arange(30))
    patches = np.stack([experiment.object[y : y + SIZE, x : x + SIZE] for y, x in corner[indices]])
    return scan_batch(frames, indices, np.ones(12, bool)), torch.as_tensor(patches)


def sure(obj):
    return Prediction(obj, torch.ones(obj.shape))


def test_a_mosaic_adds_and_picks_what_lies_where():
    corner = torch.tensor([[0, 0], [1, 2]])
    mosaic = Mosaic(corner, 2)
    patches = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]])
    flat = mosaic.add(patches)
    expected = torch.tensor([[1.0, 2, 0, 0], [3, 4, 10, 20], [0, 0, 30, 40]])
    assert torch.equal(flat.reshape(3, 4), expected)
    assert torch.equal(mosaic.pick(flat)[1], expected[1:3, 2:4])
    both = mosaic.add(torch.complex(patches, -patches))
    assert torch.equal(both, torch.complex(flat, -flat))
    assert torch.equal(mosaic.pick(both).imag, -mosaic.pick(flat))


def test_a_mosaic_of_places_far_apart_needs_no_canvas_between_them():
    corner = torch.tensor([[0, 0], [1, 1], [10**6, 10**6]])
    mosaic = Mosaic(corner, 2)
    patches = torch.arange(1.0, 13.0).reshape(3, 2, 2)
    flat = mosaic.add(patches)
    assert len(flat) == 11
    picked = mosaic.pick(flat)
    assert torch.equal(picked[2], patches[2])
    assert picked[0].tolist() == [[1, 2], [3, 9]] and picked[1, 0, 0] == 9


def test_patches_that_agree_are_stitched_to_themselves_whatever_their_phases(experiment):
    batch, truth = batch_and_truth(experiment)
    turned = truth * torch.polar(torch.ones(12), torch.arange(12.0))[:, None, None]
    mosaic = Mosaic(batch.corner_yx_px, SIZE)
    together = stitched_patches(turned, batch.weight, mosaic)
    bright = batch.weight > 0.1
    phase = (together * truth.conj())[bright].sum()
    error = (together * (phase.conj() / phase.abs()) - truth)[bright].abs()
    assert float(error.mean()) < 0.02


def test_the_truth_fits_to_the_noise_and_nothing_else_fits_as_well(experiment):
    batch, truth = batch_and_truth(experiment)
    together, own = overlap_misfits(sure(truth), batch)
    photons = batch.amplitude.square().sum((1, 2))
    # Noise of a root has the variance 1/4 where there are photons, and less where there are none.
    noise = SIZE * SIZE / 4 / photons
    assert (together < 1.5 * noise).all() and (own < 1.5 * noise).all()
    flat, _ = overlap_misfits(sure(torch.ones_like(truth)), batch)
    assert (flat > together).all() and float(flat.mean()) > 2 * float(together.mean())


def test_a_patch_that_its_neighbours_contradict_costs(experiment):
    """One patch of twelve lies five pixels beside its place."""
    batch, truth = batch_and_truth(experiment)
    spoilt = truth.clone()
    spoilt[3] = torch.roll(truth[3], 5, -1)
    together, _ = overlap_misfits(sure(spoilt), batch)
    clean, _ = overlap_misfits(sure(truth), batch)
    assert float(together.mean()) > 1.2 * float(clean.mean())


def test_masked_pixels_do_not_count(experiment):
    valid = np.ones((SIZE, SIZE), bool)
    valid[20:23] = False
    batch, truth = batch_and_truth(experiment, valid)
    mask = batch.valid.expand(batch.amplitude.shape)
    assert (batch.amplitude[~mask] == 0).all()
    spoilt = torch.where(mask, batch.amplitude, batch.amplitude.new_tensor(99.0))
    clean = amplitude_misfit(batch.probe, truth, batch.amplitude, batch.valid)
    assert torch.isfinite(clean).all()
    photons = spoilt.square().sum((1, 2)) / batch.amplitude.square().sum((1, 2))
    again = amplitude_misfit(batch.probe, truth, spoilt, batch.valid) * photons
    torch.testing.assert_close(again, clean)


def test_only_scored_frames_are_judged_but_all_are_stitched(experiment):
    batch, truth = batch_and_truth(experiment)
    scored = torch.zeros(12, dtype=torch.bool)
    scored[:2] = True
    few, own = overlap_misfits(sure(truth), batch._replace(scored=scored))
    every, _ = overlap_misfits(sure(truth), batch)
    assert few.shape == own.shape == (2,)
    torch.testing.assert_close(few, every[:2])


def test_gradients_are_those_of_finite_differences(experiment):
    batch, truth = batch_and_truth(experiment)
    parts = [t.double() if t.is_floating_point() else t for t in batch[:4]]
    double = batch._replace(
        amplitude=parts[0], probe=batch.probe.to(torch.complex128), weight=parts[3]
    )
    start = (truth * 0.9).to(torch.complex128).requires_grad_()
    along = torch.randn(start.shape, dtype=torch.complex128, generator=torch.manual_seed(1))

    def loss(obj):
        # The own misfit: the alignment of phases is constant to the gradient, on purpose.
        return overlap_misfits(sure(obj), double)[1].sum()

    (gradient,) = torch.autograd.grad(loss(start), start)
    slope = float((gradient.conj() * along).real.sum())
    with torch.no_grad():
        step = 1e-5
        measured = float(loss(start + step * along) - loss(start - step * along)) / (2 * step)
    assert slope == pytest.approx(measured, rel=1e-4)


def test_descending_the_stitched_misfit_finds_the_object(experiment):
    batch, truth = batch_and_truth(experiment)
    obj = torch.ones_like(truth).requires_grad_()
    optimiser = torch.optim.Adam([obj], lr=0.03)
    first = last = 0.0
    for step in range(60):
        together, own = overlap_misfits(sure(obj), batch)
        loss = together.mean() + 0.1 * own.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < 0.3 * first


def test_confidence_learns_the_expected_error_and_the_object_nothing_from_it():
    obj = torch.ones(1, 8, 8, dtype=torch.complex64, requires_grad=True)
    truth = torch.full((1, 8, 8), 1.0 + 0.05j, dtype=torch.complex64)
    weight = torch.ones(1, 8, 8)
    weight[0, 0, 0] = 2
    # Half of the pixels are wrong by something that no phase takes away.
    truth = torch.where(torch.arange(8) % 2 == 0, truth, truth.conj()).clone()
    logit = torch.zeros(1, 8, 8, requires_grad=True)
    optimiser = torch.optim.Adam([logit], lr=0.1)
    for _ in range(200):
        loss = confidence_loss(Prediction(obj, torch.sigmoid(logit)), truth, weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert obj.grad is None
    learnt = expected_error(torch.sigmoid(logit)).detach()
    assert float(learnt.mean()) == pytest.approx(0.05, rel=0.1)


def test_a_network_without_confidence_has_no_loss_of_it():
    ones = torch.ones(1, 4, 4)
    assert float(confidence_loss(Prediction(ones + 0j, ones), ones + 0.5j, ones)) == 0
