"""Ask a ZeroMQ endpoint what it is without ever becoming its peer.

Used by ``ptycho-stream doctor``.  A PUSH socket deals frames to every PULL that completes the
handshake, so this speaks the beginning of ZMTP (https://rfc.zeromq.org/spec/23) over a plain
connection: both sides greet and the other says what kind of socket it is; then we hang up, before
the handshake is complete and the sender could choose us for a frame.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

Answer = Literal["ok", "keyed", "silent", "refused", "wrong key", "not zeromq"]

# Peers of ZMTP 2 and later look at the first and last byte only; one of ZMTP 1 takes the rest for
# the length of a message and waits for it, instead of taking us for a peer.
_SIGNATURE = b"\xff" + struct.pack(">Q", 2**32) + b"\x7f"
_MAJOR = b"\x03"
_REST_OF_GREETING = b"\x00" + b"NULL".ljust(20, b"\0") + b"\0" * 32
_GREETING_BYTES = 64
_LONG_COMMAND = 0x02
_MAX_COMMAND_BYTES = 4096


@dataclass(frozen=True)
class Knocked:
    """What was found behind an endpoint.

    Attributes:
        answer: ``ok`` if a ZeroMQ socket without keys is there, ``keyed`` if one that asks for a
            key, ``silent`` if something accepts and says nothing.
        detail: a sentence for people.
        socket_type: ``PUSH``, ``PUB`` ...; None where the peer did not get so far.
    """

    answer: Answer
    detail: str
    socket_type: str | None = None


def knock(endpoint: str, timeout_s: float = 2.0) -> Knocked:
    """Find out what listens at ``endpoint``, ``tcp://HOST:PORT`` or ``ipc:///PATH``."""
    deadline_s = time.monotonic() + timeout_s
    try:
        line = _connect(endpoint, timeout_s)
    except TimeoutError:
        return Knocked("silent", "the connection was neither accepted nor refused")
    except OSError as error:
        return Knocked("refused", f"nothing listens there ({error.strerror or error})")
    with line:
        try:
            return _greet(line, deadline_s)
        except TimeoutError:
            return Knocked("silent", "it accepts connections but does not speak")
        except OSError as error:
            reason = error.strerror or str(error)
            return Knocked("not zeromq", f"it hung up on a ZeroMQ greeting ({reason})")


def _connect(endpoint: str, timeout_s: float) -> socket.socket:
    parts = urlsplit(endpoint)
    if parts.scheme == "ipc":
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(timeout_s)
        try:
            line.connect(endpoint.removeprefix("ipc://"))
        except OSError:
            line.close()
            raise
        return line
    return socket.create_connection((parts.hostname, parts.port), timeout_s)


def _greet(line: socket.socket, deadline_s: float) -> Knocked:
    line.sendall(_SIGNATURE)
    start = _read(line, 1, deadline_s)
    if start != b"\xff":
        return Knocked("not zeromq", "something else than ZeroMQ listens there")
    signature = start + _read(line, 9, deadline_s)
    if not signature[9] & 1:
        return Knocked("not zeromq", "something else than ZeroMQ listens there")
    major = _read(line, 1, deadline_s)[0]
    if major < 3:  # going on would complete the handshake of so old a protocol
        return Knocked("ok", f"a ZeroMQ socket listens there (ZMTP {major})")
    line.sendall(_MAJOR)
    greeting = _read(line, _GREETING_BYTES - 11, deadline_s)
    mechanism = greeting[1:21].rstrip(b"\0").decode("ascii", errors="replace")
    if mechanism != "NULL":
        return Knocked("keyed", f"it asks for a key ({mechanism})")
    line.sendall(_REST_OF_GREETING)
    kind = _socket_type(_read_command(line, deadline_s))
    if kind is None:
        return Knocked("wrong key", "it turned us away")
    return Knocked("ok", f"a {kind} socket listens there", kind)


def _read(line: socket.socket, count: int, deadline_s: float) -> bytes:
    got = b""
    while len(got) < count:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        line.settimeout(left_s)
        piece = line.recv(count - len(got))
        if not piece:
            raise ConnectionResetError("connection closed")
        got += piece
    return got


def _read_command(line: socket.socket, deadline_s: float) -> bytes:
    flags = _read(line, 1, deadline_s)[0]
    if flags & _LONG_COMMAND:
        (length,) = struct.unpack(">Q", _read(line, 8, deadline_s))
    else:
        length = _read(line, 1, deadline_s)[0]
    return _read(line, min(length, _MAX_COMMAND_BYTES), deadline_s)


def _socket_type(command: bytes) -> str | None:
    """Value of ``Socket-Type`` of a READY command; None if it is another command."""
    name, rest = command[1 : 1 + command[0]], command[1 + command[0] :]
    if name != b"READY":
        return None
    while rest:
        key, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        length = int.from_bytes(rest[:4], "big")
        value, rest = rest[4 : 4 + length], rest[4 + length :]
        if key.lower() == b"socket-type":
            return value.decode("ascii", errors="replace")
    return "ZeroMQ"
