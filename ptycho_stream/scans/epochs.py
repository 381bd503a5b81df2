"""Which scan an epoch of positions belongs to: exactly one, decided once, never "the newest".

The scan state machine keeps one :class:`EpochBook`.  Positions whose scan has not come yet are held
here, within a bound; those of a scan that is closed have no home and are given back to be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    first_frame_ns: int
    last_frame_ns: int
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
        measured: its positions are read while frames are taken, and it names no series.
        since_ns: when its first positions came; None before.
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
    measured: bool = False
    since_ns: int | None = None
    joined: bool = False
    suspect: bool = False
    resumed: bool = False
    scan_id: str | None = None
    ended: bool = False
    in_use: bool = False
    held: list[Positions] = field(default_factory=list[Positions])

    @property
    def ready(self) -> bool:
        """Whether a scan may have it: when it is measured, only with its first positions."""
        return self.since_ns is not None or not self.measured

    @property
    def over(self) -> bool:
        """Whether it was measured and has ended.

        If its scan had no frame yet, it was an alignment, or frames come long behind positions.
        """
        return self.measured and self.ended

    @property
    def held_count(self) -> int:
        """Positions that wait."""
        return sum(len(batch.numbers) for batch in self.held)


class EpochBook:
    """All epochs that were seen lately, by name.

    Args:
        match_window_ns: how far apart a scan and an epoch without a series may be armed.
        lag_ns: how far measured positions may come behind their frames, or frames behind them.
        measured: whether positions are read while frames are taken.
        max_held: positions that may wait.

    Both times may be changed through the attributes of these names.
    """

    def __init__(
        self,
        match_window_ns: int,
        lag_ns: int = 0,
        measured: bool = False,
        max_held: int = MAX_HELD_POSITIONS,
    ) -> None:
        self.match_window_ns = match_window_ns
        self.lag_ns = lag_ns
        self._measured = measured
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

    def begin(self, name: str, series: str | None, at_ns: int) -> Epoch:
        """The epoch ``name``, new if it was not seen yet."""
        epoch = self._epochs.get(name)
        if epoch is None:
            closed_ns = self._closed_without.get(series) if series is not None else None
            suspect = closed_ns is not None and at_ns - closed_ns <= self.match_window_ns
            epoch = Epoch(name, series, at_ns, at_ns, self._measured, suspect=suspect)
            self._epochs[name] = epoch
        elif epoch.series is None and epoch.scan_id is None:
            epoch.series = series
        epoch.measured &= epoch.series is None
        epoch.resumed = False
        epoch.heard_ns = at_ns
        return epoch

    def resume(self, name: str, scan: Claimant, at_ns: int) -> None:
        """Note that a former process gave an epoch to a scan that is open again."""
        epoch = self.begin(name, scan.series, at_ns)
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
        near = self._near(epoch, free)
        if epoch.measured:  # of a scan that is over, another may be nearer to its frames
            near = [s for s in near if s.state == "running" or self.find_nearest(s) is epoch]
        return min(near, key=lambda s: abs(s.armed_ns - epoch.begun_ns), default=None)

    def _near(self, epoch: Epoch, scans: Iterable[Claimant]) -> list[Claimant]:
        """Scans that were armed within the window about an epoch's arming."""
        return [s for s in scans if abs(s.armed_ns - epoch.begun_ns) <= self.match_window_ns]

    def _may_take(self, scan: Claimant, epoch: Epoch) -> bool:
        """Whether a scan has no epoch yet, or one that may go on under another name."""
        if epoch.measured and (scan.state == "armed" or self._too_late(epoch, scan)):
            return False
        return scan.epoch is None or (epoch.joined and self._epochs[scan.epoch].resumed)

    def _too_late(self, epoch: Epoch, scan: Claimant) -> bool:
        """Whether an epoch was armed after a scan's first frame had been taken.

        Whichever is heard of first, the lag of messages included.
        """
        return not epoch.joined and epoch.begun_ns > scan.first_frame_ns + self.lag_ns

    def find_nearest(self, scan: Claimant) -> Epoch | None:
        """Of measured epochs the one whose positions came nearest to a scan's frames.

        They may have been over before the first of them, or begin after the last.  But one that was
        armed nearer and sent nothing is the scan's own, and lost.
        """
        waiting = [
            epoch
            for epoch in self._epochs.values()
            if epoch.scan_id is None
            and epoch.measured
            and self._near(epoch, (scan,))
            and not self._too_late(epoch, scan)
        ]
        apart = {
            epoch.name: max(
                scan.first_frame_ns - epoch.heard_ns, epoch.since_ns - scan.last_frame_ns, 0
            )
            for epoch in waiting
            if epoch.since_ns is not None
        }
        name = min(apart, key=apart.__getitem__, default=None)
        if name is None or apart[name] > self.lag_ns:
            return None
        nearest = self._epochs[name]
        own = min(waiting, key=lambda epoch: abs(scan.armed_ns - epoch.begun_ns))
        return nearest if own.since_ns is not None else None

    def find_epoch(self, scan: Claimant) -> Epoch | None:
        """The waiting epoch that belongs to a scan that was just armed, or has its first frame."""
        begun = scan.state != "armed"
        return self._find(
            scan, lambda epoch: not (epoch.suspect or epoch.over) and (begun or not epoch.measured)
        )

    def find_suspect(self, scan: Claimant) -> Epoch | None:
        """The same of those that are suspect, for a scan that ends without one."""
        return self._find(scan, lambda epoch: epoch.suspect)

    def _find(self, scan: Claimant, suits: Callable[[Epoch], bool]) -> Epoch | None:
        waiting = [
            epoch
            for epoch in self._epochs.values()
            if epoch.scan_id is None and epoch.ready and suits(epoch)
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

        Nor with any other.
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

    def expire(self, at_ns: int, scans: Iterable[Claimant]) -> list[tuple[str, int]]:
        """Give up epochs that no scan was armed near; what they held is lost.

        Of an epoch that names its series the time counts from what it sent last: without a limit,
        what was sent for a scan that never came would reach another one of the same series.  One
        that is not ready waits for its positions, however long its scan was armed with it.

        Args:
            at_ns: now.
            scans: that are open; an epoch that may still become one's is kept.
        """
        free = [scan for scan in scans if scan.epoch is None]
        dropped: list[tuple[str, int]] = []
        for epoch in self._epochs.values():
            since_ns = epoch.begun_ns if epoch.series is None else epoch.heard_ns
            waits = epoch.scan_id is None and epoch.ready
            if not waits or at_ns - since_ns <= self.match_window_ns:
                continue
            if epoch.series is not None or not self._near(epoch, free):
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
