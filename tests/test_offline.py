"""A recorded scan is reconstructed from its file as the live stage would have done it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_bench import predict
from scan_samples import make_header

from ptycho_stream.errors import (
    FileFormatError,
    GeometryError,
    ProbeError,
    SettingsError,
    StoreError,
)
from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.npz import ScanFile, save_arrays, save_scan
from ptycho_stream.files.ptychopinn_npz import save_ptychopinn
from ptycho_stream.files.stored_scan import store_as_settings_say, store_scan
from ptycho_stream.geometry import View
from ptycho_stream.reconstruct.offline import Progress, reconstruct_file
from ptycho_stream.reconstruct.recipe import load_recipe
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image
from ptycho_stream.scans import Catalogue, ScanReader, ScanWriter
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.settings import Settings, checked_settings
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

FRAMES, SIZE = 40, 64
QUICK = {"refine": {"enabled": False}, "trust": {"enabled": False}}
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    experiment = simulate_experiment(
        seed=4, frames=FRAMES, size_px=SIZE, detector_pixel_yx_m=(75e-6, 60e-6)
    )
    return scan_file_of(experiment)


@pytest.fixture
def path(scan, tmp_path) -> Path:
    save_scan(tmp_path / "scan.npz", scan)
    return tmp_path / "scan.npz"


def made_live(scan: ScanFile, root: Path) -> Image:
    """What the network makes of a scan in the store, as the reconstruct stage has it."""
    np.savez(root / "probe.npz", probe=scan.probe)
    settings = checked_settings(
        {"probe": {"path": root / "probe.npz"}, "reconstruct": {"size_px": SIZE}}, "here"
    )
    with ScanReader.open(root, store_scan(root, scan)) as reader:
        image = ScanImage(reader, load_recipe(settings), settings.reconstruct.tile_px)
        predict(image)
        return Image(image.image(final=True))


def test_the_image_is_the_live_one(path, scan, tmp_path):
    image = reconstruct_file(path, tables=QUICK)
    live = made_live(scan, tmp_path)
    np.testing.assert_array_equal(image.object_yx, live.object_yx)
    assert image.origin_yx_m == live.origin_yx_m and image.pixel_yx_m == live.pixel_yx_m
    assert image.complete and image.frame_numbers.size == FRAMES


def test_refinement_trust_progress_and_files(path, scan, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    told: list[Progress] = []
    outputs = [tmp_path / name for name in ("a.h5", "a.cxi", "a.npz", "a.tiff")]
    image = reconstruct_file(
        path,
        tables={"refine": {"seconds": 100.0, "sweeps": 20}, "trust": {"seconds": 100.0}},
        outputs=outputs,
        report=told.append,
    )
    assert image.verdict == "good" and image.layer == "refined" and image.trust["frames_judged"]
    steps = [p.step for p in told]
    assert [s for n, s in enumerate(steps) if s not in steps[:n]][:2] == ["storing", "predicting"]
    assert {"refining", "judging", "writing"} <= set(steps)
    assert told[0].done == told[0].total == FRAMES
    assert "good" in "".join(p.words for p in told)
    assert all(output.is_file() for output in outputs) and (tmp_path / "a.diffraction.h5").is_file()
    again = load_measured(tmp_path / "a.h5")
    np.testing.assert_array_equal(np.asarray(again.counts), scan.counts)
    assert not list(temporary.iterdir())


def test_a_file_without_geometry_is_reconstructed_with_its_object_pixel(scan, tmp_path):
    save_ptychopinn(tmp_path / "train.npz", scan)
    image = reconstruct_file(tmp_path / "train.npz", tables=QUICK)
    assert image.pixel_yx_m == pytest.approx(scan.pixel_yx_m)
    with pytest.raises(FileFormatError, match="photon energy"):
        reconstruct_file(tmp_path / "train.npz", outputs=[tmp_path / "a.h5"])


# ---- scans of a store ------------------------------------------------------------------------


def files_of(directory: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in directory.iterdir()}


def test_a_scan_of_a_store_is_reconstructed_beside_it(scan, tmp_path):
    """Through its present view, and without a trace in its folder."""
    turned = View(SIZE, orientation="flip_y").apply(np.asarray(scan.counts))
    mirrored = replace(scan, counts=np.ascontiguousarray(turned))
    scan_id = store_scan(tmp_path, mirrored)
    view = View(SIZE, orientation="flip_y", version=2)
    Catalogue(tmp_path).add_view(scan_id, view)
    directory = scan_directory(tmp_path, scan_id)
    before = files_of(directory)
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    tables = {**QUICK, "probe": {"path": tmp_path / "probe.npz"}}
    image = reconstruct_file(directory, tables=tables)
    assert files_of(directory) == before and image.scan_id == scan_id
    np.testing.assert_array_equal(image.object_yx, made_live(scan, tmp_path).object_yx)
    with pytest.raises(ProbeError, match="holds no probe"):
        reconstruct_file(directory)
    for wrong in ({"data": tmp_path / "x"}, {"choice": MeasuredChoice(photon_energy_eV=1e4)}):
        with pytest.raises(FileFormatError, match="is a scan of a store"):
            reconstruct_file(directory, tables=tables, **wrong)


def test_a_scan_that_is_still_recorded_is_refused(tmp_path, scan):
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    header = make_header(
        state="running", frame_shape_yx=(SIZE, SIZE), size_px=SIZE, pixel_yx_m=scan.pixel_yx_m
    )
    with ScanWriter.create(tmp_path, header, 100) as writer:
        slot = writer.append(0, scan.counts[0], 0, 0)
        writer.append_pair(0, slot, 0.0, 0.0, 0)
        writer.commit()
        with pytest.raises(StoreError, match="still running: wait for its end"):
            reconstruct_file(
                scan_directory(tmp_path, header.scan_id),
                tables={"probe": {"path": tmp_path / "probe.npz"}},
            )


def test_scan_and_image_are_kept_where_that_is_wanted(path, tmp_path):
    image = reconstruct_file(path, tables=QUICK, data=tmp_path / "kept")
    with ScanReader.open(tmp_path / "kept", image.scan_id) as reader:
        assert reader.header.state == "complete" and reader.committed == FRAMES
        recipe = load_recipe(
            checked_settings(
                {"probe": {"path": path}, "reconstruct": {"size_px": SIZE}}, "the file's probe"
            )
        )
        again = Image(ScanImage(reader, recipe, 128).image(final=True))
    np.testing.assert_array_equal(again.object_yx, image.object_yx)


# ---- configurations --------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, scan) -> Settings:
    """Of a beamline that stores a crop in bins of a detector which is read mirrored."""
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    mask = np.zeros((2 * SIZE + 20, 2 * SIZE + 30), np.uint8)
    mask[SIZE + 10 : SIZE + 12, SIZE + 20] = 1
    np.save(tmp_path / "mask.npy", mask)
    return checked_settings(
        {
            "probe": {"path": tmp_path / "probe.npz"},
            "reconstruct": {"size_px": SIZE},
            "detector": {"crop_yx_px": [2 * SIZE, 2 * SIZE], "bin_px": 2},
            "view": {"orientation": "flip_x", "bad_pixels_path": tmp_path / "mask.npy"},
            "geometry": {"detector_distance_m": 2.0},
            "metadata": {"operator": "nobody"},
            **QUICK,
        },
        "here",
    )


def raw_frames(scan: ScanFile) -> ScanFile:
    """The scan as a detector of twice as many pixels would have it, mirrored, with a rim."""
    turned = View(SIZE, orientation="flip_x").apply(np.asarray(scan.counts))
    frames = np.zeros((FRAMES, 2 * SIZE + 20, 2 * SIZE + 30), np.uint16)
    # All counts of a bin in one of its pixels, so that the sums are the scan's; the detector's
    # middle lies in the bin that is the middle of the stored frame.
    frames[:, 10 : 9 + 2 * SIZE : 2, 14 : 14 + 2 * SIZE : 2] = turned
    pixel = scan.detector_pixel_yx_m
    return replace(
        scan,
        counts=frames,
        detector_pixel_yx_m=(pixel[0] / 2, pixel[1] / 2),
        detector_distance_m=None,
        pixel_yx_m=None,
        probe=None,
    )


def test_a_configuration_crops_bins_and_looks_as_the_daemon_does(scan, config, tmp_path):
    save_scan(tmp_path / "raw.npz", raw_frames(scan))
    told: list[tuple[int, int]] = []
    raw = load_measured(tmp_path / "raw.npz")
    scan_id = store_as_settings_say(tmp_path, raw, config, lambda *at: told.append(at))
    assert told[-1] == (FRAMES, FRAMES)
    with ScanReader.open(tmp_path, scan_id) as reader:
        header = reader.header
        assert header.frame_shape_yx == (SIZE, SIZE) and header.bin_px == 2
        assert header.metadata["operator"] == "nobody"
        assert header.pixel_yx_m == pytest.approx(scan.pixel_yx_m)
        shown = header.view.apply(reader.frames(slice(None)))
        np.testing.assert_array_equal(shown, scan.counts)
    image = reconstruct_file(tmp_path / "raw.npz", config)
    live = made_live(scan, tmp_path)
    assert image.object_yx.shape == live.object_yx.shape
    assert not np.array_equal(image.object_yx, live.object_yx), "a pixel more is masked"
    seen = np.isfinite(live.object_yx) & np.isfinite(image.object_yx)
    assert np.abs(image.object_yx - live.object_yx)[seen].mean() < 0.05


def test_what_is_asked_for_goes_before_the_configuration(scan, config, tmp_path):
    save_scan(tmp_path / "raw.npz", raw_frames(scan))
    tables = {"view": {"orientation": "identity"}, "refine": {"enabled": True, "seconds": 0.5}}
    image = reconstruct_file(tmp_path / "raw.npz", config, tables)
    assert image.layer == "refined"
    right = reconstruct_file(tmp_path / "raw.npz", config)
    assert right.layer == "predicted"
    assert image.trust == {} and not np.array_equal(image.object_yx, right.object_yx)


# ---- what is refused -------------------------------------------------------------------------


def test_what_does_not_fit_is_said_before_the_work(scan, tmp_path, path):
    for output, words in ((tmp_path / "a.txt", "must end in"), (Path("none/a.h5"), "no folder")):
        with pytest.raises(FileFormatError, match=words):
            reconstruct_file(path, outputs=[output])
    save_scan(tmp_path / "bare.npz", replace(scan, probe=None))
    with pytest.raises(ProbeError, match=r"holds no probe: name one"):
        reconstruct_file(tmp_path / "bare.npz")
    save_arrays(tmp_path / "odd.npz", {"probe": scan.probe[:, :60, :60]})
    with pytest.raises(ProbeError, match=r"60 pixels a side.*multiples of 32"):
        reconstruct_file(path, tables={"probe": {"path": tmp_path / "odd.npz"}})
    with pytest.raises(SettingsError, match=r"refine\.secs"):
        reconstruct_file(path, tables={"refine": {"secs": 3}})
    nowhere = replace(scan, pixel_yx_m=None, detector_distance_m=None)
    save_scan(tmp_path / "nowhere.npz", nowhere)
    with pytest.raises(FileFormatError, match="neither the file nor the settings tell energy"):
        reconstruct_file(tmp_path / "nowhere.npz")
    far = {"view": {"center_yx_px": [500.0, 500.0]}}
    with pytest.raises(GeometryError, match="nothing"):
        reconstruct_file(path, tables={**QUICK, **far})


@pytest.mark.interop
@pytest.mark.timeout(600)
def test_a_detector_that_is_the_wrong_way_round_is_turned_where_settings_say_so(tmp_path):
    experiment = simulate_experiment(seed=4, frames=90, size_px=SIZE)
    truth = scan_file_of(experiment)
    turned = View(SIZE, orientation="flip_x").apply(np.asarray(truth.counts))
    save_scan(tmp_path / "scan.npz", replace(truth, counts=np.ascontiguousarray(turned)))
    trust = {"diagnosis": "auto", "seconds": 200.0}  # as much as it takes
    tables = {"refine": {"seconds": 200.0, "sweeps": 8.0}, "trust": trust}
    image = reconstruct_file(tmp_path / "scan.npz", tables=tables)
    assert image.content.generation == 2 and image.verdict == "good"
    assert image.trust["excess"] < 0.02
    said = reconstruct_file(
        tmp_path / "scan.npz", tables={**tables, "trust": {**trust, "diagnosis": "suggest"}}
    )
    assert said.verdict == "orientation suspect" and "flip_x" in " ".join(said.reasons)
