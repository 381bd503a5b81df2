"""The bounded CBOR reader: it reads what another library writes, and nothing makes it allocate."""

from __future__ import annotations

import math
import struct
import tracemalloc

import cbor2
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from ptycho_stream.errors import LimitExceeded, MalformedMessage, WireError
from ptycho_stream.wire.cbor import MAX_DEPTH, Tag, read_cbor

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300)
)
ITEMS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=30),
    max_leaves=40,
)


def read(data: bytes, max_items: int = 10_000, max_text_bytes: int = 1 << 20):
    return read_cbor(data, max_items, max_text_bytes)


@settings(max_examples=300, deadline=None)
@given(item=ITEMS)
def test_what_another_library_writes_is_read(item) -> None:
    try:
        assert read(cbor2.dumps(item)) == item
    except LimitExceeded:
        reject()  # nested too deeply


@pytest.mark.parametrize(
    ("data", "item"),
    [
        (bytes.fromhex("9f018202039f0405ffff"), [1, [2, 3], [4, 5]]),
        (bytes.fromhex("bf61610161629f0203ffff"), {"a": 1, "b": [2, 3]}),
        (bytes.fromhex("5f42010243030405ff"), b"\1\2\3\4\5"),
        (bytes.fromhex("7f657374726561646d696e67ff"), "streaming"),
        (bytes.fromhex("9fff"), []),
        (bytes.fromhex("5fff"), b""),
        (bytes.fromhex("f93c00"), 1.0),
        (bytes.fromhex("f97c00"), math.inf),
        (bytes.fromhex("fa47c35000"), 100000.0),
        (bytes.fromhex("f7"), None),
        (bytes.fromhex("3bffffffffffffffff"), -(2**64)),
        (bytes.fromhex("c11a514b67b0"), Tag(1, 1363896240)),
        (bytes.fromhex("d9d9f7d82801"), Tag(55799, Tag(40, 1))),
        (bytes.fromhex("a201020304"), {"1": 2, "3": 4}),
        (bytes.fromhex("a261610161610 2".replace(" ", "")), {"a": 2}),
    ],
)
def test_items_of_rfc_8949_are_read(data: bytes, item: object) -> None:
    for form in (data, bytearray(data), memoryview(data)):
        assert read(form) == item


def test_byte_strings_are_views_of_the_message() -> None:
    data = cbor2.dumps({"blob": bytes(1000), "b": 1})
    blob = read(data)["blob"]
    assert isinstance(blob, memoryview)
    assert blob.obj is data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x82\x01",
        b"\x18",
        b"\x19\x01",
        b"\x1b" + bytes(7),
        b"\x43ab",
        b"\x63ab",
        b"\x5b" + (2**60).to_bytes(8, "big") + b"ab",
        b"\x58\xff",
        b"\xfb\0",
        b"\xc1",
        b"\xa1\x01",
        b"\x9f\x01",
        b"\xbf\x61a\x01",
        b"\x7f\x61a",
        b"\xff",
        b"\x82\xff\x01",
        b"\xa1\xff\x01",
        b"\xa1\x61a\xff",
        b"\xbf\x61a\xff",
        b"\xc1\xff",
        b"\x5f\x61a\xff",
        b"\x7f\x41a\xff",
        b"\x7f\x7f\x61a\xff\xff",
        b"\x1c",
        b"\x1f",
        b"\x3e",
        b"\xdf",
        b"\xfc",
        b"\xf8\x20",
        b"\xe0",
        b"\x62\xff\xfe",
        b"\xa1\x80\x01",
        b"\xa1\x41a\x01",
        b"\xa1\xc1\x01\x01",
        b"\xa1\xf6\x01",
        b"\x01\x02",
    ],
)
def test_damage_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\xbb" + (2**60).to_bytes(8, "big"),
        b"\x9b" + (2**60).to_bytes(8, "big"),
        b"\x9a" + (10_001).to_bytes(4, "big") + b"\x80" * 10_001,
        b"\x9f" + b"\x80" * 10_001 + b"\xff",
        b"\xbf" + b"\x61a\x00" * 5_001 + b"\xff",
        b"\x7f" + b"\x60" * 10_001 + b"\xff",
        b"\x84" + b"\x99\x0d\x00" + b"\x00" * 0xD00 * 4,
        b"\x81" * 100_000,
        b"\x9f" * 100_000,
        b"\xc6" * 100_000,
        b"\xa1\x00" * 100_000,
        b"\x7a" + (2**20 + 1).to_bytes(4, "big") + b"a" * (2**20 + 1),
        b"\x82" + (b"\x7a" + (2**19 + 1).to_bytes(4, "big") + b"a" * (2**19 + 1)) * 2,
    ],
)
def test_more_than_accepted_is_refused_before_it_is_made(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            read(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 << 20


def test_nesting_is_accepted_as_deep_as_it_is_said() -> None:
    deepest = b"\x81" * MAX_DEPTH + b"\x01"
    assert read(deepest)
    with pytest.raises(LimitExceeded, match="nested"):
        read(b"\x81" + deepest)


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read(data)
    except WireError:
        return


def test_half_floats_are_read_like_those_of_struct() -> None:
    for number in range(0, 2**16, 7):
        data = b"\xf9" + number.to_bytes(2, "big")
        expected = struct.unpack(">e", data[1:])[0]
        assert read(data) == expected or math.isnan(expected)
