"""``ptycho-stream simulate``: every option does what it says, or says what is wrong."""

import json
import re
import shlex

import numpy as np
import pytest

from ptycho_stream.cli import main
from ptycho_stream.cli.simulate_options import MEASURED, PROBES, SAMPLES
from ptycho_stream.files.npz import load_scan
from ptycho_stream.physics.probe import load_probe
from ptycho_stream.simulate.probes import PROBE_KINDS
from ptycho_stream.simulate.scan_paths import PATH_KINDS
from ptycho_stream.simulate.series import DectrisSeries, DetectorOptions


@pytest.fixture
def simulated(tmp_path, capsys):
    def run(options=""):
        out = tmp_path / "scan.npz"
        status = main(
            ["simulate", "--out", str(out), "--frames", "9", "--json", *shlex.split(options)]
        )
        told = capsys.readouterr()
        assert status == 0, told.err
        return out, json.loads(told.out)

    return run


@pytest.mark.parametrize("sample", SAMPLES)
def test_samples_by_name(simulated, sample):
    out, _ = simulated(f"--size 32 --sample {sample}")
    scan = load_scan(out)
    assert scan.object is not None and scan.object.std() > 1e-3
    assert scan.metadata["sample_kind"] == sample


@pytest.mark.parametrize("probe", [name for name in PROBES if name != MEASURED])
def test_probes_by_name(simulated, probe):
    out, _ = simulated(f"--size 32 --probe {probe} --modes 2 --photons 1e4")
    scan = load_scan(out)
    assert scan.probe is not None and scan.probe.shape == (2, 32, 32)
    assert (np.abs(scan.probe) ** 2).sum() == pytest.approx(1e4, rel=1e-3)
    assert scan.metadata["probe_kind"] == probe


@pytest.mark.parametrize("path", PATH_KINDS)
def test_paths_by_name(simulated, path):
    out, _ = simulated(f"--size 32 --path {path}")
    assert load_scan(out).metadata["path"] == path


def test_names_are_the_simulators_own():
    assert set(PROBES) - {MEASURED} == set(PROBE_KINDS)


def test_a_measured_probe_sets_the_size_and_keeps_its_modes(simulated, tmp_path):
    out, _ = simulated(f"--size 48 --probe coded --modes 3 --probe-out {tmp_path / 'p.npz'}")
    made = load_probe(tmp_path / "p.npz")
    out, told = simulated(f"--probe-in {tmp_path / 'p.npz'} --sample bars")
    scan = load_scan(out)
    assert told["shape_yx"] == [48, 48]
    assert scan.metadata["probe_kind"] == MEASURED
    np.testing.assert_allclose(scan.probe, made.modes, rtol=1e-4, atol=1e-3)


def test_faults_of_the_detector_are_in_the_file_and_in_the_stream(simulated):
    out, told = simulated(
        "--size 32 --gaps 2 --hot 0.01 --dead 0.01 --beam-stop 2 --background 1 --saturation 500"
    )
    scan = load_scan(out)
    assert scan.bad_pixels is not None
    assert told["bad_pixels"] == scan.bad_pixels.sum() > 2 * 32 * 2 - 4
    assert scan.counts.max() <= 500
    good = scan.counts[:, ~scan.bad_pixels]
    assert told["dose_photons"] == pytest.approx(good.sum() / 9)
    series = DectrisSeries(scan, 1, DetectorOptions(encoding="<", header_detail="all"))
    pixels = np.frombuffer(series.frame(0)[2], "<u2").reshape(32, 32)
    assert (pixels[scan.bad_pixels] == 65535).all()
    np.testing.assert_array_equal(pixels[~scan.bad_pixels], scan.counts[0][~scan.bad_pixels])
    mask = np.frombuffer(series.start()[5], "<u4").reshape(32, 32)
    np.testing.assert_array_equal(mask != 0, scan.bad_pixels)


def test_a_zone_plate_by_its_optics(simulated):
    out, _ = simulated("--size 128 --zone-plate 160,0.06,60,400")
    probe = load_scan(out).probe
    far = np.abs(np.fft.fftshift(np.fft.fft2(probe[0])))
    assert far[64, 64] < 0.05 * far.max(), "the central stop is seen in the far field"


def test_strength_of_the_sample(simulated):
    out, _ = simulated("--size 32 --sample polygons --phase-rad 0.3 --absorption 0 --seed 4")
    truth = load_scan(out).object
    np.testing.assert_allclose(np.abs(truth), 1, atol=1e-5)
    assert np.ptp(np.angle(truth)) == pytest.approx(0.3, abs=1e-3)


def test_the_same_options_give_the_same_counts(simulated):
    options = "--size 32 --sample random --probe random --path fly --gaps 2 --seed 7"
    first = load_scan(simulated(options)[0])
    second = load_scan(simulated(options)[0])
    np.testing.assert_array_equal(first.counts, second.counts)
    np.testing.assert_array_equal(first.object, second.object)


def test_ptychopinn_s_format(simulated):
    out, told = simulated("--size 32 --format ptychopinn --photons 1e5")
    with np.load(out, allow_pickle=False) as held:
        assert held["diff3d"].shape == (9, 32, 32)
        metadata = json.loads(str(held["_metadata"]))
    assert metadata["dose_photons"] == pytest.approx(told["dose_photons"])
    assert metadata["photons"] == 1e5


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--sample bread", 2, "none of showcase"),
        ("--probe torch", 2, "none of zone-plate"),
        ("--path walk", 2, "none of raster"),
        ("--photons 0", 2, "above 0"),
        ("--hot 0.7", 2, "0.5"),
        ("--gaps -1", 2, "gaps"),
        ("--saturation 0", 2, "saturation"),
        ("--modes 2", 2, "drawn"),
        ("--probe measured", 2, "--probe-in"),
        ("--probe-in p.npz --probe coded", 2, "leave out"),
        ("--zone-plate 1,2,3", 2, "four numbers"),
        ("--zone-plate 160,0.06,60,400 --probe coded", 2, "leave out"),
        ("--sample random --phase-rad 1", 2, "own"),
        ("--probe-in nowhere.npz", 1, "nowhere.npz"),
        ("--zone-plate 160,0.06,60,4000 --size 64", 1, "wider|wide"),
        ("--zone-plate 160,0.001,60,4", 1, "below 0.5"),
        ("--beam-stop 90 --size 64", 1, "cover"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, options, status, words):
    out = tmp_path / "scan.npz"
    assert main(["simulate", "--out", str(out), "--frames", "4", *shlex.split(options)]) == status
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(words, told), told
    assert not out.exists()
