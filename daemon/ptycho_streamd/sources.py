"""The sockets that ingest reads: one a stream, with its codec and what is known of its health.

A socket monitor tells connections from silence, so that the daemon can say of an endpoint what
nobody else may find out by connecting: a second PULL would take frames away.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from ptycho_stream.errors import EndpointError, SettingsError
from ptycho_stream.messages import Message
from ptycho_stream.settings import Settings
from ptycho_stream.wire import FrameDecoder, PatientDecoder, frame_decoders, position_decoder
from ptycho_stream.wire.limits import WireLimits
from ptycho_streamd.door import Door
from ptycho_streamd.pva_source import PvaSource
from ptycho_streamd.security import Gate
from ptycho_streamd.stream_health import WATCHED, Health

PULL_QUEUE_MESSAGES = 64
"""Small: what we have not taken waits, counted, in the detector."""
SUB_QUEUE_MESSAGES = (64, 20_000)
"""At least and at most, within the bytes allowed: what a PUB cannot get rid of is gone."""
LARGEST_ITEM_BYTES = 4


class SocketSettings(Protocol):
    """What detector and position settings have in common."""

    @property
    def attach(self) -> Literal["connect", "bind"]:
        """Which end binds."""
        ...

    @property
    def socket(self) -> Literal["pull", "sub"]:
        """What the other end's PUSH or PUB asks for."""
        ...


class Stream(Protocol):
    """What ingest reads: a socket with its codec, or something that looks like one."""

    @property
    def name(self) -> str:
        """The settings' table."""
        ...

    @property
    def endpoint(self) -> str:
        """Where it is."""
        ...

    @property
    def health(self) -> Health:
        """What happened to it."""
        ...

    @property
    def socket(self) -> zmq.Socket[bytes] | int:
        """For a poller: readable when :meth:`receive` has something."""
        ...

    def receive(self) -> list[Message] | None:
        """What the next message holds (it may be nothing yet); None if there is none."""
        ...

    def watch(self) -> None:
        """Take in what is known of connections; call now and then."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values for ``ptycho-stream doctor`` and ``ctl endpoints``."""
        ...

    def close(self) -> None:
        """Give up all that it holds."""
        ...


class Source:
    """A stream of frames or positions.

    Args:
        gate: of this process.
        name: ``detector`` or ``positions``, the settings' table.
        endpoint: where it is.
        options: how to attach to it.
        decoder: of its dialect; several streams may share one.
        limits: what the socket accepts.
        sub_queue_messages: so many may wait in a SUB socket.

    Raises:
        EndpointError: the endpoint cannot be bound or is no address.
    """

    def __init__(
        self,
        gate: Gate,
        name: str,
        endpoint: str,
        options: SocketSettings,
        decoder: FrameDecoder,
        limits: WireLimits,
        sub_queue_messages: int,
    ) -> None:
        self.name = name
        self.endpoint = endpoint
        self._options = options
        self._decoder = decoder
        self._patient = decoder if isinstance(decoder, PatientDecoder) else None
        self.socket = gate.context.socket(zmq.PULL if options.socket == "pull" else zmq.SUB)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, limits.max_message_bytes)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        if options.socket == "pull":
            self.socket.setsockopt(zmq.RCVHWM, PULL_QUEUE_MESSAGES)
        else:
            self.socket.setsockopt(zmq.RCVHWM, sub_queue_messages)
            self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._door: Door | None = None
        if options.attach == "bind":
            setting = f"{name}.endpoint"
            self._door = gate.bind(self.socket, endpoint, setting, name, "publish")
            self.health = self._door.health
            return
        self.health = Health()
        gate.show_key(self.socket, endpoint)
        self._monitor = self.socket.get_monitor_socket(WATCHED)
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise EndpointError(
                f"cannot connect {name}.endpoint = {endpoint}: {error.strerror}; correct it"
            ) from error

    def receive(self) -> list[Message] | None:
        """What the next ZeroMQ message holds (it may be nothing yet); None if there is none."""
        try:
            parts = self._parts()
        except zmq.Again:
            return (self._patient.overdue() or None) if self._patient is not None else None
        self.health.messages += 1
        return self._decoder.receive(parts) if parts else []

    def _parts(self) -> list[bytes]:
        """The next message; empty if it comes from somebody who may not send any more."""
        if self._door is None or not self._door.keyed:
            return self.socket.recv_multipart(zmq.NOBLOCK)
        frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        return [frame.bytes for frame in frames] if self._door.admits(frames[0]) else []

    def watch(self) -> None:
        """Take in what the monitor has seen; call now and then."""
        if self._door is not None:  # the gate does that
            return
        while self._monitor.poll(0):
            kind = int(recv_monitor_message(self._monitor)["event"])
            self.health.take(kind)
            self.health.peers = int(kind == zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def describe(self) -> dict[str, Any]:
        """Plain values for ``ptycho-stream doctor`` and ``ctl endpoints``."""
        self.watch()
        return {
            "name": self.name,
            "endpoint": self.endpoint,
            "attach": self._options.attach,
            "socket": self._options.socket,
            **self.health.plain(),
        }

    def close(self) -> None:
        """Close the socket and its monitor."""
        if self._door is not None:
            self._door.close()
            return
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()


def sub_queue_messages(queue_bytes: int, limits: WireLimits) -> int:
    """How many of the largest frames accepted may wait in ``queue_bytes``: ZeroMQ counts messages.

    Not fitted to the frames that come: libzmq 4.3 may crash when the mark of a socket is changed
    while one of its connections is going away.
    """
    height, width = limits.max_shape_yx_px
    frame_bytes = min(height * width * LARGEST_ITEM_BYTES, limits.max_message_bytes)
    least, most = SUB_QUEUE_MESSAGES
    return min(max(queue_bytes // max(frame_bytes, 1), least), most)


def open_sources(gate: Gate, settings: Settings, limits: WireLimits) -> list[Stream]:
    """The stream of positions, if they come on their own, and those of the detector.

    Raises:
        EndpointError: one of them cannot be attached to; none is left open.
        SettingsError: one asks for a library that is not installed.
    """
    opened: list[Stream] = []
    try:
        positions = settings.positions
        decoder = position_decoder(positions, limits)
        if decoder is not None and positions.endpoint is not None:
            # Positions are small: they may wait in any number that a scan has.
            most = SUB_QUEUE_MESSAGES[1]
            opened.append(
                Source(gate, "positions", positions.endpoint, positions, decoder, limits, most)
            )
        detector = settings.detector
        if detector.dialect == "pva":
            opened.append(PvaSource(detector.table, detector, limits))
            return opened
        queue_messages = sub_queue_messages(detector.queue_bytes, limits)
        decoders = frame_decoders(detector, limits)
        for endpoint, decoder in zip(detector.endpoints, decoders, strict=True):
            opened.append(
                Source(gate, detector.table, endpoint, detector, decoder, limits, queue_messages)
            )
    except (EndpointError, SettingsError):
        for source in opened:
            source.close()
        raise
    return opened
