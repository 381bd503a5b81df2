"""While a scan runs the network is given a fitted or refined probe, where it knows no beam."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_bench import SETTINGS, SIZE, Bench, predict, running_scan, shipped_recipe

from ptycho_stream.errors import ModelError
from ptycho_stream.geometry import View
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.generation import Generation
from ptycho_stream.reconstruct.lending import LentScan
from ptycho_stream.reconstruct.live_misfit import newest_misfit
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.refined_layer import RefinedLayer
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.scans import ScanReader
from ptycho_stream.settings import RefinementSettings
from ptycho_stream.simulate.experiment import SimulatedExperiment, simulate_experiment

FRAMES = 80
LONGER = RefinementSettings(modes=1, sweeps=24)


@pytest.fixture(scope="module")
def experiment() -> SimulatedExperiment:
    return simulate_experiment(seed=5, frames=FRAMES, size_px=SIZE)


def defocused(probe: Probe, waves: float, astigmatism: float = 0.0) -> Probe:
    """The probe with so many waves of defocus at the edge of its window's spectrum."""
    along_yx = waves + astigmatism, waves - astigmatism
    r2 = (np.fft.fftfreq(probe.size_px) / 0.5) ** 2
    phase = along_yx[0] * r2[:, None] + along_yx[1] * r2[None, :]
    spectrum = np.fft.fft2(probe.modes) * np.exp(2j * np.pi * phase)
    return Probe(np.fft.ifft2(spectrum).astype(np.complex64))


@pytest.fixture(scope="module")
def recipe(experiment: SimulatedExperiment) -> Recipe:
    """With a probe that does not explain the frames."""
    return replace(shipped_recipe(experiment), probe=defocused(experiment.probe, 2.0))


@pytest.fixture
def bench(experiment: SimulatedExperiment, recipe: Recipe, tmp_path: Path) -> Iterator[Bench]:
    with running_scan(tmp_path, experiment, recipe) as made:
        yield made


@pytest.fixture
def astigmatic(
    experiment: SimulatedExperiment,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Bench]:
    """With a probe that another defocus makes better, and refinement of more frames better still.

    However alike they are, so that the refined one takes the fitted one's place.
    """
    monkeypatch.setattr("ptycho_stream.reconstruct.renewal._MOST_FITTED", 32)
    monkeypatch.setattr("ptycho_stream.reconstruct.renewal._ALIKE", 1.1)
    wrong = defocused(experiment.probe, 2.0, astigmatism=0.5)
    with running_scan(tmp_path, experiment, replace(recipe, probe=wrong)) as made:
        yield made


def excess(image: ScanImage) -> float:
    return newest_misfit(image.viewed, generation(image)).excess


def turn(image: ScanImage, limit: int) -> int:
    """A batch, else a step of refinement; how many pairs are new to subscribers."""
    if image.can_step:
        return len(image.step(limit, list[int]().extend))
    if image.wants_refinement:
        image.refine(0.0)
    return 0


def turns(image: ScanImage, limit: int = 16) -> int:
    """What the stage does while there is anything to do; how many pairs were new."""
    told = 0
    for _ in range(2000):
        if not (image.has_work or image.wants_refinement):
            break
        told += turn(image, limit)
    assert image.refined is not None
    image.refined.show()
    return told


def whole_scan(bench: Bench) -> tuple[ScanImage, float]:
    """A scan after all turns, and the excess that its frames had with the probe as told."""
    bench.write(range(FRAMES))
    image = bench.open(settings=LONGER)
    predict(image)
    before = excess(image)
    turns(image)
    return image, before


def generation(image: ScanImage) -> Generation:
    """What subscribers see."""
    assert image.current is not None
    return image.current


def renewed_with(image: ScanImage) -> int:
    """With how many frames the probe was refined that the network has."""
    return generation(image).identity.probe_frames


def renewed_with_next(image: ScanImage) -> int:
    """The same of the generation that follows."""
    assert image.following is not None
    return image.following.identity.probe_frames


def until_renewal(image: ScanImage) -> None:
    """Predict and refine until the scan is to be predicted again."""
    predict(image)
    while not image.can_step:
        image.refine(0.0)


def without_probe(recipe: Recipe) -> Recipe:
    """The same, with a network that says that the probe tells it nothing."""
    network = copy.copy(recipe.network)
    network.uses_probe = False
    return replace(recipe, network=network)


def test_a_scan_that_begins_out_of_focus_is_predicted_again_with_a_fitted_probe(bench, caplog):
    caplog.set_level("INFO")
    image, before = whole_scan(bench)
    said = generation(image).identity.probe_finding
    assert said.startswith("the probe that the scan began with is wrong: it is 2.1 rad out of")
    assert said in caplog.text
    assert renewed_with(image) == 64 and generation(image).identity.probe_settled
    assert generation(image).number == 2  # and not a third time
    assert excess(image) < before / 2
    assert image.refined is not None and image.refined.follows and image.refined.probe_waits
    assert image.refined.sweeps >= LONGER.sweeps / 2  # the rest is for the scan's end
    assert len(image.frames) == FRAMES

    as_told = bench.open(recipe=without_probe(bench.recipe), settings=LONGER)
    turns(as_told)
    assert renewed_with(as_told) == 0
    assert bench.error(image) < 0.4 * bench.error(as_told)

    bench.writer.seal("complete", {})
    assert image.reader.refresh()
    turns(image)
    assert image.refined.sweeps >= LONGER.sweeps and generation(image).number == 2


def test_a_probe_that_no_defocus_makes_better_is_refined_first(bench, monkeypatch, caplog):
    monkeypatch.setattr("ptycho_stream.reconstruct.probe_fit.CLEARLY", 0.0)
    caplog.set_level("INFO")
    image, before = whole_scan(bench)
    assert "no other defocus or far field explains the first frames" in caplog.text
    assert renewed_with(image) > 32 and not generation(image).identity.probe_settled
    assert excess(image) < before / 2


@pytest.mark.parametrize("settings", [{"probe": False}, {"positions": True}, {"seconds": 1.0}])
def test_a_probe_stays_that_is_not_refined_or_while_it_would_do_harm(bench, settings):
    bench.write(range(FRAMES))
    image = bench.open(settings=SETTINGS.model_copy(update=settings))
    turns(image)
    assert renewed_with(image) == 0


def test_a_probe_that_the_network_is_good_with_stays(bench, experiment):
    bench.write(range(FRAMES))
    image = bench.open(recipe=shipped_recipe(experiment), settings=LONGER)
    turns(image)
    assert renewed_with(image) == 0 and generation(image).number == 1


@pytest.mark.parametrize("beam", ["bench", "astigmatic"])
def test_while_it_is_predicted_again_new_frames_come_and_none_is_lost(beam, request):
    bench: Bench = request.getfixturevalue(beam)
    # With photons from the first frames an image of four would be made again, and told again.
    image = bench.open(recipe=replace(bench.recipe, photons=4.1e5), settings=LONGER)
    told = 0
    for first in range(0, FRAMES, 4):
        bench.write(range(first, first + 4))
        told += sum(turn(image, 4) for _ in range(12))
    told += turns(image, 4)
    assert renewed_with(image) >= 32
    assert generation(image).number > (2 if beam == "astigmatic" else 1)
    assert told == FRAMES  # each is new to subscribers once
    assert sorted(image.frames.number.tolist()) == list(range(FRAMES))
    assert len(generation(image).ledger.added) == FRAMES
    assert image.backlog == 0 and image.following is None


def test_a_refined_probe_that_is_like_the_fitted_one_does_not_take_its_place(
    astigmatic, monkeypatch
):
    monkeypatch.setattr("ptycho_stream.reconstruct.renewal._ALIKE", 0.5)
    astigmatic.write(range(FRAMES))
    image = astigmatic.open(settings=LONGER)
    turns(image)
    assert renewed_with(image) == 32 and not generation(image).identity.probe_settled
    assert image.refined is not None and image.refined.sweeps >= LONGER.sweeps


@pytest.mark.parametrize("sealed", [False, True])
def test_the_network_waits_for_the_probe_that_is_fitted_while_the_scan_runs(bench, sealed):
    bench.write(range(40))
    image = bench.open(settings=LONGER)
    predict(image)
    image.refine(0.0, may_renew=False)
    assert not image.renewals.fits(generation(image))
    while not image.renewals.fits(generation(image)):
        image.refine(0.0)
    bench.write(range(40, 60))
    if sealed:
        bench.writer.seal("complete", {})
        assert image.reader.refresh()
    assert image.has_work and image.can_step == sealed
    while image.renewals.fits(generation(image)):
        image.refine(0.0)
    assert image.refined is not None and image.refined.looked_at == 60  # the image goes on
    assert image.can_step
    turns(image)
    assert renewed_with(image) == 40 and len(image.frames) == 60


def test_a_restart_in_the_midst_of_it_goes_on_with_that_probe(bench):
    bench.write(range(FRAMES))
    image = bench.open(settings=LONGER)
    until_renewal(image)
    image.step(4, list[int]().extend)
    assert image.following is not None and image.following.ledger.count == 4
    probe = image.following.probe
    image.save()
    again = bench.open(settings=LONGER)
    turns(again)
    assert renewed_with(again) == renewed_with_next(image)
    np.testing.assert_array_equal(generation(again).probe, probe)
    again.save()
    third = bench.open(settings=LONGER)
    assert not third.has_work and not third.wants_refinement
    assert renewed_with(third) == renewed_with(again)


def test_a_probe_that_has_got_worse_is_not_used(bench, monkeypatch, caplog):
    bench.write(range(FRAMES))
    image = bench.open(settings=LONGER)
    worse = Probe(np.roll(defocused(bench.experiment.probe, 8.0).modes, 20, axis=1))
    monkeypatch.setattr(RefinedLayer, "probe", worse)
    monkeypatch.setattr("ptycho_stream.reconstruct.probe_fit.defocused", lambda *_: worse)
    turns(image)
    assert renewed_with(image) == 0 and image.following is None
    assert "does not explain the frames better" in caplog.text
    assert not generation(image).identity.probe_finding
    assert not any(
        record.levelname == "WARNING" and "began with" in record.message
        for record in caplog.records
    )
    assert image.refined is not None and image.refined.sweeps >= LONGER.sweeps


def test_a_probe_that_cannot_be_judged_is_not_used_and_no_frame_is_lost(bench, monkeypatch, caplog):
    bench.write(range(FRAMES))
    image = bench.open(settings=LONGER)
    until_renewal(image)
    bench.writer.seal("complete", {})
    assert image.reader.refresh()

    def refuse(*_: object) -> None:
        raise ModelError("no memory left")

    monkeypatch.setattr("ptycho_stream.reconstruct.renewal.newest_misfit", refuse)
    turns(image)
    assert renewed_with(image) == 0 and image.following is None
    assert "goes on with the probe as it was: no memory left" in caplog.text
    assert image.refined is not None and image.refined.sweeps >= LONGER.sweeps
    assert len(image.frames) == FRAMES


def test_a_view_that_changes_while_a_probe_waits_does_not_get_it(bench):
    bench.write(range(FRAMES))
    image = bench.open(settings=LONGER)
    until_renewal(image)
    bench.writer.update_header(views=(View(SIZE), View(SIZE).next(orientation="flip_x")))
    assert image.reader.refresh()
    predict(image)
    assert renewed_with(image) == 0
    scale = generation(image).probe / bench.recipe.probe.modes
    np.testing.assert_allclose(scale, scale.flat[0], rtol=1e-3)


def test_pairs_that_helpers_predict_meanwhile_are_in_it(bench):
    bench.write(range(FRAMES))
    image = bench.open(settings=LONGER)
    until_renewal(image)
    image.step(4, list[int]().extend)
    assert image.following is not None
    number = image.following.number
    loan = image.lend(30)
    assert loan is not None and loan.generation == number and loan.probe is not None
    np.testing.assert_array_equal(loan.probe, image.following.probe)
    with ScanReader.open(bench.root, bench.writer.scan_id) as reader:
        made = LentScan(reader, bench.recipe, loan).make(loan, lambda: None)
    image.take_back(loan, made)
    turns(image)
    assert generation(image).number >= number and renewed_with(image) >= 32
    assert len(generation(image).ledger.added) == len(image.frames) == FRAMES


def test_another_view_of_the_frames_begins_with_the_probe_that_was_told(bench):
    bench.write(range(FRAMES))
    image = bench.open(settings=LONGER)
    turns(image)
    assert renewed_with(image) >= 32
    told = bench.recipe.probe_digest
    bench.writer.update_header(views=(View(SIZE), View(SIZE).next(orientation="flip_x")))
    assert image.reader.refresh()
    predict(image)
    assert renewed_with(image) == 0 and generation(image).identity.probe_digest == told
    scale = generation(image).probe / bench.recipe.probe.modes
    np.testing.assert_allclose(scale, scale.flat[0], rtol=1e-3)


def test_what_was_found_is_told_as_long_as_such_a_probe_is_used(astigmatic, experiment):
    bench: Bench = astigmatic
    bench.write(range(FRAMES))
    image = bench.open(settings=LONGER)
    turns(image)
    assert renewed_with(image) > 32  # refined since
    finding = generation(image).identity.probe_finding
    assert "rad out of focus" in finding
    image.save()
    again = bench.open(settings=LONGER)
    assert generation(again).identity.probe_finding == finding
    again.use(replace(bench.recipe, probe=experiment.probe))
    turns(again)
    assert renewed_with(again) == 0 and not generation(again).identity.probe_finding


def test_another_model_in_the_midst_of_a_fit_begins_anew(bench):
    bench.write(range(FRAMES))
    image = bench.open(settings=LONGER)
    until_renewal(image)
    image.use(replace(bench.recipe, model="another"))
    turns(image)
    assert renewed_with(image) == 64 and generation(image).identity.probe_settled
    assert generation(image).identity.model == "another"


def test_a_detector_that_is_turned_is_left_to_the_diagnosis(bench, experiment, caplog):
    caplog.set_level("INFO")
    bench.writer.update_header(views=(View(SIZE), View(SIZE).next(orientation="rotate180")))
    bench.write(range(FRAMES))
    image = bench.open(recipe=shipped_recipe(experiment), settings=LONGER)
    turns(image)
    assert "a detector turned by 180 degrees explains the first frames as well" in caplog.text
    assert "predicts it again" not in caplog.text
    assert renewed_with(image) == 0 and generation(image).number == 1


def test_the_network_gets_as_many_modes_as_the_settings_say(astigmatic):
    bench = astigmatic
    bench.write(range(FRAMES))
    three = LONGER.model_copy(update={"modes": 3})
    for told, modes in ((None, 3), (2, 2)):
        image = bench.open(recipe=replace(bench.recipe, modes=told), settings=three)
        turns(image)
        assert renewed_with(image) >= 32 and len(generation(image).probe) == modes
