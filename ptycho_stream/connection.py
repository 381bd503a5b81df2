"""A client's socket: connected, with keys where the daemon asks for them, and why it is not let in.

Used by :mod:`ptycho_stream.client`, :mod:`ptycho_stream.remote` and :mod:`ptycho_stream.layers`.
libzmq tries a refused connection again and again and says nothing; only its socket monitor tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from ptycho_stream.errors import EndpointError, KeyRefused
from ptycho_stream.keys import ClientKeys
from ptycho_stream.messages import BytesLike

MECHANISM_MISMATCH = 0x11000002
"""Value of HANDSHAKE_FAILED_PROTOCOL (zmq.h: ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)."""
_WATCHED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


LOOK_S = 0.1
"""Between looks at whether the other end has refused to let us in."""

_Socket = TypeVar("_Socket", bound=zmq.Socket[Any])
_Answer = TypeVar("_Answer")


class Connection(Generic[_Socket]):
    """Connects a socket, which is closed with it.

    Args:
        socket: of any kind, also one for asyncio, with its own options set.
        endpoint: to connect to.
        keys: to show; None: plain.

    Raises:
        EndpointError: the endpoint is none; the socket is closed.
    """

    def __init__(self, socket: _Socket, endpoint: str, keys: ClientKeys | None) -> None:
        self.socket = socket
        self._endpoint = endpoint
        self._keys = keys
        self._refusal = ""
        self._hung_up = False
        # What could not be delivered goes with the socket: a `start` must not be carried out
        # minutes later, when the daemon is back.
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if keys is not None:
            keys.show(socket)
        place = f"inproc://connection-{id(self)}"
        socket.monitor(place, _WATCHED)
        self._events: zmq.Socket[bytes] = zmq.Context(shadow=socket.context).socket(zmq.PAIR)
        self._events.setsockopt(zmq.LINGER, 0)
        self._events.connect(place)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise EndpointError(
                f"cannot connect to {endpoint}: {error.strerror}; write tcp://HOST:PORT or "
                "ipc:///PATH"
            ) from error

    def check(self) -> None:
        """Take in what has happened; call now and then.

        Raises:
            KeyRefused: the other end does not let this socket in, and will not.
        """
        while self._events.poll(0):
            event = recv_monitor_message(self._events)
            self._note(int(event["event"]), int(event["value"]))
        if self._refusal:
            raise KeyRefused(f"{self._endpoint} does not let us in: {self._refusal}")

    @property
    def doubt(self) -> str:
        """To be added to the error when nothing was heard: what a failed handshake may mean."""
        if not self._hung_up:
            return ""
        if self._keys is None:
            return "; something there hangs up on us: it may ask for a key"
        return (
            "; something there hangs up on us: the server key that we expect, "
            f"{self._keys.server_public}, may not be its own (`ptycho-stream keys show` on its "
            "machine prints that)"
        )

    def close(self) -> None:
        """End the watch and close the socket."""
        while self._events.poll(0):  # libzmq could stand still at a queue that is full
            self._events.recv_multipart()
        self.socket.disable_monitor()
        self._events.close()
        self.socket.close()

    def _note(self, kind: int, value: int) -> None:
        match kind:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._refusal, self._hung_up = "", False
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH if self._keys is not None:
                self._refusal = (
                    f"our key {self._keys.own.public} is not in its allow-list, is revoked, or "
                    "lacks the right; on its machine, `ptycho-stream keys allow` lets it in"
                )
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL if value == MECHANISM_MISMATCH:
                self._refusal = (
                    "it asks for no key, and we show one: leave the key out"
                    if self._keys is not None
                    else "it asks for a key: give yours and its own (--key and --server-key, or "
                    "keys= in Python)"
                )
            case _:
                self._hung_up = True


class Line(Generic[_Socket]):
    """A DEALER that asks: connected when it is first needed, and anew after :meth:`hang_up`.

    Args:
        context: for the socket, blocking or for asyncio; ended by :meth:`close`.
        endpoint: to connect to.
        keys: to show; None: plain.
        max_answer_bytes: a larger answer ends the connection.
    """

    def __init__(
        self,
        context: zmq.Context[_Socket],
        endpoint: str,
        keys: ClientKeys | None,
        max_answer_bytes: int,
    ) -> None:
        self.endpoint = endpoint
        self._context = context
        self._keys = keys
        self._max_answer_bytes = max_answer_bytes
        self._connection: Connection[_Socket] | None = None

    def connection(self) -> Connection[_Socket]:
        """The connection.

        Raises:
            EndpointError: the endpoint is none.
        """
        if self._connection is None:
            dealer = self._context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.MAXMSGSIZE, self._max_answer_bytes)
            self._connection = Connection(dealer, self.endpoint, self._keys)
        return self._connection

    @property
    def doubt(self) -> str:
        """As of the connection; empty where there is none."""
        return "" if self._connection is None else self._connection.doubt

    def hang_up(self) -> None:
        """Close the connection; answers that are still to come go with it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Give everything back."""
        self.hang_up()
        self._context.term()


def exchange(
    connection: Connection[zmq.Socket[bytes]],
    request: Sequence[BytesLike],
    understand: Callable[[list[bytes]], _Answer | None],
    until_s: float,
) -> _Answer | None:
    """Send a request and wait for its answer until ``time.monotonic()`` is ``until_s``.

    Args:
        connection: to whom.
        request: its parts.
        understand: the answer in a message's parts; None: it is another's.
        until_s: then the answer is None.

    Raises:
        KeyRefused: the other end does not let us in.
    """
    connection.check()
    # libzmq gives up a refused connection, and a send that waits would wait for ever.
    with suppress(zmq.Again):
        connection.socket.send_multipart(request, zmq.NOBLOCK)
    while (left_s := until_s - time.monotonic()) > 0:
        if not connection.socket.poll(int(min(left_s, LOOK_S) * 1e3) + 1):
            connection.check()
            continue
        answer = understand(connection.socket.recv_multipart())
        if answer is not None:
            return answer
    return None


async def exchange_async(
    connection: Connection[zmq.asyncio.Socket],
    request: Sequence[BytesLike],
    understand: Callable[[list[bytes]], _Answer | None],
) -> _Answer:
    """As :func:`exchange`, for asyncio; whoever waits for it limits the time."""
    connection.check()
    await connection.socket.send_multipart(request)
    while True:
        if not await connection.socket.poll(int(LOOK_S * 1e3)):
            connection.check()
            continue
        answer = understand(await connection.socket.recv_multipart())
        if answer is not None:
            return answer
