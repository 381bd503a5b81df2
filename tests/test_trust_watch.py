"""The watch: verdicts on sound and spoiled scans, in slices of time, whatever the frames hold."""

import time

import numpy as np
import pytest
from trust_scans import Scan, scan_of, spoiled

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.reconstruct.canvas import Canvas
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.trust_watch import Shown, TrustReport, TrustWatch
from ptycho_stream.results import Tile
from ptycho_stream.simulate.probes import random_probe
from ptycho_stream.simulate.samples import random_sample
from ptycho_stream.verdicts import VERDICTS

TILE_PX = 64


@pytest.fixture(scope="module")
def network():
    return ModelRegistry().load()[0]


@pytest.fixture(scope="module")
def sound(network) -> Scan:
    probe = random_probe(np.random.default_rng((5, 2)), 64)
    return scan_of(network, 2, frames=144, probe=probe, sample=random_sample)


def shown_of(scan: Scan) -> Shown:
    canvas = scan.canvas
    tiles = {i: Tile(n, *canvas.object_tile(i)) for i, n in canvas.versions.items()}
    return Shown(tiles, scan.beam, canvas, "predicted")


def watch_of(scan: Scan, **options) -> TrustWatch:
    watch = TrustWatch(lambda slots: scan.counts[slots], scan.truth.pixel_yx_m, TILE_PX, **options)
    number = np.arange(len(scan.counts))
    watch.add(number, number, scan.position_yx_m)
    return watch


def looked(watch: TrustWatch, shown: Shown, budget_s: float = 0.5) -> TrustReport:
    """The report when there is nothing left to find out."""
    for _ in range(1000):
        report = watch.look(shown, budget_s)
        assert report.verdict in VERDICTS and report.reasons and all(report.reasons)
        assert all(np.isfinite(value) for value in report.figures.values())
        if not watch.has_work:
            return report
    raise AssertionError("there is always something left to find out")


def test_a_sound_scan_is_good_and_its_figures_are_there(sound):
    watch = watch_of(sound)
    assert watch.has_work
    report = looked(watch, shown_of(sound))
    assert report.verdict == "good", report.reasons
    assert set(report.figures) >= {
        "r_factor",
        "r_poisson",
        "excess",
        "deviance",
        "resolution_nm",
        "coverage_um2",
        "overlap",
    }
    assert "r_free" not in report.figures, "the network has seen the held-out frames"
    assert report.figures["frames_judged"] + report.figures["frames_unseen"] == 144
    tiles = watch.misfit_tiles()
    assert any(np.isfinite(tile.excess_yx).any() for tile in tiles.values())
    assert watch.misfit_tiles() == tiles, "nothing has changed"


def test_a_look_keeps_to_its_budget_and_its_answers_come_by_and_by(sound):
    watch, shown = watch_of(sound), shown_of(sound)
    first = watch.look(shown, 0.0)
    assert first.figures["frames_judged"] <= 16 and first.verdict == "undecided"
    spent: list[float] = []
    while watch.has_work:
        started = time.process_time()
        watch.look(shown, 0.05)
        spent.append(time.process_time() - started)
    assert len(spent) > 3
    assert max(spent) < 0.8
    assert not watch.has_work


def test_a_changed_image_is_judged_again_and_more_frames_are_asked_about_again(sound):
    watch, shown = watch_of(sound), shown_of(sound)
    before = looked(watch, shown).figures["excess"]
    truth = {}
    for (ty, tx), tile in shown.tiles.items():
        piece = sound.truth_at((ty * TILE_PX, tx * TILE_PX), tile.object_yx.shape)
        truth[ty, tx] = Tile(tile.version + 1, piece, tile.weight_yx)
    perfect = Shown(truth, shown.probe, shown.canvas, "refined")
    watch.look(perfect, 0.0)
    assert watch.has_work
    after = looked(watch, perfect).figures
    assert abs(after["excess"]) < 3e-3 < before
    assert abs(after["excess_free"]) < 0.02


FAULTS = {
    "another probe": "probe suspect",
    "too few photons": "probe suspect",
    "positions off": "positions suspect",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_suspected_and_named(sound, fault):
    rng = np.random.default_rng(1)
    match fault:
        case "another probe":
            other = random_probe(np.random.default_rng(99), 64)
            scan = sound.told(probe=other.normalised(sound.beam.photons))
        case "too few photons":
            scan = sound.told(probe=sound.beam.normalised(sound.beam.photons / 2))
        case _:
            off = rng.normal(0, 2, sound.position_yx_m.shape) * sound.truth.pixel_yx_m
            scan = sound.told(position_yx_m=sound.position_yx_m + off)
    report = looked(watch_of(scan), shown_of(scan))
    assert report.verdict == FAULTS[fault], report.reasons


def test_bad_frames_are_named(network):
    scan = scan_of(network, seed=6, frames=144)
    which = np.random.default_rng(5).choice(144, 8, replace=False)
    report = looked(watch_of(spoiled(scan, "other frames", which)), shown_of(scan))
    assert report.verdict == "frames bad", report.reasons
    assert len(np.intersect1d(report.bad_frames, which)) >= 7
    assert len(report.bad_frames) <= 9


@pytest.mark.slow
def test_a_mirrored_detector_is_suspected_with_what_undoes_it(sound, network):
    scan = sound.told(counts=np.ascontiguousarray(np.roll(sound.counts[:, ::-1], 1, axis=1)))
    watch = watch_of(scan, predictor=Predictor(network, scan.beam))
    report = looked(watch, shown_of(scan))
    assert report.verdict == "orientation suspect", report.reasons
    assert report.finding is not None and report.finding.best is not None
    best = report.finding.best
    assert any(
        layout.detector == "flip_y" and layout.positions == "identity"
        for layout in (best.layout, *best.equivalent)
    )


def test_a_sparse_scan_is_undersampled(network):
    probe = random_probe(np.random.default_rng((5, 2)), 64)
    scan = scan_of(network, 2, frames=49, probe=probe, sample=random_sample, step_px=24.0)
    report = looked(watch_of(scan), shown_of(scan))
    assert report.verdict == "undersampled", report.reasons


@pytest.mark.parametrize(
    "case", ["no frame", "one frame", "dark", "masked", "nowhere", "one place", "saturated"]
)
def test_hopeless_scans_are_undecided_or_suspected_and_leave_no_nan(sound, network, case):
    few = slice(0, 1) if case == "one frame" else slice(0, 20)
    counts, position = sound.counts[few].copy(), sound.position_yx_m[few].copy()
    valid = None
    match case:
        case "dark":
            counts[:] = 0
        case "masked":
            valid = np.zeros((64, 64), bool)
        case "nowhere":
            position[:] = np.nan
        case "one place":
            position[:] = position[0]
        case "saturated":
            counts[:] = 60_000
        case _:
            pass
    shown = shown_of(sound)
    pixel = sound.truth.pixel_yx_m
    if case == "no frame":
        watch = TrustWatch(lambda slots: counts[slots], pixel, TILE_PX)
        report = watch.look(Shown({}, sound.beam, Canvas(TILE_PX), "predicted"), 0.1)
        assert report.verdict == "undecided"
        assert not watch.has_work
        return
    predictor = None if case == "saturated" else Predictor(network, sound.beam)
    watch = TrustWatch(
        lambda slots: counts[slots], pixel, TILE_PX, valid=valid, predictor=predictor
    )
    watch.add(np.arange(len(counts)), np.arange(len(counts)), position)
    report = looked(watch, shown)
    assert report.verdict != "good", report.reasons
    assert not any(np.isinf(tile.excess_yx).any() for tile in watch.misfit_tiles().values())


def test_corrected_positions_are_used(sound):
    off = sound.position_yx_m + 4 * np.asarray(sound.truth.pixel_yx_m)
    watch = watch_of(sound.told(position_yx_m=off))
    bad = looked(watch, shown_of(sound)).figures["excess"]
    number = np.arange(len(off))
    watch.move(number, sound.position_yx_m)
    changed = shown_of(sound)
    tiles = {i: Tile(t.version + 1, t.object_yx, t.weight_yx) for i, t in changed.tiles.items()}
    report = looked(watch, Shown(tiles, changed.probe, changed.canvas, "predicted"))
    assert report.figures["excess"] < 0.7 * bad


def test_growing_scans_ask_again(sound):
    half = len(sound.counts) // 2
    watch = TrustWatch(lambda slots: sound.counts[slots], sound.truth.pixel_yx_m, TILE_PX)
    shown, number = shown_of(sound), np.arange(len(sound.counts))
    watch.add(number[:half], number[:half], sound.position_yx_m[:half])
    first = looked(watch, shown).figures
    watch.add(number[half:], number[half:], sound.position_yx_m[half:])
    assert watch.has_work
    second = looked(watch, shown).figures
    assert second["coverage_um2"] > first["coverage_um2"]
    assert second["resolution_frames"] == len(sound.counts)
