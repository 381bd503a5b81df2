"""Who is let in to the sockets that this process binds, and what this process shows to others.

Each process of the daemon has one :class:`Gate`: its ZeroMQ context, its authenticator (the handler
of ZAP, https://rfc.zeromq.org/spec/27) in a thread of its own, and the :class:`Door` of each socket
that it binds.  CURVE without a running authenticator would admit everybody: every socket that asks
for keys has a ZAP domain and ZAP_ENFORCE_DOMAIN, so that nobody gets in while there is none.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq
from prometheus_client import CollectorRegistry, Counter
from zmq.utils import z85

from ptycho_stream.allow_list import AllowList, Right, read_allow_list
from ptycho_stream.errors import EndpointError, KeyFileError
from ptycho_stream.keys import ClientKeys, load_private_key
from ptycho_stream.settings import SecuritySettings, is_local
from ptycho_streamd.door import Door
from ptycho_streamd.log_limit import LimitedLog
from ptycho_streamd.stream_health import HANDSHAKE_FAILED

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
TURN_MS = 200
LIST_INTERVAL_S = 0.5
"""Between looks at whether the allow-list has changed."""
HANDSHAKE_MS = 5000
"""A stranger who says nothing is shown out after so long."""
BACKLOG = 512
CRYPTOGRAPHIC, MECHANISM_MISMATCH = 0x11000001, 0x11000002
"""Values of HANDSHAKE_FAILED_PROTOCOL (zmq.h: ZMQ_PROTOCOL_ERROR_ZMTP_...)."""
REFUSED = {
    "no_key": "it shows no key, or hangs up before",
    "wrong_key": "its key is not in the allow-list",
    "wrong_server_key": "it expects another public key of this daemon",
    "revoked": "its key is revoked",
    "no_right": "its key lacks the right",
    "unasked_key": "it shows a key, and this daemon asks for none",
    "unfinished": "it did not finish the handshake",
    "malformed": "it does not keep to the protocol",
    "crowded": "there are too many connections from there, or in all",
}
"""Why a peer is refused: the label of the metric, and words for the log."""

log = logging.getLogger(__name__)


class Gate:
    """A process' context, its authenticator and its doors.

    Args:
        settings: without keys sockets are plain, and bound to loopback or ipc only.
        registry: for the count of peers that were refused.

    Raises:
        KeyFileError: the private key or the allow-list cannot be used.
    """

    def __init__(
        self, settings: SecuritySettings | None = None, registry: CollectorRegistry | None = None
    ) -> None:
        settings = settings or SecuritySettings()
        self._key = None if settings.key_path is None else load_private_key(settings.key_path)
        self._server_keys = settings.server_keys
        self._list_path = settings.allowed_keys_path
        self._list_seen = _version(self._list_path)
        self.allowed: AllowList = {}
        if self._list_path is not None:
            self.allowed = read_allow_list(self._list_path)
        self._obeyed = self.allowed
        self._refused = Counter(
            "ptycho_stream_peers_refused",
            "Peers that were not let in, or messages of a revoked key, by socket and reason",
            ["socket", "reason"],
            registry=registry or CollectorRegistry(),
        )
        self._trouble = LimitedLog(log)
        self._lock = threading.Lock()
        self._doors: list[Door] = []
        self._admitted: set[tuple[str, str]] = set()
        self._stop = threading.Event()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zap = self.context.socket(zmq.ROUTER)
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind(ZAP_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)
        self._thread.start()

    @property
    def keyed(self) -> bool:
        """Whether sockets ask for keys."""
        return self._key is not None

    def bind(
        self, socket: zmq.Socket[bytes], endpoint: str, setting: str, name: str, right: Right
    ) -> Door:
        """Bind a socket of this context, which asks for a key with ``right`` if there are keys.

        Args:
            socket: with its own options set.
            endpoint: to bind.
            setting: that names the endpoint, for the error.
            name: of the socket in metrics and log.
            right: that a key needs.

        Raises:
            EndpointError: it cannot be bound, or is not local and there are no keys; the socket is
                closed.
        """
        if self._key is not None:
            socket.curve_server = True
            socket.curve_publickey = self._key.public.encode()
            socket.curve_secretkey = self._key.secret.encode()
            socket.zap_domain = name.encode()
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        elif not is_local(endpoint):
            socket.close()
            raise EndpointError(f"{setting} = {endpoint} is open to the network and has no keys")
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.setsockopt(zmq.BACKLOG, BACKLOG)
        for option, value in (
            (zmq.TCP_KEEPALIVE, 1),  # a peer whose machine is gone
            (zmq.TCP_KEEPALIVE_IDLE, 60),
            (zmq.TCP_KEEPALIVE_INTVL, 10),
            (zmq.TCP_KEEPALIVE_CNT, 3),
        ):
            socket.setsockopt(option, value)
        door = Door(socket, name, right, self._admit_of(name, right) if self.keyed else None)
        with self._lock:
            self._doors.append(door)
        try:
            socket.bind(endpoint)
            if endpoint.startswith("ipc://"):
                # For the group of its folder, whatever the umask; who comes near the folder says.
                Path(endpoint.removeprefix("ipc://")).chmod(0o660)
        except (zmq.ZMQError, OSError) as error:
            door.close()
            raise EndpointError(
                f"cannot bind {setting} = {endpoint}: {error.strerror}; another daemon or program "
                f"may hold it: stop that, or set another {setting}"
            ) from error
        return door

    def show_key(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        """Before a socket connects: show the daemon's key to a sender whose own is known."""
        if self._key is not None and endpoint in self._server_keys:
            ClientKeys(self._key, self._server_keys[endpoint]).show(socket)

    def read_again(self) -> None:
        """Go by what the allow-list says now; who has lost a right is shown out.

        Raises:
            KeyFileError: it cannot be used; what was in it before still holds.
        """
        if self._list_path is not None:
            self._list_seen = _version(self._list_path)
            self.allowed = read_allow_list(self._list_path)

    def check(self) -> None:
        """Make sure that the authenticator runs; call now and then.

        Raises:
            EndpointError: it does not, and nobody is let in: the process must be started again.
        """
        if not self._thread.is_alive():
            raise EndpointError(
                "the authenticator of this process has ended, and nobody is let in any more; the "
                "log says why"
            )

    def close(self) -> None:
        """End the authenticator and close what is still open."""
        self._stop.set()
        self._thread.join()
        for door in self._doors:
            door.close()
            door.events.close()
        self._zap.close()
        self.context.term()

    # ---- the authenticator's thread --------------------------------------------------------------

    def _run(self) -> None:
        look_at_s = 0.0
        try:
            while not self._stop.is_set():
                self._wait()
                self._answer()
                self._watch_doors()
                if self.keyed and time.monotonic() >= look_at_s:
                    look_at_s = time.monotonic() + LIST_INTERVAL_S
                    self._look_at_list()
                if self._obeyed is not self.allowed:
                    self._show_out()
        except Exception:
            log.exception("the authenticator ends: nobody is let in any more")
        finally:
            self._zap.close()  # as long as nobody listens here, libzmq refuses every handshake

    def _wait(self) -> None:
        poller = zmq.Poller()
        poller.register(self._zap, zmq.POLLIN)
        with self._lock:
            for door in self._doors:
                if door.closed:
                    door.events.close()
            self._doors = [door for door in self._doors if not door.closed]
            for door in self._doors:
                poller.register(door.events, zmq.POLLIN)
        poller.poll(TURN_MS)

    def _answer(self) -> None:
        """Answer libzmq's questions whether a peer may come in."""
        while self._zap.poll(0):
            sender, _, _, request_id, domain, address, _, mechanism, *shown = (
                self._zap.recv_multipart()
            )
            key = z85.encode(shown[0]).decode() if mechanism == b"CURVE" and shown else ""
            may = self._may_enter(domain.decode(), key, address.decode())
            status, text = (b"200", b"OK") if may else (b"400", b"refused")
            user = key.encode() if may else b""
            self._zap.send_multipart([sender, b"", b"1.0", request_id, status, text, user, b""])

    def _may_enter(self, name: str, key: str, address: str) -> bool:
        with self._lock:
            door = next((door for door in self._doors if door.name == name), None)
        if door is None:  # a socket that is being closed
            return False
        if not self._holds(key, door.right):
            self._refuse(name, self._reason(key), f"{address}, {self._whose(key)}")
            return False
        self._admitted.add((name, key))
        return True

    def _watch_doors(self) -> None:
        with self._lock:
            doors = list(self._doors)
        for door in doors:
            for kind, value in door.take_events():
                if kind == zmq.EVENT_ACCEPTED and (address := door.opened(value)) is not None:
                    self._refuse(door.name, "crowded", address)
                elif kind == zmq.EVENT_DISCONNECTED:
                    door.gone(value)
                elif kind & HANDSHAKE_FAILED and kind != zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    # Not those that the answer above has refused, and counted.
                    self._refuse(door.name, self._fault(kind, value), "an unknown address")

    def _fault(self, kind: int, value: int) -> str:
        """Why a handshake failed.  Of two that cannot agree whether there are keys, the one that
        notices first hangs up, so that who hangs up counts as one who shows none.
        """
        if kind != zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return "no_key" if self.keyed and value != errno.EAGAIN else "unfinished"
        if value == MECHANISM_MISMATCH:
            return "no_key" if self.keyed else "unasked_key"
        return "wrong_server_key" if value == CRYPTOGRAPHIC else "malformed"

    def _look_at_list(self) -> None:
        """Read the allow-list if it has changed; a wrong one is told once and changes nothing."""
        version = _version(self._list_path)
        if version == self._list_seen:
            return
        self._list_seen = version
        try:
            self.read_again()
        except KeyFileError as error:
            log.error("the allow-list stays as it was: %s", error)
        else:
            log.info("the allow-list has changed: %d keys may come in", len(self.allowed))

    def _show_out(self) -> None:
        """Cut the connections of keys that were let in and may not be here any more."""
        self._obeyed = self.allowed
        self._watch_doors()  # so that connections of this very moment are known
        with self._lock:
            doors = {door.name: door for door in self._doors}
        # Looked at once: another thread may put a newer list in place meanwhile.
        lost = {
            (name, key)
            for name, key in self._admitted
            if name not in doors or not self._holds(key, doors[name].right)
        }
        for name, door in doors.items():
            if whose := sorted(self._whose(key) for at, key in lost if at == name):
                log.warning("%s: %d connections cut, for %s", name, door.cut(), ", ".join(whose))
        self._admitted -= lost

    # ---- both threads ----------------------------------------------------------------------------

    def _holds(self, key: str, right: Right) -> bool:
        """Whether a key may do this now.  Who has the daemon's own key could be the daemon."""
        if self._key is not None and key == self._key.public:
            return True
        entry = self.allowed.get(key)
        return entry is not None and right in entry.rights

    def _admit_of(self, name: str, right: Right) -> Callable[[str], bool]:
        def admit(key: str) -> bool:
            if self._holds(key, right):
                return True
            self._refuse(name, self._reason(key), f"a message, {self._whose(key)}")
            return False

        return admit

    def _reason(self, key: str) -> str:
        if not key:
            return "no_key"
        entry = self.allowed.get(key)
        if entry is None:
            return "wrong_key"
        return "revoked" if entry.revoked else "no_right"

    def _whose(self, key: str) -> str:
        entry = self.allowed.get(key)
        return f"key {key}" if entry is None else f"key of {entry.name} ({entry.words})"

    def _refuse(self, name: str, reason: str, who: str) -> None:
        self._refused.labels(name, reason).inc()
        self._trouble.warning(f"{name}:{reason}", f"{name}: refused {who}: {REFUSED[reason]}")


def _version(path: Path | None) -> tuple[int, int, int] | None:
    """What changes when a file does."""
    if path is None:
        return None
    try:
        known = path.stat()
    except OSError:
        return None
    return known.st_ino, known.st_mtime_ns, known.st_size
