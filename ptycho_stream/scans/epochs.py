"""Which scan an epoch of positions belongs to: exactly one, decided once, never "the newest".

The scan state machine keeps one :class:`EpochBook`.  Positions whose scan has not come yet are held
here, within a bound; those of a scan that is closed have no home and are given back to be counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from ptycho_stream.messages import Positions

MAX_HELD_POSITIONS: Final = 1_000_000
MAX_EPOCHS: Final = 4096


class Claimant(Protocol):
    """What the book looks at in an open scan."""

    scan_id: str
    series: str
    armed_ns: int
    epoch: str | None


@dataclass(slots=True)
class Epoch:
    """One epoch.  ``scan_id`` is None while it waits; ``held`` is what came meanwhile.

    ``suspect``: it came just after a scan of its series closed without positions, so it may be that
    scan's; it goes to the next scan of the series only if that ends without an epoch of its own.
    """

    name: str
    series: str | None
    begun_ns: int
    suspect: bool = False
    scan_id: str | None = None
    ended: bool = False
    held: list[Positions] = field(default_factory=list[Positions])

    @property
    def held_count(self) -> int:
        """Positions that wait."""
        return sum(len(batch.numbers) for batch in self.held)


class EpochBook:
    """All epochs that were seen lately, by name.  ``match_window_ns`` may change."""

    def __init__(self, match_window_ns: int, max_held: int = MAX_HELD_POSITIONS) -> None:
        self.match_window_ns = match_window_ns
        self._max_held = max_held
        self._epochs: dict[str, Epoch] = {}
        self._closed_without: dict[str, int] = {}

    def __getitem__(self, name: str) -> Epoch:
        return self._epochs[name]

    def begin(self, name: str, series: str | None, at_ns: int) -> Epoch:
        """The epoch ``name``, new if it was not seen yet."""
        epoch = self._epochs.get(name)
        if epoch is None:
            closed_ns = self._closed_without.get(series) if series is not None else None
            suspect = closed_ns is not None and at_ns - closed_ns <= self.match_window_ns
            epoch = self._epochs[name] = Epoch(name, series, at_ns, suspect)
            self._forget_oldest()
        elif epoch.series is None and epoch.scan_id is None:
            epoch.series = series
        return epoch

    def find_scan(self, epoch: Epoch, scans: Iterable[Claimant]) -> Claimant | None:
        """The open scan that a waiting epoch belongs to, if it is there."""
        free = [scan for scan in scans if scan.epoch is None]
        if epoch.suspect:
            return None
        if epoch.series is not None:
            same = [scan for scan in free if scan.series == epoch.series]
            return max(same, key=lambda scan: scan.armed_ns, default=None)
        near = [s for s in free if abs(s.armed_ns - epoch.begun_ns) <= self.match_window_ns]
        return min(near, key=lambda s: abs(s.armed_ns - epoch.begun_ns), default=None)

    def find_epoch(self, scan: Claimant, *, suspects: bool = False) -> Epoch | None:
        """The waiting epoch that belongs to a scan that was just armed (or, of suspects, ends)."""
        waiting = [
            epoch
            for epoch in self._epochs.values()
            if epoch.scan_id is None and epoch.suspect == suspects
        ]
        same = [epoch for epoch in waiting if epoch.series == scan.series]
        if same:
            return max(same, key=lambda epoch: epoch.begun_ns)
        near = [
            epoch
            for epoch in waiting
            if epoch.series is None and abs(scan.armed_ns - epoch.begun_ns) <= self.match_window_ns
        ]
        return min(near, key=lambda e: abs(scan.armed_ns - e.begun_ns), default=None)

    def bind(self, epoch: Epoch, scan: Claimant) -> tuple[list[Positions], list[Epoch]]:
        """Give an epoch to a scan, for good.

        Returns:
            What was held for it, and older epochs of its series, which no scan will claim now.
        """
        stale = [
            other
            for other in self._epochs.values()
            if other.scan_id is None
            and other is not epoch
            and other.series is not None
            and other.series == scan.series
            and other.begun_ns <= epoch.begun_ns
        ]
        for other in stale:
            other.scan_id = ""
        epoch.scan_id = scan.scan_id
        epoch.series = scan.series
        scan.epoch = epoch.name
        held, epoch.held = epoch.held, []
        return held, stale

    def hold(self, epoch: Epoch, positions: Positions) -> list[tuple[str, int]]:
        """Keep positions until their scan comes; returns (epoch, count) of what had to go."""
        epoch.held.append(positions)
        dropped: list[tuple[str, int]] = []
        total = sum(e.held_count for e in self._epochs.values() if e.held)
        for other in self._epochs.values():  # oldest first
            while other.held and total > self._max_held:
                count = len(other.held.pop(0).numbers)
                total -= count
                dropped.append((other.name, count))
        return dropped

    def expire(self, at_ns: int) -> list[tuple[str, int]]:
        """Give up epochs without a series that no scan was armed near; what they held is lost."""
        dropped: list[tuple[str, int]] = []
        for epoch in self._epochs.values():
            over = epoch.series is None and at_ns - epoch.begun_ns > self.match_window_ns
            if over and epoch.scan_id is None:
                epoch.scan_id = ""
                dropped.append((epoch.name, epoch.held_count))
                epoch.held = []
        return dropped

    def scan_armed(self, scan: Claimant) -> None:
        """Epochs of this series that come from now on are taken for this scan's."""
        self._closed_without.pop(scan.series, None)

    def scan_closed(self, scan: Claimant, at_ns: int) -> None:
        """Remember whether a scan had its positions: what comes late must not reach the next."""
        if scan.epoch is None:
            self._closed_without[scan.series] = at_ns
        else:
            self._closed_without.pop(scan.series, None)
        for series, closed_ns in list(self._closed_without.items()):
            if at_ns - closed_ns > self.match_window_ns:
                del self._closed_without[series]

    def _forget_oldest(self) -> None:
        while len(self._epochs) > MAX_EPOCHS:
            del self._epochs[next(iter(self._epochs))]
