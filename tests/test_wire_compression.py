"""Blobs to pixels: every framing, every damage, no crash and no allocation on a promise."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.errors import DecodeError, LimitExceeded, WireError
from ptycho_stream.messages import EncodedImage
from ptycho_stream.wire.compression import ENCODINGS, decode, decode_window, encode


def diffraction(shape: tuple[int, int] = (128, 128), dtype: str = "<u2") -> np.ndarray:
    y, x = np.indices(shape)
    r2 = (y - shape[0] / 2) ** 2 + (x - shape[1] / 2) ** 2
    mean = 90 * np.exp(-r2 / (0.1 * shape[0] * shape[1]))
    return np.random.default_rng(3).poisson(mean).astype(dtype)


def image(pixels: np.ndarray, encoding: str, bits: int | None = None) -> EncodedImage:
    blob = encode(pixels, encoding, bits)
    return EncodedImage(blob, encoding, pixels.dtype.str, pixels.shape, bits)


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 130),
    width=st.integers(1, 130),
    dtype=st.sampled_from(["|u1", "<u2", "<u4", ">u2"]),
    encoding=st.sampled_from(ENCODINGS),
    seed=st.integers(0, 99),
)
def test_pixels_come_back_bit_exact(
    height: int, width: int, dtype: str, encoding: str, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 200, (height, width)).astype(dtype)
    decoded = decode(image(pixels, encoding))
    assert decoded.dtype == pixels.dtype
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_the_shuffle_width_may_differ_from_the_pixel_width(bits: int) -> None:
    pixels = diffraction((100, 102))
    np.testing.assert_array_equal(decode(image(pixels, "bslz4", bits)), pixels)


def test_a_header_of_zeros_means_blocks_of_8192_bytes() -> None:
    pixels = diffraction()
    blob = bytes(12) + encode(pixels, "bslz4")[12:]
    decoded = decode(EncodedImage(blob, "bslz4", "<u2", pixels.shape))
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pixels_are_written_into_the_given_buffer(encoding: str) -> None:
    pixels = diffraction()
    buffer = np.empty((2, *pixels.shape), "<u2")
    assert np.shares_memory(decode(image(pixels, encoding), buffer[1]), buffer)
    np.testing.assert_array_equal(buffer[1], pixels)


@pytest.mark.parametrize("buffer", [np.empty((64, 256), "<u2"), np.empty((128, 128), "<u4")])
def test_a_frame_that_does_not_fit_the_buffer_is_refused(buffer: np.ndarray) -> None:
    with pytest.raises(DecodeError, match="must not change"):
        decode(image(diffraction(), "bslz4"), buffer)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_frame_above_the_limit_is_refused_before_it_is_decoded(encoding: str) -> None:
    promised = EncodedImage(b"tiny", encoding, "<u4", (100_000, 100_000))
    with pytest.raises(LimitExceeded):
        decode(promised)


@pytest.mark.parametrize("encoding", ["lz4", "bslz4", "lz4-hdf5"])
def test_a_few_bytes_cannot_make_us_allocate_a_large_frame(encoding: str) -> None:
    size = 8192 * 8192 * 4
    blob = struct.pack(">QI", size, size) + struct.pack(">I", 4) + b"1234"
    with pytest.raises(DecodeError, match="cannot hold"):
        decode(EncodedImage(blob, encoding, "<u4", (8192, 8192)))


@pytest.mark.parametrize(
    ("total", "block"), [(7, 8192), (32768, 0), (32768, 3), (32768, 2**32 - 1), (2**64 - 1, 8192)]
)
def test_a_header_that_contradicts_the_frame_is_refused(total: int, block: int) -> None:
    blob = struct.pack(">QI", total, block) + encode(diffraction(), "bslz4")[12:]
    with pytest.raises(DecodeError):
        decode(EncodedImage(blob, "bslz4", "<u2", (128, 128)))


@pytest.mark.parametrize("dtype", ["O", "V8", "no such type", "<M8[s]", "<c16", "<u2,<u2"])
def test_only_numbers_are_pixels(dtype: str) -> None:
    with pytest.raises(DecodeError, match="not a pixel type"):
        decode(EncodedImage(b"", "raw", dtype, (1, 1)))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_damaged_blobs_raise_or_decode_but_never_crash(encoding: str) -> None:
    rng = np.random.default_rng(11)
    pixels = diffraction((32, 33))
    good = encode(pixels, encoding)
    refused = 0
    for _ in range(5000):
        blob = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            blob[rng.integers(len(blob))] = rng.integers(256)
        if rng.random() < 0.3:
            del blob[rng.integers(len(blob)) :]
        try:
            decoded = decode(EncodedImage(bytes(blob), encoding, "<u2", pixels.shape))
        except WireError:
            refused += 1
        else:
            assert decoded.shape == pixels.shape
    assert refused > 0


@settings(max_examples=200, deadline=None)
@given(data=st.data(), height=st.integers(1, 150), width=st.integers(1, 150))
def test_a_window_is_what_the_whole_frame_has_there(
    data: st.DataObject, height: int, width: int
) -> None:
    dtype = data.draw(st.sampled_from(["|u1", "<u2", "<u4", ">u2"]))
    encoding = data.draw(st.sampled_from(ENCODINGS))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom = data.draw(st.integers(top + 1, height))
    right = data.draw(st.integers(left + 1, width))
    seed = data.draw(st.integers(0, 99))
    pixels = np.random.default_rng(seed).integers(0, 200, (height, width)).astype(dtype)
    window = slice(top, bottom), slice(left, right)
    found = decode_window(image(pixels, encoding), window)
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found, pixels[window])


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("rows", [(0, 9), (40, 80), (250, 263)])
def test_a_window_of_many_blocks_is_written_into_the_given_buffer(rows, bits) -> None:
    pixels = diffraction((263, 257), "<u4")
    window = slice(*rows), slice(100, 200)
    buffer = np.empty((3, rows[1] - rows[0], 100), "<u4")
    decode_window(image(pixels, "bslz4", bits), window, buffer[1])
    np.testing.assert_array_equal(buffer[1], pixels[window])


def test_blocks_outside_the_window_are_walked_and_not_decoded() -> None:
    pixels = diffraction((256, 256), "<u4")
    good = encode(pixels, "bslz4")
    window = slice(100, 120), slice(0, 256)
    first_block = struct.unpack_from(">I", good, 12)[0]
    spoilt = good[:16] + b"\xff" * first_block + good[16 + first_block :]
    found = decode_window(EncodedImage(spoilt, "bslz4", "<u4", (256, 256)), window)
    np.testing.assert_array_equal(found, pixels[window])
    with pytest.raises(DecodeError):
        decode(EncodedImage(spoilt, "bslz4", "<u4", (256, 256)))
    longer = good[:12] + struct.pack(">I", first_block + 1) + good[16:]
    for blob in (longer, good[:-1], good + b"x", good[: len(good) // 2]):
        with pytest.raises(DecodeError):
            decode_window(EncodedImage(blob, "bslz4", "<u4", (256, 256)), window)


@pytest.mark.parametrize(
    "window",
    [
        (slice(0, 129), slice(0, 5)),
        (slice(0, 5), slice(3, 129)),
        (slice(5, 5), slice(0, 5)),
        (slice(-1, 5), slice(0, 5)),
    ],
)
def test_a_frame_that_does_not_hold_the_window_is_refused(window) -> None:
    with pytest.raises(DecodeError, match="does not hold rows"):
        decode_window(image(diffraction(), "bslz4"), window)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_windows_of_damaged_blobs_raise_or_decode_but_never_crash(encoding: str) -> None:
    rng = np.random.default_rng(12)
    pixels = diffraction((40, 233), "<u4")
    good = encode(pixels, encoding)
    window = slice(15, 30), slice(5, 60)
    refused = 0
    for _ in range(2000):
        blob = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            blob[rng.integers(len(blob))] = rng.integers(256)
        if rng.random() < 0.3:
            del blob[rng.integers(len(blob)) :]
        try:
            decoded = decode_window(EncodedImage(bytes(blob), encoding, "<u4", (40, 233)), window)
        except WireError:
            refused += 1
        else:
            assert decoded.shape == (15, 55)
    assert refused > 0
