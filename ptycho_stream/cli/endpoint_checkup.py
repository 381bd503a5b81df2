"""The checks of ``ptycho-stream doctor`` that concern endpoints.

Where a daemon runs it is asked what it sees; otherwise streams are knocked at, and the daemon's own
ports are tried for whether they are free.  No socket that could be dealt a frame is ever made.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from ptycho_stream.cli.checkup import Finding
from ptycho_stream.cli.knock import Knocked, knock
from ptycho_stream.cli.pva_checkup import check_channels
from ptycho_stream.errors import ControlError, EndpointError
from ptycho_stream.keys import ClientKeys
from ptycho_stream.remote import Daemon
from ptycho_stream.settings import (
    DetectorSettings,
    PositionSettings,
    SecuritySettings,
    Settings,
    reachable,
)

_SENDERS = {"pull": ("PUSH",), "sub": ("PUB", "XPUB")}


def check_endpoints(
    settings: Settings, timeout_s: float, keys: ClientKeys | None = None
) -> list[Finding]:
    """One finding for every endpoint that the settings name; ``keys`` are to ask the daemon."""
    security = settings.security
    keyed = security.key_path is not None
    control = _check_control(settings, timeout_s)
    running = control.state == "OK"
    known: list[Mapping[str, Any]] = []
    if running:
        known, trouble = _ask_daemon(reachable(settings.control.endpoint), timeout_s, keys)
        if trouble:
            control = Finding("control", "silent", control.target, trouble, ok=False)
    findings = [control]
    for detector in settings.detectors.values():
        findings += _check_detector(detector, known, security, timeout_s, running=running)
    positions = settings.positions
    if positions.is_stream and positions.endpoint is not None:
        endpoint = positions.endpoint
        findings.append(
            _as_daemon_says("positions", endpoint, known)
            if known
            else _check_stream(
                "positions", endpoint, positions, security, timeout_s, running=running
            )
        )
    for name, endpoint, kind in (
        ("results", settings.results.endpoint, "XPUB"),
        ("results.resync", settings.results.resync_endpoint, "ROUTER"),
    ):
        findings.append(
            _own(name, endpoint, (kind,), timeout_s, keyed)
            if running
            else _check_free(name, endpoint)
        )
    pages = [("http", settings.http.host, settings.http.port)]
    if settings.viewer.enabled:
        pages.append(("viewer", settings.viewer.host, settings.viewer.port))
    for name, host, port in pages:
        if not running and port:
            written = f"[{host}]" if ":" in host else host
            findings.append(_check_free(name, f"tcp://{written}:{port}"))
    return findings


def _check_detector(
    detector: DetectorSettings,
    known: list[Mapping[str, Any]],
    security: SecuritySettings,
    timeout_s: float,
    *,
    running: bool,
) -> list[Finding]:
    """A finding for each of a detector's endpoints."""
    table = detector.table
    if known:
        return [_as_daemon_says(table, endpoint, known) for endpoint in detector.endpoints]
    if detector.dialect == "pva":
        return check_channels(table, detector, timeout_s)
    return [
        _check_stream(table, endpoint, detector, security, timeout_s, running=running)
        for endpoint in detector.endpoints
    ]


def _check_control(settings: Settings, timeout_s: float) -> Finding:
    endpoint = settings.control.endpoint
    found = knock(reachable(endpoint), timeout_s)
    if found.answer == "refused":
        return Finding("control", "no daemon", endpoint, "the daemon is not running")
    if settings.security.key_path is not None:
        if found.answer == "keyed":
            return Finding("control", "OK", endpoint, "a daemon runs, and asks for keys")
    elif found.answer == "ok" and found.socket_type in ("ROUTER", None):
        return Finding("control", "OK", endpoint, "a daemon runs")
    return Finding("control", "in use", endpoint, f"by another program: {found.detail}", ok=False)


def _ask_daemon(
    endpoint: str, timeout_s: float, keys: ClientKeys | None
) -> tuple[list[Mapping[str, Any]], str]:
    """What the daemon knows of its streams, and why it did not tell."""
    try:
        with Daemon(endpoint, timeout_s=timeout_s, keys=keys) as daemon:
            return cast("list[Mapping[str, Any]]", daemon.endpoints()), ""
    except ControlError as error:
        return [], f"the daemon could not tell of its endpoints: {error}"
    except EndpointError as error:
        return [], str(error)


def _as_daemon_says(name: str, endpoint: str, known: list[Mapping[str, Any]]) -> Finding:
    """A stream of a running daemon: connected, and has it said anything?"""
    streams = {str(told["endpoint"]): told for told in known if told["name"] == name}
    stream = streams.get(endpoint)
    if stream is None:
        uses = ", ".join(streams) or "none"
        text = f"the daemon uses {uses}: restart it to apply the file"
        return Finding(name, "differs", endpoint, text, ok=False)
    messages, age_s = stream["messages"], stream["last_message_age_s"]
    if stream["peers"]:
        if not messages:
            return Finding(name, "silent", endpoint, "connected, nothing has come yet")
        return Finding(name, "OK", endpoint, f"{messages} messages, the last {age_s:.1f} s ago")
    failed = stream["handshakes_failed"]
    if stream["attach"] == "bind" and (stream["connected"] or not failed):
        # Those who were not let in may be strangers: the right one was here, or nobody yet.
        text = f"the daemon waits; nobody is connected, {failed} were not let in"
        return Finding(name, "silent", endpoint, text)
    if failed:
        failure = (
            f"something answers, but the handshake fails ({stream['last_failure']}): it is not "
            "ZeroMQ or another kind of socket, or the key is wrong; check the address first"
        )
        return Finding(name, "no handshake", endpoint, failure, ok=False)
    return Finding(name, "refused", endpoint, "the daemon cannot connect: start the sender", False)


def _check_stream(
    name: str,
    endpoint: str,
    stream: DetectorSettings | PositionSettings,
    security: SecuritySettings,
    timeout_s: float,
    *,
    running: bool,
) -> Finding:
    """A stream of which no daemon tells."""
    if stream.attach == "bind" and running:
        keyed = security.key_path is not None
        return _own(name, endpoint, ("PULL", "SUB"), timeout_s, keyed)
    if stream.attach == "bind":
        return _check_free(name, endpoint)
    keyed = endpoint in security.server_keys
    return _judge(name, endpoint, knock(endpoint, timeout_s), _SENDERS[stream.socket], keyed)


def _own(
    name: str, endpoint: str, kinds: tuple[str, ...], timeout_s: float, keyed: bool
) -> Finding:
    """A socket that the running daemon should have bound."""
    return _judge(name, endpoint, knock(reachable(endpoint), timeout_s), kinds, keyed)


def _judge(
    name: str, endpoint: str, found: Knocked, kinds: tuple[str, ...], keyed: bool
) -> Finding:
    if found.answer == "keyed":
        if keyed:
            return Finding(name, "OK", endpoint, found.detail)
        detail = f"{found.detail}, and no key is configured: set security.server_keys"
        return Finding(name, "wrong key", endpoint, detail, ok=False)
    if keyed and found.answer == "ok":
        detail = f"{found.detail}, and asks for no key: restart it with keys"
        return Finding(name, "no key", endpoint, detail, ok=False)
    if found.answer != "ok":
        return Finding(name, found.answer, endpoint, found.detail, ok=False)
    if found.socket_type is not None and found.socket_type not in kinds:
        wanted = " or ".join(kinds)
        return Finding(
            name, "wrong kind", endpoint, f"{found.detail}, {wanted} is expected", ok=False
        )
    return Finding(name, "OK", endpoint, found.detail)


def _check_free(name: str, endpoint: str) -> Finding:
    """Whether the daemon will be able to bind ``endpoint`` when it starts."""
    parts = urlsplit(endpoint.replace("//*:", "//0.0.0.0:"))
    if parts.scheme == "ipc":
        return _check_ipc(name, endpoint)
    try:
        family = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family[0]) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(family[4])
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding(name, "in use", endpoint, f"cannot be bound ({reason})", ok=False)
    return Finding(name, "OK", endpoint, "free for the daemon to bind")


def _check_ipc(name: str, endpoint: str) -> Finding:
    path = Path(endpoint.removeprefix("ipc://"))
    if knock(endpoint, 1.0).answer != "refused":
        return Finding(name, "in use", endpoint, "another program has bound it", ok=False)
    if not path.parent.is_dir():
        return Finding(name, "missing", endpoint, f"there is no folder {path.parent}", ok=False)
    return Finding(name, "OK", endpoint, "free for the daemon to bind")
