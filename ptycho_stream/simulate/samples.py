"""Random synthetic samples: complex transmissions with edges, shapes, gratings and textures.

The families are chosen so that a network trained on them meets sharp and soft edges, flat areas,
fine and coarse structure, and phase with or without matching absorption. Used by the scan
simulator and, through it, by training.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]
Shape = tuple[int, int]
Grid = tuple[Field, Field]


def random_sample(rng: np.random.Generator, shape_yx_px: Shape) -> NDArray[np.complex64]:
    """Draw one sample from all families.

    Args:
        rng: the only source of randomness.
        shape_yx_px: rows and columns.

    Returns:
        complex64 transmission, |T| in [0.4, 1]; the phase spans 0.2 to 3.2 rad.
    """
    phase = random_field(rng, shape_yx_px)
    kind = rng.random()
    if kind < 0.5:
        density = phase
    elif kind < 0.75:
        density = random_field(rng, shape_yx_px)
    else:
        density = 0.5 * (phase + random_field(rng, shape_yx_px))
    # Most hard X-ray samples are weak phase objects; a fifth is strong, to pi/2 and beyond.
    depth = rng.uniform(1.6, 3.2) if rng.random() < 0.2 else rng.uniform(0.2, 1.8)
    absorption = rng.uniform(0.3, 0.9) if rng.random() < 0.15 else rng.uniform(0.0, 0.3)
    sign = 1.0 if rng.random() < 0.5 else -1.0
    exponent = -absorption * density + 1j * np.float32(sign * depth) * (phase - phase.mean())
    return np.exp(exponent).astype(np.complex64)


def showcase_sample(rng: np.random.Generator, shape_yx_px: Shape) -> NDArray[np.complex64]:
    """A resolution target among grains: something to look at, with detail at every scale.

    Args:
        rng: the only source of randomness.
        shape_yx_px: rows and columns.

    Returns:
        complex64 transmission; phase about 1 rad, absorption to 20 per cent.
    """
    grid = _grid(shape_yx_px)
    grains = _leaves(rng, grid, number=260, opaque=True)
    target = _star(rng, grid, off_centre=0.0)
    radius = np.float32(0.36 * min(shape_yx_px))
    disc = _inside(np.hypot(*grid) - radius, 1.5)
    density = (disc * target + (1 - disc) * grains).astype(np.float32)
    return np.exp((-0.2 + 1j) * density).astype(np.complex64)


def random_field(rng: np.random.Generator, shape_yx_px: Shape) -> Field:
    """Draw one projected-density map with values in [0, 1], float32, from a random family."""
    families: tuple[Callable[[np.random.Generator, Grid], Field], ...] = (
        _bars,
        _star,
        _leaves,
        _leaves,
        _edges,
        _noise,
        _cells,
    )
    grid = _grid(shape_yx_px)
    field = families[rng.integers(len(families))](rng, grid)
    if rng.random() < 0.35:
        other = families[rng.integers(len(families))](rng, grid)
        share = np.float32(rng.uniform(0.1, 0.5))
        field = (1 - share) * field + share * other
    low, high = float(field.min()), float(field.max())
    return ((field - low) / max(high - low, 1e-6)).astype(np.float32)


def _grid(shape_yx_px: Shape) -> Grid:
    rows, columns = shape_yx_px
    y, x = np.ogrid[:rows, :columns]
    return (y - (rows - 1) / 2).astype(np.float32), (x - (columns - 1) / 2).astype(np.float32)


def _inside(distance_px: Field, width_px: float) -> Field:
    """1 where the signed distance is negative, 0 where positive, linear over the edge's width."""
    return np.clip(0.5 - distance_px / np.float32(width_px), 0, 1)


def _edge_width_px(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.8, 2.0) if rng.random() < 0.7 else rng.uniform(2.0, 6.0))


def _rotated(rng: np.random.Generator, grid: Grid) -> tuple[Field, Field]:
    y, x = grid
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * y - s * x, s * y + c * x


def _bars(rng: np.random.Generator, grid: Grid) -> Field:
    """Gratings of a random pitch in a few tilted rectangles, on nothing or on each other."""
    out = np.zeros(np.broadcast_shapes(grid[0].shape, grid[1].shape), np.float32)
    reach = 0.5 * max(out.shape)
    for _ in range(rng.integers(1, 7)):
        u, v = _rotated(rng, grid)
        pitch = np.float32(rng.uniform(4, 40))
        duty = rng.uniform(0.3, 0.7)
        wave = np.abs((u / pitch + rng.random()) % 1 - 0.5) - 0.5 * duty
        lines = _inside(wave * pitch, _edge_width_px(rng))
        half = rng.uniform(0.15, 1.0, 2) * reach
        centre = rng.uniform(-0.7, 0.7, 2) * reach
        box = np.maximum(np.abs(u - centre[0]) - half[0], np.abs(v - centre[1]) - half[1])
        area = _inside(box.astype(np.float32), _edge_width_px(rng))
        out = out * (1 - area) + lines * area * np.float32(rng.uniform(0.4, 1))
    return out


def _star(rng: np.random.Generator, grid: Grid, off_centre: float = 0.3) -> Field:
    """Radial spokes, rings and a hub: a resolution target."""
    centre = rng.uniform(-off_centre, off_centre, 2) * max(grid[0].size, grid[1].size)
    y, x = grid[0] - np.float32(centre[0]), grid[1] - np.float32(centre[1])
    radius = np.hypot(y, x)
    spokes = int(rng.integers(6, 48))
    turn = np.arctan2(y, x) * spokes / (2 * np.pi) + rng.random()
    arc = (np.abs(turn % 1 - 0.5) - 0.25) * radius * np.float32(2 * np.pi / spokes)
    out = _inside(arc, _edge_width_px(rng))
    hub_px, reach_px = rng.uniform(2, 30), 0.7 * grid[0].size
    out = np.where(radius < np.float32(hub_px), np.float32(rng.integers(2)), out)
    for _ in range(rng.integers(0, 5)):
        ring = np.abs(radius - np.float32(rng.uniform(hub_px, reach_px)))
        gap = _inside(ring - np.float32(rng.uniform(0.7, 6)), _edge_width_px(rng))
        out = out * (1 - gap) + np.float32(rng.integers(2)) * gap
    return out.astype(np.float32)


def _leaves(
    rng: np.random.Generator, grid: Grid, number: int | None = None, opaque: bool | None = None
) -> Field:
    """Dead leaves: ellipses, rectangles and polygons that hide or overlap one another."""
    rows, columns = grid[0].size, grid[1].size
    out = np.full((rows, columns), rng.random(), np.float32)
    if opaque is None:
        opaque = rng.random() < 0.6
    if not opaque:
        out[:] = 0
    smallest = rng.uniform(2, 10)
    for _ in range(number or int(rng.integers(20, 120))):
        # Power law of sizes: the scale-invariant statistics of natural images.
        size = float(min(smallest / max(rng.random(), 1e-3) ** 0.7, 0.3 * rows))
        cy, cx = rng.uniform(0, rows), rng.uniform(0, columns)
        margin = 1.5 * size + 4
        top, bottom = int(max(cy - margin, 0)), int(min(cy + margin, rows))
        left, right = int(max(cx - margin, 0)), int(min(cx + margin, columns))
        y = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(cy)
        x = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(cx)
        area = _inside(_leaf_distance(rng, (y, x), size), _edge_width_px(rng))
        view = out[top:bottom, left:right]
        if opaque:
            view += (np.float32(rng.random()) - view) * area
        else:
            view += np.float32(rng.uniform(0.2, 1)) * area
    return out


def _leaf_distance(rng: np.random.Generator, grid: Grid, size_px: float) -> Field:
    u, v = _rotated(rng, grid)
    aspect = np.float32(rng.uniform(0.3, 1))
    kind = rng.integers(3)
    if kind == 0:
        return ((np.hypot(u, v / aspect) - size_px) * aspect).astype(np.float32)
    if kind == 1:
        return np.maximum(np.abs(u) - size_px, np.abs(v) - aspect * size_px).astype(np.float32)
    distance = np.full(np.broadcast_shapes(u.shape, v.shape), -np.inf, np.float32)
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
    for angle in angles:
        side = np.cos(angle) * u + np.sin(angle) * v - size_px * rng.uniform(0.4, 0.9)
        distance = np.maximum(distance, side.astype(np.float32))
    # A few random half planes need not close; the circle keeps the leaf inside its box.
    return np.maximum(distance, (np.hypot(u, v) - size_px).astype(np.float32))


def _edges(rng: np.random.Generator, grid: Grid) -> Field:
    """A few half planes and wide strips of different densities: mostly flat areas."""
    out = np.zeros(np.broadcast_shapes(grid[0].shape, grid[1].shape), np.float32)
    for _ in range(rng.integers(1, 9)):
        u, _ = _rotated(rng, grid)
        offset = np.float32(rng.uniform(-0.4, 0.4) * max(out.shape))
        distance = u - offset
        if rng.random() < 0.6:
            distance = np.abs(distance) - np.float32(rng.uniform(1, 30))
        out += np.float32(rng.uniform(-1, 1)) * _inside(distance, _edge_width_px(rng))
    return out


def _noise(rng: np.random.Generator, grid: Grid) -> Field:
    """Gaussian noise with a power-law spectrum and a soft cut-off, clipped at 2.5 sigma."""
    shape = (grid[0].size, grid[1].size)
    fy = np.fft.fftfreq(shape[0]).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(shape[1]).astype(np.float32)[None, :]
    k = np.hypot(fy, fx)
    slope, cut = rng.uniform(1.0, 2.2), rng.uniform(0.08, 0.5)
    envelope = (k + np.float32(0.01)) ** -slope * np.exp(-((k / cut) ** 4))
    spectrum = np.fft.rfft2(rng.standard_normal(shape, np.float32)) * envelope
    field = np.fft.irfft2(spectrum, shape)
    field = (field - field.mean()) / max(float(field.std()), 1e-12)
    return np.clip(field, -2.5, 2.5).astype(np.float32)


def _cells(rng: np.random.Generator, grid: Grid) -> Field:
    """Noise cut at one or two levels: grains, pores, labyrinths, with sharp borders."""
    field = _noise(rng, grid)
    out = np.zeros_like(field)
    for _ in range(rng.integers(1, 3)):
        level, steepness = rng.uniform(-1, 1), rng.uniform(2, 15)
        out += (0.5 + 0.5 * np.tanh(steepness * (field - level))).astype(np.float32)
    return out
