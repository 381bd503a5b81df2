"""Sample families without shapes: power-law, Perlin and simplex noise, and cells cut from noise.

Each takes a generator and a grid and returns a field (h, w), float32, of any range. Registered in
:mod:`ptycho_stream.simulate.samples`.
"""

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.simulate.grid import Field, Grid, shape_of

_SKEW, _UNSKEW = np.float32(0.3660254), np.float32(0.21132487)
"""(sqrt(3) - 1) / 2 and (3 - sqrt(3)) / 6: square lattice to triangles and back."""


def power_law(rng: np.random.Generator, grid: Grid) -> Field:
    """Gaussian noise with a power-law spectrum and a soft cut-off, clipped at 2.5 sigma."""
    shape = shape_of(grid)
    fy = np.fft.fftfreq(shape[0]).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(shape[1]).astype(np.float32)[None, :]
    k = np.sqrt(fy * fy + fx * fx)
    slope, cut = rng.uniform(1.0, 2.2), rng.uniform(0.08, 0.5)
    envelope = np.exp(np.float32(-slope) * np.log(k + np.float32(0.01)) - (k / cut) ** 4)
    spectrum = np.fft.rfft2(rng.standard_normal(shape, np.float32)) * envelope
    field = np.fft.irfft2(spectrum, shape)
    field = (field - field.mean()) / max(float(field.std()), 1e-12)
    return np.clip(field, -2.5, 2.5).astype(np.float32)


def cells(rng: np.random.Generator, grid: Grid) -> Field:
    """Noise cut at one or two levels: grains, pores, labyrinths, with sharp borders."""
    field = power_law(rng, grid)
    out = np.zeros_like(field)
    for _ in range(rng.integers(1, 3)):
        level, steepness = rng.uniform(-1, 1), rng.uniform(2, 15)
        out += np.float32(0.5) + np.float32(0.5) * np.tanh(
            np.float32(steepness) * (field - np.float32(level))
        )
    return out


def perlin(rng: np.random.Generator, grid: Grid) -> Field:
    """Gradient noise on square lattices, each octave half as coarse (Perlin 1985 and 2002)."""
    shape = shape_of(grid)
    cell = rng.uniform(0.1, 0.5) * max(shape)
    gain = rng.uniform(0.35, 0.75)
    out = np.zeros(shape, np.float32)
    for octave in range(int(rng.integers(2, 6))):
        step = cell / 2**octave
        if step < 3:
            break
        out += np.float32(gain**octave) * _lattice_noise(rng, shape, step)
    return _folded(rng, out)


def _lattice_noise(rng: np.random.Generator, shape: tuple[int, int], step_px: float) -> Field:
    """One octave of Perlin noise.

    A pixel mixes (gradient . offset) of its cell's four corners with weights that are products of
    a row's and a column's, so the octave is two products of thin matrices.
    """
    row_weight, row_offset = _corners(rng, shape[0], step_px)
    column_weight, column_offset = _corners(rng, shape[1], step_px)
    turn = rng.uniform(0, 2 * np.pi, (row_weight.shape[1], column_weight.shape[1]))
    upward = (row_weight * row_offset) @ np.sin(turn).astype(np.float32) @ column_weight.T
    across = row_weight @ np.cos(turn).astype(np.float32) @ (column_weight * column_offset).T
    return upward + across


def _corners(rng: np.random.Generator, size: int, step_px: float) -> tuple[Field, Field]:
    """Weight of each lattice line for each pixel of an axis, and offset from it; (size, lines)."""
    place = (np.arange(size) / step_px + rng.random()).astype(np.float32)[:, None]
    lines = np.arange(int(place[-1, 0]) + 2, dtype=np.float32)
    offset = place - lines
    t = np.clip(np.abs(offset), 0, 1)
    return 1 - t * t * t * (t * (t * 6 - 15) + 10), offset


def simplex(rng: np.random.Generator, grid: Grid) -> Field:
    """Gradient noise on triangles, which has no preferred axes (Perlin 2001, Gustavson 2005)."""
    shape = shape_of(grid)
    cell = rng.uniform(0.08, 0.4) * max(shape)
    gain = rng.uniform(0.35, 0.7)
    out = np.zeros(shape, np.float32)
    for octave in range(int(rng.integers(2, 5))):
        step = cell / 2**octave
        if step < 3:
            break
        out += np.float32(gain**octave) * _triangle_noise(rng, grid, step)
    return _folded(rng, out)


def _triangle_noise(rng: np.random.Generator, grid: Grid, step_px: float) -> Field:
    """One octave of simplex noise."""
    scale = np.float32(1 / step_px)
    y, x = grid[0] * scale, grid[1] * scale
    skew = (y + x) * _SKEW
    row, column = np.floor(y + skew), np.floor(x + skew)
    unskew = (row + column) * _UNSKEW
    dy, dx = y - (row - unskew), x - (column - unskew)
    row -= row.min()
    column -= column.min()
    columns = int(column.max()) + 2
    turn = rng.uniform(0, 2 * np.pi, (int(row.max()) + 2) * columns)
    gradient = (np.sin(turn) + 1j * np.cos(turn)).astype(np.complex64)
    index = (row * columns + column).astype(np.intp)
    low = dy > dx
    # Corners of the triangle: (0, 0), the nearer of (1, 0) and (0, 1), and (1, 1).
    out = _corner_share(gradient[index], dy, dx)
    across = np.where(low, np.float32(1), np.float32(0))
    index += np.where(low, columns, 1)
    out += _corner_share(gradient[index], dy - across + _UNSKEW, dx + across + (_UNSKEW - 1))
    index += np.where(low, 1, columns)
    end = 2 * _UNSKEW - 1
    return out + _corner_share(gradient[index], dy + end, dx + end)


def _corner_share(gradient: NDArray[np.complex64], away_y: Field, away_x: Field) -> Field:
    """What a corner with a gradient (y + i x) adds to the pixels that are this far from it."""
    reach = np.float32(0.5) - away_y * away_y
    reach -= away_x * away_x
    np.maximum(reach, 0, out=reach)
    reach *= reach
    reach *= reach
    return reach * (gradient.real * away_y + gradient.imag * away_x)


def _folded(rng: np.random.Generator, field: Field) -> Field:
    """The noise as it is, or its absolute value: ridges and veins."""
    return np.abs(field) if rng.random() < 0.3 else field
