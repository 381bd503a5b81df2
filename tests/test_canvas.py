"""Stitching: sums on tiles, whose order, batching and tile size do not matter."""

import numpy as np
import pytest

from ptycho_stream.reconstruct.canvas import Canvas, half_of
from ptycho_stream.results import Tile, stitch


def random_patches(count=60, size=32, seed=0, spread=90):
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(count, size, size)) + 1j * rng.normal(size=(count, size, size))
    weights = rng.random((count, size, size)) + 0.01
    corner = rng.integers(-spread, spread, (count, 2))
    return (
        patches.astype(np.complex64),
        weights.astype(np.float32),
        corner,
        half_of(np.arange(count)),
    )


def stitched(canvas):
    tiles = {key: Tile(1, *canvas.object_tile(key)) for key in canvas.tiles}
    return stitch(tiles, canvas.tile_px)


def plain_sum(patches, weights, corner):
    low = corner.min(0)
    shape = tuple(corner.max(0) - low + patches.shape[-1])
    numerator, denominator = np.zeros(shape, complex), np.zeros(shape)
    for patch, weight, (y, x) in zip(patches, weights, corner - low, strict=True):
        n = patch.shape[-1]
        numerator[y : y + n, x : x + n] += patch * weight
        denominator[y : y + n, x : x + n] += weight
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1e-30), np.nan), low


@pytest.mark.parametrize("tile_px", [32, 50, 128])
def test_canvas_equals_a_plain_weighted_mean(tile_px):
    patches, weights, corner, half = random_patches()
    canvas = Canvas(tile_px)
    canvas.add(patches, weights, corner, half)
    obj, weight, origin = stitched(canvas)
    expected, low = plain_sum(patches, weights, corner)
    assert origin == tuple(low)
    assert np.array_equal(np.isnan(obj), np.isnan(expected))
    assert np.array_equal(weight > 0, ~np.isnan(expected))
    assert np.allclose(np.nan_to_num(obj), np.nan_to_num(expected), rtol=1e-4, atol=1e-4)


def test_order_and_batching_change_nothing_beyond_rounding():
    patches, weights, corner, half = random_patches()
    whole, parts = Canvas(64), Canvas(64)
    whole.add(patches, weights, corner, half)
    order = np.random.default_rng(1).permutation(len(patches))
    for some in np.array_split(order, 7):
        parts.add(patches[some], weights[some], corner[some], half[some])
    assert np.allclose(
        np.nan_to_num(stitched(whole)[0]), np.nan_to_num(stitched(parts)[0]), atol=1e-5
    )


def test_halves_add_up_and_are_balanced():
    numbers = np.arange(10_000)
    half = half_of(numbers)
    assert 0.48 < half.mean() < 0.52
    assert 0.45 < half[::2].mean() < 0.55
    assert np.array_equal(half, half_of(numbers[::-1])[::-1])


def test_only_touched_tiles_get_a_new_version():
    canvas = Canvas(32)
    one = np.ones((1, 32, 32))
    for x in (0, 320):
        canvas.add(
            one.astype(np.complex64), one.astype(np.float32), np.array([[0, x]]), np.array([0])
        )
    before = {key: tile.version for key, tile in canvas.tiles.items()}
    canvas.add(one.astype(np.complex64), one.astype(np.float32), np.array([[0, 0]]), np.array([1]))
    changed = {key for key, tile in canvas.tiles.items() if tile.version != before.get(key)}
    assert changed == {(0, 0)}


def test_a_saved_canvas_goes_on_as_if_nothing_had_happened():
    patches, weights, corner, half = random_patches()
    through = Canvas(64)
    through.add(patches, weights, corner, half)
    first = Canvas(64)
    first.add(patches[:30], weights[:30], corner[:30], half[:30])
    again = Canvas.from_state(first.state(), 64)
    again.add(patches[30:], weights[30:], corner[30:], half[30:])
    assert np.array_equal(stitched(again)[0], stitched(through)[0], equal_nan=True)
    assert {k: t.version for k, t in again.tiles.items()} == {
        k: t.version for k, t in through.tiles.items()
    }


def test_the_canvases_of_workers_add():
    patches, weights, corner, half = random_patches()
    whole, parts = Canvas(32), [Canvas(32), Canvas(32)]
    whole.add(patches, weights, corner, half)
    for part, rows in zip(parts, (slice(0, 20), slice(20, None)), strict=True):
        part.add(patches[rows], weights[rows], corner[rows], half[rows])
    parts[0].merge(parts[1])
    assert parts[0].tiles.keys() == whole.tiles.keys()
    for index, tile in whole.tiles.items():
        np.testing.assert_allclose(parts[0].tiles[index].numerator, tile.numerator, atol=1e-4)
        np.testing.assert_allclose(parts[0].tiles[index].denominator, tile.denominator, rtol=1e-5)
        assert parts[0].tiles[index].version == tile.version
