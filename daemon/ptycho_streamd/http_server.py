"""The daemon's HTTP address: ``/metrics`` for Prometheus and ``/healthz`` for whoever asks.

Run by the supervisor in a thread; ``/healthz`` answers 200 while all stages are well, else 503,
with the same JSON that ``ptycho-stream ctl status`` shows of the stages.  ``/`` leads to the page.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ptycho_stream.errors import EndpointError
from ptycho_stream.settings import HttpSettings

Health = Callable[[], tuple[bool, dict[str, Any]]]
REQUEST_TIMEOUT_S = 5.0
log = logging.getLogger(__name__)


class HttpServer:
    """Serves until :meth:`close`; ``port`` is the one that was bound.

    Raises:
        EndpointError: the port is taken; the text names the setting.
    """

    def __init__(
        self,
        settings: HttpSettings,
        registry: CollectorRegistry,
        health: Health,
        viewer_url: Callable[[], str],
    ) -> None:
        attributes = {
            "registry": registry,
            "health": staticmethod(health),
            "viewer_url": staticmethod(viewer_url),
        }
        handler = type("Handler", (_Handler,), attributes)
        try:
            self._server = ThreadingHTTPServer((settings.host, settings.port), handler)
        except OSError as error:
            raise EndpointError(
                f"cannot serve HTTP at {settings.host}:{settings.port}: {error.strerror}; stop the "
                "program that uses the port or change http.port"
            ) from error
        self._server.daemon_threads = True
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


class _Handler(BaseHTTPRequestHandler):
    registry: CollectorRegistry
    health: Health
    viewer_url: Callable[[], str]
    timeout = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
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
        log.debug("http %s: %s", self.client_address[0], format % args)

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
