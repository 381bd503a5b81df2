"""The sending end of a simulated detector or positioner, which says so if a message gets lost.

Used by :mod:`ptycho_stream.simulate.detector`.  It waits until somebody is there to receive, blocks
while that somebody is slow, gives up with an error that names the endpoint, and closes in bounded
time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

import zmq

from ptycho_stream.errors import EndpointError

SocketKind = Literal["push", "pub"]

_POLL_MS = 100
# Messages that may wait for a receiver.  Few, so that little memory is taken and little is left to
# send when it is over.  Never changed on a living socket: libzmq 4.3.5 crashes when a connection
# ends meanwhile.
_QUEUE_MESSAGES = 16
_FULL_PAUSE_S = 0.001


class Outlet:
    """A context manager around a PUSH or PUB socket, bound or connected.

    Args:
        endpoint: to bind or connect; ``tcp://127.0.0.1:*`` binds any free port.
        kind: ``push`` deals messages to receivers and keeps what they have not taken; ``pub`` sends
            everything to every subscriber.  Other than real ones it waits for one that is slow,
            whose own queue may still overflow; what is sent before somebody subscribes is lost.
        attach: ``bind`` (as detectors do) or ``connect``.
        timeout_s: how long a receiver may be absent or take nothing and, at the end, take for what
            is queued (16 messages).

    Raises:
        EndpointError: the endpoint cannot be bound or connected.
    """

    def __init__(
        self,
        endpoint: str,
        kind: SocketKind = "push",
        attach: Literal["bind", "connect"] = "bind",
        timeout_s: float = 30.0,
    ) -> None:
        self._kind = kind
        self._timeout_s = timeout_s
        self._context = zmq.Context()
        # XPUB is a PUB that hears of its subscribers, which is how we know that there is one.
        self._socket = self._context.socket(zmq.PUSH if kind == "push" else zmq.XPUB)
        self._subscribers = 0
        self._socket.sndhwm = _QUEUE_MESSAGES
        if kind == "pub":
            self._socket.setsockopt(zmq.XPUB_NODROP, 1)
        # Without it a connecting PUSH takes messages before there is anybody to send them to.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        try:
            if attach == "bind":
                self._socket.bind(endpoint)
            else:
                self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise EndpointError(
                f"cannot {attach} {endpoint}: {error.strerror}; choose another port or stop the "
                "program that uses it"
            ) from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(linger=error is None)

    def close(self, linger: bool = True) -> None:
        """Close the socket, after what is queued has been taken unless ``linger`` is False.

        Raises:
            EndpointError: it was not taken in ``timeout_s``.
        """
        began_s = time.monotonic()
        self._context.destroy(linger=round(self._timeout_s * 1000) if linger else 0)
        # ZeroMQ does not say whether it delivered or gave up; giving up takes all of the time.
        if linger and time.monotonic() - began_s >= self._timeout_s:
            raise EndpointError(
                f"the receiver at {self.endpoint} did not take the last messages within "
                f"{self._timeout_s:g} s, and they are lost: is the daemon still running?"
            )

    def wait_for_receiver(self, timeout_s: float | None = None) -> None:
        """Return when a receiver is connected (``push``) or subscribed (``pub``).

        Raises:
            EndpointError: nobody came in time.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + limit_s
        while not self._has_receiver(_POLL_MS):
            if time.monotonic() > deadline_s:
                raise EndpointError(
                    f"nobody connected to {self.endpoint} within {limit_s:g} s: start the daemon, "
                    "or correct its settings (this endpoint, socket = "
                    f"{'pull' if self._kind == 'push' else 'sub'!r})"
                )

    def send(self, parts: Sequence[bytes]) -> None:
        """Send one message, waiting while all receivers are busy.

        Raises:
            EndpointError: none took anything for ``timeout_s``.
        """
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK)
            except zmq.Again:
                self._await_room()
            else:
                return
            if time.monotonic() > deadline_s:
                raise EndpointError(
                    f"no receiver at {self.endpoint} took a message for {self._timeout_s:g} s: "
                    "is the daemon still running?"
                )

    def _await_room(self) -> None:
        if self._kind == "push":
            self._socket.poll(_POLL_MS, zmq.POLLOUT)
        else:
            time.sleep(_FULL_PAUSE_S)  # an XPUB says that it is ready, whether it is or not

    def _has_receiver(self, wait_ms: int) -> bool:
        if self._kind == "push":
            return bool(self._socket.poll(wait_ms, zmq.POLLOUT))
        while self._socket.poll(wait_ms if not self._subscribers else 0, zmq.POLLIN):
            self._subscribers += 1 if self._socket.recv()[:1] == b"\x01" else -1
        return self._subscribers > 0
