"""Thousands of connections from one address, silent, half closed or full of garbage.

The detector has another address: one that connects amid a flood of its own address is turned away
with the rest of it, perhaps after its first frames (which are counted as missing).
"""

from __future__ import annotations

import random
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from beamline import SHAPE, headers, pixels
from daemon_harness import DaemonHarness, free_port, wait_for

from ptycho_stream.client import Daemon as DaemonClient
from ptycho_stream.scans import Catalogue
from ptycho_stream.simulate.outlet import Outlet
from ptycho_stream.wire import NativeEncoder

CONNECTIONS = 1500
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
GARBAGE = (b"", b"\x00", b"GET / HTTP/1.1\r\n", GREETING[:12], GREETING, b"\xff" * 4096)


def resident_bytes(daemon: DaemonHarness, pids: list[int]) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def flood(ports: list[int], seed: int) -> list[socket.socket]:
    """Connect again and again; returns what is left open."""
    rng = random.Random(seed)
    left: list[socket.socket] = []
    for number in range(CONNECTIONS):
        # Few to the last one, HTTP: its backlog is short, and each further one waits a second.
        port = ports[-1] if number % 20 == 0 else ports[number % (len(ports) - 1)]
        one = socket.create_connection(("127.0.0.1", port), timeout=10)
        end = rng.choice(("close", "half close", "stay"))
        with suppress(OSError):  # the daemon has thrown it out already
            one.sendall(rng.choice(GARBAGE))
            if end == "half close":
                one.shutdown(socket.SHUT_WR)
        if end == "close":
            one.close()
        else:
            left.append(one)
    return left


def _from_elsewhere(endpoint: str) -> str:
    """``endpoint``, to be connected to from another address than the flood's."""
    return endpoint.replace("tcp://", "tcp://127.0.0.2:0;")


def send_scan(endpoint: str, series: int) -> None:
    encoder = NativeEncoder(str(series), encoding="bslz4")
    with Outlet(endpoint, "push", "connect") as outlet:
        outlet.send(encoder.scan_start(20, SHAPE, "<u2"))
        for number in range(20):
            outlet.send(encoder.frame(number, pixels(series, number), (number * 1e-6, 0.0)))
        outlet.send(encoder.scan_end())


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_flood_of_connections_costs_no_frame(tmp_path: Path) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    tables: dict[str, Any] = {
        "detector": {"dialect": "native", "endpoint": endpoint, "attach": "bind"},
        "positions": {"source": "inline", "endpoint": None, "socket": None},
    }
    with DaemonHarness(tmp_path, tables, stages=("ingest",)) as daemon:
        settings = daemon.settings
        ports = [urlsplit(endpoint).port, urlsplit(settings.control.endpoint).port]
        ports.append(settings.http.port)
        assert all(ports)
        sender = _from_elsewhere(endpoint)
        send_scan(sender, 1)
        catalogue = Catalogue(daemon.data)
        wait_for(lambda: [h for h in headers(catalogue) if h.sealed])
        pids = [daemon.pid, daemon.stage_pid("ingest")]
        before = resident_bytes(daemon, pids)
        left = flood([port for port in ports if port], 1)
        try:
            assert len(left) > 800
            send_scan(sender, 2)
            wait_for(lambda: len([h for h in headers(catalogue) if h.sealed]) == 2, 20)
            with DaemonClient(_from_elsewhere(settings.control.endpoint)) as control:
                assert control.status()["state"] == "ready"
            grown = resident_bytes(daemon, pids) - before
            assert grown < 100e6, f"{grown / 1e6:.0f} MB for {CONNECTIONS} connections"
        finally:
            for one in left:
                one.close()
        for header, key in zip(headers(catalogue), (1, 2), strict=True):
            assert header.state == "complete" and header.counts["frames"] == 20
            with catalogue.open(header.scan_id) as reader:
                assert reader.verify() == []
                assert (reader.frame(3) == pixels(key, 3)).all()
        status = daemon.status()
        assert (status["state"], status["stages"]["ingest"]["restarts"]) == ("ready", 0)
        until_s = time.monotonic() + 40
        while sum(psutil.Process(pid).num_fds() for pid in pids) > 200:
            assert time.monotonic() < until_s, "connections that are gone are still held"
            time.sleep(0.2)
