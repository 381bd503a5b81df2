"""Counts the messages that a numbered stream has lost.

Used by the STINS decoder, whose sender numbers all its messages: a gap there is a message that
never came, whatever it was, and every other one missing is a second receiver that takes them.  And
by the Bluesky decoder, to tell whether a run that has ended may still have events on their way.
"""

from __future__ import annotations

from typing import Final

WINDOW: Final = 64
"""A message so far behind is lost, not late."""
MAX_GAP: Final = 4096
"""A larger jump is a sender that counts anew, not a loss."""


class MessageNumbers:
    """Which of consecutive numbers have not come."""

    def __init__(self) -> None:
        self._next: int | None = None
        self._absent: set[int] = set()

    def take(self, number: int) -> int:
        """Take the number of a message; how many before it are lost for good, as of now."""
        expected = self._next
        if expected is None or abs(number - expected) > MAX_GAP:
            return self._start(number)
        if number >= expected:
            self._absent.update(range(expected, number))
            self._next = number + 1
        else:
            self._absent.discard(number)
        if not self._absent:
            return 0
        given_up = {absent for absent in self._absent if absent < number - WINDOW}
        self._absent -= given_up
        return len(given_up)

    def begin(self, number: int) -> int:
        """Take the number of a series' first message, with which numbers may start again."""
        if self._next is None or number < self._next:
            return self._start(number)
        return self.take(number)

    def expect(self, number: int) -> None:
        """The stream begins with ``number``."""
        self._next = number

    def awaits(self, last: int) -> bool:
        """Whether one of the numbers up to ``last`` has not come and may still come."""
        return self._next is None or self._next <= last or bool(self._absent)

    def settle(self) -> int:
        """Give up those that are late, at a series' end; how many there were."""
        lost = len(self._absent)
        self._absent.clear()
        return lost

    def _start(self, number: int) -> int:
        self._next = number + 1
        return self.settle()
