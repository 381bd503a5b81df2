"""A socket that this process binds, and the connections that others have made to it.

Made by :meth:`ptycho_streamd.security.Gate.bind`.  libzmq cannot end one connection of a socket,
and binding it anew would cut them all, with the frames that are on their way: a door knows the file
descriptor of each connection and which key its messages came with, and shuts down just that line.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from ptycho_stream.allow_list import Right
from ptycho_streamd.stream_health import WATCHED, Health

MAX_CONNECTIONS = 512
MAX_PER_ADDRESS = 128
"""At a time, to one socket; one more is shut at once, so that a flood takes no descriptors."""
EVENTS_KEPT = 100_000
"""For a thread that is late: libzmq stands still, with all its sockets, when this is full."""
MAX_EVENTS_PER_TURN = 10_000


@dataclass(slots=True)
class _Line:
    """A connection: where it comes from, and what tells its descriptor from a later one's."""

    address: str
    inode: int


class Door:
    """One bound socket.

    Two threads use it: that of the socket's owner, and the gate's, which reads the events.

    Attributes:
        name: of the socket in metrics, log and ZAP.
        right: that a key needs.
        health: what happened to it.
        max_messages: that one connection may send, of those that are counted.
    """

    def __init__(
        self, bound: zmq.Socket[bytes], name: str, right: Right, admit: Callable[[str], bool] | None
    ) -> None:
        self.name = name
        self.right: Right = right
        self.health = Health()
        self.socket = bound
        self.closed = False
        self.max_messages = float("inf")
        self._admit = admit
        self._lock = threading.Lock()
        self._lines: dict[int, _Line] = {}
        self._keys: dict[int, str] = {}
        self._sent: Counter[int] = Counter()
        place = f"inproc://door-{id(self)}"
        bound.monitor(place, WATCHED)
        self.events = bound.context.socket(zmq.PAIR)
        self.events.setsockopt(zmq.LINGER, 0)
        self.events.setsockopt(zmq.RCVHWM, EVENTS_KEPT)
        self.events.connect(place)

    @property
    def keyed(self) -> bool:
        """Whether it asks for keys."""
        return self._admit is not None

    def admits(self, frame: zmq.Frame) -> bool:
        """Whether what has come may be taken: its sender's key may have been revoked meanwhile.

        Costs 3 µs a message where sockets ask for keys, nothing elsewhere.
        """
        if self._admit is None:
            return True
        try:
            key, descriptor = str(frame.get("User-Id")), int(frame.get(zmq.SRCFD))
        except zmq.ZMQError:  # no peer's: libzmq itself has made it up
            return False
        with self._lock:
            self._keys[descriptor] = key
        return self._admit(key)

    def count(self, frame: zmq.Frame) -> None:
        """Count what a connection sends, and shut it above ``max_messages``."""
        try:
            descriptor = int(frame.get(zmq.SRCFD))
        except zmq.ZMQError:  # libzmq has made it up, of a connection that is gone
            return
        with self._lock:
            self._sent[descriptor] += 1
            line = self._lines.get(descriptor)  # None: the gate will hear of it in a moment
            sent = self._sent[descriptor]
        if line is not None and sent > self.max_messages:
            self._shut(descriptor, line)

    def take_events(self) -> list[tuple[int, int]]:
        """Kind and value of what libzmq tells, a bounded number; the gate's thread only."""
        taken: list[tuple[int, int]] = []
        while len(taken) < MAX_EVENTS_PER_TURN and self.events.poll(0):
            event = recv_monitor_message(self.events)
            kind, value = int(event["event"]), int(event["value"])
            self.health.take(kind)
            taken.append((kind, value))
        return taken

    def opened(self, descriptor: int) -> str | None:
        """Note a new connection; the address that has too many, if it was shut at once for that."""
        line = _line(descriptor)
        if line is None:
            return None
        with self._lock:
            self._lines[descriptor] = line
            of_all = self.health.peers = len(self._lines)
            of_address = Counter(held.address for held in self._lines.values())[line.address]
            sent = self._sent[descriptor]
        if sent > self.max_messages:
            self._shut(descriptor, line)
            return None
        if of_all <= MAX_CONNECTIONS and of_address <= MAX_PER_ADDRESS:
            return None
        self._shut(descriptor, line)
        return line.address

    def gone(self, descriptor: int) -> None:
        """Forget a connection that is over."""
        with self._lock:
            self._lines.pop(descriptor, None)
            self._keys.pop(descriptor, None)
            self._sent.pop(descriptor, None)
            self.health.peers = len(self._lines)

    def cut(self) -> int:
        """Shut the connections of keys that are not let in any more; how many there were.

        Those that have never sent anything are shut too: whose they are is not known, they lose
        nothing, and who may comes back by itself.
        """
        assert self._admit is not None
        with self._lock:
            lines, keys = dict(self._lines), dict(self._keys)
        shut = 0
        for descriptor, line in lines.items():
            key = keys.get(descriptor)
            if key is None or not self._admit(key):
                shut += self._shut(descriptor, line)
        return shut

    def close(self) -> None:
        """Close the socket; its owner's thread only."""
        if not self.closed:
            self.socket.disable_monitor()
            self.closed = True
            self.socket.close()

    def _shut(self, descriptor: int, line: _Line) -> bool:
        """Shut a connection down; libzmq finds it ended.  False if it is not there any more."""
        if _line(descriptor) != line:
            return False
        try:
            with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has ended by itself
            return False
        return True


def _line(descriptor: int) -> _Line | None:
    """What a descriptor stands for now; None if it is no connection."""
    try:
        inode = os.fstat(descriptor).st_ino
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
            peer = connection.getpeername()
    except OSError:
        return None
    return _Line(str(peer[0]) if isinstance(peer, tuple) else "local", inode)
