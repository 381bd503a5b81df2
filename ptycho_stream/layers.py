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

from ptycho_stream.connection import Line, exchange, exchange_async
from ptycho_stream.errors import EndpointError
from ptycho_stream.keys import ClientKeys
from ptycho_stream.wire import results as wire
from ptycho_stream.wire.layers import Layer, LayerFollower, LayerName, LayerUpdate

MAX_MESSAGE_BYTES = 512 << 20


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
        self._timeout_s = timeout_s
        self._follower = LayerFollower(name, scan_id)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._line = Line(context, resync_endpoint, keys, MAX_MESSAGE_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the socket back."""
        self._line.close()

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
            self._line.hang_up()
            raise

    def _exchanged(self, until_s: float) -> LayerUpdate | wire.Refusal:
        connection, follower = self._line.connection(), self._follower
        answer = exchange(connection, follower.request(), follower.receive, until_s)
        if answer is None:
            raise _silent(self._line.endpoint, self._timeout_s, connection.doubt)
        return answer


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
        self._timeout_s = timeout_s
        self._follower = LayerFollower(name, scan_id)
        self._line = Line(zmq.asyncio.Context(), resync_endpoint, keys, MAX_MESSAGE_BYTES)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the socket back."""
        self._line.close()

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
            doubt = self._line.doubt
            self._line.hang_up()
            raise _silent(self._line.endpoint, self._timeout_s, doubt) from None
        except EndpointError:
            self._line.hang_up()
            raise

    async def _exchanged(self) -> LayerUpdate | wire.Refusal:
        connection, follower = self._line.connection(), self._follower
        return await exchange_async(connection, follower.request(), follower.receive)
