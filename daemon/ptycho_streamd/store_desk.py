"""Answers requests that read much from the scan store, in a thread beside the supervisor's loop.

The supervisor's loop keeps the other stages alive and must not wait for a disk.  It hands such a
request over and picks the outcome up when :attr:`StoreDesk.wakes` becomes readable.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ptycho_stream.errors import ControlError
from ptycho_streamd.control import Request

MAX_WAITING = 64
"""More requests are refused: each answer may hold some megabytes."""
PATIENCE_S = 10.0
"""A request that waited longer has been given up by who asked."""

Command = Callable[[dict[str, Any]], Any]


class StoreDesk:
    """One thread and the requests that it is to answer, in the order of their coming.

    Args:
        commands: what answers, by name; called in the desk's thread only.

    Attributes:
        wakes: file descriptor that is readable when :meth:`answered` has something.
    """

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self.wakes = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._commands = dict(commands)
        self._thread = ThreadPoolExecutor(1, "store-desk")
        self._waiting: deque[tuple[Request, Future[Any]]] = deque()

    def __contains__(self, command: str) -> bool:
        return command in self._commands

    @property
    def commands(self) -> tuple[str, ...]:
        """Names of those that are answered here."""
        return tuple(self._commands)

    def submit(self, request: Request) -> None:
        """Take a request.

        Raises:
            ControlError: too many wait.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise ControlError(
                "unavailable", f"{MAX_WAITING} requests wait for the disk: try again in a second"
            )
        until_s = time.monotonic() + PATIENCE_S
        future = self._thread.submit(self._answer, request, until_s)
        self._waiting.append((request, future))
        future.add_done_callback(lambda _done: os.eventfd_write(self.wakes, 1))

    def answered(self) -> list[tuple[Request, Callable[[], Any]]]:
        """Requests that are done, and for each what returns its result or raises its error."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wakes)
        done: list[tuple[Request, Callable[[], Any]]] = []
        while self._waiting and self._waiting[0][1].done():
            request, future = self._waiting.popleft()
            done.append((request, future.result))
        return done

    def close(self) -> None:
        """Finish what is being done, drop the rest."""
        self._thread.shutdown(cancel_futures=True)
        os.close(self.wakes)

    def _answer(self, request: Request, until_s: float) -> Any:
        if time.monotonic() > until_s:
            raise ControlError("timeout", "the disk is too slow: try again")
        return self._commands[request.command](request.arguments)
