"""Mutated messages for every codec, a few thousand each; ``make fuzz`` sends a million."""

from __future__ import annotations

import tracemalloc

import pytest
from fuzz import run_chunk
from fuzz_codecs import (
    FRAME_SEEDS,
    POSITION_SOURCES,
    Codec,
    all_codecs,
    dialects,
    position_streams,
)

CODECS = all_codecs()


def test_every_dialect_of_the_settings_is_fuzzed() -> None:
    assert set(dialects()) <= set(FRAME_SEEDS)
    assert set(position_streams()) <= set(POSITION_SOURCES)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_mutated_messages_raise_nothing(codec: Codec) -> None:
    for seed in range(2):
        run_chunk(codec, seed)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_mutated_messages_take_bounded_memory(codec: Codec) -> None:
    tracemalloc.start()
    try:
        run_chunk(codec, 1000, 300)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200e6
