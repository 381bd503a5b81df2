"""Patches a second that the canvas takes, beside a four-corner splat and the memory's bandwidth.

The splat is what a program writes that has no canvas: each pixel of a patch goes to the four pixels
around its place with bilinear weights, by torch's ``index_add_``. The canvas has the fraction of a
position in the probe instead (decision 1) and adds whole rows. Both take the same patches on one
core, in turns, along the lines of a raster scan; so does a copy of as many bytes as the sums have
under a patch, read and written once.

    python benchmarks/stitch.py [--turns 7] [--patches 2000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.reconstruct.canvas import Canvas

BATCH = 16
STEP_PX = 5.3
SUM_BYTES = 12
"""Of a pixel: complex64 and float32."""


def raster(count: int, size: int) -> NDArray[np.float64]:
    """Corners (n, 2) of a square raster scan."""
    side = int(np.ceil(np.sqrt(count)))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)
    return grid.reshape(-1, 2)[:count] * STEP_PX


def by_canvas(
    patches: NDArray[np.complex64], weights: NDArray[np.float32], corner: NDArray[np.float64]
) -> None:
    canvas = Canvas(128)
    whole = np.rint(corner).astype(np.int64)
    half = np.arange(len(corner)) % 2
    for at in range(0, len(corner), BATCH):
        part = slice(at, at + BATCH)
        canvas.add(patches, weights, whole[part], half[part])


def by_splat(
    patches: NDArray[np.complex64], weights: NDArray[np.float32], corner: NDArray[np.float64]
) -> None:
    size = patches.shape[-1]
    width = int(corner.max()) + size + 2
    numerator = torch.zeros(width * width, dtype=torch.complex64)
    denominator = torch.zeros(width * width)
    patch, weight = torch.from_numpy(patches), torch.from_numpy(weights)
    offset = torch.arange(size)
    for at in range(0, len(corner), BATCH):
        place = torch.from_numpy(corner[at : at + BATCH])
        base = place.floor().long()
        fraction = (place - base).float()
        weighted = patch * weight
        for down in (0, 1):
            rows = (base[:, 0, None] + down + offset) * width
            for across in (0, 1):
                columns = base[:, 1, None] + across + offset
                index = (rows[:, :, None] + columns[:, None, :]).reshape(-1)
                share = (fraction[:, 0] if down else 1 - fraction[:, 0]) * (
                    fraction[:, 1] if across else 1 - fraction[:, 1]
                )
                share = share[:, None, None]
                numerator.index_add_(0, index, (weighted * share).reshape(-1))
                denominator.index_add_(0, index, (weight * share).reshape(-1))


def by_copy(
    patches: NDArray[np.complex64], weights: NDArray[np.float32], corner: NDArray[np.float64]
) -> None:
    """What the sums under the patches would cost if they had only to be read and written."""
    one = np.zeros(patches[0].size * SUM_BYTES, np.uint8)
    many = np.zeros((64, one.size), np.uint8)
    for at in range(len(corner)):
        np.copyto(many[at % 64], one)


def rate(
    way: Callable[..., None],
    patches: NDArray[np.complex64],
    weights: NDArray[np.float32],
    corner: NDArray[np.float64],
) -> float:
    started_s = time.process_time()
    way(patches, weights, corner)
    return len(corner) / (time.process_time() - started_s)


def main() -> None:
    """Print a table: medians, and the median of the ratios of a turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--patches", type=int, default=2000, help="of 32 x 32; 128: a quarter")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    ways = {"canvas": by_canvas, "splat": by_splat, "copy": by_copy}
    print("| patches | canvas a second | splat | ratio | copy of the sums | share of it |")
    print("|---|---|---|---|---|---|")
    figures: dict[str, dict[str, float]] = {}
    for size in (32, 128):
        shape = (BATCH, size, size)
        patches = (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)
        weights = rng.random(shape).astype(np.float32)
        corner = raster(args.patches * 32 // size // BATCH * BATCH, size)
        turns = [
            {name: rate(way, patches, weights, corner) for name, way in ways.items()}
            for _ in range(args.turns)
        ]
        median = {name: statistics.median(turn[name] for turn in turns) for name in ways}
        ratio = statistics.median(turn["canvas"] / turn["splat"] for turn in turns)
        share = statistics.median(turn["canvas"] / turn["copy"] for turn in turns)
        figures[str(size)] = {**median, "ratio": ratio, "share_of_copy": share}
        print(
            f"| {size}² | {median['canvas']:,.0f} | {median['splat']:,.0f} | {ratio:.1f} "
            f"| {median['copy']:,.0f} | {share:.2f} |"
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
