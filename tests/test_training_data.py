"""Which frames training sees: the store's own, as reconstruct sees them, repeatably drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_scans import SIZE, make_experiment, write_scan

from ptycho_stream.errors import TrainingError
from ptycho_stream.networks.network import Network, Prediction
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.patches import measured_photons
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.scans import Catalogue, ScanReader
from ptycho_stream.scans.header import write_header
from ptycho_stream.scans.viewed_scan import ViewedScan
from ptycho_stream.training.overlap import ScanBatch
from ptycho_stream.training.scan_data import (
    BatchPlan,
    ScanData,
    SplitScan,
    frame_groups,
    scan_batch,
    training_batch,
)
from ptycho_stream.training.scan_frames import held_out, open_frames
from ptycho_stream.training.told_probe import told_probe_batch

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own deprecations


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(frames=80)


@pytest.fixture
def reader(experiment, tmp_path):
    scan_id = write_scan(tmp_path, experiment)
    with Catalogue(tmp_path).open(scan_id) as reader:
        yield reader


def frames_of(reader, experiment, pairs=None):
    return open_frames(reader, experiment.probe, 1e5, pairs or (0, reader.pair_count))


def split_of(reader, experiment, **changes):
    plan = BatchPlan(**{"seed": 3, "frames": 6, "held_out": 0.25} | changes)
    return SplitScan(frames_of(reader, experiment), plan), plan


def equal(one, two):
    return all(
        torch.equal(a, b)
        for part, other in zip(one, two, strict=True)
        if part is not None
        for a, b in zip(part, other, strict=True)
    )


def test_the_split_is_stable_when_the_scan_grows():
    few, many = np.arange(100), np.arange(5000)
    assert np.array_equal(held_out(few, 0.1, 1), held_out(many, 0.1, 1)[:100])
    assert held_out(many, 0.1, 1).mean() == pytest.approx(0.1, abs=0.02)
    assert not np.array_equal(held_out(many, 0.1, 1), held_out(many, 0.1, 2))
    # More held out means the same ones and others.
    assert held_out(many, 0.3, 1)[held_out(many, 0.1, 1)].all()


def test_frames_are_views_of_the_mapped_store(reader, experiment):
    frames = frames_of(reader, experiment)
    counts = frames.counts(np.arange(3, 9))
    assert not counts.flags.owndata and not counts.flags.writeable
    assert np.array_equal(counts, experiment.counts[3:9])


def test_training_and_reconstruction_see_the_same(reader, experiment, monkeypatch):
    """Counts, mask, shift, photons: what the predictor is given for the same pairs."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one worker, one call
    photons = measured_photons(ViewedScan(reader), 8)
    frames = open_frames(reader, experiment.probe, photons, (0, reader.pair_count))
    seen = {}

    class Recorder(Network):
        def settings_json(self):
            return {}

        def stages(self, amplitude, probe, valid):
            seen.update(amplitude=amplitude, probe=probe, valid=valid)
            return [Prediction(torch.zeros_like(probe[:, 0]), torch.ones_like(amplitude))]

    indices = np.array([5, 17, 40])
    predictor = Predictor(Recorder(), frames.probe)
    predictor.predict(frames.counts(indices), frames.shift_yx_px[indices], frames.valid)
    batch = scan_batch(frames, indices, np.ones(3, bool))
    torch.testing.assert_close(batch.amplitude, seen["amplitude"])
    torch.testing.assert_close(batch.probe, seen["probe"])
    assert torch.equal(batch.valid, seen["valid"])
    assert frames.probe.photons == pytest.approx(photons, rel=1e-4)
    assert int(batch.corner_yx_px.min()) == 0


def test_a_range_of_pairs_is_all_that_is_used(reader, experiment):
    frames = frames_of(reader, experiment, (10, 30))
    assert frames.number.tolist() == list(range(10, 30))


def test_batches_are_pure_functions_of_seed_and_number(reader, experiment):
    scan, plan = split_of(reader, experiment, synthetic=True)
    assert equal(training_batch([scan], plan, 7), training_batch([scan], plan, 7))
    other, other_plan = split_of(reader, experiment, synthetic=True, seed=4)
    assert not equal(training_batch([scan], plan, 7), training_batch([other], other_plan, 7))
    assert not equal(training_batch([scan], plan, 7), training_batch([scan], plan, 8))


def test_a_resumed_series_goes_on_where_it_was(reader, experiment):
    scan, plan = split_of(reader, experiment)
    series = iter(ScanData([scan], plan).train_dataloader())
    first = [next(series) for _ in range(4)]
    resumed = iter(ScanData([scan], plan, first=2).train_dataloader())
    for batch in first[2:]:
        assert equal(batch, next(resumed))


def test_ranks_share_a_series(reader, experiment):
    scan, plan = split_of(reader, experiment)
    alone = iter(ScanData([scan], plan).train_dataloader())
    dealt = [
        iter(ScanData([scan], split_of(reader, experiment, rank=r, ranks=2)[1]).train_dataloader())
        for r in range(2)
    ]
    for number in range(4):
        assert equal(next(alone), next(dealt[number % 2]))


def test_a_batch_is_a_neighbourhood_of_training_frames(reader, experiment):
    scan, plan = split_of(reader, experiment)
    frames = scan.frames
    assert len(scan.train) + len(scan.held_out) == 80
    spread = np.ptp(frames.position_yx_px, axis=0).max()
    for number in range(10):
        measured = training_batch([scan], plan, number).measured
        assert isinstance(measured, ScanBatch) and measured.scored.all()
        assert len(measured.amplitude) == 6
        assert float(measured.corner_yx_px.max()) < spread
    near = frame_groups(np.random.default_rng(0), frames, int(scan.train[4]), 6, 1, scan.train)
    distance = np.linalg.norm(frames.position_yx_px - frames.position_yx_px[scan.train[4]], axis=1)
    assert set(near.tolist()) <= set(scan.train.tolist())
    outside = np.setdiff1d(scan.train, near)
    assert distance[near].max() <= distance[outside].min() + 1e-9


def test_groups_are_a_frame_and_its_neighbours(reader, experiment):
    scan, plan = split_of(reader, experiment, group_frames=4, frames=8)
    rng = np.random.default_rng(1)
    rows = frame_groups(rng, scan.frames, int(scan.train[9]), 8, 4, scan.train).reshape(2, 4)
    for row in rows:
        assert len(set(row.tolist())) == 4
        nearest = scan.frames.nearest(int(row[0]), 9, scan.train)
        assert set(row.tolist()) <= set(nearest.tolist())
    assert len(training_batch([scan], plan, 0).measured.amplitude) == 8


def test_validation_scores_held_out_frames_only(reader, experiment):
    scan, plan = split_of(reader, experiment)
    loader = ScanData([scan], plan).val_dataloader()
    batches = list(loader)
    assert 1 <= len(batches) <= 8
    assert set(scan.choosing) | set(scan.judging) == set(scan.held_out)
    assert not set(scan.choosing) & set(scan.judging)
    everywhere = scan_batch(scan.frames, np.arange(80), np.ones(80, bool)).amplitude
    for batch in batches:
        assert batch.measured.scored[0] and batch.synthetic is None
        same = (batch.measured.amplitude[:, None] == everywhere).all((-2, -1))
        which = same.int().argmax(1).numpy()
        assert same.any(1).all() and not np.isin(which, scan.judging).any()
        assert np.array_equal(batch.measured.scored.numpy(), np.isin(which, scan.choosing))


def test_synthetic_frames_are_under_the_scans_probe_and_mask(reader, experiment):
    frames = frames_of(reader, experiment)
    frames.valid[4] = False
    batch = told_probe_batch(frames, 1, 2, 8, 4)
    assert batch.amplitude.shape == (8, SIZE, SIZE)
    dark = torch.as_tensor(np.fft.ifftshift(~frames.valid).copy())
    assert (batch.amplitude[:, dark] == 0).all()
    photons = batch.probe.abs().square().sum((1, 2, 3))
    torch.testing.assert_close(photons, torch.full((8,), frames.probe.photons), rtol=1e-3, atol=0)
    again = told_probe_batch(frames, 1, 2, 8, 4)
    assert torch.equal(batch.amplitude, again.amplitude)


def test_flagged_and_damaged_frames_are_left_out(experiment, tmp_path):
    scan_id = write_scan(tmp_path, experiment)
    with ScanReader.open(tmp_path, scan_id) as reader:
        path = min(reader.directory.glob("frames-*.bin"))
    with path.open("r+b") as file:
        file.seek(7 * SIZE * SIZE * 2)
        file.write(b"\xff" * 16)
    with ScanReader.open(tmp_path, scan_id) as reader:
        frames = frames_of(reader, experiment)
        assert 7 not in frames.number and len(frames) == 79


def test_a_scan_that_cannot_be_trained_on_is_refused(reader, experiment):
    with pytest.raises(TrainingError, match="name a probe"):
        open_frames(reader, Probe(np.ones((1, 64, 64), np.complex64)), 1e5, (0, 10))
    plan, alone = BatchPlan(seed=3, frames=6), frames_of(reader, experiment, (0, 1))
    with pytest.raises(TrainingError, match="more frames"):
        SplitScan(alone, plan)
    write_header(reader.directory, replace(reader.header, pixel_yx_m=None))
    reader.refresh()
    with pytest.raises(TrainingError, match="no pixel size"):
        frames_of(reader, experiment)
