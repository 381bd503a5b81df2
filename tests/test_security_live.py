"""A daemon that asks for keys: who gets in where, with real sockets, and what becomes of others."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq
from beamline import SHAPE, check_scan, pixels, positions, sealed_headers
from daemon_harness import DaemonHarness, free_port, wait_for
from zmq.utils.monitor import recv_monitor_message

from ptycho_stream.allow_list import RIGHTS, allow, revoke
from ptycho_stream.cli import main
from ptycho_stream.client import Daemon, ResultStream
from ptycho_stream.errors import ControlError, EndpointError, KeyRefused
from ptycho_stream.keys import ClientKeys, load_private_key, new_key
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.wire import NativeEncoder

pytestmark = pytest.mark.slow

REFUSED = 'ptycho_stream_peers_refused_total{{{}reason="{}",socket="{}"}}'
FLUO = "more_detectors.fluo"
SOCKETS = {
    "detector": (zmq.PUSH, "publish"),
    FLUO: (zmq.PUSH, "publish"),
    "positions": (zmq.PUSH, "publish"),
    "results": (zmq.SUB, "subscribe"),
    "resync": (zmq.DEALER, "subscribe"),
    "control": (zmq.DEALER, "control"),
}
CUT_S = 3.0


class Keyed:
    """A daemon with keys for everybody that a test needs."""

    def __init__(self, folder: Path, stages: tuple[str, ...]) -> None:
        self.folder = folder
        self.allowed = folder / "allowed-keys"
        self.server = self.pair("daemon")
        for right in RIGHTS:
            self.let_in(right, right)
        self.let_in("everything", *RIGHTS)
        self.let_in("former", *RIGHTS)
        revoke(self.allowed, "former")
        self.pair("stranger")
        self.fluo_endpoint = f"tcp://127.0.0.1:{free_port()}"
        fluo = {"name": "fluo", "dialect": "native", "endpoint": self.fluo_endpoint}
        self.daemon = DaemonHarness(
            folder,
            {
                "detector": {"attach": "bind"},
                "more_detectors": [{**fluo, "attach": "bind"}],
                "positions": {"attach": "bind"},
                "security": {
                    "key_path": "daemon.key_secret",
                    "allowed_keys_path": "allowed-keys",
                },
                "viewer": {"enabled": False},
            },
            stages,
        )
        settings = self.daemon.settings
        self.endpoints = {
            "detector": self.daemon.detector_endpoint,
            FLUO: self.fluo_endpoint,
            "positions": self.daemon.positions_endpoint,
            "results": settings.results.endpoint,
            "resync": settings.results.resync_endpoint,
            "control": settings.control.endpoint,
        }
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def pair(self, name: str) -> str:
        """Make a key; its public half."""
        private, _ = new_key(self.folder, name)
        return load_private_key(private).public

    def let_in(self, name: str, *rights: Any) -> None:
        path = self.folder / f"{name}.key_secret"
        public = load_private_key(path).public if path.exists() else self.pair(name)
        allow(self.allowed, name, public, rights)

    def keys(self, name: str, server: str | None = None) -> ClientKeys:
        own = load_private_key(self.folder / f"{name}.key_secret")
        return ClientKeys(own, server or self.server)

    def connect(self, place: str, keys: ClientKeys | None) -> Peer:
        return Peer(self.context, SOCKETS[place][0], self.endpoints[place], keys)

    def enter(self, place: str, name: str) -> Peer:
        """A peer that is in: libzmq gives up once it was refused, and a new key takes a moment."""
        deadline_s = time.monotonic() + 10.0
        while time.monotonic() < deadline_s:
            peer = self.connect(place, self.keys(name))
            with suppress(AssertionError):
                wait_for(peer.look, 1.0)
                return peer
            peer.close()
        raise AssertionError(f"{name} does not get in at {place}:\n{self.daemon.log}")

    def refused(self, place: str, reason: str) -> float:
        of_detector = 'detector="fluo",' if place == FLUO else ""
        return self.daemon.metrics().get(REFUSED.format(of_detector, reason, place), 0.0)


class Peer:
    """A socket that tries to get in, and whether it did."""

    def __init__(self, context: Any, kind: int, endpoint: str, keys: ClientKeys | None) -> None:
        self.socket = context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        if kind == zmq.SUB:
            self.socket.subscribe(b"")
        if keys is not None:
            keys.show(self.socket)
        self._events = self.socket.get_monitor_socket()
        self.inside = False
        self.entered = 0
        self.socket.connect(endpoint)

    def look(self) -> bool:
        """Whether it is connected now."""
        while self._events.poll(0):
            kind = recv_monitor_message(self._events)["event"]
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.inside = True
                self.entered += 1
            elif kind == zmq.EVENT_DISCONNECTED:
                self.inside = False
        return self.inside

    def close(self) -> None:
        self.look()
        self.socket.disable_monitor()
        self._events.close()
        self.socket.close()


@contextmanager
def running(folder: Path, *stages: str) -> Iterator[Keyed]:
    keyed = Keyed(folder, stages)
    with keyed.daemon:
        try:
            yield keyed
        finally:
            keyed.context.destroy(linger=0)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory) -> Iterator[Keyed]:
    with running(tmp_path_factory.mktemp("keyed"), "ingest", "reconstruct") as made:
        yield made


def test_nobody_gets_in_without_a_key_that_has_the_right(keyed):
    other = {"publish": "subscribe", "subscribe": "control", "control": "publish"}
    false_server = load_private_key(keyed.folder / "stranger.key_secret").public
    peers: dict[tuple[str, str], Peer] = {}
    for place, (_, right) in SOCKETS.items():
        peers[place, "no_key"] = keyed.connect(place, None)
        peers[place, "wrong_key"] = keyed.connect(place, keyed.keys("stranger"))
        wrong_server = keyed.keys("everything", false_server)
        peers[place, "wrong_server_key"] = keyed.connect(place, wrong_server)
        peers[place, "revoked"] = keyed.connect(place, keyed.keys("former"))
        peers[place, "no_right"] = keyed.connect(place, keyed.keys(other[right]))
    try:
        for place, reason in peers:
            wait_for(
                lambda place=place, reason=reason: keyed.refused(place, reason),
                what=f"count of {reason} at {place}",
            )
        assert [where for where, peer in peers.items() if peer.look() or peer.entered] == []
    finally:
        for peer in peers.values():
            peer.close()
    stranger = load_private_key(keyed.folder / "stranger.key_secret").public
    assert f"control: refused 127.0.0.1, key {stranger}: its key is not in" in keyed.daemon.log
    assert "results: refused 127.0.0.1, key of former (revoked): its key is" in keyed.daemon.log


def test_a_key_gets_in_where_it_has_the_right(keyed):
    for place, (_, right) in SOCKETS.items():
        for name in (right, "everything", "daemon"):
            keyed.enter(place, name).close()


def test_the_clients_say_what_is_wrong_with_keys(keyed):
    control, results = keyed.endpoints["control"], keyed.endpoints["results"]
    resync = keyed.endpoints["resync"]
    with Daemon(control, keys=keyed.keys("control")) as daemon:
        assert daemon.status()["state"] == "ready"
    with (
        Daemon(control, keys=keyed.keys("subscribe")) as daemon,
        pytest.raises(KeyRefused, match="not in its allow-list, is revoked, or lacks"),
    ):
        daemon.status()
    # Of two that do not agree whether there are keys the first to notice hangs up: then it may be.
    with (
        Daemon(control, timeout_s=1.0) as daemon,
        pytest.raises(EndpointError, match=r"asks? for a key"),
    ):
        daemon.status()
    wrong = keyed.keys("control", keyed.keys("stranger").own.public)
    with (
        Daemon(control, timeout_s=0.5, keys=wrong) as daemon,
        pytest.raises(EndpointError, match="the server key that we expect"),
    ):
        daemon.status()
    with ResultStream(results, resync, keys=keyed.keys("subscribe")) as stream:
        assert stream.latest(10.0) is None
    for shown, said in ((keyed.keys("publish"), "allow-list"), (None, "asks? for a key")):
        with (
            ResultStream(results, resync, keys=shown) as stream,
            pytest.raises(EndpointError, match=said),
        ):
            stream.latest(2.0)


def test_a_new_key_gets_in_without_a_restart_and_a_revoked_one_is_cut(keyed):
    keyed.pair("late")
    with Daemon(keyed.endpoints["control"], keys=keyed.keys("late")) as daemon:
        with pytest.raises(KeyRefused):
            daemon.status()
        keyed.let_in("late", "control")
        wait_for(lambda: _answers(daemon), CUT_S, "entry of a key that was allowed")
    late = keyed.enter("control", "late")
    subscriber = keyed.enter("results", "everything")
    stays = keyed.enter("results", "subscribe")
    caller = Daemon(keyed.endpoints["control"], keys=keyed.keys("everything"))
    caller.status()
    revoke(keyed.allowed, "everything")
    revoke(keyed.allowed, "late")
    began_s = time.monotonic()
    wait_for(lambda: not subscriber.look() and not late.look(), CUT_S, "the cut")
    print(f"cut after {time.monotonic() - began_s:.2f} s")
    with caller, pytest.raises(KeyRefused):
        caller.status()
    time.sleep(0.3)  # for those that were cut to try again
    assert not subscriber.look()
    assert stays.look() and stays.entered == 1
    for peer in (late, subscriber, stays):
        peer.close()
    keyed.let_in("everything", *RIGHTS)


def _answers(daemon: Daemon) -> bool:
    try:
        return bool(daemon.status())
    except KeyRefused:
        return False


def test_frames_of_others_are_not_lost_when_a_sender_is_revoked(keyed):
    """Two senders of one scan; one of them is revoked while both send."""
    keyed.let_in("second", "publish")
    first = keyed.enter("detector", "publish")
    second = keyed.enter("detector", "second")
    positioner = keyed.enter("positions", "publish")
    try:
        send = NativeEncoder("5", "e5")
        first.socket.send_multipart(send.scan_start(2000, SHAPE, "<u2"))
        wait_for(lambda: keyed.daemon.ingest()["summary"].startswith("series 5"))
        positioner.socket.send_multipart(send.positions_start())
        positioner.socket.send_multipart(send.positions(range(1000), positions(range(1000))))
        positioner.socket.send_multipart(send.positions_end())
        sent = range(0, 1000, 2)
        for number in sent:
            first.socket.send_multipart(send.frame(number, pixels(5, number)))
            with suppress(zmq.Again):
                second.socket.send_multipart(
                    send.frame(number + 1, pixels(5, number + 1)), zmq.NOBLOCK
                )
            if number == 200:
                keyed.daemon.metric("ptycho_stream_positions_received_total", 1000.0)
                revoke(keyed.allowed, "second")
            time.sleep(0.005)
        assert not second.look() and first.entered == 1
        first.socket.send_multipart(send.scan_end())
        catalogue = Catalogue(keyed.daemon.data)
        (header,) = wait_for(lambda: sealed_headers(catalogue, 1), 20)
        with catalogue.open(header.scan_id) as reader:
            numbers = reader.records()["number"].tolist()
        assert set(sent) <= set(numbers)
        odd = [number for number in numbers if number % 2]
        assert odd and max(odd) < 999
        check_scan(catalogue, header.scan_id, 5, numbers)
    finally:
        for peer in (first, second, positioner):
            peer.close()


def test_a_stored_detector_shows_a_key_too(keyed):
    sender = keyed.enter(FLUO, "publish")
    send = NativeEncoder("6", "e6")
    sender.socket.send_multipart(send.scan_start(5, SHAPE, "<u2"))
    for number in range(5):
        sender.socket.send_multipart(send.frame(number, pixels(6, number)))
    keyed.daemon.metric('ptycho_stream_frames_committed_total{detector="fluo"}', 5.0)
    sender.close()


def test_a_wrong_allow_list_changes_nothing_and_is_told(keyed):
    text = keyed.allowed.read_text()
    keyed.allowed.write_text(text + "eve everything\n")
    try:
        wait_for(lambda: "the allow-list stays as it was" in keyed.daemon.log, CUT_S)
        with keyed.daemon.control() as daemon:
            with pytest.raises(ControlError, match="allowed-keys, line") as caught:
                daemon.reload()
            assert caught.value.code == "bad_settings"
        keyed.daemon.kill("ingest")
        wait_for(lambda: keyed.daemon.status()["stages"]["ingest"]["restarts"])
        keyed.daemon.wait_ready()
        keyed.enter("detector", "publish").close()
    finally:
        keyed.allowed.write_text(text)
    wait_for(lambda: "the allow-list has changed" in keyed.daemon.log.rsplit("stays as", 1)[1])


def test_the_doctor_looks_at_keys_and_asks_with_them(keyed, capsys):
    config = str(keyed.daemon.config)
    keyed.enter(FLUO, "publish").close()
    known = keyed.refused(FLUO, "wrong_key")
    stranger = keyed.connect(FLUO, keyed.keys("stranger"))
    wait_for(lambda: keyed.refused(FLUO, "wrong_key") > known)
    stranger.close()
    assert main(["doctor", "--config", config, "--json"]) == 0
    found = {line["subject"]: line for line in json.loads(capsys.readouterr().out)}
    assert found[FLUO]["state"] == "silent" and "were not let in" in found[FLUO]["detail"]
    assert found["control"]["detail"] == "a daemon runs, and asks for keys"
    assert found["detector"]["state"] == "silent" and found["results"]["state"] == "OK"
    assert keyed.server in found["security.key_path"]["detail"]
    assert "may publish" in found["security.allowed_keys_path"]["detail"]
    key = keyed.folder / "daemon.key_secret"
    key.chmod(0o644)
    try:
        assert main(["doctor", "--config", config, "--json"]) == 1
        told = capsys.readouterr()
        found = {line["subject"]: line for line in json.loads(told.out)}
        assert "chmod 600" in found["security.key_path"]["detail"]
        assert "the daemon is not asked" in told.err
    finally:
        key.chmod(0o600)


def test_terminal_commands_take_keys_from_options_environment_and_configuration(
    keyed, capsys, monkeypatch
):
    config, secret = str(keyed.daemon.config), str(keyed.folder / "control.key_secret")
    assert main(["ctl", "status", "--config", config]) == 0
    endpoint = ["--endpoint", keyed.endpoints["control"]]
    shown = ["--key", secret, "--server-key", keyed.server]
    assert main(["ctl", "scans", *endpoint, *shown]) == 0
    assert main(["ctl", "scans", *endpoint, "--key", secret, "--config", config]) == 0
    monkeypatch.setenv("PTYCHO_STREAM_KEY", str(keyed.folder / "subscribe.key_secret"))
    monkeypatch.setenv("PTYCHO_STREAM_SERVER_KEY", str(keyed.folder / "daemon.key"))
    assert main(["ctl", "status", *endpoint]) == 1
    assert "does not let us in: our key" in capsys.readouterr().err
    results = [
        "--results",
        keyed.endpoints["results"],
        "--resync",
        keyed.endpoints["resync"],
    ]
    assert main(["watch", "--once", "--timeout", "10", *results]) == 0  # of the scan above
    sender = ["--key", str(keyed.folder / "publish.key_secret")]
    assert main(["watch", "--once", "--timeout", "10", *results, *sender]) == 1
    assert "does not let us in: our key" in capsys.readouterr().err
    monkeypatch.delenv("PTYCHO_STREAM_SERVER_KEY")
    assert main(["ctl", "status", *endpoint]) == 1
    assert "and no --server-key" in capsys.readouterr().err


def test_thousands_of_connections_from_one_address_do_no_harm(keyed):
    """To each socket: strangers who hang up, talk rubbish or nothing, or show wrong keys."""
    ports = [int(endpoint.rsplit(":", 1)[1]) for endpoint in keyed.endpoints.values()]
    ports.append(keyed.daemon.settings.http.port)
    stages = keyed.daemon.status()["stages"]
    pids = [keyed.daemon.pid, *(keyed.daemon.stage_pid(name) for name in stages)]
    processes = [psutil.Process(pid) for pid in pids]
    flood(ports, 100)  # what is allocated once
    wait_for(lambda: all(_settled(process) for process in processes), 20)
    before = [(p.memory_info().rss, _held(p)) for p in processes]
    began_s = time.monotonic()
    flood(ports, 600)
    print(f"{600 * len(ports)} connections in {time.monotonic() - began_s:.1f} s")
    for process, (rss, held) in zip(processes, before, strict=True):
        with suppress(AssertionError):
            wait_for(lambda process=process, held=held: _more(process, held).total() <= 2, 20)
        more = _more(process, held)
        assert more.total() <= 2, f"{process.cmdline()[-3:]} holds {more} more than {held}"
        grown = process.memory_info().rss - rss
        print(f"{process.pid}: {grown / 2**20:.1f} MiB more")
        assert grown < 16 << 20
    after = keyed.daemon.status()["stages"]
    assert {name: after[name]["pid"] for name in stages} == {
        name: stage["pid"] for name, stage in stages.items()
    }
    for place, (_, right) in SOCKETS.items():
        keyed.enter(place, right).close()


def flood(ports: list[int], count: int) -> None:
    rubbish = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f\x03", os.urandom(4096))
    lines: deque[socket.socket] = deque()
    for number in range(count):
        for port in ports:
            line = socket.create_connection(("127.0.0.1", port), 5)
            with suppress(OSError):
                line.sendall(rubbish[number % len(rubbish)])
            lines.append(line)
            if len(lines) > 300:  # some stay open for a while
                lines.popleft().close()
    for line in lines:
        line.close()


def _settled(process: psutil.Process) -> bool:
    """Whether nothing is left of connections but what the process itself holds."""
    found = process.num_fds()
    time.sleep(0.3)
    return process.num_fds() == found


def _held(process: psutil.Process) -> Counter[str]:
    """What a process holds of sockets, their kind and threads; files are of scans."""
    held = Counter({"thread": process.num_threads()})
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if not (name := str(link.readlink())).startswith("/"):
                held[name.partition(":[")[0]] += 1
    return held


def _more(process: psutil.Process, held: Counter[str]) -> Counter[str]:
    return _held(process) - held


def test_the_daemon_shows_its_key_to_detectors_that_ask_for_one(tmp_path):
    keyed = Keyed(tmp_path, ("ingest",))
    places = {name: f"tcp://127.0.0.1:{free_port()}" for name in ("", "fluo")}
    keyed.pair("detector")
    sender = load_private_key(tmp_path / "detector.key_secret")
    keyed.daemon.write_config(
        {
            "detector": {"attach": "connect", "endpoint": places[""]},
            "more_detectors": [{"name": "fluo", "dialect": "native", "endpoint": places["fluo"]}],
            "security": {"server_keys": dict.fromkeys(places.values(), sender.public)},
        }
    )
    with keyed.daemon:
        for name, endpoint in places.items():
            with keyed.context.socket(zmq.PUSH) as push:
                push.setsockopt(zmq.LINGER, 0)
                push.curve_server = True
                push.curve_publickey = sender.public.encode()
                push.curve_secretkey = sender.secret.encode()
                push.bind(endpoint)
                send = NativeEncoder("1")
                push.send_multipart(send.scan_start(1, SHAPE, "<u2"))
                push.send_multipart(send.frame(0, np.ones(SHAPE, np.uint16)))
                labels = f'{{detector="{name}"}}' if name else ""
                keyed.daemon.metric(f"ptycho_stream_frames_received_total{labels}", 1.0)
    keyed.context.term()
