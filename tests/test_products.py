"""Results as the files that other programs open: keys, conventions, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image as Picture
from result_samples import FRAMES, NUMBERS, SIZE, asymmetric_scan, good_counts, image_of

from ptycho_stream.errors import FileFormatError, StoreError
from ptycho_stream.files.image_npz import load_image
from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.products import FORMATS, format_of, result_path, write_result
from ptycho_stream.files.ptychodus_names import diffraction_path, product_path
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.geometry import View
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.results import Image
from ptycho_stream.scans import Catalogue, ScanReader
from ptycho_stream.scans.view_data import keep_view_data

GEOMETRY = DetectorGeometry(2.0, 8800.0, (75e-6, 55e-6), count_time_s=0.02)
LOSSES = [(1, 0.5), (2, 0.25)]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[ScanReader]:
    """The scan in a store."""
    with ScanReader.open(tmp_path / "data", store_scan(tmp_path / "data", asymmetric_scan())) as r:
        yield r


@pytest.fixture
def image(reader: ScanReader) -> Image:
    return image_of(asymmetric_scan(), reader.scan_id)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_product_has_the_names_of_old_and_new_versions(folder, image, reader):
    path = folder / "product.h5"
    files = write_result(image, path, "ptychodus", reader, geometry=GEOMETRY, losses=LOSSES)
    assert files == [path, folder / "diffraction.h5"]
    assert names(folder) == ["diffraction.h5", "product.h5"]
    with h5py.File(path) as file:
        told = dict(file.attrs)
        assert told["name"] == "star" and told["comments"] == "a trial"
        assert told["detector_object_distance_m"] == 2.0 and told["exposure_time_s"] == 0.02
        assert told["photon_energy_eV"] == told["probe_energy_eV"] == 8800.0
        assert told["mass_attenuation_m2_per_kg"] == told["mass_attenuation_m2_kg"] == 0.0
        assert told["tomography_angle_deg"] == 12.5
        photons = np.square(np.abs(image.probe)).sum(dtype=float)
        assert told["probe_photon_count"] == pytest.approx(photons)
        np.testing.assert_array_equal(file["probe_position_indexes"], NUMBERS)
        position = np.stack([file["probe_position_y_m"], file["probe_position_x_m"]], 1)
        np.testing.assert_array_equal(position, image.positions_yx_m)
        assert file["probe"].shape == (1, 1, SIZE, SIZE)
        assert file["object"].shape == (1, *image.object_yx.shape)
        assert file["object_layer_spacing_m"].shape == (0,)
        assert file["object_layer_spacing_m"].dtype == np.float64
        assert file["loss_epochs"][:].tolist() == [1, 2]
        assert file["loss_values"][:].tolist() == [0.5, 0.25]
        known = json.loads(file["ptycho_stream"][()])
        assert known["sample"] == "star" and known["ptycho_stream"]["verdict"] == "good"


def test_pixels_of_positions_follow_from_the_centre_of_the_object(folder, image):
    """x_px = (x_m - center_x_m) / pixel_width_m + (W - 1) / 2, of the probe's (N - 1) / 2."""
    write_result(image, folder / "product.h5", "ptychodus", geometry=GEOMETRY)
    assert names(folder) == ["product.h5"]
    scan = asymmetric_scan()
    with h5py.File(folder / "product.h5") as file:
        obj, told = file["object"][0], file["object"].attrs
        pixel = told["pixel_height_m"], told["pixel_width_m"]
        center = told["center_y_m"], told["center_x_m"]
        position = np.stack([file["probe_position_y_m"], file["probe_position_x_m"]], 1)
        probe = file["probe"][0]
        weight = file["object_weight"][:]
    assert pixel == scan.pixel_yx_m and pixel[0] != pixel[1]
    assert np.isfinite(obj).all() and (obj[weight == 0] == 1).all() and (weight == 0).any()
    corner = (position - center) / pixel + (np.array(obj.shape) - 1) / 2 - (SIZE - 1) / 2
    whole = np.rint(corner).astype(int)
    errors = [
        misfit(probe, obj, whole[n], corner[n] - whole[n], good_counts(scan)[n], scan.bad_pixels)
        for n in range(FRAMES)
    ]
    assert np.mean(errors) < 0.08


def misfit(probe, obj, corner, shift, counts, bad) -> float:
    """R of a frame: the probe moved by a fraction of a pixel, the object at a whole one."""
    patch = obj[corner[0] : corner[0] + SIZE, corner[1] : corner[1] + SIZE]
    frequency = np.fft.fftfreq(SIZE)
    ramp = np.exp(-2j * np.pi * (frequency[:, None] * shift[0] + frequency * shift[1]))
    moved = np.fft.ifft2(np.fft.fft2(probe) * ramp)
    wave = np.fft.fftshift(np.fft.fft2(moved * patch, norm="ortho"), axes=(-2, -1))
    amplitude = np.sqrt((np.abs(wave) ** 2).sum(0))
    measured = np.sqrt(counts)
    return np.abs(amplitude - measured)[~bad].sum() / measured[~bad].sum()


@pytest.mark.parametrize("kind", ["ptychodus", "cxi", "ptychopinn"])
def test_what_is_written_is_read_back(folder, image, reader, kind):
    path = folder / {"ptychodus": "a.h5", "cxi": "a.cxi", "ptychopinn": "a.ptychopinn.npz"}[kind]
    told: list[tuple[int, int]] = []
    write_result(image, path, kind, reader, progress=lambda *at: told.append(at))
    assert told[-1] == (FRAMES, FRAMES)
    found, scan = load_measured(path), asymmetric_scan()
    assert found.frame_numbers.tolist() == NUMBERS.tolist()
    np.testing.assert_array_equal(np.asarray(found.counts), good_counts(scan))
    np.testing.assert_allclose(found.positions_yx_m, scan.positions_yx_m, rtol=1e-12)
    assert found.pixel_yx_m == pytest.approx(scan.pixel_yx_m)
    assert found.object_origin_yx_m == pytest.approx(image.origin_yx_m)
    np.testing.assert_array_equal(found.object[5:], image.object_yx[5:])
    np.testing.assert_allclose(found.probe, scan.probe, rtol=1e-5, atol=1e-4)
    if kind != "ptychopinn":
        np.testing.assert_array_equal(found.bad_pixels, scan.bad_pixels)
        assert found.photon_energy_eV == pytest.approx(scan.photon_energy_eV)
        assert found.detector_pixel_yx_m == scan.detector_pixel_yx_m


def test_cxi_has_its_paths(folder, image, reader):
    write_result(image, folder / "scan.cxi", "cxi", reader, losses=LOSSES)
    with h5py.File(folder / "scan.cxi") as file:
        assert file["cxi_version"][()] == 160
        entry = file["entry_1"]
        energy_j = entry["instrument_1/source_1/energy"][()]
        assert energy_j == pytest.approx(8800 * 1.602176634e-19)
        detector = entry["instrument_1/detector_1"]
        assert detector["data"].shape == (FRAMES, SIZE, SIZE)
        assert detector["x_pixel_size"][()] == 55e-6 and detector["y_pixel_size"][()] == 75e-6
        assert detector["mask"].dtype == np.uint32
        np.testing.assert_array_equal(detector["mask"][:] != 0, asymmetric_scan().bad_pixels)
        translation = entry["sample_1/geometry_1/translation"][:]
        np.testing.assert_array_equal(translation[:, 1::-1], image.positions_yx_m)
        assert isinstance(entry["data_1"].get("data", getlink=True), h5py.SoftLink)
        assert entry["data_1/data"] == detector["data"]
        np.testing.assert_array_equal(entry["data_1/translation"], translation)
        np.testing.assert_array_equal(entry["image_1/data"][0], image.probe)
        assert entry["image_2/data"].shape == (1, *image.object_yx.shape)
        size = entry["image_2/image_size"][:2] / entry["image_2/data"].shape[:0:-1]
        assert size.tolist() == pytest.approx(image.pixel_yx_m[::-1])


def test_frames_are_written_as_the_view_shows_them(folder, reader, tmp_path):
    """Turned, masked and corrected: what the image was made of."""
    flat = np.ones((SIZE, SIZE))
    flat[:, : SIZE // 2] = 2.0
    mask = np.zeros((SIZE, SIZE), bool)
    mask[3, 4] = True
    view = View(
        SIZE,
        orientation="flip_x",
        version=2,
        flat_field=keep_view_data(reader.directory, flat),
        bad_pixels=keep_view_data(reader.directory, mask),
    )
    Catalogue(tmp_path / "data").add_view(reader.scan_id, view)
    reader.refresh()
    image = image_of(asymmetric_scan(), reader.scan_id)
    write_result(image, folder / "a.h5", "ptychodus", reader)
    shown = View(SIZE, orientation="flip_x")
    bad = shown.apply(asymmetric_scan().bad_pixels | mask)
    expected = np.where(bad, 0, shown.apply(good_counts(asymmetric_scan()) / flat))
    with h5py.File(folder / "a.diffraction.h5") as file:
        assert file["patterns"].dtype == np.float32
        np.testing.assert_allclose(file["patterns"], expected, rtol=1e-6)
        np.testing.assert_array_equal(file["bad_pixels"], bad)
        assert file["patterns"].attrs["detector_pixel_height_m"] == 75e-6


def test_npz_and_pictures(folder, image, reader):
    for kind in ("npz", "png", "tiff"):
        write_result(image, folder / f"a.{kind}", kind, reader)
    np.testing.assert_array_equal(load_image(folder / "a.npz").object_yx, image.object_yx)
    height, width = image.object_yx.shape
    with Picture.open(folder / "a.png") as picture:
        assert picture.height == height and picture.width > 2 * width
    with Picture.open(folder / "a.tiff") as picture:
        assert picture.n_frames == 2 and picture.mode == "F"
        known = json.loads(picture.tag_v2[270])
        assert known["pages"] == ["phase_rad", "amplitude"] and known["sample"] == "star"
        x_per_cm, y_per_cm = picture.tag_v2[282], picture.tag_v2[283]
        assert float(x_per_cm) == pytest.approx(0.01 / image.pixel_yx_m[1], rel=1e-4)
        assert float(y_per_cm) == pytest.approx(0.01 / image.pixel_yx_m[0], rel=1e-4)
        phase = np.array(picture)
        picture.seek(1)
        np.testing.assert_array_equal(np.array(picture), np.abs(image.object_yx))
    turn = np.exp(1j * phase) * image.object_yx.conj()
    seen = np.isfinite(image.object_yx)
    assert np.isnan(phase[~seen]).all() and (~seen).any()
    np.testing.assert_allclose(
        turn[seen] / np.abs(turn[seen]), turn[seen][0] / abs(turn[seen][0]), rtol=1e-5
    )


def test_without_frames_there_is_what_can_be_said_without(folder, image):
    write_result(image, folder / "a.cxi", "cxi", geometry=DetectorGeometry())
    with pytest.raises(FileFormatError, match="an image only"):
        load_measured(folder / "a.cxi")
    with pytest.raises(FileFormatError, match=r"made of frames.*name its folder"):
        write_result(image, folder / "a.ptychopinn.npz", "ptychopinn")
    with pytest.raises(FileFormatError, match=r"needs photon energy.*\[geometry\]"):
        write_result(image, folder / "a.h5", "ptychodus")
    assert names(folder) == ["a.cxi"]


def test_an_image_without_pixels_is_not_written(folder, image):
    empty = Image(replace(image.content, tiles={}))
    for kind in FORMATS:
        with pytest.raises(FileFormatError, match="has no pixel yet"):
            write_result(empty, folder / "a", kind, geometry=GEOMETRY)
    assert names(folder) == []


@pytest.mark.parametrize("kind", ["ptychodus", "cxi", "ptychopinn"])
def test_a_fault_leaves_the_file_that_was_there(folder, image, reader, kind):
    path = folder / "a"
    path.write_text("before")
    (reader.directory / "frames-000000.bin").rename(reader.directory / "gone")
    with pytest.raises(StoreError), ScanReader(reader.directory) as broken:
        write_result(image, path, kind, broken)
    assert names(folder) == ["a"] and path.read_text() == "before"


def test_a_folder_that_is_not_there_is_an_error(folder, image, reader):
    for kind in FORMATS:
        with pytest.raises(FileFormatError, match="cannot write"):
            write_result(image, folder / "none" / "a", kind, reader)


def test_frames_are_written_by_their_numbers(folder, image, reader):
    """Not in the order in which they got into the image."""
    order = np.random.default_rng(2).permutation(FRAMES)
    content = replace(
        image.content,
        frame_numbers=image.frame_numbers[order],
        position_yx_m=image.positions_yx_m[order],
    )
    write_result(Image(content), folder / "a.cxi", "cxi", reader)
    found = load_measured(folder / "a.cxi")
    assert found.frame_numbers.tolist() == NUMBERS.tolist()
    np.testing.assert_array_equal(found.positions_yx_m, asymmetric_scan().positions_yx_m)
    np.testing.assert_array_equal(np.asarray(found.counts), good_counts(asymmetric_scan()))


def test_frames_of_another_scan_are_refused(folder, image, reader):
    other = Image(replace(image.content, frame_numbers=image.frame_numbers + 1))
    with pytest.raises(FileFormatError, match=r"has frames that the scan in .* has not"):
        write_result(other, folder / "a.cxi", "cxi", reader)


def test_names_ask_for_formats():
    asked = {name: format_of(Path(name)) for name in ("a.npz", "a.PtychoPINN.npz", "a.h5", "a.txt")}
    assert asked == {
        "a.npz": "npz",
        "a.PtychoPINN.npz": "ptychopinn",
        "a.h5": "ptychodus",
        "a.txt": None,
    }
    for kind in FORMATS:
        assert format_of(result_path(Path("out"), "ID", kind)) == kind
    assert result_path(Path("out"), "ID", "ptychodus") == Path("out/ID/product.h5")


def test_the_two_files_of_ptychodus_know_each_other_s_name(folder):
    pairs = {
        "product.h5": "diffraction.h5",
        "ID.product.h5": "ID.diffraction.h5",
        "image.h5": "image.diffraction.h5",
    }
    for product, frames in pairs.items():
        (folder / product).touch()
        assert diffraction_path(folder / product) == folder / frames
        assert product_path(folder / frames) == folder / product
    assert diffraction_path(Path("product.000007.h5")) == Path("diffraction.h5")
