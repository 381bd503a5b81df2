"""Stitching: sums on tiles, whose order, batching and tile size do not matter."""

import numpy as np
import pytest
import torch

from ptycho_stream.reconstruct.canvas import Canvas, half_of
from ptycho_stream.reconstruct.device_canvas import DeviceCanvas, canvas_on
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
    tiles = {key: Tile(1, *canvas.object_tile(key)) for key in canvas.versions}
    return stitch(tiles, canvas.tile_px)


def on_torch(tile_px):
    """The canvas of a GPU, on the CPU."""
    return DeviceCanvas(tile_px, torch.device("cpu"))


both = pytest.mark.parametrize("make", [Canvas, on_torch])


def assert_same_sums(canvas, other):
    assert canvas.versions == other.versions
    for index in other.versions:
        sums, wanted = canvas.sums(index), other.sums(index)
        np.testing.assert_allclose(sums.numerator, wanted.numerator, atol=1e-4)
        np.testing.assert_allclose(sums.denominator, wanted.denominator, rtol=1e-5)


def plain_sum(patches, weights, corner):
    low = corner.min(0)
    shape = tuple(corner.max(0) - low + patches.shape[-1])
    numerator, denominator = np.zeros(shape, complex), np.zeros(shape)
    for patch, weight, (y, x) in zip(patches, weights, corner - low, strict=True):
        n = patch.shape[-1]
        numerator[y : y + n, x : x + n] += patch * weight
        denominator[y : y + n, x : x + n] += weight
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1e-30), np.nan), low


@both
@pytest.mark.parametrize("tile_px", [32, 50, 128])
def test_canvas_equals_a_plain_weighted_mean(make, tile_px):
    patches, weights, corner, half = random_patches()
    canvas = make(tile_px)
    canvas.add(patches, weights, corner, half)
    obj, weight, origin = stitched(canvas)
    expected, low = plain_sum(patches, weights, corner)
    assert origin == tuple(low)
    assert np.array_equal(np.isnan(obj), np.isnan(expected))
    assert np.array_equal(weight > 0, ~np.isnan(expected))
    assert np.allclose(np.nan_to_num(obj), np.nan_to_num(expected), rtol=1e-4, atol=1e-4)


@both
def test_order_and_batching_change_nothing_beyond_rounding(make):
    patches, weights, corner, half = random_patches()
    whole, parts = make(64), make(64)
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


@both
def test_only_touched_tiles_get_a_new_version(make):
    canvas = make(32)
    one = np.ones((1, 32, 32))
    for x in (0, 320):
        canvas.add(
            one.astype(np.complex64), one.astype(np.float32), np.array([[0, x]]), np.array([0])
        )
    before = dict(canvas.versions)
    canvas.add(one.astype(np.complex64), one.astype(np.float32), np.array([[0, 0]]), np.array([1]))
    assert {key for key in before if canvas.versions[key] != before[key]} == {(0, 0)}


@both
def test_a_saved_canvas_goes_on_as_if_nothing_had_happened(make):
    patches, weights, corner, half = random_patches()
    through = make(64)
    through.add(patches, weights, corner, half)
    first = make(64)
    first.add(patches[:30], weights[:30], corner[:30], half[:30])
    again = make(64)
    again.restore(first.state())
    again.add(patches[30:], weights[30:], corner[30:], half[30:])
    assert np.array_equal(stitched(again)[0], stitched(through)[0], equal_nan=True)
    assert again.versions == through.versions


@both
def test_the_canvases_of_workers_add(make):
    patches, weights, corner, half = random_patches()
    whole, parts = make(32), [make(32), make(32)]
    whole.add(patches, weights, corner, half)
    for part, rows in zip(parts, (slice(0, 20), slice(20, None)), strict=True):
        part.add(patches[rows], weights[rows], corner[rows], half[rows])
    parts[0].merge(parts[1])
    assert_same_sums(parts[0], whole)


def test_the_canvas_of_a_gpu_is_that_of_the_host():
    """With tiles far apart, and more of them than the device's array begins with."""
    patches, weights, corner, half = random_patches(count=200, spread=300)
    corner[-1] = 10**9, -(10**9)
    host, device = Canvas(50), on_torch(50)
    host.add(patches, weights, corner, half)
    for rows in np.array_split(np.arange(len(patches)), 5):
        one = torch.from_numpy(patches[rows]), torch.from_numpy(weights[rows])
        device.add(*one, corner[rows], half[rows])
    assert_same_sums(device, host)
    mixed = Canvas(50)
    mixed.add(
        torch.from_numpy(patches[:100]),
        torch.from_numpy(weights[:100]),
        *(part[:100] for part in (corner, half)),
    )
    rest = on_torch(50)
    rest.add(patches[100:], weights[100:], corner[100:], half[100:])
    mixed.merge(rest)
    assert_same_sums(mixed, host)


def test_the_canvas_is_where_patches_are_made():
    assert type(canvas_on("cpu", 64)) is Canvas
    assert type(canvas_on("meta", 64)) is DeviceCanvas
