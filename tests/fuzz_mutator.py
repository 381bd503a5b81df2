"""Messages made worse: structure-aware mutations of the parts of a message, from a seed.

Used by ``fuzz.py`` and ``test_fuzz.py``; knows what binary and text formats fear (lengths, numbers,
nesting, torn ends, parts that are missing or of another message), and no dialect in particular.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

Parts = list[bytes]

NUMBERS = tuple(
    text.encode()
    for text in (
        *("0", "-1", "1", "255", "256", "65536", "-0.0", "1e308", "1e999", "NaN", "null", "true"),
        *(str(2**n) for n in (31, 32, 40, 62, 63, 64, 70)),
        *("-9223372036854775809", "[]", "{}", '""', '"\\u0000"', "[1,[2,[3]]]", "9" * 400),
    )
)
TOKENS = (
    *(b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1", b"\xc0"),
    *(b"\xcf" + b"\xff" * 8, b"\xcb\x7f\xf8" + bytes(6), b"\xd3\x80" + bytes(7)),  # msgpack
    *(b"\x9b" + b"\xff" * 8, b"\xbb" + b"\xff" * 8, b"\x5f", b"\x9f", b"\xff", b"\xf6"),  # CBOR
    *(b"\xd9\xd9\xf7", b"\xd8\x28", b"\xd8\x45", b"\xd9\xdc\xb4", b"\x1b" + b"\xff" * 8),
    *(b"\x00" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00"),
)
NESTS = (b"[", b'{"a":', b"\x91", b"\x81\xa1a", b"\x9f", b"\xa1\x61a", b"\x81")
_DIGITS = re.compile(rb"-?\d+(?:\.\d+)?")


def mutated(seeds: Sequence[Parts], rng: random.Random, max_part_bytes: int = 1 << 16) -> Parts:
    """A message of ``seeds`` after one to four mutations; parts are cut at ``max_part_bytes``."""
    parts = list(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if parts and rng.random() < 0.85:
            at = rng.randrange(len(parts))
            change = rng.choice(_OF_A_PART)
            parts[at] = change(parts[at], rng)[:max_part_bytes]
        else:
            parts = rng.choice(_OF_THE_WHOLE)(parts, seeds, rng)
    return parts


def _flip(part: bytes, rng: random.Random) -> bytes:
    if not part:
        return b"\x00"
    data = bytearray(part)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def _overwrite(part: bytes, rng: random.Random) -> bytes:
    token = rng.choice(TOKENS)
    at = rng.randrange(len(part) + 1)
    return part[:at] + token + part[at + len(token) :]


def _insert(part: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(part) + 1)
    new = rng.choice(TOKENS) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 9))
    return part[:at] + new + part[at:]


def _cut(part: bytes, rng: random.Random) -> bytes:
    a, b = sorted((rng.randrange(len(part) + 1), rng.randrange(len(part) + 1)))
    return part[:a] + part[b:] if rng.random() < 0.5 else part[:a]


def _repeat(part: bytes, rng: random.Random) -> bytes:
    a, b = sorted((rng.randrange(len(part) + 1), rng.randrange(len(part) + 1)))
    return part[:b] + part[a:b] * rng.choice((1, 2, 50)) + part[b:]


def _number(part: bytes, rng: random.Random) -> bytes:
    found = list(_DIGITS.finditer(part[:4096]))
    if not found:
        return _overwrite(part, rng)
    place = rng.choice(found)
    return part[: place.start()] + rng.choice(NUMBERS) + part[place.end() :]


def _nest(part: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(part) + 1)
    return part[:at] + rng.choice(NESTS) * rng.choice((2, 9, 65, 1025, 20_000)) + part[at:]


def _random(part: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(64))


_OF_A_PART: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _flip, _overwrite, _overwrite, _insert, _cut, _cut, _repeat),
    *(_number, _number, _number, _nest, _random),
)


def _drop(parts: Parts, seeds: Sequence[Parts], rng: random.Random) -> Parts:
    at = rng.randrange(len(parts) + 1)
    return parts[:at] + parts[at + 1 :]


def _double(parts: Parts, seeds: Sequence[Parts], rng: random.Random) -> Parts:
    at = rng.randrange(len(parts) + 1)
    return parts[:at] + parts[max(at - 1, 0) : at] + parts[at:]


def _foreign(parts: Parts, seeds: Sequence[Parts], rng: random.Random) -> Parts:
    at, other = rng.randrange(len(parts) + 1), rng.choice(seeds)
    return parts[:at] + [rng.choice(other)] * bool(other) + parts[at + rng.randrange(2) :]


def _shuffle(parts: Parts, seeds: Sequence[Parts], rng: random.Random) -> Parts:
    return rng.sample(parts, len(parts))


_OF_THE_WHOLE = (_drop, _double, _foreign, _foreign, _shuffle)
