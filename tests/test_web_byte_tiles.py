"""Tiles as bytes: what a page makes of them is what they were, within a step of their range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_streamd.web.byte_tiles import (
    STEPS,
    ByteTile,
    encoded,
    phase_about,
    quantised,
    settled,
)

SIDE = 16


def noise(seed: int, scale: float = 1.0, middle: float = 0.0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(middle, scale, (SIDE, SIDE)).astype(np.float32)
    values[:2, :3] = np.nan
    return values


def decoded(difference: bool, steps: bytes, former: ByteTile | None) -> np.ndarray:
    """As the page does it (wire.js)."""
    table = np.frombuffer(steps, np.uint8).reshape(SIDE, SIDE)
    if difference:
        assert former is not None
        return former.levels + table
    levels = np.zeros((SIDE, SIDE), np.uint8)
    for y, x in np.ndindex(SIDE, SIDE):
        before = levels[y, x - 1] if x else levels[y - 1, 0] if y else np.uint8(0)
        levels[y, x] = (int(before) + int(table[y, x])) % 256
    return levels


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    scale=st.floats(1e-6, 1e6),
    middle=st.floats(-1e3, 1e3),
)
def test_values_come_back_within_half_a_step(seed, scale, middle):
    values = noise(seed, scale, middle)
    tile = quantised(values)
    back = tile.values
    np.testing.assert_array_equal(np.isnan(back), np.isnan(values))
    inside = np.isfinite(values) & (values >= tile.low) & (values <= tile.high)
    assert inside.sum() >= 0.99 * np.isfinite(values).sum()
    half = 0.51 * (tile.high - tile.low) / STEPS + 1e-6 * (abs(middle) + scale)
    assert np.abs(back - values)[inside].max() <= half
    outside = np.isfinite(values) & ~inside
    assert np.isin(tile.levels[outside], (1, 255)).all(), "what lies beyond is at the end"


def test_a_tile_that_changes_a_little_keeps_its_range():
    first = quantised(noise(1))
    values = noise(1) + 0.01
    second = quantised(values, first)
    assert (second.low, second.high) == (first.low, first.high)
    grown = quantised(3 * noise(1), first)
    assert grown.low < first.low and grown.high > first.high
    faint = quantised(0.05 * noise(1), first)
    assert faint.high - faint.low < 0.2 * (first.high - first.low)


@pytest.mark.parametrize("value", [0.0, 1.0, -273.0, 1e-12])
def test_a_flat_tile_has_a_range_all_the_same(value):
    tile = quantised(np.full((SIDE, SIDE), value, np.float32))
    assert tile.low < value < tile.high
    assert np.abs(tile.values - value).max() <= (tile.high - tile.low) / STEPS


def test_a_tile_that_was_never_seen_is_all_zero():
    tile = quantised(np.full((SIDE, SIDE), np.nan, np.float32))
    assert not tile.levels.any() and tile.low < tile.high
    assert quantised(noise(2), tile).levels.any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), other=st.integers(0, 99), same_range=st.booleans())
def test_what_is_sent_is_what_the_page_has_then(seed, other, same_range):
    sent = quantised(noise(seed))
    new = quantised(noise(other), sent if same_range else None)
    difference, steps = encoded(new, sent)
    assert difference == ((new.low, new.high) == (sent.low, sent.high))
    np.testing.assert_array_equal(decoded(difference, steps, sent), new.levels)
    whole, steps = encoded(new, None)
    assert not whole
    np.testing.assert_array_equal(decoded(whole, steps, None), new.levels)


def test_steps_of_one_are_not_made_but_never_add_up():
    levels = np.full((SIDE, SIDE), 100, np.uint8)
    sent = ByteTile(0.0, 1.0, levels)
    for wanted in range(101, 140):
        new = ByteTile(0.0, 1.0, np.full_like(levels, wanted))
        sent = settled(new, sent)
        assert np.abs(sent.levels.astype(int) - wanted).max() <= 1
    unseen = ByteTile(0.0, 1.0, np.zeros_like(levels))
    assert not settled(unseen, ByteTile(0.0, 1.0, np.ones_like(levels))).levels.any()
    assert settled(ByteTile(0.0, 2.0, levels + 1), ByteTile(0.0, 1.0, levels)).levels[0, 0] == 101


def test_phases_do_not_wrap_where_they_need_not():
    angles = np.pi + np.linspace(-0.4, 0.4, SIDE**2).reshape(SIDE, SIDE)
    object_yx = np.exp(1j * angles).astype(np.complex64)
    object_yx[0, 0] = np.nan
    found = phase_about(object_yx, None)
    assert np.nanmax(found) - np.nanmin(found) < 0.85
    np.testing.assert_allclose(np.exp(1j * found)[1:], object_yx[1:], atol=1e-5)
    # A tile stays in the branch in which it was.
    assert abs(np.nanmean(phase_about(object_yx, 3 * np.pi)) - 3 * np.pi) < 0.1
    assert np.isnan(phase_about(np.full((2, 2), np.nan, np.complex64), None)).all()
