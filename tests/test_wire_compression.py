"""Blobs to pixels: every framing, every damage, no crash and no allocation on a promise."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.errors import DecodeError, LimitExceeded, WireError
from ptycho_stream.messages import EncodedImage
from ptycho_stream.wire.compression import ENCODINGS, decode, encode


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
