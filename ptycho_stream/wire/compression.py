"""Blobs to pixels and back: raw, LZ4, and bit-shuffled LZ4 as DECTRIS and HDF5 frame them.

Used by ingest for every frame and by the simulators.  The blob is data from outside: all lengths
are checked before memory is allocated, and nothing that is not told its input's length
(``bitshuffle.decompress_lz4``, which crashes the process on damaged blobs) ever sees it.

Framing of ``bslz4``: u64 big endian decoded bytes, u32 big endian block bytes, then for each block
u32 big endian compressed length + LZ4 of the bit-shuffled elements, a shorter last block (a
multiple of 8 elements), and left-over elements raw.  Some senders leave the 12 header bytes zero.
``lz4-hdf5`` has the same header and lengths; a block as long as its decoded self is stored raw.
"""

# bitshuffle and lz4 come without type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import struct
from functools import lru_cache
from itertools import repeat
from struct import Struct
from typing import Any

import bitshuffle
import lz4.block
import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import DecodeError, LimitExceeded
from ptycho_stream.messages import EncodedImage

DEFAULT_BLOCK_BYTES = 8192
DEFAULT_MAX_BYTES = 512 * 2**20
LZ4_MAX_RATIO = 256  # a byte of LZ4 lengthens a match by at most 255
ENCODINGS = ("raw", "lz4", "bslz4", "lz4-hdf5")

_HEADER = Struct(">QI")
_LENGTH = Struct(">I")
_SHUFFLE_DTYPES = {8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
_lz4_decompress: Any = lz4.block.decompress
_lz4_compress: Any = lz4.block.compress
_bitunshuffle: Any = bitshuffle.bitunshuffle
_compress_lz4: Any = bitshuffle.compress_lz4


def decode(
    image: EncodedImage,
    out: NDArray[np.generic] | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> NDArray[np.generic]:
    """Pixels of one image.

    Args:
        image: as a codec made it.
        out: (y, x) of the image's dtype, byte order aside, to be written into.
        max_bytes: decoded size above which the image is refused.

    Returns:
        ``out`` if given, else a new array (y, x) of ``image.dtype`` (read-only where it views the
        blob).

    Raises:
        LimitExceeded: the image promises more than ``max_bytes``.
        DecodeError: the blob is damaged, not what was promised, or does not fit ``out``.
    """
    pixels = _decode_rows(image, 0, image.shape_yx[0], max_bytes)
    return pixels if out is None else _fill(out, pixels, image)


def decode_window(
    image: EncodedImage,
    window: tuple[slice, slice],
    out: NDArray[np.generic] | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> NDArray[np.generic]:
    """Pixels of a part of one image; only the blocks that hold its rows are decoded.

    The length prefixes of the other blocks are walked and checked, their content is not looked at:
    damage outside the window may go unnoticed. ``lz4`` has a single block, which is decoded whole.

    Args:
        image: as a codec made it.
        window: rows and columns, each a slice with a start and a stop and without a step.
        out: (h, w) of the window and of the image's dtype, byte order aside, to be written into.
        max_bytes: decoded size of the whole image above which it is refused.

    Returns:
        ``out`` if given, else an array (h, w) of ``image.dtype``.

    Raises:
        LimitExceeded: the image promises more than ``max_bytes``.
        DecodeError: the blob is damaged, not what was promised, does not reach as far as the
            window, or does not fit ``out``.
    """
    rows, columns = window
    height, width = image.shape_yx
    if not (0 <= rows.start < rows.stop <= height and 0 <= columns.start < columns.stop <= width):
        raise DecodeError(
            f"a frame of {image.shape_yx} does not hold rows {rows.start} to {rows.stop} and "
            f"columns {columns.start} to {columns.stop}: shape must not change within a series"
        )
    pixels = _decode_rows(image, rows.start, rows.stop, max_bytes)[:, columns]
    return pixels if out is None else _fill(out, pixels, image)


def _decode_rows(image: EncodedImage, first: int, last: int, max_bytes: int) -> NDArray[np.generic]:
    """Rows [first, last) of an image, (last - first, x)."""
    dtype = _dtype(image.dtype)
    height, width = image.shape_yx
    if height < 1 or width < 1:
        raise DecodeError(f"a frame of shape {image.shape_yx} holds no pixels")
    row_bytes = width * dtype.itemsize
    size = height * row_bytes
    if size > max_bytes:
        raise LimitExceeded(f"a frame of {size} bytes is above the limit of {max_bytes}")
    start, stop = first * row_bytes, last * row_bytes
    match image.encoding:
        case "bslz4":
            flat, at = _decode_bslz4(image.blob, size, dtype, image.shuffle_bits, start, stop)
        case "raw":
            flat, at = _decode_raw(image.blob, size), 0
        case "lz4":
            flat, at = _decode_block(memoryview(image.blob), size, "the frame"), 0
        case "lz4-hdf5":
            parts, at, _ = _blocks(image.blob, size, 1, start, stop, raw_if_full=True)
            flat = b"".join(parts)
        case _:
            raise DecodeError(
                f"encoding {image.encoding!r} is not known; it is one of {', '.join(ENCODINGS)}"
            )
    if not isinstance(flat, np.ndarray):
        flat = np.frombuffer(flat, np.uint8)
    if flat.nbytes != stop - start:
        flat = flat.view(np.uint8)[start - at : stop - at]
    return flat.view(dtype).reshape(last - first, width)


def _fill(
    out: NDArray[np.generic], pixels: NDArray[np.generic], image: EncodedImage
) -> NDArray[np.generic]:
    if out.shape != pixels.shape or out.dtype.newbyteorder("=") != pixels.dtype.newbyteorder("="):
        raise DecodeError(
            f"{pixels.shape} {pixels.dtype.name} of a frame of {image.shape_yx} came where "
            f"{out.shape} {out.dtype.name} was expected: shape and type must not change within a "
            "series"
        )
    out[...] = pixels
    return out


def encode(
    pixels: NDArray[np.generic], encoding: str = "raw", shuffle_bits: int | None = None
) -> bytes:
    """Blob of ``pixels`` (y, x) in their own byte order, the inverse of :func:`decode`.

    Args:
        pixels: (y, x), C order or not.
        encoding: one of :data:`ENCODINGS`.
        shuffle_bits: element width of ``bslz4``; the dtype's if None.

    Raises:
        ValueError: ``encoding`` or ``shuffle_bits`` is none of those known.
    """
    flat = np.ascontiguousarray(pixels).ravel()
    match encoding:
        case "raw":
            return flat.tobytes()
        case "lz4":
            return _lz4_compress(flat.tobytes(), store_size=False)
        case "bslz4":
            bits = shuffle_bits or flat.itemsize * 8
            if bits not in _SHUFFLE_DTYPES or flat.nbytes % (bits // 8):
                raise ValueError(f"cannot shuffle {flat.nbytes} bytes as elements of {bits} bits")
            elements = flat.view(np.uint8).view(_SHUFFLE_DTYPES[bits])
            body = _compress_lz4(elements, DEFAULT_BLOCK_BYTES * 8 // bits)
            return _HEADER.pack(flat.nbytes, DEFAULT_BLOCK_BYTES) + body.tobytes()
        case "lz4-hdf5":
            return _encode_hdf5(flat.tobytes())
        case _:
            raise ValueError(f"encoding {encoding!r} is none of {', '.join(ENCODINGS)}")


@lru_cache(maxsize=64)
def _dtype(name: str) -> np.dtype[np.generic]:
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError) as error:
        raise DecodeError(f"{name!r} is not a pixel type") from error
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise DecodeError(f"{name!r} is not a pixel type: integers and floats are accepted")
    return dtype


def _decode_raw(blob: Any, size: int) -> Any:
    if len(memoryview(blob).cast("B")) != size:
        raise DecodeError(f"a raw frame holds {len(blob)} bytes where {size} were promised")
    return blob


def _decode_block(block: memoryview, size: int, what: str) -> bytes:
    if size > LZ4_MAX_RATIO * len(block):
        raise DecodeError(f"{what} of {len(block)} bytes cannot hold LZ4 of {size} bytes")
    try:
        plain = _lz4_decompress(block, uncompressed_size=size)
    except (lz4.block.LZ4BlockError, ValueError, OverflowError) as error:
        raise DecodeError(f"{what} is not LZ4 of {size} bytes: {error}") from error
    if len(plain) != size:
        raise DecodeError(f"{what} decodes to {len(plain)} bytes where {size} were promised")
    return plain


def _decode_bslz4(
    blob: Any,
    size: int,
    dtype: np.dtype[np.generic],
    shuffle_bits: int | None,
    start: int,
    stop: int,
) -> tuple[NDArray[np.generic], int]:
    """Elements of the blocks that hold bytes [start, stop), and the byte that they begin at."""
    elements = _SHUFFLE_DTYPES.get(shuffle_bits or dtype.itemsize * 8)
    if elements is None or size % elements.itemsize:
        raise DecodeError(f"{size} bytes cannot have been shuffled as {shuffle_bits} bit elements")
    itemsize = elements.itemsize
    parts, at, block_bytes = _blocks(blob, size, itemsize, start, stop)
    if block_bytes > size:
        # A single block may be short of 8 elements at its end: as one block of all whole eights,
        # bitshuffle treats it as the sender did.
        block_bytes = max(size, 8 * itemsize)
    shuffled = np.frombuffer(b"".join(parts), elements)
    return _bitunshuffle(shuffled, block_bytes // (8 * itemsize) * 8), at


def _blocks(
    blob: Any, size: int, itemsize: int, start: int, stop: int, raw_if_full: bool = False
) -> tuple[list[Any], int, int]:
    """Decoded blocks of a framed blob of ``size`` bytes that hold bytes [start, stop).

    Returns:
        The blocks, left-over bytes last if they are among them; the byte that the first block
        begins at; the bytes of a block.
    """
    view = memoryview(blob).cast("B")
    end = len(view)
    if end < 12:
        raise DecodeError(f"a blob of {end} bytes is shorter than its 12-byte header")
    total, block_bytes = _HEADER.unpack_from(view, 0)
    if total == 0 and block_bytes == 0:
        total, block_bytes = size, DEFAULT_BLOCK_BYTES
    if total != size:
        raise DecodeError(f"the blob's header promises {total} bytes, the frame's {size}")
    eight = 8 * itemsize if not raw_if_full else 1
    if block_bytes < eight or block_bytes % eight:
        raise DecodeError(f"blocks of {block_bytes} bytes are not whole eights of elements")
    left = size % eight
    in_blocks = size - left
    first = start // block_bytes
    to_come, until = in_blocks - first * block_bytes, 0
    if stop < in_blocks:
        until = max(in_blocks - -(-stop // block_bytes) * block_bytes, 0)
    parts: list[Any] = []
    at, plain, unpack = 12, block_bytes, _LENGTH.unpack_from
    try:
        if first:
            at = _skipped(view, at, first)
        while to_come > until:
            if to_come < plain:
                plain = to_come
            to_come -= plain
            begin = at + 4
            at = begin + unpack(view, at)[0]
            if at > end:
                break
            block = view[begin:at]
            stored = raw_if_full and at - begin == plain
            parts.append(block if stored else _decode_block(block, plain, "a block"))
        if until:
            at = _skipped(view, at, -(-until // block_bytes))
    except struct.error as error:
        raise DecodeError("the blob ends before its last block") from error
    if end - at != left:
        raise DecodeError(f"the blob ends with {end - at} bytes where {left} were left to come")
    if left and stop > in_blocks:
        parts.append(view[at:])
    return parts, first * block_bytes, block_bytes


def _skipped(view: memoryview, at: int, count: int) -> int:
    """Where ``count`` blocks from ``at`` on end; may lie beyond the end of ``view``."""
    unpack = _LENGTH.unpack_from
    for _ in repeat(None, count):
        at += 4 + unpack(view, at)[0]
    return at


def _encode_hdf5(plain: bytes) -> bytes:
    parts = [_HEADER.pack(len(plain), DEFAULT_BLOCK_BYTES)]
    for start in range(0, len(plain), DEFAULT_BLOCK_BYTES):
        piece = plain[start : start + DEFAULT_BLOCK_BYTES]
        packed: bytes = _lz4_compress(piece, store_size=False)
        packed = packed if len(packed) < len(piece) else piece
        parts += [_LENGTH.pack(len(packed)), packed]
    return b"".join(parts)
