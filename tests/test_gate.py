"""The gate of a process: closed while no authenticator runs, and not to be crowded out."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from daemon_harness import free_port, wait_for
from prometheus_client import CollectorRegistry

from ptycho_stream.allow_list import Right, allow
from ptycho_stream.client import Daemon
from ptycho_stream.errors import EndpointError, KeyFileError, KeyRefused
from ptycho_stream.keys import ClientKeys, load_private_key, new_key
from ptycho_stream.settings import SecuritySettings
from ptycho_streamd.control import ControlServer
from ptycho_streamd.door import MAX_PER_ADDRESS
from ptycho_streamd.security import Gate


class Served:
    """A control server that answers, in a thread, behind a gate of its own."""

    def __init__(self, folder: Path, endpoint: str, *, keyed: bool = True) -> None:
        self.endpoint = endpoint
        self.registry = CollectorRegistry()
        security = SecuritySettings()
        self.keys: ClientKeys | None = None
        if keyed:
            server, client = (
                load_private_key(new_key(folder, name)[0]) for name in ("daemon", "alice")
            )
            allow(folder / "allowed", "alice", client.public, ["control"])
            security = SecuritySettings(
                key_path=folder / "daemon.key_secret", allowed_keys_path=folder / "allowed"
            )
            self.keys = ClientKeys(client, server.public)
        self.gate = Gate(security, self.registry)
        self.server = ControlServer(self.gate, endpoint)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._over.is_set():
            if self.server.socket.poll(20):
                for request in self.server.poll():
                    self.server.reply(request, {"state": "ready"})

    def answers(self, timeout_s: float = 1.0, source: str = "") -> bool:
        """Whether a client with the right key is answered."""
        endpoint = self.endpoint.replace("//", f"//{source}:0;") if source else self.endpoint
        with Daemon(endpoint, timeout_s=timeout_s, keys=self.keys) as daemon:
            try:
                return daemon.status() == {"state": "ready"}
            except KeyRefused:
                raise
            except EndpointError:
                return False

    def refused(self, reason: str) -> float:
        labels = {"socket": "control", "reason": reason}
        return self.registry.get_sample_value("ptycho_stream_peers_refused_total", labels) or 0.0

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.server.close()
        self.gate.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path, f"tcp://127.0.0.1:{free_port()}")
    yield made
    made.close()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path, f"tcp://127.0.0.1:{free_port()}", keyed=False)
    yield made
    made.close()


def test_a_key_revoked_while_others_are_shown_out_is_not_forgotten(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert served.answers()
    gate, holds = served.gate, served.gate._holds
    revoked = {key: replace(entry, rights=frozenset()) for key, entry in gate.allowed.items()}

    def holds_and_is_revoked(key: str, right: Right) -> bool:
        held = holds(key, right)
        gate.allowed = revoked  # by the thread that reads the list again at a reload
        return held

    monkeypatch.setattr(gate, "_holds", holds_and_is_revoked)
    gate.allowed = dict(gate.allowed)
    wait_for(lambda: "connections cut, for key of alice" in caplog.text, 5)


def test_nobody_gets_in_when_the_authenticator_has_died(served, monkeypatch, caplog):
    assert served.answers(5.0)
    served.gate.check()

    def die() -> None:
        raise RuntimeError("killed by a test")

    monkeypatch.setattr(served.gate, "_answer", die)
    wait_for(lambda: not served.gate._thread.is_alive())
    assert not served.answers()
    with pytest.raises(EndpointError, match="nobody is let in any more"):
        served.gate.check()
    assert "killed by a test" in caplog.text


def test_nobody_gets_in_while_the_authenticator_stands_still(served, monkeypatch):
    go_on = threading.Event()
    answer = served.gate._answer
    monkeypatch.setattr(served.gate, "_answer", lambda: (go_on.wait(20), answer()))
    time.sleep(0.3)  # it hangs now
    assert not served.answers()
    go_on.set()
    assert served.answers(5.0)


def test_without_keys_only_this_machine_is_bound_to():
    gate = Gate()
    with pytest.raises(EndpointError, match=r"control\.endpoint = tcp://0\.0\.0\.0:.* has no keys"):
        ControlServer(gate, f"tcp://0.0.0.0:{free_port()}")
    gate.close()


def test_a_gate_without_its_files_is_not_opened(tmp_path):
    with pytest.raises(KeyFileError, match="cannot read the key file"):
        Gate(SecuritySettings(key_path=tmp_path / "a", allowed_keys_path=tmp_path / "b"))
    new_key(tmp_path, "daemon")
    key = tmp_path / "daemon.key_secret"
    with pytest.raises(KeyFileError, match="cannot read the allow-list"):
        Gate(SecuritySettings(key_path=key, allowed_keys_path=tmp_path / "b"))


def test_an_ipc_socket_is_for_the_group_of_its_folder(tmp_path):
    before = os.umask(0)
    try:
        made = Served(tmp_path, f"ipc://{tmp_path}/control", keyed=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "control").stat().st_mode) == 0o660
    assert made.answers(5.0)
    made.close()


@pytest.mark.parametrize("kind", ["plain", "served"])
def test_one_address_cannot_crowd_out_others(kind, request):
    served = request.getfixturevalue(kind)
    port = int(served.endpoint.rsplit(":", 1)[1])
    lines = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * MAX_PER_ADDRESS)]
    wait_for(lambda: served.refused("crowded") >= 2 * MAX_PER_ADDRESS)
    (door,) = served.gate._doors
    wait_for(lambda: door.health.peers == MAX_PER_ADDRESS)
    assert served.answers(5.0, source="127.0.0.2")
    for line in lines:
        line.close()
    wait_for(lambda: door.health.peers <= 1)
    assert served.answers(5.0)


def test_strangers_who_say_nothing_are_shown_out(tmp_path, monkeypatch):
    monkeypatch.setattr("ptycho_streamd.security.HANDSHAKE_MS", 300)
    served = Served(tmp_path, f"tcp://127.0.0.1:{free_port()}")
    with socket.create_connection(("127.0.0.1", int(served.endpoint.rsplit(":", 1)[1]))) as line:
        line.settimeout(5.0)
        while line.recv(64):  # its greeting, and then the end
            continue
    wait_for(lambda: served.refused("unfinished"))
    served.close()
