"""Which frames go through a network together, and where they lie relative to each other.

PtychoPINN's rules: C = gridsize^2 frames are drawn from the K nearest neighbours of a seed frame.
Coordinates are [x, y]; channel c stands for row c // gridsize, column c % gridsize. Used by the
raw data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from ptycho_stream.errors import PtychoPinnError


def draw_groups(
    coords_xy: NDArray[np.float64],
    *,
    gridsize: int,
    K: int,
    nsamples: int,
    seed: int | None,
    sequential_sampling: bool = False,
) -> NDArray[np.int32]:
    """Draw ``nsamples`` groups.

    Args:
        coords_xy: (M, 2).
        gridsize: C is its square; with C = 1 a group is its seed frame, else C of the seed's
            neighbours, without the seed.
        K: so many nearest neighbours are drawn from (all others, where there are fewer).
        nsamples: B, of different seeds.
        seed: of the draws; None: another one each time.
        sequential_sampling: the first B frames are seeds, in order, instead of random ones.

    Returns:
        Indices int32 (B, C).

    Raises:
        PtychoPinnError: there are fewer frames or neighbours than a group has, or fewer frames than
            seeds.
    """
    frames, channels = len(coords_xy), gridsize**2
    if channels > min(frames, K):
        raise PtychoPinnError(
            f"a group of gridsize {gridsize} has {channels} frames; there are {frames} frames and "
            f"K is {K}: neither may be smaller"
        )
    if channels > 1 and frames == channels:
        raise PtychoPinnError(
            f"a group has {channels} neighbours of a seed frame and there are {frames} frames with "
            "it: one more is needed"
        )
    if not 1 <= nsamples <= frames:
        raise PtychoPinnError(
            f"{nsamples} groups were asked for and there are {frames} frames, each of which can be "
            f"the seed of one: ask for 1 to {frames} (n_groups, nsamples)"
        )
    rng = np.random.default_rng(seed)
    seeds = (
        np.arange(nsamples) if sequential_sampling else rng.choice(frames, nsamples, replace=False)
    )
    if channels == 1:
        return seeds[:, None].astype(np.int32)
    near = _neighbours(coords_xy, seeds, min(K, frames - 1))
    return rng.permuted(near, axis=1)[:, :channels].astype(np.int32)


def _neighbours(
    coords_xy: NDArray[np.float64], seeds: NDArray[np.int64], K: int
) -> NDArray[np.int64]:
    """The K frames (B, K) nearest to each seed, without itself."""
    near = np.asarray(KDTree(coords_xy).query(coords_xy[seeds], K + 1)[1])
    own = near == seeds[:, None]
    # Where many frames share a place the seed need not be among its own K + 1 nearest.
    own[~own.any(1), -1] = True
    return near[~own].reshape(len(seeds), K)


@dataclass(frozen=True, slots=True, eq=False)
class GroupCoordinates:
    """Where the frames of groups lie.

    Attributes:
        offsets: float64 (B, 1, 2, 1), the mean m of each group, [x, y].
        relative: float64 (B, 1, 2, C), -(c - m) of each frame's position c: merging moves a patch
            by minus this, extracting one moves the object by plus this.
        nn: float64 (B, 1, 2, C), the positions c.
    """

    offsets: NDArray[np.float64]
    relative: NDArray[np.float64]
    nn: NDArray[np.float64]


def group_coordinates(
    coords_xy: NDArray[np.float64], groups: NDArray[np.integer[Any]]
) -> GroupCoordinates:
    """Coordinates of groups (B, C) of the frames at ``coords_xy`` (M, 2)."""
    nn = coords_xy[groups].transpose(0, 2, 1)[:, None]
    offsets = nn.mean(-1, keepdims=True)
    return GroupCoordinates(offsets, offsets - nn, nn)
