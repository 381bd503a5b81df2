"""Sample families with edges: gratings, spokes, dead leaves, polygons, half planes, circuits.

Each takes a generator and a grid and returns a field (h, w), float32, of any range. Registered in
:mod:`ptycho_stream.simulate.samples`.
"""

import numpy as np

from ptycho_stream.simulate.grid import (
    Field,
    Grid,
    edge_width_px,
    inside,
    radius_px,
    rotated,
    shape_of,
    window,
)


def bars(rng: np.random.Generator, grid: Grid) -> Field:
    """Gratings of a random pitch in a few tilted rectangles, on nothing or on each other."""
    out = np.zeros(shape_of(grid), np.float32)
    reach = 0.5 * max(out.shape)
    for _ in range(rng.integers(1, 7)):
        u, v = rotated(rng, grid)
        pitch = np.float32(rng.uniform(4, 40))
        duty = rng.uniform(0.3, 0.7)
        turn = u / pitch + np.float32(rng.random())
        turn -= np.floor(turn) + np.float32(0.5)
        wave = np.abs(turn, out=turn)
        wave -= np.float32(0.5 * duty)
        wave *= pitch
        lines = inside(wave, edge_width_px(rng))
        half = rng.uniform(0.15, 1.0, 2) * reach
        centre = rng.uniform(-0.7, 0.7, 2) * reach
        u -= np.float32(centre[0])
        v -= np.float32(centre[1])
        box = np.maximum(
            np.abs(u, out=u) - np.float32(half[0]), np.abs(v, out=v) - np.float32(half[1])
        )
        area = inside(box, edge_width_px(rng))
        lines *= np.float32(rng.uniform(0.4, 1))
        out += area * (lines - out)
    return out


def spokes(rng: np.random.Generator, grid: Grid, off_centre: float = 0.3) -> Field:
    """Radial spokes, rings and a hub: a resolution target."""
    centre = rng.uniform(-off_centre, off_centre, 2) * max(shape_of(grid))
    y, x = grid[0] - np.float32(centre[0]), grid[1] - np.float32(centre[1])
    radius = radius_px(y, x)
    number = int(rng.integers(6, 48))
    turn = np.arctan2(y, x) * np.float32(number / (2 * np.pi)) + np.float32(rng.random())
    turn -= np.floor(turn) + np.float32(0.5)
    arc = (np.abs(turn, out=turn) - np.float32(0.25)) * radius * np.float32(2 * np.pi / number)
    out = inside(arc, edge_width_px(rng))
    hub_px, reach_px = rng.uniform(2, 30), 0.7 * grid[0].size
    out = np.where(radius < np.float32(hub_px), np.float32(rng.integers(2)), out)
    for _ in range(rng.integers(0, 5)):
        ring = np.abs(radius - np.float32(rng.uniform(hub_px, reach_px)))
        gap = inside(ring - np.float32(rng.uniform(0.7, 6)), edge_width_px(rng))
        out = out * (1 - gap) + np.float32(rng.integers(2)) * gap
    return out.astype(np.float32)


def leaves(
    rng: np.random.Generator, grid: Grid, number: int | None = None, opaque: bool | None = None
) -> Field:
    """Dead leaves: ellipses, rectangles and polygons that hide or overlap one another."""
    rows, columns = shape_of(grid)
    out = np.full((rows, columns), rng.random(), np.float32)
    if opaque is None:
        opaque = rng.random() < 0.6
    if not opaque:
        out[:] = 0
    smallest = rng.uniform(2, 10)
    for _ in range(number or int(rng.integers(20, 120))):
        # Power law of sizes: the scale-invariant statistics of natural images.
        size = float(min(smallest / max(rng.random(), 1e-3) ** 0.7, 0.3 * rows))
        centre = (rng.uniform(0, rows), rng.uniform(0, columns))
        part, local = window(grid, centre, 1.5 * size + 4)
        area = inside(_leaf_distance(rng, local, size), edge_width_px(rng))
        _lay(out[part], area, rng, opaque)
    return out


def _lay(view: Field, area: Field, rng: np.random.Generator, opaque: bool) -> None:
    """Cover, or add to, the part ``view`` of a field."""
    if opaque:
        view += (np.float32(rng.random()) - view) * area
    else:
        view += np.float32(rng.uniform(0.2, 1)) * area


def _leaf_distance(rng: np.random.Generator, grid: Grid, size_px: float) -> Field:
    u, v = rotated(rng, grid)
    aspect = np.float32(rng.uniform(0.3, 1))
    kind = rng.integers(3)
    size = np.float32(size_px)
    if kind == 0:
        return (radius_px(u, v / aspect) - size) * aspect
    if kind == 1:
        return np.maximum(np.abs(u) - size, np.abs(v) - aspect * size)
    # A few random half planes need not close; the circle keeps the leaf inside its box.
    distance = radius_px(u, v) - size
    for angle in np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7))):
        side = np.float32(np.cos(angle)) * u + np.float32(np.sin(angle)) * v
        side -= np.float32(size_px * rng.uniform(0.4, 0.9))
        np.maximum(distance, side, out=distance)
    return distance


def polygons(rng: np.random.Generator, grid: Grid) -> Field:
    """Convex polygons of three to eight sides and of like sizes: crystals, flakes, particles."""
    rows, columns = shape_of(grid)
    opaque = bool(rng.random() < 0.5)
    out = np.zeros((rows, columns), np.float32)
    typical = rng.uniform(0.03, 0.2) * min(rows, columns)
    number = int(np.clip(rng.uniform(0.3, 1.5) * rows * columns / (3 * typical**2), 3, 150))
    for _ in range(number):
        size = float(typical * rng.uniform(0.5, 1.6))
        centre = (rng.uniform(0, rows), rng.uniform(0, columns))
        part, (y, x) = window(grid, centre, 2.1 * size + 4)
        sides = int(rng.integers(3, 9))
        # Sides at nearly even angles always close; none is further away than the size.
        angles = (np.arange(sides) + rng.uniform(-0.2, 0.2, sides) + rng.random()) / sides
        away = size * rng.uniform(0.6, 1.0, sides)
        distance = np.full(np.broadcast_shapes(y.shape, x.shape), -np.inf, np.float32)
        for angle, offset in zip(2 * np.pi * angles, away, strict=True):
            side = np.float32(np.cos(angle)) * y + np.float32(np.sin(angle)) * x
            np.maximum(distance, side - np.float32(offset), out=distance)
        # Triangles reach furthest; the circle keeps them inside their window.
        np.maximum(distance, radius_px(y, x) - np.float32(2 * size), out=distance)
        _lay(out[part], inside(distance, edge_width_px(rng)), rng, opaque)
    return out


def edges(rng: np.random.Generator, grid: Grid) -> Field:
    """A few half planes and wide strips of different densities: mostly flat areas."""
    out = np.zeros(shape_of(grid), np.float32)
    for _ in range(rng.integers(1, 9)):
        u, _ = rotated(rng, grid)
        u -= np.float32(rng.uniform(-0.4, 0.4) * max(out.shape))
        if rng.random() < 0.6:
            np.abs(u, out=u)
            u -= np.float32(rng.uniform(1, 30))
        out += np.float32(rng.uniform(-1, 1)) * inside(u, edge_width_px(rng))
    return out


def circuits(rng: np.random.Generator, grid: Grid) -> Field:
    """An integrated circuit: layers of wires that run across each other, with vias and pads."""
    shape = shape_of(grid)
    out = np.zeros(shape, np.float32)
    upright = bool(rng.integers(2))
    for _ in range(rng.integers(2, 5)):
        height, width = shape[::-1] if upright else shape
        layer = _wires(rng, height, width)
        out += np.float32(rng.uniform(0.3, 1)) * (layer.T if upright else layer)
        upright = not upright
    edge = float(rng.uniform(0.8, 1.6))
    side = float(rng.uniform(1.5, 5))
    for _ in range(rng.integers(10, 80)):
        half = side * (4.0 if rng.random() < 0.05 else 1.0)
        centre = (rng.uniform(0, shape[0]), rng.uniform(0, shape[1]))
        part, (y, x) = window(grid, centre, half + 4)
        via = inside(np.maximum(np.abs(y), np.abs(x)) - np.float32(half), edge)
        out[part] += np.float32(0.8) * via
    return out


def _wires(rng: np.random.Generator, height: int, width: int) -> Field:
    """Horizontal wires on evenly spaced tracks, each interrupted at random places.

    A track's profile across times its run along the wire: the layer is a product of two small
    matrices, which costs less than drawing the wires one by one.
    """
    pitch = rng.uniform(6, 24)
    half = np.float32(pitch * rng.uniform(0.2, 0.35))
    edge = float(rng.uniform(0.8, 1.6))
    tracks = np.arange(rng.uniform(0, pitch), height, pitch, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    profile = inside(np.abs(y - tracks) - half, edge)
    runs = 2 * int(rng.integers(1, max(width // 40, 1) + 2))
    cuts = np.sort(rng.uniform(-0.2 * width, 1.2 * width, (len(tracks), runs)), axis=1)
    x = np.arange(width, dtype=np.float32)
    along = np.zeros((len(tracks), width), np.float32)
    for begin, end in zip(cuts[:, ::2].T, cuts[:, 1::2].T, strict=True):
        middle, reach = ((begin + end) / 2)[:, None], ((end - begin) / 2)[:, None]
        along += inside((np.abs(x - middle) - reach).astype(np.float32), edge)
    return profile @ along
