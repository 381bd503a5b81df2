"""PtychoPINN's data file: the keys of its contract, and the same physics behind them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.ptychopinn_npz import save_ptychopinn
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.simulate.sensor import SensorSettings

SIZE = 64


@pytest.fixture(scope="module")
def scan():
    sensor = SensorSettings(gap_px=2, hot=0.005)
    return scan_file_of(simulate_experiment(frames=20, size_px=SIZE, photons=1e7, sensor=sensor))


@pytest.fixture(scope="module")
def held(scan, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.npz"
    save_ptychopinn(path, scan)
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def test_the_keys_have_the_contract_s_shapes_and_types(held, scan):
    expected = {
        "diff3d": (np.float32, (20, SIZE, SIZE)),
        "xcoords": (np.float64, (20,)),
        "ycoords": (np.float64, (20,)),
        "xcoords_start": (np.float64, (20,)),
        "ycoords_start": (np.float64, (20,)),
        "scan_index": (np.int64, (20,)),
        "probeGuess": (np.complex64, (SIZE, SIZE)),
        "objectGuess": (np.complex64, scan.object.shape),
    }
    assert set(held) == {*expected, "_metadata"}
    for key, (dtype, shape) in expected.items():
        assert held[key].dtype == dtype and held[key].shape == shape, key
    assert held["_metadata"].shape == ()


def test_the_strongest_mode_is_the_probe(held, scan, tmp_path):
    weak = np.concatenate([0.1 * scan.probe[:1], scan.probe[:1]])
    save_ptychopinn(tmp_path / "train.npz", replace(scan, probe=weak))
    with np.load(tmp_path / "train.npz") as file:
        np.testing.assert_allclose(file["probeGuess"], held["probeGuess"], rtol=1e-6)


def test_amplitudes_are_plausible_to_its_own_checks(held):
    amplitude = held["diff3d"]
    assert amplitude.min() >= 0
    assert amplitude.max(axis=(1, 2)).mean() < 10
    assert amplitude.max() / amplitude.mean() < 100


def test_the_dose_is_the_mean_of_the_sums(held, scan):
    told = json.loads(str(held["_metadata"]))
    assert told["measurement_domain"] == "amplitude"
    good = scan.counts[:, ~scan.bad_pixels].sum(1, dtype=np.int64).mean()
    assert told["dose_photons"] == pytest.approx(good)
    assert told["nphotons"] == told["dose_photons"] == pytest.approx(scan.metadata["dose_photons"])
    counts = (held["diff3d"].astype(np.float64) / told["amplitude_scale"]) ** 2
    assert counts.sum((1, 2)).mean() == pytest.approx(told["dose_photons"], rel=1e-5)
    assert (held["diff3d"][:, scan.bad_pixels] == 0).all()


def test_probe_object_and_coordinates_predict_the_amplitude(held, scan):
    """Patches at whole pixels, x along the columns: only this order and this offset fit."""
    good = ~scan.bad_pixels

    def misfit(shift_x=0, shift_y=0, swap=False):
        errors = []
        for number in range(len(held["diff3d"])):
            x, y = held["xcoords"][number], held["ycoords"][number]
            x, y = (y, x) if swap else (x, y)
            top = int(np.rint(y - SIZE / 2)) + shift_y
            left = int(np.rint(x - SIZE / 2)) + shift_x
            patch = held["objectGuess"][top : top + SIZE, left : left + SIZE]
            if patch.shape != (SIZE, SIZE):
                continue
            wave = np.fft.fftshift(np.fft.fft2(held["probeGuess"] * patch, norm="ortho"))
            measured = held["diff3d"][number]
            errors.append(np.abs(np.abs(wave) - measured)[good].sum() / measured[good].sum())
        return np.mean(errors)

    right = misfit()
    assert right < 0.1
    for wrong in ({"shift_x": 2}, {"shift_x": -2}, {"shift_y": 2}, {"shift_y": -2}, {"swap": True}):
        assert misfit(**wrong) > 1.2 * right, wrong


def test_what_the_format_cannot_hold_is_refused(tmp_path, scan):
    counts, positions = np.ones((2, 8, 8), np.uint16), np.zeros((2, 2))
    numbers, probe = np.arange(2), np.ones((1, 8, 8), np.complex64)

    def refused(words, **changes):
        keys = {"counts": counts, "probe": probe, "pixel_yx_m": (1e-8, 1e-8), **changes}
        with pytest.raises(FileFormatError, match=words):
            save_ptychopinn(
                tmp_path / "x.npz",
                ScanFile(positions_yx_m=positions, frame_numbers=numbers, **keys),
            )

    refused("probe", probe=None)
    refused("pixel_yx_m", pixel_yx_m=None)
    refused("square", counts=np.ones((2, 8, 9), np.uint16))
    refused("no frame holds a photon", counts=np.zeros((2, 8, 8), np.uint16))
    assert not list(tmp_path.iterdir())
