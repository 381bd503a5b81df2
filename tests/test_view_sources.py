"""Files that users name for a view: what is read, and what is refused with words that help."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from PIL import Image

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.frame_list import load_frame_list
from ptycho_stream.files.pixel_map import load_pixel_map

SHAPE = (6, 8)


@pytest.mark.parametrize("dtype", [bool, "u1", "<u2", ">i4", "<f4", "<f8"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_are_read_as_they_were_saved(tmp_path, suffix, dtype):
    values = (np.arange(48).reshape(SHAPE) % 2).astype(dtype)
    path = tmp_path / f"map{suffix}"
    if suffix == ".npy":
        np.save(path, np.asfortranarray(values))
    else:
        np.savez_compressed(path, bad_pixels=values, other=np.zeros(3))
    np.testing.assert_array_equal(load_pixel_map(path, "bad_pixels", (SHAPE,)), values)


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i4", "<f4"])
def test_tiffs_are_read(tmp_path, dtype):
    values = np.arange(48).reshape(SHAPE).astype(dtype)
    Image.fromarray(values).save(tmp_path / "flat.tiff")
    found = load_pixel_map(tmp_path / "flat.tiff", "flat_field", ((1, 2), SHAPE))
    np.testing.assert_array_equal(found, values)


def write_lying_npy(path) -> None:
    """A header that promises a terabyte."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**17)}
        )


def write_short_npy(path) -> None:
    np.save(path, np.zeros(SHAPE))
    path.write_bytes(path.read_bytes()[:-8])


def write_two_pages(path) -> None:
    page = Image.fromarray(np.zeros(SHAPE, "u1"))
    page.save(path, save_all=True, append_images=[page])


def write_zip_of_text(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("flat_field.npy", "no array")


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("a.npy", lambda path: np.save(path, np.zeros((8, 6))), "8 x 6 where 6 x 8 are wanted"),
        ("a.npy", lambda path: np.save(path, np.zeros((1, *SHAPE))), "1 x 6 x 8 where"),
        ("a.npy", lambda path: np.save(path, np.full(SHAPE, "text")), "bools, integers or floats"),
        ("a.npy", lambda path: np.save(path, np.full(SHAPE, None), allow_pickle=True), "object"),
        ("a.npy", write_lying_npy, "1048576 x 131072 where"),
        ("a.npy", write_short_npy, "ends before its last pixel"),
        ("a.npy", lambda path: path.write_bytes(b"what"), "cannot be read"),
        ("a.npz", lambda path: path.write_bytes(b"what"), "cannot be read"),
        ("a.npz", lambda path: np.savez(path, a=np.zeros(2), b=np.zeros(2)), "call the array"),
        ("a.npz", write_zip_of_text, "cannot be read"),
        ("a.tif", lambda path: path.write_bytes(b"what"), "is no TIFF"),
        ("a.tif", lambda path: Image.new("RGB", SHAPE[::-1]).save(path), "one number a pixel"),
        ("a.tif", lambda path: Image.new("L", (9, 9)).save(path), "9 x 9 where"),
        ("a.tif", write_two_pages, "2 pages"),
        ("a.png", lambda path: path.write_bytes(b""), "none of NPY, NPZ and TIFF"),
        ("a.npy", lambda path: None, "there is no file"),
    ],
)
def test_maps_that_cannot_be_used_are_refused(tmp_path, name, write, says):
    write(tmp_path / name)
    with pytest.raises(FileFormatError, match=says) as raised:
        load_pixel_map(tmp_path / name, "flat_field", (SHAPE,))
    assert name in str(raised.value)


def test_damaged_maps_are_refused_whatever_the_damage(tmp_path):
    rng = np.random.default_rng(1)
    sources = {}
    np.save(tmp_path / "a.npy", np.zeros(SHAPE))
    np.savez(tmp_path / "a.npz", flat_field=np.zeros(SHAPE))
    Image.fromarray(np.zeros(SHAPE, "<f4")).save(tmp_path / "a.tiff", compression="tiff_deflate")
    for name in ("a.npy", "a.npz", "a.tiff"):
        sources[name] = (tmp_path / name).read_bytes()
    for turn in range(1500):
        name = ("a.npy", "a.npz", "a.tiff")[turn % 3]
        data = bytearray(sources[name])
        for _ in range(3):
            data[rng.integers(min(len(data), 200))] = rng.integers(256)
        (tmp_path / name).write_bytes(data[: rng.integers(1, len(data) + 1)])
        try:
            found = load_pixel_map(tmp_path / name, "flat_field", (SHAPE,))
        except FileFormatError:
            continue
        assert found.shape == SHAPE


def test_lists_of_frames_have_numbers_and_ranges(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_text("frame\n3, 5\n20-25; 24 .. 30\n7 # the shutter stuck\n\n8\n6\n")
    assert load_frame_list(path).tolist() == [[3, 3], [5, 8], [20, 30]]
    path.write_bytes(b"\xef\xbb\xbf17\r\n19\r\n")
    assert load_frame_list(path).tolist() == [[17, 17], [19, 19]]
    path.write_text("# none\n")
    assert load_frame_list(path).shape == (0, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3\n-4", "line 2"),
        ("1\n9-3", "smaller one"),
        ("1\n2.5", "no frame number"),
        ("1\nx", "no frame number"),
        ("1\n1e9", "no frame number"),
        ("7" * 5000, "line 1"),
        (f"1\n{2**62}", "no range"),
        ("1\n\x00", "line 2"),
        (b"\xff\xfe1\x00", "not text"),
        (None, "cannot read"),
    ],
)
def test_lists_that_hold_something_else_are_refused(tmp_path, text, says):
    path = tmp_path / "bad.csv"
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text is not None:
        path.write_text(text)
    with pytest.raises(FileFormatError, match=says):
        load_frame_list(path)
