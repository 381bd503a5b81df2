"""Subscribe to a daemon's results, blocking or with asyncio, and call it.

For programs of one's own, the terminal commands and the viewer.  ::

    with ResultStream() as results:
        for image in results:
            print(image.scan_id, image.object_yx.shape, image.state)

:class:`Daemon` and :class:`AsyncDaemon`, the control clients, are at home in
:mod:`ptycho_stream.remote` and belong to this face too; so do :class:`LayerReader` and
:class:`AsyncLayerReader` of :mod:`ptycho_stream.layers`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import closing
from typing import Self, TypeVar

import zmq
import zmq.asyncio

from ptycho_stream.connection import Connection
from ptycho_stream.errors import EndpointError
from ptycho_stream.keys import ClientKeys
from ptycho_stream.layers import AsyncLayerReader, LayerReader
from ptycho_stream.notebook import LivePlace
from ptycho_stream.remote import AsyncDaemon, Daemon
from ptycho_stream.results import Image
from ptycho_stream.wire import results as wire
from ptycho_stream.wire.follower import Follower

__all__ = [
    "AsyncDaemon",
    "AsyncLayerReader",
    "AsyncResultStream",
    "Daemon",
    "Image",
    "LayerReader",
    "ResultStream",
]

RESULTS_ENDPOINT = "tcp://127.0.0.1:9600"
RESYNC_ENDPOINT = "tcp://127.0.0.1:9601"

# Messages that wait on this side while the program is busy; with the sender's limit on their size
# this bounds memory.  What is lost is asked for.
RECEIVE_HWM = 16
MAX_MESSAGE_BYTES = 512 << 20
# Taken from the socket before the program gets an image: enough to skip stale ones.
MAX_MESSAGES_PER_TURN = 64
LONGEST_POLL_S = 1.0

_T = TypeVar("_T")
# What to wait for, step by step: it yields the time up to which a poll may wait, and returns.
_Steps = Generator[float, None, _T]


class _Link:
    """The two sockets of a stream, the follower that knows what came over them, and what to do.

    The streams differ in how they wait only: they poll the sockets between the steps of
    :meth:`next_image`, :meth:`latest` and :meth:`wait_complete`.
    """

    def __init__(
        self,
        endpoint: str,
        resync_endpoint: str,
        scan_id: str | None,
        timeout_s: float | None,
        keys: ClientKeys | None,
    ) -> None:
        self.follower = Follower(scan_id)
        self.endpoints = f"{endpoint} and {resync_endpoint}"
        self._scan_id = scan_id
        self._timeout_s = timeout_s
        self._heard_at_s = time.monotonic()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.updates = self._context.socket(zmq.SUB)
        self.resync = self._context.socket(zmq.DEALER)
        self.updates.setsockopt(zmq.RCVHWM, RECEIVE_HWM)
        # A request that could not leave is made anew; it must not be sent twice after a restart.
        self.resync.setsockopt(zmq.SNDHWM, 1)
        self.resync.setsockopt(zmq.IMMEDIATE, 1)
        self._connections: list[Connection[zmq.Socket[bytes]]] = []
        for socket, address in ((self.updates, endpoint), (self.resync, resync_endpoint)):
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            # Notice a machine that has gone without a word.
            socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
            try:
                self._connections.append(Connection(socket, address, keys))
            except EndpointError:
                self.close()
                raise
        self.updates.subscribe(wire.BEACON_TOPIC)
        self.updates.subscribe(wire.IMAGE_TOPIC)

    def ask(self) -> None:
        """Send the request that is due, if one is."""
        now_s = time.monotonic()
        request = self.follower.request(now_s)
        if request is None:
            return
        try:
            self.resync.send_multipart(request, zmq.NOBLOCK)
        except zmq.Again:  # not connected just now
            self.follower.not_sent(now_s)

    def wait_ms(self, until_s: float) -> int:
        """How long a poll may wait, at least 1 ms."""
        now_s = time.monotonic()
        wait_s = min(LONGEST_POLL_S, until_s - now_s, self.follower.wait_s(now_s))
        return max(1, int(wait_s * 1e3))

    def drain(self) -> None:
        """Take what has come."""
        heard = False
        for socket, topics in ((self.updates, 1), (self.resync, 0)):
            for _ in range(MAX_MESSAGES_PER_TURN):
                try:
                    parts = socket.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                self.follower.receive([part.buffer for part in parts[topics:]])
                heard = True
        for connection in self._connections:
            connection.check()
        now_s = time.monotonic()
        if heard:
            self._heard_at_s = now_s
        elif self._timeout_s is not None and now_s - self._heard_at_s > self._timeout_s:
            raise EndpointError(
                f"nothing heard from {self.endpoints} for {self._timeout_s:g} s: is ptycho-streamd "
                "running, and are these its results.endpoint and results.resync_endpoint?"
                f"{self._doubt()}"
            )
        self.follower.check_wanted(now_s)

    def next_image(self) -> _Steps[Image]:
        """To the next image that differs from the one before."""
        image = self.follower.take()
        while image is None:
            yield float("inf")
            image = self.follower.take()
        return image

    def latest(self, timeout_s: float | None) -> _Steps[Image | None]:
        """To the newest image, whole, or to the news that there is none."""
        follower, until_s = self.follower, _until(timeout_s)
        follower.want(self._scan_id)  # ask even if nothing seems to be missing
        while not follower.empty and follower.settled() is None:
            if timeout_s is not None and time.monotonic() >= until_s:
                raise self._late("whole image", timeout_s)
            yield until_s
        return follower.settled()

    def wait_complete(
        self,
        scan_id: str | None,
        timeout_s: float | None,
        after: str,
        on_image: Callable[[Image], None] | None,
    ) -> _Steps[Image]:
        """To the final image of a scan."""
        follower, until_s = self.follower, _until(timeout_s)
        wanted = scan_id or self._scan_id
        follower.want(wanted)
        try:
            while True:
                step = follower.take()
                if on_image is not None and step is not None and step.scan_id > after:
                    on_image(step)
                image = follower.settled()
                if image is not None and image.scan_id > after:
                    if image.final:
                        return image
                    if wanted is None:
                        wanted = image.scan_id
                        follower.want(wanted)
                if timeout_s is not None and time.monotonic() >= until_s:
                    raise self._late("final image", timeout_s)
                yield until_s
        finally:  # given up or interrupted, too: the stream goes on as before
            follower.want(self._scan_id)

    def _late(self, what: str, timeout_s: float) -> EndpointError:
        """The error for ``what`` not having come in time."""
        follower = self.follower
        if not follower.heard:
            why = f"nothing at all was heard: is ptycho-streamd running?{self._doubt()}"
        elif follower.problem:
            why = f"the last fault was: {follower.problem}"
        elif follower.empty:
            why = "the daemon has no image yet: it needs frames with positions"
        else:
            why = f"the newest image is of scan {follower.newest_scan_id}"
        return EndpointError(f"no {what} from {self.endpoints} within {timeout_s:g} s; {why}")

    def _doubt(self) -> str:
        return next((made.doubt for made in self._connections if made.doubt), "")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self.updates.close()
        self.resync.close()
        self._context.term()


def _until(timeout_s: float | None) -> float:
    return float("inf") if timeout_s is None else time.monotonic() + timeout_s


class ResultStream:
    """The images of a daemon as they grow; blocking.

    It asks for what it has missed by itself, and goes on after a restart of the daemon.  A program
    that is slow skips images and always gets the newest.

    Args:
        endpoint: the daemon's ``results.endpoint``.
        resync_endpoint: the daemon's ``results.resync_endpoint``.
        scan_id: follow this scan, and end with its final image; None: the newest one, for ever.
        timeout_s: raise EndpointError if nothing at all, not even the beacon of every second, is
            heard for so long; None: wait.
        keys: of a daemon that asks for keys (:func:`ptycho_stream.keys.load_client_keys`).
    """

    def __init__(
        self,
        endpoint: str = RESULTS_ENDPOINT,
        resync_endpoint: str = RESYNC_ENDPOINT,
        *,
        scan_id: str | None = None,
        timeout_s: float | None = 30.0,
        keys: ClientKeys | None = None,
    ) -> None:
        self._scan_id = scan_id
        self._over = False
        self._link = _Link(endpoint, resync_endpoint, scan_id, timeout_s, keys)
        self._poller = zmq.Poller()
        self._poller.register(self._link.updates, zmq.POLLIN)
        self._poller.register(self._link.resync, zmq.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the sockets back."""
        self._link.close()

    @property
    def held(self) -> dict[str, tuple[int, int]]:
        """Scans whose images the daemon holds, as of its last beacon: generation and last update.

        Oldest scan first; empty before anything was heard.
        """
        return dict(self._link.follower.held)

    def __repr__(self) -> str:
        return f"<ResultStream from {self._link.endpoints}>"

    def __iter__(self) -> Iterator[Image]:
        return self

    def __next__(self) -> Image:
        """The next image that differs from the one before.

        Raises:
            EndpointError: nothing was heard for ``timeout_s``.
            KeyRefused: the daemon does not let these keys in.
            ScanNotFound: the scan asked for is not held any more.
        """
        if self._over:
            raise StopIteration
        image = self._run(self._link.next_image())
        self._over = self._scan_id is not None and image.final
        return image

    def latest(self, timeout_s: float | None = None) -> Image | None:
        """The newest image, whole; None if the daemon says that it has none yet.

        Raises:
            EndpointError: nothing was heard for the stream's timeout, or not in ``timeout_s``.
        """
        return self._run(self._link.latest(timeout_s))

    def wait_complete(
        self,
        scan_id: str | None = None,
        timeout_s: float | None = None,
        *,
        after: str = "",
        on_image: Callable[[Image], None] | None = None,
    ) -> Image:
        """Wait for the final image of a scan, however the scan ends.

        Args:
            scan_id: of that scan; None: the newest one, or the first to come if there is none.
            timeout_s: how long to wait; None: as long as the daemon lives.
            after: without ``scan_id``, wait for a scan newer than this one.
            on_image: is given each image on the way.

        Raises:
            EndpointError: it did not come in time, or nothing was heard for the stream's timeout.
            ScanNotFound: the scan's image is not held any more.
        """
        return self._run(self._link.wait_complete(scan_id, timeout_s, after, on_image))

    def show(
        self, scan_id: str | None = None, timeout_s: float | None = None, *, after: str = ""
    ) -> Image:
        """In a Jupyter notebook, show a scan's image as it grows, in one place below the cell.

        Arguments, result and errors are those of :meth:`wait_complete`; interrupt the kernel to
        stop it earlier.

        Raises:
            MissingPackage: IPython is not installed.
        """
        place = LivePlace()
        image = self.wait_complete(scan_id, timeout_s, after=after, on_image=place)
        place(image)
        return image

    def _run(self, steps: _Steps[_T]) -> _T:
        with closing(steps):
            while True:
                try:
                    until_s = next(steps)
                except StopIteration as end:
                    return end.value
                self._turn(until_s)

    def _turn(self, until_s: float) -> None:
        self._link.ask()
        self._poller.poll(self._link.wait_ms(until_s))
        self._link.drain()


class AsyncResultStream:
    """The images of a daemon as they grow; for asyncio.

    Like :class:`ResultStream`, with ``async with``, ``async for`` and ``await``.
    """

    def __init__(
        self,
        endpoint: str = RESULTS_ENDPOINT,
        resync_endpoint: str = RESYNC_ENDPOINT,
        *,
        scan_id: str | None = None,
        timeout_s: float | None = 30.0,
        keys: ClientKeys | None = None,
    ) -> None:
        self._scan_id = scan_id
        self._over = False
        self._link = _Link(endpoint, resync_endpoint, scan_id, timeout_s, keys)
        self._poller = zmq.asyncio.Poller()
        self._poller.register(self._link.updates, zmq.POLLIN)
        self._poller.register(self._link.resync, zmq.POLLIN)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the sockets back."""
        self._link.close()

    @property
    def held(self) -> dict[str, tuple[int, int]]:
        """Scans whose images the daemon holds, as of its last beacon: generation and last update.

        Oldest scan first; empty before anything was heard.
        """
        return dict(self._link.follower.held)

    def __repr__(self) -> str:
        return f"<AsyncResultStream from {self._link.endpoints}>"

    def __aiter__(self) -> AsyncIterator[Image]:
        return self

    async def __anext__(self) -> Image:
        """The next image that differs from the one before; errors as in ResultStream."""
        if self._over:
            raise StopAsyncIteration
        image = await self._run(self._link.next_image())
        self._over = self._scan_id is not None and image.final
        return image

    async def latest(self, timeout_s: float | None = None) -> Image | None:
        """The newest image, whole; None if the daemon says that it has none yet."""
        return await self._run(self._link.latest(timeout_s))

    async def wait_complete(
        self,
        scan_id: str | None = None,
        timeout_s: float | None = None,
        *,
        after: str = "",
        on_image: Callable[[Image], None] | None = None,
    ) -> Image:
        """Wait for the final image of a scan, however the scan ends; as in ResultStream."""
        steps = self._link.wait_complete(scan_id, timeout_s, after, on_image)
        return await self._run(steps)

    async def show(
        self, scan_id: str | None = None, timeout_s: float | None = None, *, after: str = ""
    ) -> Image:
        """Show a scan's image in a Jupyter notebook as it grows; as in ResultStream.

        As a task (``asyncio.create_task``) it leaves the notebook free for other cells meanwhile.
        """
        place = LivePlace()
        image = await self.wait_complete(scan_id, timeout_s, after=after, on_image=place)
        place(image)
        return image

    async def _run(self, steps: _Steps[_T]) -> _T:
        with closing(steps):
            while True:
                try:
                    until_s = next(steps)
                except StopIteration as end:
                    return end.value
                self._link.ask()
                await self._poller.poll(self._link.wait_ms(until_s))
                self._link.drain()
