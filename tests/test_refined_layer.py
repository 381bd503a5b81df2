"""Refinement of a scan's image as it grows, from the store and without any daemon."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_bench import SETTINGS, SIZE, Bench, predict, refine, running_scan, shipped_recipe

from ptycho_stream.errors import GeometryError, ProbeError, PtychoStreamError
from ptycho_stream.geometry import View
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.misfit import Misfit
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.refine import RefinedImage, Refiner
from ptycho_stream.reconstruct.refined_layer import restored
from ptycho_stream.reconstruct.saved_image import STATE_FILE
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.reconstruct.shown_frames import ShownFrames
from ptycho_stream.reconstruct.trust import held_out
from ptycho_stream.results import Image, ImageState
from ptycho_stream.scans import PAIR_RECORD
from ptycho_stream.settings import RefinementSettings
from ptycho_stream.simulate.experiment import SimulatedExperiment, simulate_experiment
from ptycho_stream.simulate.probes import probe_of_kind

FRAMES = 80
HELD = np.flatnonzero(held_out(np.arange(FRAMES))).tolist()


@pytest.fixture(scope="module")
def experiment() -> SimulatedExperiment:
    assert HELD  # else nothing is tested about them
    return simulate_experiment(seed=5, frames=FRAMES, size_px=SIZE)


@pytest.fixture(scope="module")
def recipe(experiment: SimulatedExperiment) -> Recipe:
    return shipped_recipe(experiment)


@pytest.fixture
def bench(experiment: SimulatedExperiment, recipe: Recipe, tmp_path: Path) -> Iterator[Bench]:
    with running_scan(tmp_path, experiment, recipe) as made:
        yield made


def object_of(image: ScanImage) -> np.ndarray:
    return Image(image.image(final=False)).object_yx


def shows_probe(image: ScanImage, given: np.ndarray) -> bool:
    """Whether the refined image is shown with the modes (M, N, N) ``given``, but for phase."""
    assert image.refined is not None
    magnitude = np.abs(given)
    shown = np.abs(image.refined.shown_probe)
    return np.allclose(shown, magnitude, atol=1e-4 * magnitude.max())


class Watcher:
    """A subscriber: within a generation tiles only get newer versions, frames are only appended."""

    def __init__(self) -> None:
        self._seen: ImageState | None = None

    def look(self, image: ScanImage) -> ImageState:
        state, before = image.image(final=False), self._seen
        self._seen = state
        numbers = state.frame_numbers.tolist()
        assert len(set(numbers)) == len(numbers) == state.counts["reconstructed"]
        assert len(state.position_yx_m) == len(numbers)
        if before is None or before.generation != state.generation:
            return state
        assert numbers[: before.frame_numbers.size] == before.frame_numbers.tolist()
        assert before.layer in ("predicted", state.layer)
        assert state.sweeps > 0 or state.layer == "predicted"
        for index, old in before.tiles.items():
            new = state.tiles[index]
            same = np.array_equal(new.object_yx, old.object_yx, equal_nan=True)
            same &= np.array_equal(new.weight_yx, old.weight_yx)
            assert new.version > old.version or (new.version == old.version and same)
            assert (np.isfinite(old.object_yx) <= np.isfinite(new.object_yx)).all()
            assert ((new.weight_yx > 0) == np.isfinite(new.object_yx)).all()
        return state


def test_an_image_that_is_refined_while_it_grows_gets_nearer_to_the_sample(bench, experiment):
    image, watcher = bench.open(), Watcher()
    bench.write(range(30))
    predict(image)
    state = watcher.look(image)
    assert state.layer == "predicted" and state.sweeps == 0
    refine(image, sweeps=3)
    state = watcher.look(image)
    assert state.layer == "refined" and state.sweeps >= 3
    bench.write(range(30, FRAMES))
    image.step(16, list[int]().extend)
    watcher.look(image)
    predict(image)
    watcher.look(image)
    refine(image)
    state = watcher.look(image)
    assert sorted(state.frame_numbers.tolist()) == list(range(FRAMES))
    positions = experiment.positions_yx_m[state.frame_numbers]
    np.testing.assert_array_equal(state.position_yx_m, positions)
    assert state.sweeps >= SETTINGS.sweeps and not image.wants_refinement

    predicted = bench.open(settings=None)
    predict(predicted)
    assert bench.error(image) < 0.7 * bench.error(predicted)
    assert image.refined is not None and image.refined.follows


def test_frames_that_are_held_out_are_shown_but_never_refined(bench):
    bench.write(range(FRAMES))
    image = bench.open()
    predict(image)
    refine(image, sweeps=1)
    assert image.refined is not None
    refined = set(image.reader.pairs()["number"][image.refined.pairs].tolist())
    assert refined == set(range(FRAMES)) - set(HELD)
    assert image.refined.looked_at == FRAMES
    assert set(HELD) <= set(image.image(final=False).frame_numbers.tolist())


def test_refinement_goes_ahead_of_a_network_that_cannot_keep_up(bench):
    image, watcher = bench.open(), Watcher()
    bench.write(range(16))
    image.step(16, list[int]().extend)
    bench.write(range(16, FRAMES))
    assert image.current is not None
    before = watcher.look(image)
    assert set(before.tiles) == set(image.current.canvas.versions)
    refine(image, sweeps=1)
    assert image.refined is not None and image.refined.follows
    followed = watcher.look(image)
    assert set(followed.frame_numbers.tolist()) == set(range(16))  # no start for the others yet
    image.step(4, list[int]().extend)  # a few of them, here and there
    refine(image, sweeps=2)
    ahead = watcher.look(image)
    assert set(ahead.frame_numbers.tolist()) >= set(range(FRAMES)) - set(HELD)
    assert image.backlog == FRAMES - 20  # the network has these to do still
    assert set(ahead.tiles) > set(before.tiles)
    while image.has_work:
        image.step(16, list[int]().extend)
        watcher.look(image)
    image.refine(0.05)
    assert image.refined is not None
    image.refined.show()
    state = watcher.look(image)
    assert sorted(state.frame_numbers.tolist()) == list(range(FRAMES))


@pytest.mark.parametrize("good", [True, False])
def test_a_good_probe_is_fitted_later_than_one_that_is_not(bench, monkeypatch, good):
    excess = 10.0 if good else 0.0
    monkeypatch.setattr("ptycho_stream.reconstruct.scan_image.GOOD_PROBE_EXCESS", excess)
    bench.write(range(FRAMES))
    image = bench.open(settings=replace_settings(sweeps=24))
    predict(image)
    assert image.current is not None
    given = image.current.probe
    refine(image, sweeps=9)
    assert image.refined is not None and image.refined.follows
    assert shows_probe(image, given) == good
    bench.writer.seal("complete", {})
    assert image.reader.refresh()
    refine(image, sweeps=11)
    assert not shows_probe(image, given)


@pytest.mark.parametrize("enough", [FRAMES // 2, 2 * FRAMES])
def test_a_good_probe_waits_for_enough_frames_and_visits(bench, monkeypatch, enough):
    monkeypatch.setattr("ptycho_stream.reconstruct.scan_image.GOOD_PROBE_EXCESS", 10.0)
    monkeypatch.setattr("ptycho_stream.reconstruct.refined_layer._PROBE_WAITS_FRAMES", enough)
    bench.write(range(FRAMES))
    image = bench.open()
    predict(image)
    assert image.current is not None
    given = image.current.probe
    refine(image, sweeps=4)
    assert shows_probe(image, given)
    refine(image)
    assert shows_probe(image, given) == (enough > FRAMES)
    assert image.refined is not None
    if enough > FRAMES:
        assert image.refined.sweeps < SETTINGS.sweeps, "none are left for the probe"
    bench.writer.seal("complete", {})
    assert image.reader.refresh()
    refine(image)
    assert not shows_probe(image, given) and image.refined.sweeps >= SETTINGS.sweeps


def test_a_good_probe_is_fitted_for_good(bench, monkeypatch):
    """Also where so many frames come that they were visited less on average than before."""
    monkeypatch.setattr("ptycho_stream.reconstruct.scan_image.GOOD_PROBE_EXCESS", 10.0)
    monkeypatch.setattr("ptycho_stream.reconstruct.refined_layer._PROBE_WAITS_FRAMES", 30)
    bench.write(range(40))
    image = bench.open()
    predict(image)
    refine(image, sweeps=8)
    assert image.refined is not None
    before = image.refined.shown_probe
    bench.write(range(40, FRAMES))
    predict(image)
    image.refine(0.0)
    assert image.refined.sweeps < 6
    refine(image, sweeps=5)
    assert not shows_probe(image, before)


@pytest.mark.parametrize("few", [True, False])
def test_a_probe_that_nobody_knows_of_is_not_fitted_to_few_frames(bench, monkeypatch, few):
    # The network's image is not looked at.
    monkeypatch.setattr(ScanImage, "_decide_to_follow", lambda *_: None)
    bench.write(range(40 if few else FRAMES))
    image = bench.open()
    predict(image)
    refine(image)
    assert image.current is not None and image.refined is not None
    # Where it is kept for want of frames, half of the sweeps are for the time when they are there.
    assert image.refined.sweeps >= (SETTINGS.sweeps / 2 if few else SETTINGS.sweeps)
    assert shows_probe(image, image.current.probe) == few


def test_an_image_that_takes_long_to_compute_is_shown_seldom(bench, monkeypatch):
    given = Refiner.image

    def slowly(refiner: Refiner) -> RefinedImage:
        time.sleep(0.2)
        return given(refiner)

    monkeypatch.setattr(Refiner, "image", slowly)
    monkeypatch.setattr("ptycho_stream.reconstruct.refined_layer._SHOW_EVERY_S", 0.0)
    bench.write(range(40))
    image = bench.open()
    predict(image)
    image.refine(0.0)
    layer = image.refined
    assert layer is not None and layer.show_due
    layer.show()
    image.refine(0.0)
    assert layer.unshown and not layer.show_due
    monkeypatch.setattr("ptycho_stream.reconstruct.refined_layer._SHOW_WAITS_S", 0.0)
    assert layer.show_due


def test_a_layer_that_is_saved_undecided_decides_later(bench):
    bench.write(range(60))
    image = bench.open()
    predict(image)
    refine(image, sweeps=1)
    assert image.refined is not None
    image.refined.follows = None
    image.save()
    again = bench.open()
    assert again.refined is not None and again.refined.follows is None
    bench.write(range(60, FRAMES))
    predict(again)
    again.refine(0.05)
    assert again.refined.follows


def test_a_network_image_of_which_nothing_is_known_is_not_followed(bench, monkeypatch):
    look = "ptycho_stream.reconstruct.scan_image.newest_misfit"
    with monkeypatch.context() as patch:
        patch.setattr(look, lambda *_: Misfit(skipped=32))  # no frame lies inside the image
        bench.write(range(FRAMES))
        image = bench.open()
        predict(image)
        refine(image, sweeps=1)
        assert image.refined is not None and image.refined.follows is None
        bench.writer.seal("complete", {})
        assert image.reader.refresh()
        refine(image, sweeps=2)
        assert image.refined.follows is False


def test_a_layer_of_a_former_version_is_taken_on(bench):
    """Whose generations knew nothing of what was found about the probe."""
    bench.write(range(FRAMES))
    image = bench.open()
    predict(image)
    refine(image, sweeps=1)
    assert image.current is not None and image.refined is not None
    state = image.refined.state()
    known = json.loads(str(state["basis"]))
    del known["probe_settled"], known["probe_finding"]
    state["basis"] = np.array(json.dumps(known))
    layer = restored(image.reader, image.current, SETTINGS, torch.device("cpu"), state)
    assert layer is not None and layer.sweeps == image.refined.sweeps


def test_a_restart_goes_on_where_it_was(bench):
    bench.write(range(60))
    undisturbed, image = bench.open(), bench.open()
    for one in (undisturbed, image):
        predict(one)
        refine(one, sweeps=4)
    image.save()
    saved, expected = image.image(final=False), object_of(image)
    assert image.refined is not None

    again = bench.open()
    assert again.refined is not None
    assert again.refined.sweeps == pytest.approx(image.refined.sweeps)
    np.testing.assert_array_equal(again.refined.pairs, image.refined.pairs)
    assert (again.refined.looked_at, again.refined.follows) == (60, True)
    assert again.refined.probe_waits == image.refined.probe_waits
    state = again.image(final=False)
    assert (state.layer, state.sweeps) == ("refined", pytest.approx(saved.sweeps))
    assert set(state.frame_numbers.tolist()) == set(saved.frame_numbers.tolist())
    np.testing.assert_array_equal(object_of(again), expected)

    watcher = Watcher()
    watcher.look(again)
    bench.write(range(60, FRAMES))
    predict(again)
    refine(again)
    watcher.look(again)
    assert len(again.refined.pairs) == len(set(again.refined.pairs.tolist())) == FRAMES - len(HELD)
    predict(undisturbed)
    refine(undisturbed)
    assert bench.error(again) == pytest.approx(bench.error(undisturbed), rel=0.1)


def test_a_finished_image_is_shown_again_as_it_was_whatever_the_settings(bench):
    bench.write(range(60))
    image = bench.open()
    predict(image)
    refine(image, sweeps=2)
    image.save()
    for settings in (None, replace_settings(max_object_px=1), replace_settings(modes=2)):
        state = bench.open(settings=settings).image(final=True)
        assert state.layer == "refined"
        np.testing.assert_array_equal(Image(state).object_yx, object_of(image))


def replace_settings(**changes: object) -> RefinementSettings:
    return SETTINGS.model_copy(update=changes)


def test_a_state_from_before_the_first_visit_is_still_a_predicted_image(bench):
    bench.write(range(40))
    image = bench.open()
    predict(image)
    image.refine(0.0)
    assert image.refined is not None
    state = image.refined.state()
    state["visits"][:] = 0
    image.refined.state = lambda: state  # type: ignore[method-assign]
    image.save()
    again = bench.open()
    assert again.image(final=False).layer == "predicted"
    refine(again)
    assert again.image(final=False).layer == "refined"


@pytest.mark.parametrize("lost", ["refined.basis", "refined.visits", "refined.object"])
def test_a_saved_layer_that_cannot_be_read_is_made_again(bench, lost, caplog):
    """By another version of this program for example; the predicted image is not lost with it."""
    bench.write(range(40))
    image = bench.open()
    predict(image)
    refine(image, sweeps=1)
    image.save()
    path = image.reader.directory / STATE_FILE
    with np.load(path) as held:
        arrays = {key: held[key] for key in held.files if key != lost}
    np.savez(path, **arrays)
    again = bench.open()
    assert again.refined is None and again.current is not None
    assert "made again" in caplog.text
    refine(again, sweeps=1)
    assert again.image(final=False).layer == "refined"


def test_a_frame_whose_position_was_corrected_is_taken_in_once(bench, experiment):
    """Also where a restarted image has nothing to predict."""
    bench.write(range(40))
    pairs = np.zeros(1, PAIR_RECORD)
    pairs["number"], pairs["slot"], pairs["revision"] = 7, 7, 1
    pairs["y_m"], pairs["x_m"] = experiment.positions_yx_m[7] + 1e-7
    bench.writer.append_pairs(pairs)
    bench.writer.commit()
    image = bench.open(settings=None)
    predict(image)
    image.save()
    again = bench.open()
    assert not again.has_work
    refine(again, sweeps=1)
    assert again.refined is not None
    numbers = again.reader.pairs()["number"][again.refined.pairs].tolist()
    assert sorted(numbers) == sorted(set(range(40)) - set(HELD))
    assert 40 in again.refined.pairs  # the corrected pair, not the first one


def test_a_new_model_keeps_what_was_refined(bench):
    bench.write(range(FRAMES))
    image, watcher = bench.open(), Watcher()
    predict(image)
    refine(image, sweeps=2)
    watcher.look(image)
    layer = image.refined
    image.use(replace(bench.recipe, model="other", model_sha256="0" * 64))
    image.step(16, list[int]().extend)
    assert image.image(final=False).generation == 1
    predict(image)
    state = watcher.look(image)
    assert (state.generation, state.layer, state.model) == (2, "refined", "other")
    assert image.refined is layer
    refine(image, sweeps=3)
    assert watcher.look(image).sweeps >= 3


def test_a_new_probe_begins_a_new_layer(bench):
    bench.write(range(FRAMES))
    image, watcher = bench.open(), Watcher()
    predict(image)
    refine(image, sweeps=2)
    watcher.look(image)
    turned = Probe(bench.recipe.probe.modes * np.complex64(1j))
    image.use(replace(bench.recipe, probe=turned))
    image.step(16, list[int]().extend)
    assert watcher.look(image).layer == "refined"  # the old one, until the new one is complete
    predict(image)
    state = watcher.look(image)
    assert (state.generation, state.layer, state.sweeps) == (2, "predicted", 0)
    refine(image, sweeps=2)
    assert watcher.look(image).layer == "refined"


def test_a_new_view_begins_a_new_layer(bench):
    bench.write(range(FRAMES))
    image = bench.open()
    predict(image)
    refine(image, sweeps=2)
    image.save()
    bench.writer.update_header(views=(View(SIZE), View(SIZE).next(orientation="flip_x")))
    image.reader.refresh()
    assert not image.wants_refinement  # frames are no longer read as the image has them
    state = image.image(final=False)
    assert (state.generation, state.layer) == (1, "refined")
    again = bench.open()
    assert again.image(final=False).layer == "refined" and not again.wants_refinement
    for one in (image, again):
        predict(one)
        state = one.image(final=False)
        assert (state.generation, state.layer) == (2, "predicted")
        refine(one, sweeps=1)
        assert one.image(final=False).layer == "refined"


def test_a_prediction_that_does_not_explain_the_frames_is_not_followed(bench):
    bench.write(range(FRAMES))
    wrong = replace(bench.recipe, probe=probe_of_kind(np.random.default_rng(0), SIZE, "pinhole"))
    image = bench.open(wrong)
    predict(image)
    refine(image, sweeps=1)
    assert image.refined is not None and image.refined.follows is False
    image.save()
    again = bench.open(wrong)
    assert again.refined is not None and again.refined.follows is False


def test_an_object_that_is_too_large_is_said_once_and_stays_predicted(bench):
    bench.write(range(40))
    image = bench.open(settings=replace_settings(max_object_px=100))
    predict(image)
    before = object_of(image)
    with pytest.raises(GeometryError, match=r"refine\.max_object_px = 100"):
        image.refine(0.02)
    assert not image.wants_refinement
    state = image.image(final=True)
    assert (state.layer, state.sweeps) == ("predicted", 0)
    np.testing.assert_array_equal(Image(state).object_yx, before)
    image.save()
    assert not bench.open(settings=None).image(final=True).sweeps


def test_an_object_that_outgrows_the_limit_keeps_what_was_refined(bench):
    bench.write(range(20))
    image, watcher = bench.open(), Watcher()
    predict(image)
    refine(image, sweeps=2)
    image.save()
    image = bench.open(settings=replace_settings(max_object_px=1))
    before = watcher.look(image)
    bench.write(range(20, FRAMES), moved_m=300 * bench.experiment.pixel_yx_m[0])
    predict(image)
    with pytest.raises(GeometryError, match="max_object_px"):
        refine(image)
    state = watcher.look(image)
    assert (state.layer, state.sweeps) == ("refined", before.sweeps)
    assert state.frame_numbers.size == FRAMES
    assert not image.wants_refinement


def test_damaged_frames_are_left_out(bench):
    bench.write(range(40))
    image = bench.open()
    (path,) = sorted(image.reader.directory.glob("frames-*.bin"))[:1]
    with path.open("r+b") as file:
        for number in (3, 9):
            file.seek(number * bench.experiment.counts[0].nbytes + 100)
            file.write(b"\xff\xfe\xfd")
    predict(image)
    refine(image)
    assert image.refined is not None
    numbers = image.reader.pairs()["number"][image.refined.pairs].tolist()
    assert set(numbers) == set(range(40)) - {3, 9} - set(HELD)


def test_a_scan_of_empty_frames_is_not_refined_for_ever(bench, experiment):
    bench.experiment = replace(experiment, counts=np.zeros_like(experiment.counts))
    bench.write(range(20))
    image = bench.open()
    predict(image)
    for _ in range(50):
        if image.wants_refinement:
            image.refine(0.02)
    assert not image.wants_refinement
    state = image.image(final=True)
    assert state.layer == "predicted"
    assert not np.isnan(state.probe).any()


def lose_probe(image: ScanImage) -> None:
    """Steps that leave the range of numbers."""
    assert image.refined is not None
    beam = image.refined._refiner._model.beam
    beam.modes[...] = float("nan")


def test_a_lost_probe_keeps_what_was_shown_and_says_why_once(bench, caplog):
    caplog.set_level(logging.WARNING)
    bench.write(range(40))
    image, watcher = bench.open(settings=replace_settings(sweeps=1000)), Watcher()
    predict(image)
    refine(image, sweeps=2)
    before, shown = watcher.look(image), object_of(image)
    lose_probe(image)
    with pytest.raises(ProbeError, match="lost the probe"):
        refine(image)
    assert not image.wants_refinement
    with caplog.at_level(logging.ERROR):
        state = image.image(final=True)
    assert not caplog.records  # the error has said it
    assert (state.layer, state.sweeps) == ("refined", before.sweeps)
    assert np.isfinite(state.probe).all()
    np.testing.assert_array_equal(object_of(image), shown)

    image.save()
    again = bench.open()
    np.testing.assert_array_equal(object_of(again), shown)
    refine(again)  # from there, as far as it gets
    assert np.isfinite(again.image(final=True).probe).all()


def test_what_fails_with_one_probe_is_tried_again_with_another(bench, monkeypatch):
    def lose(_layer: object, _predicted: object, _budget_s: float) -> int:
        raise ProbeError("lost")

    bench.write(range(30))
    image = bench.open()
    predict(image)
    with monkeypatch.context() as patched:
        patched.setattr("ptycho_stream.reconstruct.scan_image.RefinedLayer.work", lose)
        with pytest.raises(ProbeError, match="lost"):
            image.refine(0.05)
    assert not image.wants_refinement
    turned = Probe(np.ascontiguousarray(bench.recipe.probe.modes[:, ::-1]))
    image.use(replace(bench.recipe, probe=turned))
    predict(image)
    assert image.wants_refinement and image.refine(0.05) > 0


def test_a_probe_that_is_found_lost_when_it_is_to_be_shown_is_not_shown(bench, caplog):
    caplog.set_level(logging.WARNING)
    bench.write(range(40))
    image = bench.open()
    predict(image)
    refine(image, sweeps=2)
    shown = object_of(image)
    assert image.refined is not None
    image.refined._visits += 1
    lose_probe(image)
    for _ in range(2):
        state = image.image(final=True)
        assert np.isfinite(state.probe).all()
        np.testing.assert_array_equal(Image(state).object_yx, shown)
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert "not refined any more" in caplog.text
    assert not image.refined.has_work


def test_a_device_without_room_is_said_as_an_error_of_the_package(bench, monkeypatch):
    bench.write(range(40))
    image = bench.open()
    predict(image)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("no room for 2 GiB")

    monkeypatch.setattr("ptycho_stream.reconstruct.refined_layer.Refiner", refuse)
    with pytest.raises(PtychoStreamError, match="no room"):
        image.refine(0.02)
    assert not image.wants_refinement and image.image(final=True).layer == "predicted"


def test_shown_frames_are_listed_once_in_the_order_in_which_they_came():
    pairs = np.zeros(5000, PAIR_RECORD)
    pairs["number"], pairs["slot"] = np.arange(5000) + 10, np.arange(5000)
    frames = ShownFrames()
    assert len(frames) == 0 and frames.missing(np.zeros(0, np.int64)).size == 0
    for indices in ([3, 1], [1, 4999], [3], [0, 1, 2]):
        fresh = frames.missing(np.array(indices, np.int64))
        frames.add(fresh, pairs[fresh])
    assert frames.number.tolist() == [13, 11, 5009, 10, 12]
    assert frames.slot.tolist() == [3, 1, 4999, 0, 2]
    assert len(frames) == len(frames.position_yx_m) == 5
