"""Trust in the image of an open scan: what is judged, told, written down, and acted upon."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from daemon_harness import wait_for
from image_bench import SETTINGS, SIZE, Bench, predict, refine, running_scan, shipped_recipe

from ptycho_stream.errors import ModelError, StoreError
from ptycho_stream.geometry import Orientation, View
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.allowance import Allowance
from ptycho_stream.reconstruct.diagnosis import Finding, Trial
from ptycho_stream.reconstruct.history import read_history
from ptycho_stream.reconstruct.layouts import Layout
from ptycho_stream.reconstruct.open_scan import OpenScan
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.reconstruct.scan_trust import ScanTrust
from ptycho_stream.reconstruct.spare_time import SpareTime
from ptycho_stream.reconstruct.trust_watch import TrustReport, TrustWatch
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.settings import Settings, TrustSettings
from ptycho_stream.simulate.experiment import SimulatedExperiment, simulate_experiment
from ptycho_streamd.reconstruct_metrics import ReconstructMetrics

FRAMES = 40


@pytest.fixture(scope="module")
def experiment() -> SimulatedExperiment:
    return simulate_experiment(seed=6, frames=FRAMES, size_px=SIZE)


@pytest.fixture
def bench(experiment: SimulatedExperiment, tmp_path: Path) -> Iterator[Bench]:
    with running_scan(tmp_path, experiment, shipped_recipe(experiment)) as made:
        made.write(range(FRAMES))
        yield made


def judge(
    image: ScanImage, diagnosis: str = "off", *, mask_pixels: bool = False, **changes: object
) -> ScanTrust:
    settings = TrustSettings(diagnosis=diagnosis, **changes)  # type: ignore[arg-type]
    device = torch.device("cpu")
    return ScanTrust(image, settings, device, positions_move=False, mask_pixels=mask_pixels)


def look_at(image: ScanImage, trust: ScanTrust) -> None:
    """Until there is nothing more to be said of the image as it is."""
    while trust.due(hurried=True):
        trust.look(image.image(final=False))


def test_what_is_found_is_told_with_the_image_and_written_down(bench, caplog):
    caplog.set_level("INFO")
    image = bench.open(settings=None)
    trust = judge(image, interval_s=1000.0)
    assert not trust.due(hurried=True)  # there is no image yet
    predict(image)
    state = image.image(final=False)
    assert trust.told(state) is state
    look_at(image, trust)
    told = trust.told(image.image(final=True))
    assert told.verdict and told.reasons and told.trust["frames_judged"] > 0
    history = read_history(image.reader.directory)
    assert [entry.frames for entry in history] == [FRAMES, FRAMES]  # the first, and the last
    assert history[-1].verdict == told.verdict and history[-1].figures == dict(told.trust)
    assert caplog.text.count(f": {told.verdict}: ") == 1


def test_looks_are_paced_as_long_as_there_is_other_work(bench):
    image = bench.open(settings=None)
    predict(image)
    trust = judge(image, share=0.001)
    assert trust.due(hurried=False)
    trust.look(image.image(final=False))
    assert not trust.due(hurried=False)
    assert trust.due(hurried=True)


def test_a_better_image_is_judged_anew(bench):
    image = bench.open()
    predict(image)
    trust = judge(image)
    look_at(image, trust)
    before = trust.told(image.image(final=False))
    refine(image)
    wait_for(lambda: trust.due(hurried=False), 30, "time for another look")
    look_at(image, trust)
    after = trust.told(image.image(final=False))
    assert after.trust["excess"] < before.trust["excess"]


def test_sweeps_that_nobody_has_seen_are_judged_in_the_end(bench):
    image = bench.open(settings=SETTINGS.model_copy(update={"sweeps": 1e6}))
    predict(image)
    refine(image, sweeps=2)
    trust = judge(image)
    look_at(image, trust)
    image.refine(0.02)
    assert not trust.due(hurried=False)
    assert trust.due(hurried=True)


def test_the_final_image_is_the_one_that_was_judged(bench):
    """The last sweeps end when the time is up, not when subscribers have seen them."""
    bench.writer.seal("complete", {})
    image = bench.open(settings=SETTINGS.model_copy(update={"sweeps": 1e6}))
    predict(image)
    lease = Catalogue(bench.root).lease(image.reader.scan_id, "reconstruct")
    trust = judge(image)
    scan = OpenScan(image, lease, trust=trust, refine_s=0.7, trust_s=60.0)
    spare_time = SpareTime(ReconstructMetrics())
    while not scan.over:
        spare_time.use({image.reader.scan_id: scan}, between_batches=False)
    assert image.refined is not None
    shown = image.refined.shown
    final = scan.state(final=True)
    assert image.refined.shown == shown and final.layer == "refined"
    again = judge(image)
    look_at(image, again)
    fresh = again.told(final)
    for figure in ("r_factor", "excess", "deviance", "frames_judged"):
        assert final.trust[figure] == pytest.approx(fresh.trust[figure], rel=1e-6)
    scan.close()


def opened(bench: Bench, *, refined: bool, share: float = 0.5) -> OpenScan:
    """The bench's scan, as the reconstruct stage opens it."""
    settings = Settings.model_validate(
        {
            "probe": {"path": "given by the recipe"},
            "refine": {"enabled": refined, "modes": 1, "sweeps": 2},
            "trust": {"enabled": True, "diagnosis": "suggest", "share": share},
        }
    )
    catalogue = Catalogue(bench.root)
    lease = catalogue.lease(bench.writer.scan_id, "reconstruct")
    return OpenScan.of(catalogue.open(bench.writer.scan_id), lease, bench.recipe, settings)


@contextmanager
def without_collector() -> Iterator[None]:
    """What is let go meanwhile is freed only where no circle of references holds it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("refined", [False, True])
def test_a_scan_that_is_closed_in_the_middle_of_a_look_is_let_go(bench, refined):
    """Its arrays are large, and the garbage collector seldom comes to objects so old."""
    scan = opened(bench, refined=refined, share=1e-6)
    predict(scan.image)
    if refined:
        refine(scan.image)
    assert scan.image.current is not None and scan.trust is not None
    held = [weakref.ref(scan.image), weakref.ref(scan.image.current.canvas)]
    if refined:
        held.append(weakref.ref(scan.image.refined))
    with without_collector():
        scan.trust.look(scan.state(final=False))
        assert scan.trust.due(hurried=True), "it was not in the middle of it"
        scan.close()
        del scan
        assert [one() for one in held] == [None] * len(held)


def test_a_save_that_the_disk_refuses_leaves_nothing_behind(bench, monkeypatch):
    def full(*_: object) -> None:
        raise StoreError("there is no space left")

    monkeypatch.setattr("ptycho_stream.reconstruct.open_scan.write_state", full)
    scan = opened(bench, refined=False)
    predict(scan.image)
    image = weakref.ref(scan.image)
    with without_collector():
        scan.begin_save()
        with pytest.raises(StoreError, match="no space"):
            scan.end_save(wait=True)
        scan.close()
        del scan
        assert image() is None


def test_no_better_probe_is_sought_before_the_pattern_was_looked_at(bench):
    scan = opened(bench, refined=False)
    predict(scan.image)
    assert scan.trust is not None and not scan.may_renew
    look_at(scan.image, scan.trust)
    assert scan.may_renew
    scan.close()


def test_another_generation_is_judged_by_itself(bench):
    image = bench.open(settings=None)
    predict(image)
    trust = judge(image)
    look_at(image, trust)
    image.use(replace(bench.recipe, probe=Probe(bench.recipe.probe.modes[:, ::-1].copy())))
    predict(image)
    state = image.image(final=False)
    assert state.generation == 2 and trust.told(state) is state
    look_at(image, trust)
    assert trust.told(state).trust


def report(detector: Orientation, positions: Orientation = "identity") -> TrustReport:
    """One that says: another way round fits."""
    trial = Trial(Layout(detector, positions), (), 0.1, 0.01)
    finding = Finding((trial,), 64, True, "it fits")
    return TrustReport({}, "orientation suspect", ("it fits",), (), finding)


@pytest.fixture
def judged(bench: Bench) -> tuple[Bench, ScanImage, ScanTrust]:
    image = bench.open(settings=None)
    predict(image)
    trust = judge(image, "auto")
    trust.look(image.image(final=False))
    return bench, image, trust


def wanted(trust: ScanTrust) -> str | None:
    view = trust.view_wanted
    return None if view is None else view["orientation"]


def turn(bench: Bench, image: ScanImage, orientation: Orientation) -> None:
    views = image.reader.header.views
    bench.writer.update_header(views=(*views, views[-1].next(orientation=orientation)))
    image.reader.refresh()


def test_an_orientation_that_was_corrected_is_not_turned_back(judged):
    """What was found of the frames as they were is no matter of the frames as they are."""
    bench, image, trust = judged
    trust.report = report("flip_x")
    assert wanted(trust) == "flip_x"
    turn(bench, image, "flip_x")
    assert wanted(trust) is None  # its image is on its way
    predict(image)
    assert wanted(trust) is None  # it was not looked at yet
    trust.look(image.image(final=False))
    trust.report = report("flip_x")
    assert wanted(trust) is None  # as it was at first: this would go on for ever
    trust.report = report("transpose")
    assert wanted(trust) not in (None, "identity", "flip_x")


def test_only_what_is_asked_for_and_can_be_corrected_is(judged):
    _, image, trust = judged
    trust.report = report("identity")
    assert wanted(trust) is None
    trust.report = report("flip_x", "flip_x")
    assert wanted(trust) is None  # where the stage was is not for the view to say
    trust.report = report("rotate90")
    assert wanted(trust) == "rotate90"
    for diagnosis in ("off", "suggest"):
        other = judge(image, diagnosis)
        other.look(image.image(final=False))
        other.report = report("rotate90")
        assert wanted(other) is None


def test_a_scan_that_is_over_waits_for_its_view_but_not_for_ever(judged, monkeypatch):
    bench, image, trust = judged
    assert not trust.awaits_view
    trust.report = report("flip_x")
    assert trust.awaits_view
    monkeypatch.setattr(trust, "_view_time", Allowance(0.0))
    assert not trust.awaits_view
    monkeypatch.undo()
    turn(bench, image, "flip_x")
    assert not trust.awaits_view


def test_a_device_that_refuses_is_an_error_of_the_package(bench, monkeypatch):
    def refuse(*_args: object) -> None:
        raise torch.OutOfMemoryError("no room for 2 GiB")

    monkeypatch.setattr(TrustWatch, "look", refuse)
    image = bench.open(settings=None)
    predict(image)
    with pytest.raises(ModelError, match="no room"):
        judge(image).look(image.image(final=False))


def test_a_view_that_is_changing_stops_the_looks(bench):
    image = bench.open(settings=None)
    predict(image)
    trust = judge(image)
    bench.writer.update_header(views=(View(SIZE), View(SIZE).next(orientation="flip_y")))
    image.reader.refresh()
    assert not trust.due(hurried=True)
