"""The first frames tell where the pattern's centre is and which pixels lie, and raise no alarm."""

from __future__ import annotations

import bz2
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_siemens_star import SOURCE, siemens_star
from numpy.typing import NDArray
from scan_samples import running_header

from ptycho_stream.geometry import ORIENTATIONS, View
from ptycho_stream.physics.optics import ZonePlate
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.layouts import composed
from ptycho_stream.reconstruct.pattern_advice import (
    FRAMES,
    PatternAdvice,
    center_of,
    chosen_frames,
    pattern_advice,
)
from ptycho_stream.scans import ScanReader, ScanWriter
from ptycho_stream.simulate.experiment import SimulatedExperiment, simulate_experiment
from ptycho_stream.simulate.probes import PROBE_KINDS, probe_of_kind, zone_plate_probe
from ptycho_stream.simulate.samples import SAMPLE_KINDS, sample_of_kind

SIZE = 64
Advise = Callable[..., PatternAdvice]


@pytest.fixture
def advise(tmp_path: Path) -> Advise:
    """Store frames (n, h, w) and look at them."""

    def look(
        counts: NDArray[Any],
        probe: Probe,
        view: View | None = None,
        bad: NDArray[np.bool_] | None = None,
        **header: Any,
    ) -> PatternAdvice:
        view = view or View(probe.size_px)
        made = running_header(
            counts.shape[1:], counts.dtype.str, probe.size_px, views=(view,), **header
        )
        with ScanWriter.create(tmp_path, made, 32, bad) as writer:
            for number, frame in enumerate(counts):
                writer.append(number, frame, received_ns=0, received_monotonic_ns=0)
            writer.commit()
            with ScanReader.open(tmp_path, made.scan_id) as reader:
                return pattern_advice(reader, np.arange(len(counts)), view, probe)

    return look


@pytest.fixture(scope="module")
def experiment() -> SimulatedExperiment:
    return simulate_experiment(seed=2, frames=36, size_px=SIZE)


def placed(
    counts: NDArray[Any], shape_yx: tuple[int, int], center_yx: tuple[int, int]
) -> NDArray[Any]:
    """Frames on a larger detector, zero frequency at a pixel of it."""
    wide = np.zeros((len(counts), *shape_yx), counts.dtype)
    top, left = (c - SIZE // 2 for c in center_yx)
    wide[:, top : top + SIZE, left : left + SIZE] = counts
    return wide


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_where_the_centre_is_told_in_stored_pixels(experiment, advise, orientation):
    """Whatever way round they are looked at, and set right by what is advised."""
    probe = probe_of_kind(np.random.default_rng(8), SIZE, "coded")  # the same from no other side
    made = simulate_experiment(seed=2, frames=36, size_px=SIZE, probe=probe)
    back = next(name for name in ORIENTATIONS if composed(orientation, name) == "identity")
    turned = np.ascontiguousarray(View(SIZE, orientation=back).apply(made.counts))
    stored = placed(turned, (150, 130), (80, 50))
    view = View(SIZE, center_yx_px=(75.0, 61.4), orientation=orientation)
    advice = advise(stored, made.probe, view)
    assert advice.center_yx_px is not None
    right = view.next(center_yx_px=advice.center_yx_px)
    assert center_of(right, (150, 130)) == (80, 50)
    assert np.array_equal(right.apply(stored), made.counts)
    (said,) = advice.suggestions
    y, x = advice.center_yx_px
    assert f"not at (75, 61): set view.center_yx_px = [{y}, {x}]" in said
    assert advise(stored, made.probe, right) == PatternAdvice()


def test_a_centre_that_is_not_set_is_the_middle(experiment, advise):
    stored = placed(experiment.counts, (100, 96), (53, 47))
    assert center_of(View(SIZE), (100, 96)) == (50, 48)
    advice = advise(stored, experiment.probe)
    assert advice.center_yx_px == pytest.approx((53, 47), abs=0.3)


@pytest.mark.parametrize("off", [(1, 0), (0, -2), (5, 7)])
def test_frames_of_the_patch_s_size_may_be_off_too(experiment, advise, off):
    counts = np.roll(experiment.counts, off, (1, 2))
    found = advise(counts, experiment.probe).center_yx_px
    assert found == pytest.approx((32 + off[0], 32 + off[1]), abs=0.3)


def test_frames_with_zero_frequency_in_the_corner(experiment, advise):
    corner = np.fft.ifftshift(experiment.counts, axes=(1, 2))
    view = View(SIZE, dc="corner")
    assert advise(corner, experiment.probe, view) == PatternAdvice()
    off = advise(np.roll(corner, (2, -3), (1, 2)), experiment.probe, view)
    assert off.center_yx_px == pytest.approx((34, 29), abs=0.3)
    hot = corner.copy()
    hot[:, 5, 60] = 60_000
    assert advise(hot, experiment.probe, view).hot == ((5, 60),)


def test_bad_pixels_are_named_where_they_are_on_the_detector(experiment, advise):
    counts = placed(experiment.counts, (80, 90), (40, 45))
    counts[:, 11, 20] = 60_000
    counts[:, 60, 70] = 50_000 + np.arange(36)
    view = View(SIZE, orientation="rotate90")
    probe = Probe(np.rot90(experiment.probe.modes, 1, (1, 2)).copy())
    advice = advise(counts, probe, view, crop_corner_yx_px=(100, 200))
    assert advice.hot == ((111, 220), (160, 270)) and not advice.dead
    (said,) = advice.suggestions
    assert said == (
        "pixels (111, 220), (160, 270) of the detector (y, x) count far too much: "
        "set view.bad_value_from = 50000"
    )
    masked = replace(view, bad_value_from=50000)
    assert advise(counts, probe, masked) == PatternAdvice()
    bad = np.zeros((80, 90), bool)
    bad[11, 20] = bad[60, 70] = True
    assert advise(counts, probe, view, bad) == PatternAdvice()


def test_pixels_that_no_count_tells_from_others_are_for_the_detector_to_mask(advise):
    made = simulate_experiment(seed=2, frames=36, size_px=SIZE, photons=1e6)
    counts = made.counts.astype(np.uint32)
    dark = np.unravel_index(int(counts.sum(0).argmin()), (SIZE, SIZE))
    bright = np.argwhere(counts.min(0) > 60)[0]
    counts[:, dark[0], dark[1]] += 150
    counts[:, bright[0], bright[1]] = 0
    advice = advise(counts, made.probe)
    assert advice.hot == (tuple(int(c) for c in dark),)
    assert advice.dead == (tuple(int(c) for c in bright),)
    assert all("mask such pixels in the detector" in said for said in advice.suggestions)
    assert "counts far too much" in advice.suggestions[0]
    assert "counts nothing" in advice.suggestions[1]


def test_a_probe_that_is_a_guess_leaves_the_worst_to_be_found(advise):
    made = simulate_experiment(seed=2, frames=36, size_px=SIZE)
    guess = zone_plate_probe(SIZE, plate=ZonePlate(0.25, 0.05, (14, 12)))
    counts = made.counts.copy()
    counts[:, 4, 7] = 60_000
    counts[:, 50, 50] += 100
    assert set(advise(counts, made.probe).hot) == {(4, 7), (50, 50)}
    assert advise(counts, guess).hot == ((4, 7),)
    off = advise(np.roll(counts, (4, 4), (1, 2)), guess)
    assert off.center_yx_px == pytest.approx((36, 36), abs=0.3) and off.hot == ((8, 11),)


def test_hot_pixels_do_not_pull_the_centre(experiment, advise):
    counts = placed(experiment.counts, (100, 100), (50, 50))
    counts[:, 80:82, 20] = 60_000
    advice = advise(counts, experiment.probe)
    assert advice.center_yx_px is None and set(advice.hot) == {(80, 20), (81, 20)}


@pytest.mark.parametrize("kind", [kind for kind in PROBE_KINDS if kind != "random"])
@pytest.mark.parametrize("photons", [3e3, 1e6])
def test_good_scans_raise_no_alarm(advise, kind, photons):
    for seed, sample in enumerate(SAMPLE_KINDS):
        rng = np.random.default_rng(seed)
        made = simulate_experiment(
            seed=seed,
            frames=32,
            size_px=SIZE,
            probe=probe_of_kind(rng, SIZE, kind, modes=1 + seed % 3),
            photons=photons,
            sample=lambda rng, shape, sample=sample: sample_of_kind(rng, shape, kind=sample),
        )
        assert advise(made.counts, made.probe) == PatternAdvice(), (kind, sample)
        other = probe_of_kind(np.random.default_rng(seed + 99), SIZE, kind).normalised(photons)
        assert advise(made.counts, other) == PatternAdvice(), (kind, sample)


def test_frames_of_one_spot_say_nothing_of_the_beam():
    """What they have in common is the sample's speckle."""
    pixel_yx_m = (1e-8, 2e-8)
    still = np.zeros((100, 2))
    assert chosen_frames(still, pixel_yx_m, SIZE) is None
    moving = np.concatenate([still, [[0, 15e-8]]])
    assert chosen_frames(moving, pixel_yx_m, SIZE) is None  # 7.5 px
    moved = np.concatenate([still, [[0, 17e-8]]])
    chosen = chosen_frames(moved, pixel_yx_m, SIZE)
    assert chosen is not None and len(set(chosen.tolist())) == FRAMES and chosen[-1] == 100
    few = np.random.default_rng(0).normal(size=(FRAMES - 1, 2))
    assert chosen_frames(few, pixel_yx_m, SIZE) is None


def test_dark_frames_and_a_blocked_beam_say_nothing(experiment, advise):
    dark = np.zeros((32, SIZE, SIZE), np.uint16)
    assert advise(dark, experiment.probe) == PatternAdvice()
    dark[:, 3, 4] = 1000
    assert advise(dark, experiment.probe) == PatternAdvice()
    noise = np.random.default_rng(0).poisson(3, dark.shape).astype(np.uint16)
    assert advise(noise, experiment.probe) == PatternAdvice()
    bad = np.ones((SIZE, SIZE), bool)
    assert advise(noise, experiment.probe, bad=bad) == PatternAdvice()


def test_the_measured_star_is_as_it_should_be(advise):
    """With the refined probe, and with the analytic guess of it that is far from true."""
    folder = os.environ.get("PTYCHO_STREAM_DATA")
    if folder is None:
        pytest.skip("PTYCHO_STREAM_DATA is not set: no measured frames to look at")
    with np.load(io.BytesIO(bz2.decompress((Path(folder) / SOURCE).read_bytes()))) as held:
        guess = Probe(held["probe"].reshape(1, 128, 128).astype(np.complex64))
    for modes in (1, 3):
        star = siemens_star(Path(folder), modes)
        for first in (0, 100, 300, 484):
            counts = star.counts[first : first + 32]
            for probe in (Probe(star.probe), guess):
                assert advise(counts, probe) == PatternAdvice()
    off = advise(np.roll(star.counts[:32], (2, -3), (1, 2)), Probe(star.probe))
    assert off.center_yx_px == pytest.approx((66, 61), abs=0.3)
