"""Which scan an epoch of positions belongs to: exactly one, decided once, never "the newest".

The scan state machine keeps one :class:`EpochBook`.  Positions whose scan has not come yet are held
here, within a bound; those of a scan that is closed have no home and are given back to be counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol

from ptycho_stream.messages import Positions

MAX_HELD_POSITIONS: Final = 1_000_000
MAX_EPOCHS: Final = 4096
MAX_TOLD: Final = 64
"""Epochs whose metadata are kept; each may be as long as a header."""


class Claimant(Protocol):
    """What the book looks at in an open scan."""

    scan_id: str
    series: str
    armed_ns: int
    epoch: str | None

    @property
    def state(self) -> str:
        """Of the scan."""
        ...


@dataclass(slots=True)
class Epoch:
    """One epoch.

    Attributes:
        scan_id: whose it is; None while it waits, empty when no scan will have it any more.
        begun_ns: when it was armed or, where that was not heard, when it was heard of first.
        heard_ns: when it last sent something.
        ready: a scan may have it now.
        joined: its arming was not heard, and was some time ago.
        suspect: it came just after a scan of its series closed without positions, so it may be that
            scan's; it goes to the next scan of the series only if that ends without one of its own.
        resumed: a former process gave it to its scan, and nothing has come of it since.
        ended: all of it has come.
        in_use: the scan that it belongs to is open.
        held: what came while it waits.
    """

    name: str
    series: str | None
    begun_ns: int
    heard_ns: int
    ready: bool = False
    joined: bool = False
    suspect: bool = False
    resumed: bool = False
    scan_id: str | None = None
    ended: bool = False
    in_use: bool = False
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
        self._told: dict[str, Mapping[str, Any]] = {}
        self._held = 0

    def __getitem__(self, name: str) -> Epoch:
        return self._epochs[name]

    def scan_of(self, name: str) -> str | None:
        """The scan that an epoch was given to, if it was."""
        epoch = self._epochs.get(name)
        return None if epoch is None else epoch.scan_id

    def begin(self, name: str, series: str | None, at_ns: int, *, ready: bool) -> Epoch:
        """The epoch ``name``, new if it was not seen yet.

        Args:
            name: of the epoch.
            series: that it names, if it names one.
            at_ns: now.
            ready: whether a scan may have it from now on.
        """
        epoch = self._epochs.get(name)
        if epoch is None:
            closed_ns = self._closed_without.get(series) if series is not None else None
            suspect = closed_ns is not None and at_ns - closed_ns <= self.match_window_ns
            epoch = Epoch(name, series, at_ns, at_ns, suspect=suspect)
            self._epochs[name] = epoch
        elif epoch.series is None and epoch.scan_id is None:
            epoch.series = series
        epoch.ready |= ready
        epoch.resumed = False
        epoch.heard_ns = at_ns
        return epoch

    def resume(self, name: str, scan: Claimant, at_ns: int) -> None:
        """Note that a former process gave an epoch to a scan that is open again."""
        epoch = self.begin(name, scan.series, at_ns, ready=True)
        self.bind(epoch, scan)
        epoch.resumed = True

    def tell(self, epoch: Epoch, metadata: Mapping[str, Any]) -> None:
        """Keep what an epoch says of itself, for its scan."""
        if metadata:
            self._told.pop(epoch.name, None)
            self._told[epoch.name] = metadata
            if len(self._told) > MAX_TOLD:
                del self._told[next(iter(self._told))]

    def told(self, epoch: Epoch) -> Mapping[str, Any]:
        """What an epoch has said of itself."""
        return self._told.get(epoch.name, {})

    def find_scan(self, epoch: Epoch, scans: Iterable[Claimant]) -> Claimant | None:
        """The open scan that a waiting epoch belongs to, if it is there."""
        if epoch.suspect or not epoch.ready:
            return None
        free = [scan for scan in scans if self._may_take(scan, epoch)]
        if epoch.series is not None:
            same = [scan for scan in free if scan.series == epoch.series]
            return max(same, key=lambda scan: scan.armed_ns, default=None)
        if epoch.joined:  # nobody knows when it was armed, but it is sending now
            running = [scan for scan in free if scan.state == "running"]
            if running:
                return max(running, key=lambda scan: scan.armed_ns)
        near = [s for s in free if abs(s.armed_ns - epoch.begun_ns) <= self.match_window_ns]
        return min(near, key=lambda s: abs(s.armed_ns - epoch.begun_ns), default=None)

    def _may_take(self, scan: Claimant, epoch: Epoch) -> bool:
        """Whether a scan has no epoch yet, or one that may go on under another name."""
        return scan.epoch is None or (epoch.joined and self._epochs[scan.epoch].resumed)

    def find_epoch(self, scan: Claimant, *, suspects: bool = False) -> Epoch | None:
        """The waiting epoch that belongs to a scan that was just armed (or, of suspects, ends)."""
        waiting = [
            epoch
            for epoch in self._epochs.values()
            if epoch.scan_id is None and epoch.ready and epoch.suspect == suspects
        ]
        same = [
            epoch
            for epoch in waiting
            if epoch.series == scan.series
            and scan.armed_ns - epoch.heard_ns <= self.match_window_ns
        ]
        if same:
            return max(same, key=lambda epoch: epoch.begun_ns)
        near = [
            epoch
            for epoch in waiting
            if epoch.series is None and abs(scan.armed_ns - epoch.begun_ns) <= self.match_window_ns
        ]
        return min(near, key=lambda e: abs(scan.armed_ns - e.begun_ns), default=None)

    def missed(self, scan: Claimant) -> Epoch | None:
        """An epoch without a series that sent something during a scan and was not matched with it.

        It was armed too far from that scan, and from all others.
        """
        return next(
            (
                epoch
                for epoch in reversed(self._epochs.values())
                if not epoch.scan_id
                and epoch.ready
                and epoch.series is None
                and epoch.heard_ns >= scan.armed_ns
            ),
            None,
        )

    def bind(self, epoch: Epoch, scan: Claimant) -> tuple[list[Positions], list[tuple[str, int]]]:
        """Give an epoch to a scan, for good.

        Returns:
            What was held for it, and (epoch, count) of what older epochs of its series had held,
            which no scan will claim now.
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
        dropped = [self._give_up(other) for other in stale]
        if scan.epoch is not None:
            self._epochs[scan.epoch].in_use = False
        epoch.scan_id = scan.scan_id
        epoch.in_use = True
        epoch.series = scan.series
        scan.epoch = epoch.name
        self._held -= epoch.held_count
        held, epoch.held = epoch.held, []
        return held, dropped

    def hold(self, epoch: Epoch, positions: Positions) -> list[tuple[str, int]]:
        """Keep positions until their scan comes; returns (epoch, count) of what had to go."""
        epoch.held.append(positions)
        self._held += len(positions.numbers)
        dropped: list[tuple[str, int]] = []
        if self._held <= self._max_held:
            return dropped
        for other in self._epochs.values():  # oldest first
            while other.held and self._held > self._max_held:
                count = len(other.held.pop(0).numbers)
                self._held -= count
                dropped.append((other.name, count))
        return dropped

    def _give_up(self, epoch: Epoch) -> tuple[str, int]:
        """No scan will have this epoch any more; its name and what it had held."""
        count = epoch.held_count
        self._held -= count
        epoch.scan_id, epoch.held = "", []
        return epoch.name, count

    def expire(self, at_ns: int) -> list[tuple[str, int]]:
        """Give up epochs that no scan was armed near; what they held is lost.

        Of an epoch that names its series the time counts from what it sent last: without a limit,
        what was sent for a scan that never came would reach another one of the same series.  One
        that is not ready waits for its positions, however long its scan was armed with it.
        """
        dropped: list[tuple[str, int]] = []
        for epoch in self._epochs.values():
            since_ns = epoch.begun_ns if epoch.series is None else epoch.heard_ns
            waits = epoch.scan_id is None and epoch.ready
            if waits and at_ns - since_ns > self.match_window_ns:
                dropped.append(self._give_up(epoch))
        return dropped

    def scan_armed(self, scan: Claimant) -> None:
        """Epochs of this series that come from now on are taken for this scan's."""
        self._closed_without.pop(scan.series, None)

    def scan_closed(self, scan: Claimant, at_ns: int) -> None:
        """Remember whether a scan had its positions: what comes late must not reach the next."""
        if scan.epoch is None:
            self._closed_without[scan.series] = at_ns
        else:
            self._epochs[scan.epoch].in_use = False
            self._closed_without.pop(scan.series, None)
        for series, closed_ns in list(self._closed_without.items()):
            if at_ns - closed_ns > self.match_window_ns:
                del self._closed_without[series]

    def forget_surplus(self) -> list[tuple[str, int]]:
        """Forget the oldest epochs that no open scan holds; returns (epoch, count) of what is lost.

        The newest one stays in any case.
        """
        surplus = len(self._epochs) - MAX_EPOCHS
        if surplus <= 0:
            return []
        newest = next(reversed(self._epochs))
        unused = (e for e in self._epochs.values() if not e.in_use and e.name != newest)
        forgotten = [self._give_up(epoch) for epoch in islice(unused, surplus)]
        for name, _ in forgotten:
            del self._epochs[name]
        return forgotten
