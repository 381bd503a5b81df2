"""Trust: what each frame says of the image, held-out frames, and the map of the misfit."""

import numpy as np
import pytest
from trust_scans import Scan, area_under_curve, block_of, map_auc, scan_of, spoiled

from ptycho_stream.errors import GeometryError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import half_of
from ptycho_stream.reconstruct.misfit import stitched_misfit
from ptycho_stream.reconstruct.misfit_map import BIN_PX, MisfitMap
from ptycho_stream.reconstruct.trust import (
    FrameFigures,
    FrameJudge,
    held_out,
    object_windows,
    tile_windows,
    total,
)
from ptycho_stream.reconstruct.trust_record import TrustRecord, bad_frames
from ptycho_stream.results import Tile


@pytest.fixture(scope="module")
def network():
    return ModelRegistry().load()[0]


@pytest.fixture(scope="module")
def scan(network) -> Scan:
    return scan_of(network)


def test_figures_are_those_of_the_misfit_module(scan):
    figures = scan.judged(scan.stitched)
    whole = stitched_misfit(
        scan.stitched,
        scan.corner_yx_px - scan.low_yx_px,
        scan.shift_yx_px,
        lambda part: scan.counts[part],
        scan.beam,
    )
    found = total(figures)
    assert found.frames == whole.frames
    assert found.r_factor == pytest.approx(whole.r_factor, rel=1e-4)
    # There noise is drawn, here it is its mean.
    assert found.r_poisson == pytest.approx(whole.r_poisson, rel=0.01)
    assert found.deviance == pytest.approx(whole.deviance, rel=1e-3)
    assert found.excess > 0.01


def test_the_truth_has_no_excess(scan):
    figures = scan.judged(scan.true_image)
    assert abs(total(figures).excess) < 2e-3
    assert np.abs(figures.excess).max() < 0.02
    np.testing.assert_allclose(figures.brightness, 1, atol=0.02)


@pytest.mark.parametrize("mean", [0.01, 0.3, 2.0, 30.0, 140.0, 150.0, 5000.0])
def test_what_noise_alone_gives_is_what_drawn_noise_gives(mean):
    """A flat probe in a corner of the far field: every pixel expects ``mean`` photons."""
    size = 64
    wave = np.zeros((1, size, size), np.complex64)
    wave[0, 0, 0] = np.sqrt(mean) * size
    probe = Probe(wave)
    rng = np.random.default_rng(0)
    counts = rng.poisson(mean, (100, size, size))
    windows = np.ones((100, size, size), np.complex64)
    figures = FrameJudge(probe).judge(windows, np.zeros((100, 2)), counts)
    # What a phase plate of one pixel passes is flat, so no pixel differs from the model.
    assert figures.r_factor.mean() == pytest.approx(figures.r_poisson.mean(), rel=0.03)
    assert figures.roots.mean() == pytest.approx(figures.noise_roots.mean(), rel=0.05)


def test_masked_pixels_do_not_count(scan):
    valid = np.ones((64, 64), bool)
    valid[30:34] = False
    counts = scan.counts[:8].astype(np.int64)
    counts[:, ~valid] = 2**31
    windows = scan.windows(scan.true_image)[:8]
    figures = FrameJudge(scan.beam, valid).judge(windows, scan.shift_yx_px[:8], counts)
    assert np.abs(figures.excess).max() < 0.02
    assert (figures.pixels == valid.sum()).all()


def test_faults_of_frames_stay_numbers(scan):
    """Dark, saturated, unreadable, unplaced, unseen: no NaN but where nothing is known."""
    windows = scan.windows(scan.true_image)[:6].copy()
    counts = scan.counts[:6].astype(np.float64)
    shift = scan.shift_yx_px[:6].copy()
    counts[0] = 0
    counts[1] = 1e6
    counts[2, 3, 3] = np.nan
    shift[3] = np.nan
    windows[4] = np.nan
    figures = FrameJudge(scan.beam).judge(windows, shift, counts)
    assert figures.usable.tolist() == [True, True, False, False, False, True]
    assert np.isfinite(figures.excess[:2]).all()
    assert (figures.excess[:2] > 0.5).all()
    assert np.isfinite(total(figures).excess)
    assert total(figures).frames == 3


def test_nothing_to_judge_gives_no_frames(scan):
    figures = FrameJudge(scan.beam).judge(
        np.empty((0, 64, 64), np.complex64), np.empty((0, 2)), np.empty((0, 64, 64))
    )
    assert total(figures).frames == 0
    assert np.isnan(total(figures).excess)
    assert not len(bad_frames(figures))


def test_shapes_that_do_not_fit_are_refused(scan):
    judge = FrameJudge(scan.beam)
    with pytest.raises(GeometryError, match="must be"):
        judge.judge(np.ones((2, 64, 64), np.complex64), np.zeros((2, 2)), scan.counts[:1])
    with pytest.raises(GeometryError, match="mask"):
        FrameJudge(scan.beam, np.ones((32, 32), bool))


def test_windows_off_the_image_are_nan():
    image = np.ones((10, 12), np.complex64)
    windows = object_windows(image, np.array([[-3, 0], [8, 9], [20, 20]]), 4)
    assert np.isfinite(windows).sum((1, 2)).tolist() == [4, 6, 0]


def test_held_out_frames_are_two_per_cent_and_know_nothing_of_the_halves():
    numbers = np.arange(200_000)
    out = held_out(numbers)
    assert 0.019 < out.mean() < 0.021
    assert 0.45 < half_of(numbers)[out].mean() < 0.55
    assert np.array_equal(out[:1000], held_out(numbers[:1000]))


def test_held_out_frames_tell_overfitting(scan):
    """An image of few frames explains these better than others of the same place."""
    out = held_out(np.arange(len(scan.counts)), 0.3)
    used = scan.told(
        counts=scan.counts[~out].astype(np.uint16), position_yx_m=scan.position_yx_m[~out]
    )
    image = used.refined(20)
    judge = FrameJudge(scan.beam)
    free = judge.judge(
        object_windows(image, scan.corner_yx_px[out] - used.low_yx_px, 64),
        scan.shift_yx_px[out],
        scan.counts[out],
    )
    assert total(free).frames > 20
    assert total(used.judged(image)).excess < total(free).excess < 0.05


def test_the_record_asks_for_new_frames_first_and_then_for_the_oldest(scan):
    record = TrustRecord()
    record.add(np.arange(10))
    assert record.due(3, 100).tolist() == [9, 8, 7]
    figures = scan.judged(scan.stitched)
    record.take(np.array([9, 8, 7]), figures.chosen(np.arange(3)))
    record.add(np.arange(10, 12))
    assert record.due(4, 100).tolist() == [11, 10, 6, 5]
    record.take(np.arange(10), figures.chosen(np.arange(10)))
    record.take(np.array([11, 10]), figures.chosen(np.arange(2)))
    assert not len(record.due(10, 100)), "all are judged against the image as it is"
    record.outdate()
    assert sorted(record.due(10, 100).tolist()) == list(range(10))
    assert len(record.due(10, 5)) == 5, "enough is enough"
    assert len(record) == 12


def test_windows_of_tiles_are_those_of_the_whole():
    whole = np.arange(24 * 24, dtype=np.complex64).reshape(24, 24)
    tiles = {
        (y - 1, x): Tile(
            1, whole[8 * y : 8 * y + 8, 8 * x : 8 * x + 8], np.ones((8, 8), np.float32)
        )
        for y in range(3)
        for x in range(3)
    }
    corner = np.array([[-8, 0], [3, 5], [11, 12], [-30, 2]])
    found = tile_windows(tiles, 8, corner, 10)
    expected = object_windows(whole, corner + np.array([8, 0]), 10)
    np.testing.assert_array_equal(found, expected)


def test_the_record_sums_up(scan):
    record = TrustRecord()
    numbers = np.arange(len(scan.counts)) + 1000
    assert record.summary().working.frames == 0
    record.add(numbers)
    figures = scan.judged(scan.stitched)
    record.take(np.arange(len(numbers)), figures)
    summary = record.summary()
    out = held_out(numbers)
    assert summary.free.frames == out.sum() > 0
    assert summary.working.r_factor == pytest.approx(total(figures.chosen(~out)).r_factor)
    assert summary.bad_share == 0.0
    assert summary.excess_median == pytest.approx(np.nanmedian(figures.excess))


def test_an_image_that_gets_better_makes_no_frame_bad_but_one_that_stays_behind():
    """While the image changes old figures are worse than new ones, whatever the frame."""
    record = TrustRecord()
    record.add(np.arange(256))
    bad = 100
    for look in range(64):  # four times around, each against a better image
        which = record.due(16, 1024)
        excess = np.full(len(which), 0.3 * 0.9**look)
        excess[which == bad] += 0.2
        record.take(which, figures_of(excess))
        assert set(record.summary().bad_frames) <= {bad}
        record.outdate()
    assert record.summary().bad_frames == (bad,)


def figures_of(excess):
    """Figures of frames (n,) with these excesses, equal otherwise."""
    ones = np.ones(len(excess))
    return FrameFigures(
        difference=100 * (0.1 + excess),
        roots=100 * ones,
        noise=10 * ones,
        noise_roots=100 * ones,
        deviances=ones,
        photons=1e4 * ones,
        expected_photons=1e4 * ones,
        pixels=ones,
    )


def test_a_hundred_thousand_frames_are_summed_up_quickly():
    record = TrustRecord()
    record.add(np.arange(100_000))
    assert len(record.due(32, 1024)) == 32
    assert record.summary().working.frames == 0


@pytest.mark.parametrize("layer", ["predicted", "refined"])
@pytest.mark.parametrize("fault", ["other frames", "shutter", "positions", "probe"])
def test_the_map_finds_spoiled_regions(network, fault, layer):
    """Five per cent of the frames, next to each other: area under the ROC curve at least 0.85."""
    scan = scan_of(network, seed=6, frames=256)
    which = block_of(scan)
    bad = spoiled(scan, fault, which)
    figures = bad.judged(bad.stitched if layer == "predicted" else bad.refined())
    assert map_auc(bad, figures, which) >= 0.85
    frame_label = np.isin(np.arange(len(bad.counts)), which)
    assert area_under_curve(figures.excess, frame_label) >= 0.85


@pytest.mark.parametrize("fault", ["other frames", "shutter", "positions", "probe"])
def test_single_bad_frames_are_named(network, fault):
    scan = scan_of(network, seed=6, frames=196)
    which = np.random.default_rng(5).choice(196, 10, replace=False)
    bad = spoiled(scan, fault, which)
    named = np.flatnonzero(bad_frames(bad.judged(bad.refined())))
    assert len(np.intersect1d(named, which)) >= 7
    # The object gives way to a bad frame, so that its next neighbours may stand out too.
    offset = bad.corner_yx_px[named, None] - scan.corner_yx_px[which]
    assert np.hypot(*offset.T).min(0).max() < 10


def test_a_sound_scan_has_no_bad_frames(scan):
    for image in (scan.stitched, scan.refined()):
        assert bad_frames(scan.judged(image)).sum() <= 1


def test_a_frame_judged_again_takes_the_place_of_its_former_self():
    power = np.random.default_rng(0).random((64, 64))
    once, twice = MisfitMap(64, power), MisfitMap(64, power)
    corner = np.array([[3, -70], [30, 5], [-17, 18]])
    index = np.arange(3)
    twice.put(index, corner + 9, np.array([5.0, 6.0, np.nan]))
    twice.put(index, corner, np.array([0.1, 0.2, 0.3]))
    once.put(index, corner, np.array([0.1, 0.2, 0.3]))
    for key in once.tiles:
        assert np.allclose(once.tile(key), twice.tile(key), equal_nan=True, atol=1e-6)
    picture, origin = once.picture()
    assert picture.shape == tuple(
        64 // BIN_PX * (np.ptp(np.array(once.tiles), axis=0) + 1)
    ) and origin == (-64, -128)
    assert np.nanmin(picture) >= 0.1 - 1e-6 and np.nanmax(picture) <= 0.3 + 1e-6


def test_an_empty_map_is_empty():
    assert MisfitMap(64, np.ones((8, 8))).picture()[0].shape == (0, 0)
    with pytest.raises(GeometryError, match="multiple"):
        MisfitMap(50, np.ones((8, 8)))
