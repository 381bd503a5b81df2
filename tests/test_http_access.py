"""Who may ask the daemon's HTTP address: token, Host, Origin, and how many at a time."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_harness import free_port, wait_for
from prometheus_client import CollectorRegistry

from ptycho_stream.cli.key_checkup import check_keys
from ptycho_stream.errors import KeyFileError
from ptycho_stream.settings import HttpSettings, Settings
from ptycho_streamd.http_access import HttpAccess
from ptycho_streamd.http_server import MAX_CONNECTIONS, HttpServer

TOKEN = "a-word-that-nobody-guesses"


@pytest.fixture
def token_path(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(f"{TOKEN}\n")
    return path


def refused(access: HttpAccess, **headers: str) -> str:
    found = access.refused({name.title(): value for name, value in headers.items()})
    return "" if found is None else found.reason


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("127.0.0.1:9603", ""),
        ("localhost:9603", ""),
        ("LOCALHOST", ""),
        ("[::1]:9603", ""),
        ("192.168.1.7:9603", ""),
        (f"{socket.gethostname()}:9603", ""),
        ("beamline.example.org:9603", ""),
        ("attacker.example.org:9603", "host"),
        ("localhost.attacker.example.org", "host"),
        ("127.0.0.1.attacker.example.org:9603", "host"),
        ("attacker.example.org#@127.0.0.1", "host"),
        ("attacker.example.org@127.0.0.1", "host"),
        ("127.0.0.1, attacker.example.org", "host"),
        ("127.0.0.1:port", "host"),
        ("[::1", "host"),
        ("", "host"),
    ],
)
def test_only_names_of_this_machine_are_answered(host: str, reason: str) -> None:
    assert refused(HttpAccess(["beamline.example.org"]), host=host) == reason


@pytest.mark.parametrize(
    ("origin", "reason"),
    [
        ("http://127.0.0.1:9603", ""),
        ("https://127.0.0.1:9603", ""),
        ("http://127.0.0.1:80", "origin"),
        ("http://attacker.example.org", "origin"),
        ("null", "origin"),
        ("file://127.0.0.1:9603", "origin"),
        ("", "origin"),
    ],
)
def test_pages_of_others_may_not_ask(origin: str, reason: str) -> None:
    assert refused(HttpAccess(), host="127.0.0.1:9603", origin=origin) == reason


@pytest.mark.parametrize(
    ("site", "mode", "reason"),
    [
        ("cross-site", "navigate", ""),
        ("same-origin", "cors", ""),
        ("none", "navigate", ""),
        ("cross-site", "no-cors", "origin"),
        ("same-site", "no-cors", "origin"),
    ],
)
def test_pages_of_others_may_link_to_us_and_not_embed_us(site: str, mode: str, reason: str) -> None:
    fetch = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
    assert refused(HttpAccess(), host="127.0.0.1:9603", **fetch) == reason


def test_a_token_is_asked_for_where_there_is_one(token_path: Path) -> None:
    access, host = HttpAccess(token_path=token_path), "127.0.0.1:9603"
    assert refused(access, host=host) == "token"
    assert refused(access, host=host, authorization="Bearer wrong") == "token"
    assert refused(access, host=host, authorization=f"Basic {TOKEN}") == "token"
    assert refused(access, host=host, authorization=f"Bearer {TOKEN}é") == "token"
    assert refused(access, host=host, authorization=f"bearer {TOKEN}") == ""
    assert access.stranger({"Host": host}) is None
    assert not access.shows_token("") and access.shows_token(TOKEN)
    assert HttpAccess().shows_token("")


def test_a_token_that_others_may_read_or_guess_is_refused(token_path: Path) -> None:
    token_path.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        HttpAccess(token_path=token_path)
    token_path.chmod(0o600)
    token_path.write_text("short")
    with pytest.raises(KeyFileError, match="holds no token of 16"):
        HttpAccess(token_path=token_path)
    with pytest.raises(KeyFileError, match="cannot read"):
        HttpAccess(token_path=token_path.with_name("nowhere"))


def test_doctor_refuses_the_token_that_the_daemon_refuses(token_path: Path) -> None:
    probe = {"path": token_path.with_name("probe.npz")}
    settings = Settings.model_validate({"probe": probe, "http": {"token_path": token_path}})
    assert [finding.ok for finding in check_keys(settings)] == [True]
    token_path.write_text("short")
    assert [finding.ok for finding in check_keys(settings)] == [False]


@pytest.fixture
def port(token_path: Path) -> Iterator[int]:
    registry = CollectorRegistry()
    settings = HttpSettings(port=free_port(), token_path=token_path)
    server = HttpServer(settings, registry, lambda: (True, {"well": True}), lambda: "")
    yield server.port
    server.close()


def ask(port: int, path: str = "/healthz", **headers: str) -> tuple[int, str]:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    line.request("GET", path, headers=headers)
    answer = line.getresponse()
    body = answer.read().decode()
    line.close()
    return answer.status, body


def test_the_server_asks_for_the_token_and_counts_who_has_none(port: int) -> None:
    shown = {"Authorization": f"Bearer {TOKEN}"}
    assert ask(port)[0] == 401
    assert ask(port, Host="attacker.example.org", **shown)[0] == 421
    assert ask(port, Origin="http://attacker.example.org", **shown)[0] == 403
    assert ask(port, **shown) == (200, '{"well": true}')
    metrics = ask(port, "/metrics", **shown)[1]
    for reason in ("host", "origin", "token"):
        assert f'ptycho_stream_http_requests_refused_total{{reason="{reason}"}} 1.0' in metrics


def test_those_who_dawdle_keep_nobody_out(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * MAX_CONNECTIONS)]
    began_s = time.monotonic()
    assert ask(port, Authorization=f"Bearer {TOKEN}")[0] == 200
    assert time.monotonic() - began_s < 4.0
    for line in idle:
        line.setblocking(False)

    def cut() -> int:
        count = 0
        for line in idle:
            try:
                count += line.recv(1) == b""
            except BlockingIOError:
                continue
        return count

    wait_for(lambda: cut() >= 2 * MAX_CONNECTIONS - 1, what="the cut of the oldest")
    for line in idle:
        line.close()
