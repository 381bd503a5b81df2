"""Sample families that are projections of solids: polyhedra, whose thickness makes the density.

Each takes a generator and a grid and returns a field (h, w), float32, of any range. Registered in
:mod:`ptycho_stream.simulate.samples`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.simulate.grid import Field, Grid, shape_of, window

Vectors = NDArray[np.floating[Any]]

_TETRAHEDRON, _BOX = 0, 1
_GOLDEN = (1 + 5**0.5) / 2
# Outward normals of the faces of regular solids, all as far from the centre.
_FACES: tuple[Vectors, ...] = (
    np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float),
    np.array([[s if k == axis else 0 for k in range(3)] for axis in range(3) for s in (-1, 1)]),
    np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], float),
    np.array(
        [np.roll([0, a, b * _GOLDEN], turn) for turn in range(3) for a in (-1, 1) for b in (-1, 1)]
    ),
)


def polyhedra(rng: np.random.Generator, grid: Grid) -> Field:
    """Turned tetrahedra, boxes, octahedra, dodecahedra and irregular grains, seen through."""
    rows, columns = shape_of(grid)
    out = np.zeros((rows, columns), np.float32)
    typical = rng.uniform(0.04, 0.22) * min(rows, columns)
    number = int(np.clip(rng.uniform(0.3, 1.2) * rows * columns / (4 * typical**2), 2, 60))
    for _ in range(number):
        size = float(typical * rng.uniform(0.5, 1.6))
        centre = (rng.uniform(0, rows), rng.uniform(0, columns))
        normals, away = _solid(rng, size)
        part, local = window(grid, centre, 2 * size + 2)
        out[part] += np.float32(rng.uniform(0.4, 1)) * thickness_px(normals, away, local)
    return out


def _solid(rng: np.random.Generator, size_px: float) -> tuple[Vectors, Vectors]:
    """Unit normals (faces, 3) in z, y, x of a solid turned at random, and the faces' distances.

    No corner is further from the centre than twice the size.
    """
    kind = int(rng.integers(len(_FACES) + 1))
    normals = _FACES[_BOX if kind == len(_FACES) else kind] @ _turn(rng).T
    away = np.full(len(normals), size_px)
    if kind == _TETRAHEDRON:
        away *= 0.6
    elif kind == _BOX:
        away *= np.repeat(rng.uniform(0.4, 1.0, 3), 2)
    elif kind == len(_FACES):
        # A grain: a cube with corners and edges broken off.
        cuts = rng.standard_normal((int(rng.integers(4, 12)), 3))
        normals = np.concatenate([normals, cuts])
        away = np.concatenate([away, size_px * rng.uniform(0.7, 1.2, len(cuts))])
    return normals / np.linalg.norm(normals, axis=1, keepdims=True), away


def _turn(rng: np.random.Generator) -> Vectors:
    """A rotation drawn evenly: the Q of a Gaussian matrix (Stewart 1980)."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    return q * np.sign(np.diag(r))


def thickness_px(normals: Vectors, away_px: Vectors, grid: Grid) -> Field:
    """How far a ray along z runs inside the convex solid of all r with n . r <= d.

    Args:
        normals: (faces, 3) unit vectors z, y, x; they close the solid.
        away_px: (faces,) distances d of the faces from the centre, pixels.
        grid: coordinates y (h, 1) and x (1, w) about the centre.

    Returns:
        float32 (h, w), 0 beside the solid.
    """
    y, x = grid
    shape = np.broadcast_shapes(y.shape, x.shape)
    top = np.full(shape, np.inf, np.float32)
    bottom = np.full(shape, -np.inf, np.float32)
    for (nz, ny, nx), distance in zip(normals.tolist(), away_px.tolist(), strict=True):
        # Faces that the ray runs along would divide by nothing; a tilt of 1e-3 is not seen.
        tilt = nz if abs(nz) > 1e-3 else 1e-3
        z = np.float32(-ny / tilt) * y + (np.float32(distance / tilt) - np.float32(nx / tilt) * x)
        if tilt > 0:
            np.minimum(top, z, out=top)
        else:
            np.maximum(bottom, z, out=bottom)
    top -= bottom
    return np.maximum(top, 0, out=top)
