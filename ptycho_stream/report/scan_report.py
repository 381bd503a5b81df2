"""What a report is made from, and the curves in it.

Filled by ``ptycho-stream export --report`` from a daemon or a scan's folder; drawn by
:mod:`ptycho_stream.report.figure`, written out by :mod:`ptycho_stream.report.page`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.reconstruct.history import HistoryEntry
from ptycho_stream.results import Image


@dataclass(frozen=True, slots=True)
class ScanReport:
    """A scan's image and history.

    Attributes:
        image: to show.
        history: of the image, oldest first; empty where none was kept.
        header: of the scan (``docs/store.md``), as JSON values; empty if it is not known.
    """

    image: Image
    history: Sequence[HistoryEntry] = ()
    header: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def time_s(self) -> NDArray[np.float64]:
        """Float64 (n,), seconds of each entry since the first."""
        times_ns = np.array([entry.time_ns for entry in self.history], np.int64)
        return np.asarray((times_ns - times_ns[:1]) * 1e-9, np.float64)

    def curve(self, value: Callable[[HistoryEntry], float | None]) -> NDArray[np.float64]:
        """Float64 (n,), a value of each entry; NaN where that is not known."""
        values = (value(entry) for entry in self.history)
        return np.array([math.nan if v is None else v for v in values], np.float64)

    def figure_curve(self, name: str) -> NDArray[np.float64]:
        """Float64 (n,), a figure of trust over the history; NaN where it is not known."""
        return self.curve(lambda entry: entry.figures.get(name))

    def turns(self) -> list[HistoryEntry]:
        """Entries at which verdict, layer, model or generation became another, and the last."""
        told: list[HistoryEntry] = []
        before: tuple[object, ...] = ()
        for entry in self.history:
            now = (entry.verdict, entry.layer, entry.model, entry.generation)
            if now != before:
                told.append(entry)
            before = now
        if self.history and told[-1] is not self.history[-1]:
            told.append(self.history[-1])
        return told
