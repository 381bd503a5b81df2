"""Smaller pictures are the means of what was seen, wherever the window lies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.bins import bin_means, binned_window

CORNER = st.tuples(st.integers(-9, 9), st.integers(-9, 9))


def naive(values, corner, window, shape, bin_px):
    """By going through the canvas pixel by pixel."""
    step = max(1, bin_px // 4)
    out = np.full(shape, np.nan, values.dtype)
    for i, j in np.ndindex(*shape):
        seen = []
        for y in range(window[0] + i * bin_px, window[0] + (i + 1) * bin_px, step):
            for x in range(window[1] + j * bin_px, window[1] + (j + 1) * bin_px, step):
                at = y - corner[0], x - corner[1]
                if 0 <= at[0] < values.shape[0] and 0 <= at[1] < values.shape[1]:
                    seen.append(values[at])
        seen = [value for value in seen if np.isfinite(value)]
        if seen:
            out[i, j] = np.mean(seen)
    return out


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    corner=CORNER,
    window=CORNER,
    wanted=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    level=st.integers(0, 4),
    is_complex=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_window_holds_the_means_of_what_was_seen(
    shape, corner, window, wanted, level, is_complex, seed
):
    random = np.random.default_rng(seed)
    values = random.normal(size=shape).astype(np.complex64 if is_complex else np.float32)
    values[random.random(shape) < 0.3] = np.nan
    bin_px = 2**level
    window = tuple(bin_px * (at // bin_px) for at in window)
    found = binned_window(values, corner, window, wanted, bin_px)
    assert found.dtype == values.dtype
    np.testing.assert_allclose(found, naive(values, corner, window, wanted, bin_px), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.complex64, np.float32])
def test_bins_without_a_pixel_are_unseen(dtype):
    values = np.full((8, 8), np.nan, dtype)
    values[0, 0], values[1, 1] = 2, 4
    means = bin_means(values, 4)
    assert means.shape == (2, 2) and means[0, 0] == 3
    assert np.isnan(means).sum() == 3
