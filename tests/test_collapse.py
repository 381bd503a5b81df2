"""Output that cannot be true: collapsed, constant or not finite; and samples that are flat."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scan_samples import running_header

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.network import Network, Prediction
from ptycho_stream.physics.forward import intensity
from ptycho_stream.reconstruct.collapse import SpreadWatch
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image
from ptycho_stream.scans import PAIR_RECORD, ScanReader, ScanWriter
from ptycho_stream.simulate.experiment import simulate_experiment

pytestmark = pytest.mark.usefixtures("place")

SIZE = 64


class Constant(Network):
    """A collapsed network: one patch for every frame; or NaN for the frames listed."""

    def __init__(self, pattern=None, nan_frames=()):
        super().__init__()
        self._pattern = torch.ones(SIZE, SIZE) if pattern is None else pattern
        self._nan_frames = list(nan_frames)

    def settings_json(self):
        return {}

    def stages(self, amplitude, probe, valid):
        obj = self._pattern.to(torch.complex64).expand(amplitude.shape).clone()
        rows = [row for row in self._nan_frames if row < len(obj)]
        obj[rows, 3, 4] = complex(float("nan"), 0)
        return [Prediction(obj, torch.ones_like(amplitude))]


@pytest.fixture(scope="module")
def scan():
    return simulate_experiment(seed=1, frames=32, size_px=SIZE, photons=1e6)


@pytest.fixture(scope="module")
def shipped():
    return ModelRegistry().load()[0]


def judged(network, counts, scan):
    return Predictor(network, scan.probe).predict_judged(counts, np.zeros((len(counts), 2)))


def flat_counts(scan, frames=16, transmission=0.8):
    """Frames of a sample without any structure."""
    probe = torch.as_tensor(scan.probe.modes)[None]
    beam = intensity(probe, torch.full((1, SIZE, SIZE), transmission, dtype=torch.complex64))[0]
    shown = np.fft.fftshift(beam.numpy())
    return np.random.default_rng(0).poisson(shown, (frames, SIZE, SIZE)).astype(np.uint16)


def test_a_network_that_works_is_not_suspected(scan, shipped):
    found = judged(shipped, scan.counts, scan).verdicts
    assert found.finite.all() and not found.collapsed.any()
    assert found.demand.min() > 0.05 and (found.spread > 0.5 * found.demand).all()


def test_the_demand_is_a_lower_bound_for_the_spread_of_the_true_patch(scan):
    """Checked with objects that are known: P (O - mean O) in the frames is at most their spread."""
    rng = np.random.default_rng(3)
    power = scan.probe.power_yx
    for strength in (0.05, 0.2, 0.8):
        phase = torch.as_tensor(rng.normal(0, strength, (4, SIZE, SIZE)).astype(np.float32))
        obj = torch.polar(torch.ones_like(phase), phase)

        class Truth(Constant):
            def stages(self, amplitude, probe, valid, obj=obj):
                return [Prediction(obj, torch.ones_like(amplitude))]

        model = intensity(torch.as_tensor(scan.probe.modes)[None], obj).numpy()
        counts = rng.poisson(np.fft.fftshift(model, axes=(-2, -1)))
        found = judged(Truth(), counts, scan).verdicts
        assert (found.demand <= found.spread).all()
        assert not found.collapsed.any()
        mean = (obj.numpy() * power).sum((-2, -1), keepdims=True) / power.sum()
        spread = np.sqrt((power * np.abs(obj.numpy() - mean) ** 2).sum((-2, -1)) / power.sum())
        expected = spread / np.abs(mean[:, 0, 0])
        np.testing.assert_allclose(found.spread, expected, rtol=1e-3)


def test_a_constant_is_found_out_where_frames_have_structure(scan):
    found = judged(Constant(), scan.counts, scan).verdicts
    assert found.collapsed.all() and found.spread.max() < 1e-2


def test_one_pattern_for_all_frames_is_found_out(scan):
    pattern = 1 + 0.5 * torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = judged(Constant(pattern), scan.counts, scan).verdicts
    assert (found.spread > found.demand * 0.25).any()  # not by the spread within a patch
    assert found.collapsed.all()


def test_a_flat_sample_may_be_flat(scan, shipped):
    counts = flat_counts(scan)
    for network in (Constant(), shipped):
        found = judged(network, counts, scan).verdicts
        assert found.demand.max() < 0.05
        assert not found.collapsed.any()


def test_a_flat_sample_may_be_flat_though_the_beam_s_flux_varies(scan, shipped):
    flux = np.random.default_rng(2).uniform(0.7, 1.3, 16)
    counts = np.concatenate([flat_counts(scan, 1, level**0.5) for level in flux])
    for network in (Constant(), shipped):
        assert not judged(network, counts, scan).verdicts.collapsed.any()


def test_the_same_frame_again_may_give_the_same_patch(scan, shipped):
    again = np.repeat(scan.counts[:1], 16, axis=0)
    assert not judged(shipped, again, scan).verdicts.collapsed.any()


@pytest.mark.parametrize("photons", [0, 50, 1e3, 1e4])
def test_frames_of_hardly_any_photons_demand_nothing(scan, photons):
    counts = flat_counts(scan, 8, (photons / scan.probe.photons) ** 0.5)
    found = judged(Constant(), counts, scan).verdicts
    assert not found.collapsed.any() and found.finite.all()


def test_patches_that_are_no_numbers_come_out_empty_and_named(scan):
    found = judged(Constant(nan_frames=[2, 5]), scan.counts[:8], scan)
    assert np.flatnonzero(~found.verdicts.finite).tolist() == [2, 5]
    assert not found.patches[[2, 5]].any() and not found.weights[[2, 5]].any()
    assert found.patches.isfinite().all()
    assert found.verdicts.collapsed[found.verdicts.finite].all()


def test_the_watch_needs_a_majority_and_keeps_its_memory(scan, shipped):
    watch = SpreadWatch()
    assert watch.spread is None and not watch.collapsed
    good = judged(shipped, scan.counts, scan).verdicts
    bad = judged(Constant(), scan.counts, scan).verdicts
    watch.add(bad[np.arange(3)])
    assert not watch.collapsed  # too few
    watch.add(bad)
    assert watch.collapsed and watch.spread is not None and watch.spread < 0.01
    assert SpreadWatch(watch.history).collapsed
    watch.add(good)
    watch.add(good)
    assert not watch.collapsed and watch.spread > 0.05


@pytest.fixture
def image(scan, tmp_path, shipped):
    header = running_header((SIZE, SIZE), scan.counts.dtype.str, SIZE, pixel_yx_m=scan.pixel_yx_m)
    with ScanWriter.create(tmp_path, header, frames_per_file=32) as writer:
        pairs = np.zeros(len(scan.counts), PAIR_RECORD)
        for number, counts in enumerate(scan.counts):
            slot = writer.append(number, counts, received_ns=0, received_monotonic_ns=0)
            pairs["number"][number], pairs["slot"][number] = number, slot
        pairs["y_m"], pairs["x_m"] = scan.positions_yx_m.T
        writer.append_pairs(pairs)
        writer.commit()
        recipe = Recipe(shipped, "shipped", "0", scan.probe, 1e6, torch.device("cpu"), 16)
        yield ScanImage(ScanReader.open(tmp_path, header.scan_id), recipe, 64), recipe


def run(image):
    collapsed = not_finite = 0
    while image.has_work:
        image.step(16, list[int]().extend)
        collapsed += image.patches_collapsed
        not_finite += image.patches_not_finite
    return collapsed, not_finite


def test_the_image_tells_that_its_network_has_collapsed(image):
    held, recipe = image
    assert run(held) == (0, 0)
    good = Image(held.image(final=False))
    assert not good.collapsed and good.spread is not None and good.spread > 0.05
    held.use(replace(recipe, network=Constant(), model="constant"))
    assert run(held) == (32, 0)
    bad = Image(held.image(final=False))
    assert bad.collapsed and held.collapsed and bad.spread is not None and bad.spread < 0.01
    held.save()
    again = ScanImage(held.reader, replace(recipe, network=Constant(), model="constant"), 64)
    assert Image(again.image(final=True)).collapsed


def test_patches_that_are_no_numbers_never_reach_the_canvas(image):
    held, recipe = image
    held.use(replace(recipe, network=Constant(nan_frames=[0, 7]), model="nan"))
    assert run(held) == (28, 4)
    assert held.counts()["reconstructed"] == 28 and held.counts()["skipped"] == 4
    assert held.current is not None
    canvas = held.current.canvas
    for sums in map(canvas.sums, canvas.versions):
        assert np.isfinite(sums.numerator).all() and np.isfinite(sums.denominator).all()
    # Of 32 frames that wait, a batch of 16 takes each second one: rows 0 and 7 of both batches.
    assert sorted(held.current.ledger.skipped.tolist()) == [0, 1, 14, 15]
