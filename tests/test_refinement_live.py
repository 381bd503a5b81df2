"""Refinement, trust and the life of the probe in the whole daemon, undisturbed and disturbed.

Scans are simulated at 64 x 64 pixels, with a probe that looks the same from no other side.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for
from test_end_to_end import error, line, newest_scan, playing, record, undisturbed

from ptycho_stream.client import LayerReader
from ptycho_stream.files.image_npz import load_image
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.geometry import View
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.history import read_history
from ptycho_stream.reconstruct.layouts import probe_symmetries
from ptycho_stream.reconstruct.probe_life import PROBE_FILE
from ptycho_stream.results import Image
from ptycho_stream.scans import Catalogue
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.probes import probe_of_kind
from ptycho_stream.simulate.scan_file import scan_file_of

FRAMES, SIZE_PX = 80, 64
ENDLESS = {"seconds": 300.0, "sweeps": 1e6}
pytestmark = [pytest.mark.timeout(90), pytest.mark.slow]


def simulated(seed: int, **options: Any) -> ScanFile:
    probe = probe_of_kind(np.random.default_rng(4), SIZE_PX, "zernike")
    made = simulate_experiment(seed=seed, frames=FRAMES, size_px=SIZE_PX, probe=probe, **options)
    return scan_file_of(made)


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    made = simulated(seed=3)
    assert made.probe is not None
    assert probe_symmetries(Probe(made.probe)) == (("identity", False),)
    return made


@pytest.fixture(scope="module")
def mirrored(scan: ScanFile) -> ScanFile:
    """The same scan from a detector that is read from right to left."""
    counts = View(size_px=SIZE_PX, orientation="flip_x").apply(scan.counts)
    return replace(scan, counts=np.ascontiguousarray(counts))


@pytest.fixture
def daemon(tmp_path: Path, scan: ScanFile) -> Iterator[DaemonHarness]:
    """Not started yet."""
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    settings = {
        "detector": {"dialect": "dectris-v1"},
        "reconstruct": {"save_interval_s": 0.2},
        "refine": {"enabled": True, "seconds": 20.0, "sweeps": 8.0, "modes": 1},
        "trust": {"enabled": True, "seconds": 20.0, "diagnosis": "off"},
    }
    harness = DaemonHarness(tmp_path, settings)
    yield harness
    harness.stop()


def assert_whole(image: Image, layer: str = "refined") -> None:
    """Every frame is in the final image, once."""
    assert image.final and sorted(image.frame_numbers.tolist()) == list(range(FRAMES))
    assert image.content.layer == layer
    assert (image.content.sweeps > 0) == (layer == "refined")


def folder(daemon: DaemonHarness, image: Image) -> Path:
    return scan_directory(daemon.data, image.scan_id)


def done(daemon: DaemonHarness, image: Image) -> bool:
    return (folder(daemon, image) / "reconstruct.done").exists()


def test_the_image_is_refined_and_judged_and_its_probe_begins_the_next_scan(daemon, scan, tmp_path):
    daemon.start()
    image = record(daemon, scan)
    assert_whole(image)
    assert image.content.sweeps >= 8
    predicted = undisturbed(daemon.settings, image.scan_id, tmp_path / "predicted")
    assert predicted.content.layer == "predicted"
    assert error(image, scan) < 0.8 * error(predicted, scan)

    trust = image.content.trust
    assert image.content.verdict == "good" and image.content.reasons
    named = {"r_factor", "r_poisson", "excess", "r_free", "frames_judged", "overlap"}
    assert named <= set(trust)
    assert all(np.isfinite(value) for value in trust.values())
    assert trust["excess"] < 0.02 and trust["frames_judged"] > 0.8 * FRAMES
    daemon.metric("ptycho_stream_refinement_sweeps", image.content.sweeps)
    daemon.metric('ptycho_stream_trust_figure{figure="excess"}', trust["excess"])
    daemon.metric('ptycho_stream_verdict_info{verdict="good"}', 1)
    assert daemon.metrics()["ptycho_stream_frame_refinements_total"] >= 8 * 0.9 * FRAMES

    history = read_history(folder(daemon, image))
    assert history and history[-1].verdict == "good" and history[-1].layer == "refined"
    assert history[-1].figures == pytest.approx(dict(trust))
    assert history[-1].frames == FRAMES

    wait_for(lambda: done(daemon, image), what="the end of the first scan")
    assert_layers_and_kept_image(daemon, image, predicted)
    # The next scan of the same beam, and one of another.
    assert (folder(daemon, image) / PROBE_FILE).exists()
    second = record(daemon, simulated(seed=4))
    assert_whole(second)
    assert f"scan {second.scan_id}: its probe is that of scan {image.scan_id}" in daemon.log
    third = record(daemon, simulated(seed=5, photon_energy_eV=9100.0))
    assert_whole(third)
    assert f"scan {third.scan_id}: its probe" not in daemon.log
    assert daemon.status()["stages"]["reconstruct"]["restarts"] == 0


def assert_layers_and_kept_image(daemon: DaemonHarness, image: Image, predicted: Image) -> None:
    """Predicted layer and misfit are there for who asks; the image stays with the scan."""
    resync = daemon.settings.results.resync_endpoint
    with LayerReader("predicted", resync) as reader:
        layer = reader.read()
    assert layer is not None and layer.scan_id == image.scan_id
    object_yx, corner = layer.joined()
    assert corner == predicted.corner_yx_px
    np.testing.assert_allclose(object_yx, predicted.object_yx, atol=1e-4)
    with LayerReader("misfit", resync) as reader:
        layer = reader.read()
    assert layer is not None
    misfit, corner = layer.joined()
    known = np.isfinite(misfit)
    assert known.any() and np.nanmean(misfit) == pytest.approx(image.trust["excess"], abs=0.02)
    kept = load_image(folder(daemon, image) / "image.npz")
    np.testing.assert_array_equal(kept.object_yx, image.object_yx)
    assert kept.content.verdict == "good" and kept.content.layer == "refined"
    assert np.isfinite(kept.misfit_yx).sum() == known.sum()
    with daemon.control() as control:
        told = control.image(parts=["object", "misfit", "probe", "positions"])
        assert told.words["scan_id"] == image.scan_id and told.words["frames"] == FRAMES
        assert told.object is not None and told.misfit is not None
        np.testing.assert_array_equal(told.object.values_yx, image.object_yx)
        assert np.isfinite(told.misfit.values_yx).sum() == known.sum()
        frame = control.frame(frame=7)
        assert frame.frame == 7 and frame.valid_yx.all() and frame.position_yx_m is not None


def refining(daemon: DaemonHarness, sweeps: float) -> None:
    """Wait until a scan was refined so far, and a state of it saved."""
    name = "ptycho_stream_refinement_sweeps"
    wait_for(lambda: Catalogue(daemon.data).latest(), 20, "a scan")
    path = scan_directory(daemon.data, newest_scan(daemon)) / "reconstruct.npz"
    wait_for(lambda: daemon.metrics().get(name, 0.0) > sweeps, 30, "sweeps")
    wait_for(path.exists, what="a saved state")


def test_a_kill_while_refining_costs_nothing(daemon, scan):
    daemon.write_config({"refine": ENDLESS, "trust": {"enabled": False}})
    daemon.start()
    with line(daemon, rate_hz=20.0) as beamline:
        with playing(beamline, scan) as player:
            refining(daemon, sweeps=0.5)
            assert player.is_alive()
            daemon.kill("reconstruct")
        refining(daemon, sweeps=3.0)
        scan_id = newest_scan(daemon)
        daemon.write_config({"refine": {"sweeps": 30.0}})
        daemon.hangup()
        wait_for(lambda: "settings read again" in daemon.log, what="a reload")
        daemon.kill("reconstruct")
        final = beamline.results.wait_complete(scan_id, timeout_s=60)
    assert_whole(final)
    assert final.content.sweeps >= 30 and error(final, scan) < 0.1
    assert daemon.metrics()['ptycho_stream_stage_restarts_total{stage="reconstruct"}'] == 2


def test_a_stop_while_refining_is_in_time_and_refinement_goes_on(daemon, scan):
    daemon.write_config({"refine": ENDLESS})
    daemon.start()
    with line(daemon) as beamline:
        beamline.play(scan)
        refining(daemon, sweeps=3.0)
    began_s = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began_s < 5
    daemon.write_config({"refine": {"sweeps": 30.0}})
    daemon.start()
    with line(daemon) as beamline:
        final = beamline.results.wait_complete(newest_scan(daemon), timeout_s=60)
    assert_whole(final)
    assert final.content.sweeps >= 30 and final.content.verdict


@pytest.mark.parametrize("diagnosis", ["auto", "suggest"])
def test_a_detector_that_is_the_wrong_way_round(daemon, scan, mirrored, diagnosis):
    """Found by the frames; corrected only where the settings say so."""
    # Time enough to try all orientations, however busy the machine is.
    daemon.write_config({"trust": {"diagnosis": diagnosis, "seconds": 60.0}})
    daemon.start()
    with line(daemon) as beamline:
        beamline.play(mirrored)
        final = beamline.results.wait_complete(timeout_s=80)
    views = [view.orientation for view in Catalogue(daemon.data).scans()[0].views]
    if diagnosis == "auto":
        assert views == ["identity", "flip_x"]
        assert_whole(final)
        assert final.content.generation > 1
        assert final.content.verdict == "good"
        assert error(final, scan) < 0.1
    else:
        assert views == ["identity"]
        assert_whole(final)
        assert final.content.verdict == "orientation suspect"
        assert "flip_x" in " ".join(final.content.reasons)


def test_a_scan_that_cannot_be_refined_ends_with_its_predicted_image(daemon, scan):
    daemon.write_config({"refine": {"max_object_px": 1000}})
    daemon.start()
    image = record(daemon, scan)
    assert_whole(image, "predicted")
    assert image.content.verdict
    assert error(image, scan) < 0.3
    daemon.metric("ptycho_stream_refinements_failed_total", 1)
    assert daemon.log.count("is not refined any more") == 1
    assert "refine.max_object_px" in daemon.log
    wait_for(lambda: done(daemon, image), what="the end of the scan")
    assert not (folder(daemon, image) / PROBE_FILE).exists()
    assert daemon.status()["stages"]["reconstruct"]["restarts"] == 0
