"""What is known of one arming of a PandA: which of its messages have come, and when it is over.

Used by :mod:`ptycho_stream.wire.panda`.  Messages are numbered from 0 with each arming; they may be
lost, doubled or overtake each other, and so may the start and the stop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from ptycho_stream.wire.sample_frames import SampleFrames

WINDOW: Final = 1024
"""So many messages are remembered to tell doubled ones, and so far behind they may still come."""
LATE_START: Final = 64
"""A start that comes after no more messages than these, and soon, has been overtaken by them."""
QUIET_NS: Final = 1_000_000_000
"""Without a message, after which nothing is expected to come late any more."""
LONG_QUIET_NS: Final = 5_000_000_000
"""After it what had not come before a stop, or before a higher number, is another arming's."""


@dataclass(slots=True)
class Arming:
    """One epoch of positions.

    Attributes:
        name: of the epoch.
        samples: that have come.
        begun_ns: monotonic time of the first message.
        arm_time: as its start has it.
        started: its start was heard.
        stopped: its stop was heard; ``emitted`` messages were sent, if that says how many.
        ended: the end of its positions was told.
        settled: nothing is to be done until another message comes.
    """

    name: str
    samples: SampleFrames
    begun_ns: int
    arm_time: str | None = None
    started: bool = False
    stopped: bool = False
    emitted: int | None = None
    ended: bool = False
    settled: bool = False
    _recent: dict[int, int] = field(default_factory=dict[int, int])
    _highest: int = -1
    _last_ns: int = 0

    def __post_init__(self) -> None:
        """Nothing has come before it begins."""
        self._last_ns = self.begun_ns

    @property
    def silent(self) -> bool:
        """Whether no data message has come yet."""
        return self._highest < 0

    def take(
        self, number: int, digest: int, now_ns: int
    ) -> Literal["new", "doubled", "of the next"]:
        """Take a data message by its number and a digest of its content; what it is."""
        former = self._recent.get(number)
        if former == digest:
            return "doubled"
        if former is not None or number <= self._highest - WINDOW:
            return "of the next"
        late = not self.silent and (self.stopped or number <= self._highest)
        beyond = self.emitted is not None and number >= self.emitted
        silence_ns = now_ns - self._last_ns
        if (late and silence_ns > LONG_QUIET_NS) or (beyond and silence_ns > QUIET_NS):
            return "of the next"
        self._last_ns = now_ns
        self._recent[number] = digest
        if len(self._recent) > WINDOW:
            del self._recent[next(iter(self._recent))]
        self._highest = max(self._highest, number)
        if beyond:
            self.stopped, self.emitted, self.ended = False, None, False  # that stop was a former's
        return "new"

    def complete(self) -> bool:
        """Whether it was stopped and each of its messages has come since it was heard of first."""
        if not self.stopped or self.emitted is None:
            return False
        first = 0 if self.started else min(self._recent, default=0)
        expected = range(max(first, self.emitted - WINDOW), self.emitted)
        return all(number in self._recent for number in expected)

    def overtaken(self, now_ns: int) -> bool:
        """Whether a start that comes now is its own, which data messages have overtaken."""
        soon = now_ns - self.begun_ns < QUIET_NS
        return not self.started and not self.stopped and self._highest < LATE_START and soon
