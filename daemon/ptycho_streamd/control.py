"""The control socket: a ROUTER on which every request is answered, also a damaged one.

The supervisor owns one, polls it, and replies when it has the answer, at once or later; what a
command does is its business.  Requests arrive here already checked against the command table.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import zmq

from ptycho_stream.errors import ControlError, WireError
from ptycho_stream.wire import control as wire
from ptycho_streamd.log_limit import LimitedLog
from ptycho_streamd.security import Gate

MAX_REQUESTS_PER_POLL = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A request to be answered with :meth:`ControlServer.reply` or :meth:`ControlServer.fail`.

    ``arguments`` hold every argument of the command, defaults filled in; ``envelope`` is the way
    back to who asked.
    """

    envelope: tuple[bytes, ...]
    id: wire.RequestId
    command: str
    arguments: dict[str, Any]


class ControlServer:
    """Takes control requests.

    Args:
        gate: of this process.
        endpoint: to bind, ``control.endpoint`` of the settings.

    Raises:
        EndpointError: the endpoint cannot be bound.
    """

    def __init__(self, gate: Gate, endpoint: str) -> None:
        self.requests_refused = 0
        self._trouble = LimitedLog(_log)
        self._socket = gate.context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_REQUEST_BYTES)
        # A client that asks and never reads must not make the daemon grow.
        self._socket.setsockopt(zmq.SNDHWM, 16)
        self._socket.setsockopt(zmq.RCVHWM, MAX_REQUESTS_PER_POLL)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._door = gate.bind(self._socket, endpoint, "control.endpoint", "control", "control")

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """To register with a poller for ``POLLIN``."""
        return self._socket

    def poll(self) -> list[Request]:
        """Requests that wait; never blocks.  Refused ones are answered here."""
        requests: list[Request] = []
        for _ in range(MAX_REQUESTS_PER_POLL):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            if not self._door.admits(frames[0]):
                continue
            peer, *parts = [frame.bytes for frame in frames]
            # A REQ socket puts an empty part before its message and wants it back; a DEALER not.
            delimiter = parts[:1] if len(parts) > 1 and not parts[0] else []
            request = self._checked((peer, *delimiter), parts[len(delimiter) :])
            if request is not None:
                requests.append(request)
        return requests

    def reply(self, request: Request, result: Any) -> None:
        """Answer with ``result``, made of JSON values, numpy scalars and paths."""
        try:
            data = wire.encode_result(request.id, result)
        except (TypeError, NotImplementedError, OverflowError) as error:
            _log.exception("the result of %s cannot be sent", request.command)
            self.fail(request, "failed", f"the result of {request.command} cannot be sent: {error}")
            return
        self._send(request.envelope, data)

    def fail(self, request: Request, code: str, message: str) -> None:
        """Answer that the request was refused or has failed."""
        self._send(request.envelope, wire.encode_error(request.id, code, message))

    def close(self) -> None:
        """Give the socket back."""
        self._door.close()

    def _checked(self, envelope: tuple[bytes, ...], parts: list[bytes]) -> Request | None:
        data = parts[0] if parts else b""
        try:
            if len(parts) != 1:
                raise ControlError("bad_request", f"a request has one part, not {len(parts)}")
            request = wire.decode_request(data)
        except (WireError, ControlError) as error:
            code = error.code if isinstance(error, ControlError) else "bad_request"
            self.requests_refused += 1
            self._trouble.warning(code, f"control request refused ({code}): {error}")
            self._send(envelope, wire.encode_error(wire.salvage_id(data), code, str(error)))
            return None
        return Request(envelope, request.id, request.command, request.arguments)

    def _send(self, envelope: tuple[bytes, ...], data: bytes) -> None:
        # A ROUTER drops what is meant for a client that has gone; nobody waits for it any more.
        self._socket.send_multipart([*envelope, data], zmq.NOBLOCK)
