"""Scans from every format that users have: what is in the file, and what is wrong with it, is said.

The files are written here with h5py and numpy alone, as other programs do; what ptycho-stream
itself writes is read back in ``test_products.py``.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from result_samples import FRAMES, NUMBERS, SIZE, asymmetric_scan, good_counts

from ptycho_stream.errors import FileFormatError, StoreError
from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.npz import ScanFile, save_scan
from ptycho_stream.files.ptychopinn_npz import save_ptychopinn
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.geometry import View
from ptycho_stream.scans import Catalogue, ScanReader
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.view_data import keep_view_data

JOULES = 1.602176634e-19
Written = Callable[..., Path]


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``values`` with some of them changed, or left out where the change is None."""
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def write_hdf5(path: Path, values: dict[str, Any], attributes: dict[str, Any]) -> Path:
    """Datasets by their paths, attributes by ``path@name``."""
    with h5py.File(path, "w") as file:
        for place, value in values.items():
            file[place] = value
        for place, value in attributes.items():
            name, _, attribute = place.partition("@")
            file[name or "/"].attrs[attribute] = value
    return path


# ---- one scan, in the formats of others ------------------------------------------------------


def write_product(path: Path, changes: dict[str, Any], attributes: dict[str, Any]) -> Path:
    scan = asymmetric_scan()
    (y_m, x_m), (h, w), pixel = scan.object_origin_yx_m, scan.object.shape, scan.pixel_yx_m
    values = {
        "probe_position_indexes": NUMBERS,
        "probe_position_x_m": scan.positions_yx_m[:, 1],
        "probe_position_y_m": scan.positions_yx_m[:, 0],
        "probe": scan.probe[None],
        "object": scan.object[None],
        "object_layer_spacing_m": np.zeros(0),
    }
    told = {
        "@name": "star",
        "@detector_object_distance_m": scan.detector_distance_m,
        "@photon_energy_eV": scan.photon_energy_eV,
        "object@pixel_width_m": pixel[1],
        "object@pixel_height_m": pixel[0],
        "object@center_x_m": x_m + (w - 1) / 2 * pixel[1],
        "object@center_y_m": y_m + (h - 1) / 2 * pixel[0],
    }
    return write_hdf5(path, changed(values, changes), changed(told, attributes))


def write_ptychodus(
    folder: Path, changes: dict[str, Any] | None = None, attributes: dict[str, Any] | None = None
) -> Path:
    """Both files; the frames in another order than the positions. Returns the product."""
    scan, order = asymmetric_scan(), np.random.default_rng(1).permutation(FRAMES)
    product = write_product(folder / "product.h5", changes or {}, attributes or {})
    values = {
        "patterns": np.asarray(scan.counts)[order],
        "indexes": NUMBERS[order],
        "bad_pixels": scan.bad_pixels,
    }
    told = {
        "patterns@detector_pixel_width_m": scan.detector_pixel_yx_m[1],
        "patterns@detector_pixel_height_m": scan.detector_pixel_yx_m[0],
    }
    write_hdf5(folder / "diffraction.h5", values, told)
    return product


def write_cxi(folder: Path, **changes: Any) -> Path:
    scan = asymmetric_scan()
    translation = np.zeros((FRAMES, 3))
    translation[:, 1], translation[:, 0] = scan.positions_yx_m.T
    detector = "entry_1/instrument_1/detector_1"
    values = {
        "cxi_version": 160,
        "entry_1/instrument_1/source_1/energy": scan.photon_energy_eV * JOULES,
        f"{detector}/data": np.asarray(scan.counts),
        f"{detector}/distance": scan.detector_distance_m,
        f"{detector}/x_pixel_size": scan.detector_pixel_yx_m[1],
        f"{detector}/y_pixel_size": scan.detector_pixel_yx_m[0],
        f"{detector}/mask": np.where(scan.bad_pixels, 5, 0x1000).astype(np.uint32),
        "entry_1/sample_1/geometry_1/translation": translation,
        "entry_1/sample_1/name": "star",
        "entry_1/image_1/data": scan.probe,
    }
    places = {"data": f"{detector}/data", "energy": "entry_1/instrument_1/source_1/energy"}
    named = {places.get(key, key): value for key, value in changes.items()}
    return write_hdf5(folder / "scan.cxi", changed(values, named), {})


def write_nexus(folder: Path, **changes: Any) -> Path:
    scan = asymmetric_scan()
    detector = "entry/instrument/detector"
    values = {
        "entry/data/data": np.asarray(scan.counts),
        "entry/instrument/beam/incident_energy": scan.photon_energy_eV / 1e3,
        f"{detector}/detector_distance": scan.detector_distance_m * 1e3,
        f"{detector}/x_pixel_size": scan.detector_pixel_yx_m[1],
        f"{detector}/y_pixel_size": scan.detector_pixel_yx_m[0],
        f"{detector}/pixel_mask": scan.bad_pixels.astype(np.uint32),
        "entry/positions/samx": scan.positions_yx_m[:, 1] * 1e6,
        "entry/positions/samy": scan.positions_yx_m[:, 0] * 1e6,
    }
    units = {
        "entry/instrument/beam/incident_energy@units": "keV",
        f"{detector}/detector_distance@units": "mm",
        f"{detector}/x_pixel_size@units": "m",
        f"{detector}/y_pixel_size@units": "m",
        "entry/positions/samx@units": "um",
        "entry/positions/samy@units": np.bytes_("micron"),
    }
    held = changed(values, changes)
    units = {key: value for key, value in units.items() if key.partition("@")[0] in held}
    return write_hdf5(folder / "scan.h5", held, units)


SAM = MeasuredChoice(y="/entry/positions/samy", x="/entry/positions/samx")


def write_ptychopinn(folder: Path, **changes: Any) -> Path:
    scan = asymmetric_scan()
    y, x = ((scan.positions_yx_m - scan.object_origin_yx_m) / scan.pixel_yx_m + 0.5).T
    values = {
        "diff3d": np.sqrt(good_counts(scan) / 1e4).astype(np.float32),
        "xcoords": x,
        "ycoords": y,
        "scan_index": np.zeros(FRAMES, np.int64),
        "probeGuess": scan.probe[0],
        "objectGuess": scan.object,
    }
    np.savez(folder / "train.npz", **changed(values, changes))
    return folder / "train.npz"


AMPLITUDE = MeasuredChoice(
    domain="amplitude", counts_per_unit=1e4, pixel_yx_m=asymmetric_scan().pixel_yx_m
)


def check(found: ScanFile, *, numbered: bool = False) -> None:
    """A scan that was read is the one that was written, wherever frames were told from others."""
    scan = asymmetric_scan()
    order = np.searchsorted(NUMBERS, found.frame_numbers) if numbered else np.arange(FRAMES)
    np.testing.assert_array_equal(np.asarray(found.counts), good_counts(scan)[order])
    np.testing.assert_allclose(found.positions_yx_m, scan.positions_yx_m[order], rtol=1e-9)
    np.testing.assert_allclose(found.pixel_yx_m, scan.pixel_yx_m, rtol=1e-9)
    if found.bad_pixels is not None:
        np.testing.assert_array_equal(found.bad_pixels, scan.bad_pixels)
    for name in ("photon_energy_eV", "detector_distance_m", "detector_pixel_yx_m"):
        if getattr(found, name) is not None:
            np.testing.assert_allclose(getattr(found, name), getattr(scan, name), rtol=1e-9)


# ---- what is read ----------------------------------------------------------------------------


def test_a_scan_file_of_ours(tmp_path):
    save_scan(tmp_path / "scan.npz", asymmetric_scan())
    found = load_measured(tmp_path / "scan.npz")
    np.testing.assert_array_equal(found.counts, asymmetric_scan().counts)
    corrected = load_measured(tmp_path / "scan.npz", MeasuredChoice(photon_energy_eV=5000.0))
    assert corrected.photon_energy_eV == 5000.0


@pytest.mark.parametrize("write", [write_ptychodus, write_cxi])
def test_the_object_pixel_follows_the_geometry_that_is_given(tmp_path, write):
    scan = asymmetric_scan()
    found = load_measured(write(tmp_path), MeasuredChoice(detector_distance_m=4.0))
    assert found.pixel_yx_m == pytest.approx([2 * pixel for pixel in scan.pixel_yx_m])
    save_scan(tmp_path / "scan.npz", scan)
    ours = load_measured(tmp_path / "scan.npz", MeasuredChoice(detector_distance_m=4.0))
    assert ours.pixel_for(SIZE) == pytest.approx(found.pixel_yx_m)


@pytest.mark.parametrize("named", ["product.h5", "diffraction.h5"])
def test_frames_and_positions_of_ptychodus_are_paired_by_their_indexes(tmp_path, named):
    write_ptychodus(tmp_path)
    found = load_measured(tmp_path / named)
    check(found, numbered=True)
    assert found.bad_pixels is not None and found.detector_pixel_yx_m == (75e-6, 55e-6)
    np.testing.assert_array_equal(found.probe, asymmetric_scan().probe)
    np.testing.assert_array_equal(found.object, asymmetric_scan().object)
    np.testing.assert_allclose(
        found.object_origin_yx_m, asymmetric_scan().object_origin_yx_m, rtol=1e-9
    )
    assert found.metadata == {"sample": "star"}


def test_a_partial_product_has_the_frames_of_its_scan(tmp_path):
    product = write_ptychodus(tmp_path)
    check(load_measured(product.rename(tmp_path / "product.000012.h5")), numbered=True)


def test_a_product_of_an_older_ptychodus_has_its_energy_under_another_name(tmp_path):
    energy = asymmetric_scan().photon_energy_eV
    attributes = {"@photon_energy_eV": None, "@probe_energy_eV": energy}
    assert load_measured(write_ptychodus(tmp_path, {}, attributes)).photon_energy_eV == energy


def test_frames_without_position_are_left_out_and_several_positions_of_one_are_averaged(tmp_path):
    scan = asymmetric_scan()
    changes = {
        "probe_position_indexes": np.r_[NUMBERS[:5], NUMBERS[:5], 999],
        "probe_position_x_m": np.r_[np.tile(scan.positions_yx_m[:5, 1], 2) + 1e-8, 0.0],
        "probe_position_y_m": np.r_[
            scan.positions_yx_m[:5, 0] - 2e-8, scan.positions_yx_m[:5, 0] + 2e-8, 0.0
        ],
    }
    found = load_measured(write_ptychodus(tmp_path, changes))
    assert sorted(found.frame_numbers) == NUMBERS[:5].tolist()
    order = np.searchsorted(NUMBERS, found.frame_numbers)
    np.testing.assert_allclose(found.positions_yx_m, scan.positions_yx_m[order] + [0, 1e-8])


def write_ptychodus_npz(folder: Path, **changes: Any) -> Path:
    """Both files as NPZ; returns the product."""
    with h5py.File(write_ptychodus(folder)) as file:
        told = dict(file.attrs)
        prefixed = {f"object_{name}": value for name, value in file["object"].attrs.items()}
        product = {**{name: file[name][()] for name in file}, **told, **prefixed}
    with h5py.File(folder / "diffraction.h5") as file:
        diffraction = {name: file[name][()] for name in file}
    for name, held in (("product", product), ("diffraction", diffraction)):
        of_it = {key: value for key, value in changes.items() if key in held}
        np.savez(folder / f"{name}.npz", **{**held, **of_it})
    return folder / "product.npz"


def test_ptychodus_npz_files(tmp_path):
    check(load_measured(write_ptychodus_npz(tmp_path)), numbered=True)


def test_cxi(tmp_path):
    found = load_measured(write_cxi(tmp_path))
    check(found)
    assert found.bad_pixels is not None and found.metadata["sample"] == "star"
    np.testing.assert_array_equal(found.probe, asymmetric_scan().probe)


@pytest.mark.parametrize("shape", [(1, 0, 0), (0, 1, SIZE, SIZE)])
def test_an_empty_probe_of_cxi_is_none(tmp_path, shape):
    found = load_measured(write_cxi(tmp_path, **{"entry_1/image_1/data": np.zeros(shape, complex)}))
    assert found.probe is None


def test_nexus_with_positions_at_named_paths(tmp_path):
    found = load_measured(write_nexus(tmp_path), SAM)
    check(found)
    assert found.bad_pixels is not None


@pytest.mark.parametrize(
    "path",
    ["exchange/data", "dp", "entry/measurement/Eiger/data", "entry/instrument/detector/data"],
)
def test_frames_are_found_where_others_have_them(tmp_path, path):
    moved = {"entry/data/data": None, path: np.asarray(asymmetric_scan().counts)}
    check(load_measured(write_nexus(tmp_path, **moved), SAM))


def test_frames_of_several_linked_files_follow_each_other(tmp_path):
    """As a DECTRIS file writer has them: a master file with links, compressed with bitshuffle."""
    hdf5plugin = pytest.importorskip("hdf5plugin")
    counts = np.asarray(asymmetric_scan().counts)
    for index, part in enumerate([counts[:7], counts[7:8], counts[8:]], 1):
        with h5py.File(tmp_path / f"data_{index:06d}.h5", "w") as file:
            file.create_dataset("entry/data/data", data=part, **hdf5plugin.Bitshuffle())
    master = write_nexus(tmp_path, **{"entry/data/data": None})
    with h5py.File(master, "r+") as file:
        for index in (1, 2, 3):
            file[f"entry/data/data_{index:06d}"] = h5py.ExternalLink(
                f"data_{index:06d}.h5", "entry/data/data"
            )
    check(load_measured(master, SAM, eager_bytes=0))
    (tmp_path / "data_000002.h5").unlink()
    with pytest.raises(FileFormatError, match=r"link to .* in data_000002\.h5"):
        load_measured(master, SAM)


def test_without_the_plugin_its_package_is_named(tmp_path, monkeypatch):
    hdf5plugin = pytest.importorskip("hdf5plugin")
    path = write_nexus(tmp_path, **{"entry/data/data": None})
    with h5py.File(path, "r+") as file:
        counts = np.asarray(asymmetric_scan().counts)
        file.create_dataset("entry/data/data", data=counts, **hdf5plugin.Bitshuffle())
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: code < 10)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(FileFormatError, match=r"bitshuffle.*pip install 'ptycho-stream\[hdf5\]'"):
        load_measured(path, SAM)


def test_a_raster_has_a_position_for_each_row_and_column(tmp_path):
    counts = np.asarray(asymmetric_scan().counts).reshape(3, 6, SIZE, SIZE)
    rows, columns = np.arange(3) * 1e-7, np.arange(6) * 2e-7
    path = write_nexus(tmp_path, **{"entry/data/data": counts, "y": rows, "x": columns})
    found = load_measured(path, MeasuredChoice(y="y", x="x", position_unit="m"))
    np.testing.assert_allclose(found.positions_yx_m[7], [1e-7, 2e-7])
    np.testing.assert_array_equal(np.asarray(found.counts), good_counts(asymmetric_scan()))


def test_positions_in_a_file_of_their_own(tmp_path):
    scan = asymmetric_scan()
    path = write_nexus(tmp_path)
    other = write_hdf5(tmp_path / "stage.h5", {"points": scan.positions_yx_m[:, ::-1].T}, {})
    choice = MeasuredChoice(xy="points", positions_file=other, position_unit="m")
    check(load_measured(path, choice))
    table = tmp_path / "stage.csv"
    lines = [f"{n},{y},{x}" for n, (y, x) in enumerate(scan.positions_yx_m.tolist()) if n != 4]
    table.write_text("frame,y_m,x_m\n" + "\n".join(reversed(lines)))
    found = load_measured(path, MeasuredChoice(positions_file=table))
    assert found.frame_numbers.tolist() == [n for n in range(FRAMES) if n != 4]
    np.testing.assert_allclose(found.positions_yx_m, np.delete(scan.positions_yx_m, 4, 0))


def test_a_table_of_positions_is_of_the_frames_and_has_a_unit_of_its_own(tmp_path):
    path, table = write_nexus(tmp_path), tmp_path / "table.csv"
    table.write_text("frame,y_m,x_m\n1000,0,0\n")
    refused(path, "no frame has a position", MeasuredChoice(positions_file=table))
    idle = MeasuredChoice(positions_file=table, xy="points", position_unit="um")
    refused(path, "metres.*no use for xy, position_unit", idle)


def test_ptychopinn_files_of_others_are_read_when_they_are_explained(tmp_path):
    found = load_measured(write_ptychopinn(tmp_path), AMPLITUDE)
    scan = asymmetric_scan()
    np.testing.assert_array_equal(np.asarray(found.counts), good_counts(scan))
    relative = found.positions_yx_m - found.object_origin_yx_m
    np.testing.assert_allclose(relative, scan.positions_yx_m - scan.object_origin_yx_m, atol=1e-15)
    assert found.frame_numbers.tolist() == list(range(FRAMES)), "scan_index names the object here"
    np.testing.assert_array_equal(found.object, scan.object)


def test_counts_under_ptychopinn_s_key_are_counts_if_so_they_are_called(tmp_path):
    path = write_ptychopinn(tmp_path, diff3d=good_counts(asymmetric_scan()))
    found = load_measured(path, replace(AMPLITUDE, domain="counts", counts_per_unit=None))
    np.testing.assert_array_equal(np.asarray(found.counts), good_counts(asymmetric_scan()))


def test_amplitudes_are_scaled_to_the_photons_of_a_frame(tmp_path):
    photons = good_counts(asymmetric_scan()).sum() / FRAMES
    choice = replace(AMPLITUDE, counts_per_unit=None, photons=float(photons))
    found = load_measured(write_ptychopinn(tmp_path), choice)
    difference = np.asarray(found.counts, np.int64) - good_counts(asymmetric_scan())
    assert np.abs(difference).max() <= 1


def test_our_ptychopinn_files_need_no_explanation(tmp_path):
    save_ptychopinn(tmp_path / "train.npz", asymmetric_scan())
    found = load_measured(tmp_path / "train.npz")
    check(found, numbered=True)
    assert found.object_origin_yx_m == pytest.approx(asymmetric_scan().object_origin_yx_m)
    strongest = asymmetric_scan().probe[:1]
    np.testing.assert_allclose(found.probe, strongest, rtol=1e-5, atol=1e-4)


# ---- the store -------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path) -> Path:
    """The folder of a scan in a store."""
    scan_id = store_scan(tmp_path, asymmetric_scan())
    return scan_directory(tmp_path, scan_id)


def test_a_scan_of_the_store(stored):
    found = load_measured(stored)
    check(found, numbered=True)
    assert found.bad_pixels is not None


def test_a_scan_of_the_store_is_seen_through_its_view(stored, tmp_path):
    with ScanReader(stored) as reader:
        bad_frames = keep_view_data(stored, np.array([[NUMBERS[2], NUMBERS[4]]]))
        view = reader.header.view.next(orientation="flip_x", bad_frames=bad_frames)
    Catalogue(tmp_path).add_view(stored.name, view)
    found = load_measured(stored)
    assert found.frame_numbers.tolist() == np.delete(NUMBERS, [2, 3, 4]).tolist()
    turned = View(SIZE, orientation="flip_x").apply(good_counts(asymmetric_scan()))
    np.testing.assert_array_equal(np.asarray(found.counts), np.delete(turned, [2, 3, 4], 0))


# ---- large files -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cxi", "nexus", "ptychodus", "store"])
def test_frames_of_large_files_are_read_as_they_are_asked_for(tmp_path, kind, stored):
    write = {"cxi": write_cxi, "nexus": write_nexus, "ptychodus": write_ptychodus}.get(kind)
    path, choice = (stored if write is None else write(tmp_path)), MeasuredChoice()
    found = load_measured(path, SAM if kind == "nexus" else choice, eager_bytes=0)
    assert not isinstance(found.counts, np.ndarray)
    numbers = found.frame_numbers if kind in ("ptychodus", "store") else NUMBERS
    expected = good_counts(asymmetric_scan())[np.searchsorted(NUMBERS, numbers)]
    np.testing.assert_array_equal(found.counts[5], expected[5])
    np.testing.assert_array_equal(found.counts[3:9:2], expected[3:9:2])
    np.testing.assert_array_equal(found.counts[np.array([7, 1, 2])], expected[[7, 1, 2]])
    np.testing.assert_array_equal(list(found.counts), expected)
    assert found.counts.shape == expected.shape and len(found.counts) == FRAMES


def test_a_fault_that_shows_late_names_the_frames(tmp_path):
    counts = np.asarray(asymmetric_scan().counts).astype(np.float32)
    counts = np.repeat(counts, 8, axis=0)
    counts[101, 7, 7] = 0.5
    positions = np.repeat(asymmetric_scan().positions_yx_m, 8, axis=0)
    path = write_nexus(tmp_path, **{"entry/data/data": counts, "p": positions[:, ::-1]})
    choice = MeasuredChoice(xy="p", position_unit="m")
    found = load_measured(path, choice, eager_bytes=0)
    assert found.counts[90:100].shape == (10, SIZE, SIZE)
    with pytest.raises(FileFormatError, match=r"fractions from frame 100 on"):
        found.counts[100:110]


# ---- marks of bad pixels, signs, dtypes ------------------------------------------------------


def test_marks_of_bad_pixels_are_found_where_there_is_no_mask(tmp_path):
    scan = asymmetric_scan()
    mask = "entry_1/instrument_1/detector_1/mask"
    marked = np.where(scan.bad_pixels, -1, good_counts(scan).astype(np.int32))
    for frames in (marked, np.where(scan.bad_pixels, np.nan, marked), marked.astype(np.uint64)):
        found = load_measured(write_cxi(tmp_path, data=frames, **{mask: None}))
        check(found)
        np.testing.assert_array_equal(found.bad_pixels, scan.bad_pixels)


def test_negative_counts_are_refused_or_taken_for_none(tmp_path):
    counts = np.asarray(asymmetric_scan().counts).astype(np.int32)
    counts[3, 4, 4] = -2
    path = write_cxi(tmp_path, data=counts)
    with pytest.raises(FileFormatError, match=r"holds -2 in frames .*negative = 'zero'"):
        load_measured(path)
    assert load_measured(path, MeasuredChoice(negative="zero")).counts[3, 4, 4] == 0


# ---- what is refused -------------------------------------------------------------------------


def refused(path: Path, words: str, choice: MeasuredChoice | None = None) -> None:
    with pytest.raises(FileFormatError, match=words) as caught:
        load_measured(path, choice)
    assert path.name in str(caught.value)


def test_pickles_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    path = tmp_path / "scan.pkl"
    path.write_bytes(pickle.dumps(Trap()))
    refused(path, r"pickle, which runs code when it is opened.*numpy\.savez")
    refused(write_ptychopinn(tmp_path, diff3d=np.array([Trap()], dtype=object)), "never opened")


def test_unknown_versions_are_refused(tmp_path):
    refused(write_cxi(tmp_path, cxi_version=170), "cxi_version is 170.*name its datasets")
    found = load_measured(
        write_cxi(tmp_path, cxi_version=170),
        MeasuredChoice(
            data="/entry_1/instrument_1/detector_1/data",
            xy="/entry_1/sample_1/geometry_1/translation",
            position_unit="m",
            pixel_yx_m=asymmetric_scan().pixel_yx_m,
        ),
    )
    np.testing.assert_allclose(found.positions_yx_m, asymmetric_scan().positions_yx_m)


@pytest.mark.parametrize(
    ("changes", "choice", "words"),
    [
        ({}, None, "does not tell whether it holds amplitudes or counts.*domain = 'amplitude'"),
        ({"measurement_domain": "fourier"}, AMPLITUDE, "'fourier', which is none of counts, amp"),
        (
            {
                "measurement_domain": "counts",
                "_metadata": json.dumps({"measurement_domain": "amplitude"}),
            },
            AMPLITUDE,
            "amplitude and counts: correct measurement_domain there$",
        ),
        (
            {"diff3d": np.asarray(asymmetric_scan().counts), "measurement_domain": "amplitude"},
            MeasuredChoice(pixel_yx_m=(1e-8, 1e-8)),
            "said to hold amplitudes.*domain = 'counts'",
        ),
        ({}, replace(AMPLITUDE, domain="counts", counts_per_unit=None), "hold fractions.*ampl"),
        ({}, replace(AMPLITUDE, counts_per_unit=None), "hold fractions.*give photons"),
        ({}, replace(AMPLITUDE, pixel_yx_m=None), "in object pixels.*give pixel_yx_m"),
        ({"xcoords": None}, AMPLITUDE, "that is no scan of ours"),
        ({"ycoords": None}, AMPLITUDE, "key ycoords is missing"),
        ({"xcoords": np.zeros(3)}, AMPLITUDE, r"\(18, 32, 32\), with 3 xcoords"),
        (
            {
                "diff3d": np.zeros((0, SIZE, SIZE), np.float32),
                **dict.fromkeys(("xcoords", "ycoords"), np.zeros(0)),
            },
            AMPLITUDE,
            "no frame has a position",
        ),
        (
            {"diff3d": np.moveaxis(np.sqrt(good_counts(asymmetric_scan()) / 1e4), 0, -1)},
            AMPLITUDE,
            r"\(32, 32, 18\) and there are 18 positions.*frames_axis = 'last'",
        ),
        ({"probeGuess": np.ones((SIZE, SIZE))}, AMPLITUDE, "probeGuess is float64"),
        ({"_metadata": "{"}, AMPLITUDE, "not JSON"),
        ({}, replace(AMPLITUDE, y="/y", x="/x"), "no use for y, x"),
        ({}, replace(AMPLITUDE, product=Path("product.h5")), "no use for product"),
        ({"xcoords": np.full(FRAMES, np.nan)}, AMPLITUDE, "no number for 18 positions"),
        ({"xcoords": np.ones(FRAMES, complex)}, AMPLITUDE, "complex128, not numbers"),
        ({"diff3d": np.full((FRAMES, SIZE, SIZE), "x")}, AMPLITUDE, "is <U1, not numbers"),
        ({"_metadata": '{"nphotons": NaN}'}, AMPLITUDE, "nphotons.* is nan, no number above 0"),
        ({"_metadata": '{"amplitude_scale": 1e-300}'}, AMPLITUDE, "amplitude_scale.*correct it"),
        ({"_metadata": '{"pixel_yx_m": [0, 1e-8]}'}, AMPLITUDE, "pixel_yx_m.*correct it"),
    ],
)
def test_what_is_wrong_with_ptychopinn_files_is_said(tmp_path, changes, choice, words):
    refused(write_ptychopinn(tmp_path, **changes), words, choice)


def test_a_transposed_stack_is_read_when_it_is_called_so(tmp_path):
    turned = np.moveaxis(np.sqrt(good_counts(asymmetric_scan()) / 1e4), 0, -1)
    path = write_ptychopinn(tmp_path, diff3d=turned.astype(np.float32))
    found = load_measured(path, replace(AMPLITUDE, frames_axis="last"))
    np.testing.assert_array_equal(np.asarray(found.counts), good_counts(asymmetric_scan()))
    path = write_cxi(tmp_path, data=np.moveaxis(np.asarray(asymmetric_scan().counts), 0, -1))
    refused(path, "frames_axis = 'last'")
    check(load_measured(path, MeasuredChoice(frames_axis="last"), eager_bytes=0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "has no frames.*an image only"),
        ({"entry_1/sample_1/geometry_1/translation": None}, "has no .*translation: name its"),
        ({"entry_1/sample_1/geometry_1/translation": np.zeros((FRAMES, 4))}, r"not \(N, 3\)"),
        ({"entry_1/sample_1/geometry_1/translation": np.zeros((5, 3))}, "5 positions"),
        ({"energy": 8800.0}, "is 8800, and CXI has joules.*photon_energy_eV"),
        ({"energy": "8.8 keV"}, "not one number"),
        ({"data": np.zeros((FRAMES, SIZE), np.uint16)}, "frames are"),
        ({"data": np.zeros((FRAMES, SIZE, SIZE), complex)}, "complex128, not numbers"),
        ({"entry_1/instrument_1/detector_1/distance": 2000e3}, "detector_distance_m = 2e"),
        ({"entry_1/instrument_1/detector_1/mask": np.zeros((3, 3), np.uint32)}, "the mask has"),
        ({"entry_1/instrument_1/detector_1/mask": np.ones((SIZE, SIZE), np.uint32)}, "no pixel"),
    ],
)
def test_what_is_wrong_with_cxi_files_is_said(tmp_path, changes, words):
    refused(write_cxi(tmp_path, **changes), words)


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1e6, "spans .* m: that is another unit"),
        (1e3, "windows?.*another unit|apart and"),
        (1e-6, "within one object pixel"),
    ],
)
def test_positions_in_a_wrong_unit_are_noticed(tmp_path, factor, words):
    translation = np.zeros((FRAMES, 3))
    translation[:, :2] = asymmetric_scan().positions_yx_m[:, ::-1] * factor
    path = write_cxi(tmp_path, **{"entry_1/sample_1/geometry_1/translation": translation})
    refused(path, words)


@pytest.mark.parametrize(
    ("changes", "choice", "words"),
    [
        ({}, None, "where the positions are is not known.*/entry/positions/samx"),
        ({}, replace(SAM, data="/entry/nothing"), "no dataset /entry/nothing; there are /entry"),
        ({}, replace(SAM, y="/entry/none"), "no dataset /entry/none"),
        ({"entry/data/data": None}, SAM, "frames at none of .*name their path with data"),
        ({"y": np.zeros(FRAMES)}, replace(SAM, y="/y"), "no unit: say position_unit"),
        ({"entry/positions/samx": np.zeros(3)}, SAM, r"\(18,\) and .* \(3,\)"),
    ],
)
def test_what_is_wrong_with_nexus_files_is_said(tmp_path, changes, choice, words):
    refused(write_nexus(tmp_path, **changes), words, choice)


def test_units_that_are_not_told_are_not_guessed(tmp_path):
    path = write_nexus(tmp_path)
    with h5py.File(path, "r+") as file:
        del file["entry/instrument/detector/detector_distance"].attrs["units"]
    refused(path, "of unit None: give the value yourself", SAM)
    check(load_measured(path, replace(SAM, detector_distance_m=2.0)))


@pytest.mark.parametrize(
    ("changes", "attributes", "words"),
    [
        ({"probe_position_indexes": 500 + NUMBERS}, {}, "no index of a frame is among"),
        ({"probe_position_indexes": NUMBERS - 4}, {}, "not numbers from 0"),
        ({"probe_position_x_m": np.zeros(3)}, {}, r"\(18,\) indexes and \(18,\) and \(3,\) coord"),
        ({}, {"@detector_object_distance_m": "2 m"}, "not a number"),
        ({"probe": np.ones((1, 1, SIZE, SIZE))}, {}, "no complex probe"),
        ({"probe": np.ones((0, 1, SIZE, SIZE), complex)}, {}, "not complex modes"),
        ({}, {"object@center_x_m": 1 + 2j}, "center_x_m of object is .*, not a number"),
    ],
)
def test_what_is_wrong_with_ptychodus_files_is_said(tmp_path, changes, attributes, words):
    product = write_ptychodus(tmp_path, changes, attributes)
    with pytest.raises(FileFormatError, match=words):
        load_measured(product)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patterns": np.float64(3)}, r"has shape \(\)"),
        ({"patterns": np.full((FRAMES, SIZE, SIZE), "x")}, "is <U1, not numbers"),
        ({"bad_pixels": np.full((SIZE, SIZE), "x")}, "is <U1"),
        ({"probe": np.zeros((0, 1, SIZE, SIZE), complex)}, "not complex modes"),
        ({"probe_position_x_m": np.ones(FRAMES, complex)}, "complex128, not numbers"),
        ({"object_center_x_m": "left"}, "object_center_x_m is .*left.*, not a number"),
        ({"photon_energy_eV": 1 + 2j}, "photon_energy_eV is .*, not a number"),
    ],
)
def test_what_is_wrong_with_ptychodus_npz_files_is_said(tmp_path, changes, words):
    with pytest.raises(FileFormatError, match=rf"\.npz: .*{words}"):
        load_measured(write_ptychodus_npz(tmp_path, **changes))


def test_the_other_file_of_ptychodus_is_asked_for(tmp_path):
    product = write_ptychodus(tmp_path)
    elsewhere = (tmp_path / "diffraction.h5").rename(tmp_path / "frames.h5")
    refused(product, "has positions only.*name that file with product")
    check(load_measured(product, MeasuredChoice(product=elsewhere)), numbered=True)
    check(load_measured(elsewhere, MeasuredChoice(product=product)), numbered=True)
    refused(product, "not a ptychodus product and its diffraction", MeasuredChoice(product=product))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "none.h5", "is missing")
    refused(tmp_path, "no scan of the store lies there")
    (tmp_path / "notes.h5").write_text("nothing")
    refused(tmp_path / "notes.h5", "neither NPZ nor HDF5")
    path = write_cxi(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FileFormatError):
        load_measured(path)
    path = write_ptychopinn(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(FileFormatError):
        load_measured(path, AMPLITUDE)


@pytest.mark.parametrize("write", [write_cxi, write_nexus, write_ptychodus])
def test_altered_files_are_read_or_refused_in_words(tmp_path, write):
    """Bytes at both ends, where HDF5 has its structure; whatever is wrong then, it is said."""
    rng = np.random.default_rng(5)
    path = write(tmp_path)
    data = path.read_bytes()
    refusals = 0
    for number in range(60):
        altered = bytearray(data)
        for _ in range(3):
            where = int(rng.integers(-6000, 6000))
            altered[where] = int(rng.integers(256))
        copy = tmp_path / f"product.{number:06d}.h5"
        copy.write_bytes(altered)
        try:
            load_measured(copy, SAM if write is write_nexus else None)
        except FileFormatError:
            refusals += 1
    assert refusals > 3


def test_answers_that_contradict_each_other_are_refused():
    for choice in (
        {"photons": 1.0, "counts_per_unit": 1.0},
        {"y": "/y"},
        {"y": "/y", "x": "/x", "xy": "/p"},
        {"photon_energy_eV": -1.0},
    ):
        with pytest.raises(FileFormatError):
            MeasuredChoice(**choice)


def test_a_scan_of_the_store_that_is_damaged_is_said(stored):
    (stored / "frames-000000.bin").unlink()
    with pytest.raises(StoreError):
        load_measured(stored)
