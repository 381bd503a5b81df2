"""Figures of a running daemon, taken now and then beside what a benchmark does."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import psutil

Sample = TypeVar("Sample")


class Sampler(Generic[Sample]):
    """Samples in a thread of its own until it is closed.

    Args:
        sample: takes one; it is left out where a process or a file is gone in that moment.
        every_s: the time between two.

    Attributes:
        samples: all so far.
    """

    def __init__(self, sample: Callable[[], Sample], every_s: float) -> None:
        self.samples: list[Sample] = []
        self._sample, self._every_s = sample, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                self.samples.append(self._sample())
            except (psutil.NoSuchProcess, FileNotFoundError):  # a scan is being deleted, say
                continue

    def close(self) -> None:
        """End the thread; again: nothing."""
        self._over.set()
        self._thread.join()


def growth(samples: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians of the second and of the last third, by what was sampled."""
    third = len(samples) // 3
    figures: dict[str, dict[str, float]] = {}
    for key in samples[-1]:
        middle = statistics.median(each[key] for each in samples[third : 2 * third])
        last = statistics.median(each[key] for each in samples[2 * third :])
        figures[key] = {"second_third": round(middle, 1), "last_third": round(last, 1)}
    return figures
