"""The supervisor's message bus: what stages tell it and what it asks of them, as msgpack.

The supervisor holds a :class:`Bus` (ROUTER) on a private ipc path, each stage the other end
(:class:`ptycho_streamd.stage.Stage`, DEALER).  Only small control values travel here, never frames:
those go through the scan store.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import msgpack
import numpy as np
import zmq

from ptycho_stream.errors import MalformedMessage

BUS_VARIABLE = "PTYCHO_STREAM_BUS"
SUPERVISOR_VARIABLE = "PTYCHO_STREAM_SUPERVISOR_PID"


@dataclass(frozen=True, slots=True)
class Beat:
    """A stage lives: its status for people and a snapshot of its metrics."""

    stage: str
    pid: int
    status: dict[str, Any]
    metrics: list[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A stage did what request ``request_id`` asked."""

    stage: str
    request_id: int
    result: Any


@dataclass(frozen=True, slots=True)
class Refusal:
    """A stage refused or failed request ``request_id``; ``code`` is for programs."""

    stage: str
    request_id: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Fatal:
    """A stage is about to exit, because of a fault that a user has to mend."""

    stage: str
    pid: int
    message: str


@dataclass(frozen=True, slots=True)
class StageRequest:
    """The supervisor hands a control request on to a stage, which must answer or fail it."""

    request_id: int
    command: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stop:
    """The daemon stops: drain, save, seal and exit."""


@dataclass(frozen=True, slots=True)
class Reload:
    """The configuration file has changed and was found to be sound: read it again."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """What the stage is at is not wanted any more: end it.  Training jobs only."""


FromStage = Beat | Answer | Refusal | Fatal
ToStage = StageRequest | Stop | Reload | Cancel
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Beat, Answer, Refusal, Fatal, StageRequest, Stop, Reload, Cancel)
}


def encode(message: FromStage | ToStage) -> bytes:
    """One bus message as bytes."""
    body = {"kind": type(message).__name__, **asdict(message)}
    return cast("bytes", msgpack.packb(body, default=_plain))


def decode(data: bytes) -> Any:
    """The message in ``data``.

    Raises:
        MalformedMessage: ``data`` is no message of this bus.
    """
    try:
        body = msgpack.unpackb(data, strict_map_key=False)
        return _KINDS[body.pop("kind")](**body)
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise MalformedMessage(f"not a message of the supervisor's bus: {error!r}") from error


def _plain(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)


class Bus:
    """The supervisor's end.  ``socket`` is to be polled; ``endpoint`` goes to the children."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        # A folder of mode 0700 keeps other users off the bus; it is short because ipc paths are
        # limited to 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ptycho-streamd-"))
        self.endpoint = f"ipc://{self.folder}/bus"
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.bind(self.endpoint)

    def receive(self) -> list[FromStage]:
        """All that has come, oldest first; does not wait.

        Raises:
            MalformedMessage: a stage sent what this version does not know.
        """
        messages: list[FromStage] = []
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            messages.append(decode(parts[-1]))

    def send(self, stage: str, pid: int, message: ToStage) -> None:
        """Send to one incarnation of a stage; a dead one gets nothing."""
        with contextlib.suppress(zmq.Again):  # a full queue: the heartbeat will find the stage out
            self.socket.send_multipart([identity(stage, pid), encode(message)], zmq.NOBLOCK)

    def close(self) -> None:
        """Close the socket and remove its path."""
        self.socket.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def identity(stage: str, pid: int) -> bytes:
    """The DEALER's routing id of one incarnation of a stage."""
    return f"{stage}:{pid}".encode()
