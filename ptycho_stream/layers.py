"""Read other layers of a scan's image: what the network alone made, and the misfit map.

Import :class:`LayerReader` and :class:`AsyncLayerReader` from :mod:`ptycho_stream.client`.  Updates
do not carry these layers; whoever wants them asks as often as they like.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Self

import zmq
import zmq.asyncio

from ptycho_stream.connection import Connection
from ptycho_stream.errors import EndpointError
from ptycho_stream.keys import ClientKeys
from ptycho_stream.wire import results as wire
from ptycho_stream.wire.layers import Layer, LayerFollower, LayerName, LayerUpdate

MAX_MESSAGE_BYTES = 512 << 20


LOOK_S = 0.2
"""Between looks at whether the daemon has refused to let us in."""


def _silent(endpoint: str, timeout_s: float, doubt: str) -> EndpointError:
    return EndpointError(
        f"no layer from {endpoint} within {timeout_s:g} s: is ptycho-streamd running, and is this "
        f"its results.resync_endpoint?{doubt}"
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
        keys: of a daemon that asks for keys (:func:`ptycho_stream.keys.load_client_keys`).

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
        keys: ClientKeys | None = None,
    ) -> None:
        self._endpoint, self._timeout_s, self._keys = resync_endpoint, timeout_s, keys
        self._follower = LayerFollower(name, scan_id)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._connection: Connection[zmq.Socket[bytes]] | None = None

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
            KeyRefused: it does not let us in.
            WireError: its answer cannot be understood.
        """
        until_s = time.monotonic() + self._timeout_s
        try:
            while True:
                pause_s = _pause_s(self._exchanged(until_s))
                if pause_s is None:
                    return self._follower.held
                time.sleep(pause_s)
        except EndpointError:
            self._hang_up()
            raise

    def _exchanged(self, until_s: float) -> LayerUpdate | wire.Refusal:
        if self._connection is None:
            dealer = self._context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            self._connection = Connection(dealer, self._endpoint, self._keys)
        connection = self._connection
        connection.check()
        # libzmq gives up a refused connection, and a send that waits would wait for ever.
        with suppress(zmq.Again):
            connection.socket.send_multipart(self._follower.request(), zmq.NOBLOCK)
        while (left_s := until_s - time.monotonic()) > 0:
            if not connection.socket.poll(int(min(left_s, LOOK_S) * 1e3) + 1):
                connection.check()
                continue
            answer = self._follower.receive(connection.socket.recv_multipart())
            if answer is not None:
                return answer
        raise _silent(self._endpoint, self._timeout_s, connection.doubt)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class AsyncLayerReader:
    """A layer of a scan's image, for asyncio; like :class:`LayerReader`, with ``await``."""

    def __init__(
        self,
        name: LayerName,
        resync_endpoint: str = "tcp://127.0.0.1:9601",
        *,
        scan_id: str | None = None,
        timeout_s: float = 10.0,
        keys: ClientKeys | None = None,
    ) -> None:
        self._endpoint, self._timeout_s, self._keys = resync_endpoint, timeout_s, keys
        self._follower = LayerFollower(name, scan_id)
        self._context = zmq.asyncio.Context()
        self._connection: Connection[zmq.asyncio.Socket] | None = None

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
            doubt = "" if self._connection is None else self._connection.doubt
            self._hang_up()
            raise _silent(self._endpoint, self._timeout_s, doubt) from None
        except EndpointError:
            self._hang_up()
            raise

    async def _exchanged(self) -> LayerUpdate | wire.Refusal:
        if self._connection is None:
            dealer = self._context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            self._connection = Connection(dealer, self._endpoint, self._keys)
        connection = self._connection
        connection.check()
        await connection.socket.send_multipart(self._follower.request())
        while True:
            if not await connection.socket.poll(int(LOOK_S * 1e3)):
                connection.check()
                continue
            answer = self._follower.receive(await connection.socket.recv_multipart())
            if answer is not None:
                return answer

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
