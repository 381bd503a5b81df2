"""Suggestions of an open scan: told once for a view, followed only where the settings say so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for
from image_bench import SIZE, Bench, predict, running_scan, shipped_recipe
from test_end_to_end import line
from test_scan_trust import judge

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.view_change import changed_view
from ptycho_stream.geometry import View
from ptycho_stream.reconstruct.history import read_history
from ptycho_stream.reconstruct.pattern_advice import FRAMES
from ptycho_stream.scans import Catalogue
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.simulate.experiment import SimulatedExperiment, simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.simulate.score import nrmse_to_truth

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def true() -> SimulatedExperiment:
    return simulate_experiment(seed=6, frames=64, size_px=SIZE)


@pytest.fixture(scope="module")
def off(true: SimulatedExperiment) -> SimulatedExperiment:
    """Frames 3 pixels down and 2 to the left, with a hot pixel."""
    counts = np.roll(true.counts, (3, -2), (1, 2))
    counts[:, 10, 60] = 50_000
    return replace(true, counts=counts)


@pytest.fixture
def bench(off: SimulatedExperiment, tmp_path: Path) -> Iterator[Bench]:
    with running_scan(tmp_path, off, shipped_recipe(off)) as made:
        yield made


def test_it_takes_some_frames_and_is_told_last_and_logged_once(bench, caplog):
    caplog.set_level(logging.INFO)
    image = bench.open(settings=None)
    trust = judge(image, "suggest", interval_s=1e-9)
    bench.write(range(FRAMES - 1))
    predict(image)
    trust.look(image.image(final=False))
    assert trust.suggestions == ()
    bench.write(range(FRAMES - 1, 40))
    predict(image)
    for _ in range(3):
        trust.look(image.image(final=False))
    center, hot = trust.suggestions
    assert "set view.center_yx_px = [3" in center
    assert "pixel (10, 60) of the detector" in hot and "view.bad_value_from = 50000" in hot
    assert trust.report is not None and trust.report.reasons
    state = trust.told(image.image(final=False))
    assert state.reasons == (*trust.report.reasons, center, hot)
    assert read_history(image.reader.directory)[-1].reasons == state.reasons
    assert trust.view_wanted is None
    said = [text for text in caplog.messages if "a suggestion" in text]
    assert len(said) == 2 and "view.center_yx_px" in said[0]


def test_off_looks_at_nothing(bench, caplog):
    image = bench.open(settings=None)
    trust = judge(image, "off")
    bench.write(range(40))
    predict(image)
    trust.look(image.image(final=False))
    assert trust.suggestions == () and trust.view_wanted is None
    assert "a suggestion" not in caplog.text


def test_a_centre_that_was_corrected_is_looked_at_again_and_not_moved_back(bench):
    image = bench.open(settings=None)
    trust = judge(image, "auto")
    bench.write(range(40))
    predict(image)
    trust.look(image.image(final=False))
    view = trust.view_wanted
    assert view is not None and view["orientation"] is None
    assert view["center_yx_px"] == pytest.approx([35, 30], abs=0.3)
    right = image.reader.header.view.next(center_yx_px=tuple(view["center_yx_px"]))
    bench.writer.update_header(views=(*image.reader.header.views, right))
    image.reader.refresh()
    assert trust.view_wanted is None  # its image is on its way
    predict(image)
    trust.look(image.image(final=False))
    assert trust.view_wanted is None
    (hot,) = trust.suggestions
    assert "(10, 60)" in hot

    wrong = right.next(center_yx_px=(33.0, 30.0))
    bench.writer.update_header(views=(*image.reader.header.views, wrong))
    image.reader.refresh()
    predict(image)
    trust.look(image.image(final=False))
    assert "set view.center_yx_px" in trust.suggestions[0]
    assert trust.view_wanted is None  # where it was before: this would go on for ever


def test_hot_pixels_are_masked_by_itself_where_the_settings_say_so(bench):
    """Also where nothing else is corrected by itself; once, and without moving the centre."""
    image = bench.open(settings=None)
    trust = judge(image, "suggest", mask_pixels=True)
    bench.write(range(40))
    predict(image)
    trust.look(image.image(final=False))
    wanted = trust.view_wanted
    assert wanted is not None
    assert (wanted["orientation"], wanted["center_yx_px"]) == (None, None)
    assert wanted["bad_pixels_yx"] == [[10, 60]]

    header, directory = image.reader.header, image.reader.directory
    view = changed_view(header, directory, wanted)
    bench.writer.update_header(views=(*header.views, view))
    image.reader.refresh()
    assert not image.viewed.valid[10, 60] and image.viewed.valid.sum() == SIZE**2 - 1
    assert trust.view_wanted is None
    predict(image)
    trust.look(image.image(final=False))
    assert trust.view_wanted is None
    assert all("(10, 60)" not in said for said in trust.suggestions)


@pytest.mark.slow
@pytest.mark.parametrize("diagnosis", ["auto", "suggest"])
def test_a_pattern_off_its_centre_in_the_daemon(true, tmp_path, diagnosis):
    """On a larger detector, far from the centre that the settings name."""
    scan = scan_file_of(true)
    wide = np.zeros((len(scan), 100, 120), scan.counts.dtype)
    wide[:, 30:94, 12:76] = scan.counts
    played: ScanFile = replace(scan, counts=wide)
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    settings = {
        "detector": {"dialect": "dectris-v1"},
        "view": {"center_yx_px": [50.0, 60.0]},
        "refine": {"enabled": True, "seconds": 20.0, "sweeps": 8.0, "modes": 1},
        "trust": {"enabled": True, "seconds": 20.0, "diagnosis": diagnosis},
    }
    with DaemonHarness(tmp_path, settings) as daemon:
        with line(daemon, rate_hz=30) as beamline:
            beamline.play(played)

            def suggested() -> list[str]:
                return daemon.status()["stages"]["reconstruct"]["status"]["suggestions"]

            if diagnosis == "suggest":
                (said,) = wait_for(suggested, 30, "a suggestion in the status")
                assert "set view.center_yx_px = [6" in said
            final = beamline.results.wait_complete(timeout_s=60)
        header = Catalogue(daemon.data).scans()[0]
        assert [view.orientation for view in header.views] == ["identity"] * len(header.views)
        reasons = final.content.reasons
        if diagnosis == "suggest":
            assert len(header.views) == 1
            assert reasons[-1] == said and len(reasons) > 1
            assert daemon.log.count("a suggestion") == 1
            return
        assert [view.version for view in header.views] == [1, 2]
        center = header.view.center_yx_px
        assert center is not None
        assert [round(c) for c in center] == [62, 44]
        assert header.view == View(64, center, version=2)
        assert "its pattern is off centre" in daemon.log
        assert final.content.generation > 1 and final.content.verdict == "good"
        assert not any("center_yx_px" in reason for reason in reasons)
        history = read_history(scan_directory(daemon.data, header.scan_id))
        assert history[-1].reasons == tuple(reasons)
        assert scan.object is not None and scan.object_origin_yx_m is not None
        assert nrmse_to_truth(final, scan.object, scan.object_origin_yx_m) < 0.1
