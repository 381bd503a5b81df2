"""Which frames of a scan go through a network together, where it takes several at a time.

Pure index logic: pairs arrive one by one, a group forms as soon as enough unused neighbours of a
frame are there, and what is left at the scan's end goes with frames that were used before. The
groups hang on the order of the pairs alone, not on batches or restarts. Used by the scan image.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_CELLS_IN_REACH = 8
"""Cells of the search grid a reach: a query looks at rings of cells, from inside out."""

_NEWEST_OF_A_CELL = 4
"""So many times K are candidates of a cell: a scan that rests on a place stays linear."""


class GroupFormer:
    """Forms groups of neighbouring frames, by their pairs' indices in the scan's log.

    The rule: when a frame arrives, look at its K nearest frames so far. If C - 1 of them are
    unused, the frame and the nearest C - 1 are a group. Else the same is asked for each unused one
    of those K, nearest first, which may have been waiting for this very frame. Of equally near
    frames the newest comes first: where a scan rests, those are the unused ones. Frames further
    away than ``reach_m`` are no neighbours; where very many share a place, only the newest are.

    Args:
        group_frames: C, of the network.
        neighbours: K; at least twice C is taken, so that there is a choice.
        reach_m: side of the window; frames that do not overlap tell nothing of each other.
    """

    def __init__(self, group_frames: int, neighbours: int, reach_m: float) -> None:
        self._partners = group_frames - 1
        self._nearest = max(neighbours, 2 * group_frames)
        self._reach_m = reach_m
        self._cell_m = reach_m / _CELLS_IN_REACH
        self._cells: dict[tuple[int, int], list[int]] = {}
        self._place: dict[int, tuple[float, float]] = {}
        self._unused: set[int] = set()

    def restore(
        self,
        used: NDArray[np.int64],
        waiting: NDArray[np.int64],
        position_yx_m: NDArray[np.float64],
    ) -> None:
        """Take in what a former one had: pairs that need no group, then pairs that wait for one.

        ``position_yx_m`` (n, 2) of both, in this order.
        """
        indices = [*used.tolist(), *waiting.tolist()]
        # By index, as they arrived: a cell's newest frames are its last ones.
        for index, (y_m, x_m) in sorted(zip(indices, position_yx_m.tolist(), strict=True)):
            self._put(index, y_m, x_m)
        self._unused = set(waiting.tolist())

    def arrive(self, index: int, y_m: float, x_m: float) -> tuple[int, ...] | None:
        """Take in one pair; the group (C,) that is complete with it, its first frame's pair first.

        The frames of a group, but for the first, are in order of their distance from it.
        """
        self._put(index, y_m, x_m)
        self._unused.add(index)
        near = self._near(index, self._nearest)
        for first in (index, *(other for other in near if other in self._unused)):
            around = near if first == index else self._near(first, self._nearest)
            free = [other for other in around if other in self._unused][: self._partners]
            if len(free) == self._partners and (first == index or index in free):
                group = (first, *free)
                self._unused.difference_update(group)
                return group
        return None

    def leftover(self, index: int) -> tuple[int, ...]:
        """A group (C,) for a pair that waited in vain; its partners may be of other groups.

        Where a scan has fewer frames than a group, the frame itself takes the empty places.
        """
        partners = self._near(index, self._partners)
        if len(partners) < self._partners:
            partners = self._nearest_of_all(index)
        missing = self._partners - len(partners)
        self._unused.discard(index)
        return (index, *partners, *[index] * missing)

    def _put(self, index: int, y_m: float, x_m: float) -> None:
        self._place[index] = (y_m, x_m)
        self._cells.setdefault(self._cell(y_m, x_m), []).append(index)

    def _cell(self, y_m: float, x_m: float) -> tuple[int, int]:
        return math.floor(y_m / self._cell_m), math.floor(x_m / self._cell_m)

    def _near(self, index: int, count: int) -> list[int]:
        """The nearest ``count`` frames within reach, nearest first."""
        y_m, x_m = self._place[index]
        row, column = self._cell(y_m, x_m)
        newest = _NEWEST_OF_A_CELL * self._nearest
        found: list[tuple[float, int]] = []
        for ring in range(_CELLS_IN_REACH + 1):
            for cell in _ring(row, column, ring):
                for other in self._cells.get(cell, [])[-newest:]:
                    if other != index:
                        there = self._place[other]
                        distance_m = math.hypot(there[0] - y_m, there[1] - x_m)
                        if distance_m <= self._reach_m:
                            found.append((distance_m, -other))
            # Frames beyond this ring are at least ``ring`` cells away.
            if len(found) >= count:
                found = heapq.nsmallest(count, found)
                if found[-1][0] < ring * self._cell_m:
                    break
        return [-other for _, other in heapq.nsmallest(count, found)]

    def _nearest_of_all(self, index: int) -> list[int]:
        """The nearest partners, however far away."""
        here = self._place[index]
        others = (
            (math.dist(there, here), other)
            for other, there in self._place.items()
            if other != index
        )
        return [other for _, other in heapq.nsmallest(self._partners, others)]


def _ring(row: int, column: int, ring: int) -> Iterable[tuple[int, int]]:
    """The cells whose larger distance from (row, column), down or across, is ``ring``."""
    if ring == 0:
        yield row, column
        return
    for across in range(-ring, ring + 1):
        yield row - ring, column + across
        yield row + ring, column + across
    for down in range(1 - ring, ring):
        yield row + down, column - ring
        yield row + down, column + ring
