"""The viewer: a page for browsers that shows scans as they run, at ``[viewer]`` of the settings.

A stage of its own, started by the supervisor as ``python -m ptycho_streamd.viewer``, that is a
client of the public protocol: the daemon goes on without it, and it without a browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import uvicorn

from ptycho_stream.errors import EndpointError, SettingsError
from ptycho_stream.settings import Settings, ViewerSettings, load_settings
from ptycho_streamd.http_access import HttpAccess
from ptycho_streamd.stage import BEAT_INTERVAL_S, Stage, run_stage
from ptycho_streamd.viewer_metrics import ViewerMetrics
from ptycho_streamd.web.application import Pages
from ptycho_streamd.web.hub import Hub
from ptycho_streamd.web.messages import MAX_MESSAGE_BYTES

NICE = 5
"""Frames come before pictures of them."""
MAX_CONNECTIONS = 256
GRACE_S = 1

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """The stage is told to stop over the bus, and has its own handlers of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class ViewerStage:
    """The stage: a server of pages, and its link to the supervisor.

    Raises:
        EndpointError: the port is taken.
        KeyFileError: the token file cannot be used.
    """

    def __init__(self, stage: Stage, config: Path, settings: Settings) -> None:
        self._stage, self._config, self._settings = stage, config, settings
        self._metrics = ViewerMetrics()
        self._access = HttpAccess(settings.http.host_names, settings.viewer.token_path)
        self._listener = listen(settings.viewer)
        port = self._listener.getsockname()[1]
        host = settings.viewer.host
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        self._hub: Hub | None = None

    async def run(self) -> None:
        """Until the supervisor says stop."""
        hub = self._hub = Hub(self._settings)
        server = _Server(self._server_config(hub))
        serving = asyncio.create_task(server.serve([self._listener]))
        watching = asyncio.create_task(hub.run())
        log.info("serving %s", self.url)
        try:
            while not self._stage.stopping:
                self._attend()
                done, _ = await asyncio.wait((serving, watching), timeout=BEAT_INTERVAL_S / 2)
                for task in done:
                    task.result()  # neither ends by itself: this raises what ended it
                    return
        finally:
            server.should_exit = True
            watching.cancel()
            await asyncio.gather(serving, watching, return_exceptions=True)
            self._attend(now=True)

    def _server_config(self, hub: Hub) -> uvicorn.Config:
        return uvicorn.Config(
            Pages(hub, self._settings.viewer, self._access, self._metrics).application(),
            http="h11",
            ws="websockets-sansio",
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,  # what is large is deflated already
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_S,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
        )

    def _attend(self, *, now: bool = False) -> None:
        """Hear the supervisor and tell it that we live."""
        for request in self._stage.requests():
            self._stage.fail(request, "unknown_command", f"the viewer knows no {request.command}")
        if self._stage.reload_requested:
            self._stage.reloaded()
            try:
                level = load_settings(self._config).log_level
            except SettingsError as error:
                log.error("the settings stay as they were: %s", error)
            else:
                logging.getLogger().setLevel(level.upper())
        self._stage.beat(self._status(), self._metrics.registry, now=now)

    def _status(self) -> dict[str, Any]:
        return {"url": self.url, "pages": 0 if self._hub is None else self._hub.pages}


def listen(settings: ViewerSettings) -> socket.socket:
    """The socket that pages connect to.

    Raises:
        EndpointError: the port is taken; the text names the setting.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen()  # before the first heartbeat says that we are there
    except OSError as error:
        listener.close()
        raise EndpointError(
            f"cannot serve the viewer at {settings.host}:{settings.port}: {error.strerror}; stop "
            "the program that uses the port, change viewer.port, or set viewer.enabled = false"
        ) from error
    return listener


def body(stage: Stage, config: Path, settings: Settings) -> None:
    """The stage's life, for :func:`ptycho_streamd.stage.run_stage`."""
    os.nice(NICE)
    # Its lines of each connection, and of each that is no HTTP, are of no use, and without limit.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    asyncio.run(ViewerStage(stage, config, settings).run())


if __name__ == "__main__":
    sys.exit(run_stage("viewer", body))
