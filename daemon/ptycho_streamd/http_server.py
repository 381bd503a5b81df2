"""The daemon's HTTP address: ``/metrics`` for Prometheus and ``/healthz`` for whoever asks.

Run by the supervisor in a thread; ``/healthz`` answers 200 while all stages are well, else 503,
with the same JSON that ``ptycho-stream ctl status`` shows of the stages; ``/`` leads to the page.
Who may ask is decided in :mod:`ptycho_streamd.http_access`.
"""

from __future__ import annotations

import json
import logging
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ptycho_stream.errors import EndpointError
from ptycho_stream.settings import HttpSettings
from ptycho_streamd.http_access import HttpAccess

Health = Callable[[], tuple[bool, dict[str, Any]]]
REQUEST_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 32
"""At a time; for one more the oldest is cut, so that those who dawdle keep nobody out."""
log = logging.getLogger(__name__)


class HttpServer:
    """Serves until :meth:`close`; ``port`` is the one that was bound.

    Raises:
        EndpointError: the port is taken; the text names the setting.
        KeyFileError: the token file cannot be used.
    """

    def __init__(
        self,
        settings: HttpSettings,
        registry: CollectorRegistry,
        health: Health,
        viewer_url: Callable[[], str],
    ) -> None:
        handler = type(
            "Handler",
            (_Handler,),
            {
                "registry": registry,
                "health": staticmethod(health),
                "viewer_url": staticmethod(viewer_url),
                "access": HttpAccess(settings.host_names, settings.token_path),
                "refused": Counter(
                    "ptycho_stream_http_requests_refused",
                    "HTTP requests that were refused, by what was wrong: host, origin or token",
                    ["reason"],
                    registry=registry,
                ),
            },
        )
        try:
            self._server = _Server((settings.host, settings.port), handler)
        except OSError as error:
            raise EndpointError(
                f"cannot serve HTTP at {settings.host}:{settings.port}: {error.strerror}; stop the "
                "program that uses the port or change http.port"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="http", daemon=True
        )
        self._thread.start()
        log.info("serving http://%s:%d/metrics", settings.host, self.port)

    def close(self) -> None:
        """Stop serving and close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """A thread for each connection, and a limit on these."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._open: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name server who we are, for seconds where there is none.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[id(request)] = request
            oldest = next(iter(self._open.values())) if len(self._open) > MAX_CONNECTIONS else None
        if oldest is not None:
            _cut(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(id(request), None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exception(), OSError):
            log.debug("http %s hung up", client_address[0])
        else:
            log.exception("a request of %s failed", client_address[0])


def _cut(request: socket.socket) -> None:
    """End a connection; the thread that serves it finds it ended."""
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended by itself
        return


class _Handler(BaseHTTPRequestHandler):
    registry: CollectorRegistry
    health: Health
    viewer_url: Callable[[], str]
    access: HttpAccess
    refused: Counter
    timeout = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        if (refused := self.access.refused(self.headers)) is not None:
            self.refused.labels(refused.reason).inc()
            self._answer(refused.status, "text/plain", f"{refused.text}\n".encode())
            return
        match self.path.partition("?")[0]:
            case "/metrics":
                self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self.registry))
            case "/healthz":
                well, body = self.health()
                status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
                text = json.dumps(body, default=str).encode()
                self._answer(status, "application/json", text)
            case "/" if url := self.viewer_url():
                self.send_response(HTTPStatus.TEMPORARY_REDIRECT)
                self.send_header("Location", url)
                self.send_header("Content-Length", "0")
                self.end_headers()
            case _:
                text = b"there are /metrics and /healthz, and / where there is a viewer\n"
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", text)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("http %s: %s", self.client_address[0], ascii(format % args))

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(body)
