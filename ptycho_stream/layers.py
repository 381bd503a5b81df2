"""Read other layers of a scan's image: what the network alone made, and the misfit map.

Import :class:`LayerReader` and :class:`AsyncLayerReader` from :mod:`ptycho_stream.client`.  Updates
do not carry these layers; whoever wants them asks as often as they like.
"""

from __future__ import annotations

import asyncio
import time
from typing import Self

import zmq
import zmq.asyncio

from ptycho_stream.errors import EndpointError
from ptycho_stream.wire import results as wire
from ptycho_stream.wire.layers import Layer, LayerFollower, LayerName, LayerUpdate

MAX_MESSAGE_BYTES = 512 << 20


def _connect(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, endpoint: str) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise EndpointError(
            f"cannot connect to {endpoint}: {error.strerror}; write tcp://HOST:PORT or ipc:///PATH"
        ) from error


def _silent(endpoint: str, timeout_s: float) -> EndpointError:
    return EndpointError(
        f"no layer from {endpoint} within {timeout_s:g} s: is ptycho-streamd running, and is this "
        "its results.resync_endpoint?"
    )


def _pause_s(answer: LayerUpdate | wire.Refusal) -> float | None:
    """How long to wait before asking for the rest; None: there is no more to ask for.

    Raises:
        EndpointError: the daemon does not understand us.
    """
    if isinstance(answer, LayerUpdate):
        return wire.MIN_RESYNC_INTERVAL_S if answer.more else None
    match answer.reason:
        case "busy":
            return max(answer.retry_s, 0.001)
        case "bad_request":
            raise EndpointError(f"the daemon knows no layers ({answer.message}): update it")
        case _:
            return None


class LayerReader:
    """A layer of a scan's image, read as often as one likes; blocking.

    Only what is new travels.  One thread may use an object at a time.

    Args:
        name: ``predicted`` (what the network made, where the image is refined) or ``misfit``.
        resync_endpoint: the daemon's ``results.resync_endpoint``.
        scan_id: of this scan; None: of the newest.
        timeout_s: how long an answer may take.

    Example::

        with LayerReader("misfit") as misfit:
            layer = misfit.read()
    """

    def __init__(
        self,
        name: LayerName,
        resync_endpoint: str = "tcp://127.0.0.1:9601",
        *,
        scan_id: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self._endpoint, self._timeout_s = resync_endpoint, timeout_s
        self._follower = LayerFollower(name, scan_id)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the socket back."""
        self._hang_up()
        self._context.term()

    def read(self) -> Layer | None:
        """The layer as it is now; None if no image of the scan is held.

        Raises:
            EndpointError: the daemon does not answer.
            WireError: its answer cannot be understood.
        """
        until_s = time.monotonic() + self._timeout_s
        while True:
            pause_s = _pause_s(self._exchanged(until_s))
            if pause_s is None:
                return self._follower.held
            time.sleep(pause_s)

    def _exchanged(self, until_s: float) -> LayerUpdate | wire.Refusal:
        if self._socket is None:
            self._socket = self._context.socket(zmq.DEALER)
            _connect(self._socket, self._endpoint)
        self._socket.send_multipart(self._follower.request())
        while self._socket.poll(max(0, int((until_s - time.monotonic()) * 1e3))):
            answer = self._follower.receive(self._socket.recv_multipart())
            if answer is not None:
                return answer
        self._hang_up()
        raise _silent(self._endpoint, self._timeout_s)

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class AsyncLayerReader:
    """A layer of a scan's image, for asyncio; like :class:`LayerReader`, with ``await``."""

    def __init__(
        self,
        name: LayerName,
        resync_endpoint: str = "tcp://127.0.0.1:9601",
        *,
        scan_id: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self._endpoint, self._timeout_s = resync_endpoint, timeout_s
        self._follower = LayerFollower(name, scan_id)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the socket back."""
        self._hang_up()
        self._context.term()

    async def read(self) -> Layer | None:
        """The layer as it is now; None if no image of the scan is held; errors as in LayerReader.

        One task may read at a time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    pause_s = _pause_s(await self._exchanged())
                    if pause_s is None:
                        return self._follower.held
                    await asyncio.sleep(pause_s)
        except TimeoutError:
            self._hang_up()
            raise _silent(self._endpoint, self._timeout_s) from None

    async def _exchanged(self) -> LayerUpdate | wire.Refusal:
        if self._socket is None:
            self._socket = self._context.socket(zmq.DEALER)
            _connect(self._socket, self._endpoint)
        await self._socket.send_multipart(self._follower.request())
        while True:
            answer = self._follower.receive(await self._socket.recv_multipart())
            if answer is not None:
                return answer

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
