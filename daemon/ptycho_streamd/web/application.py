"""The viewer's HTTP side: the page and its files, thumbnails, and a WebSocket for each page.

Everything passes :class:`Guarded` first.  Nothing here changes anything in the daemon: what a
person does on a page goes over its WebSocket.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import mimetypes
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from ptycho_stream.errors import MalformedMessage
from ptycho_stream.settings import ViewerSettings
from ptycho_streamd.http_access import HttpAccess, Refused
from ptycho_streamd.log_limit import LimitedLog
from ptycho_streamd.viewer_metrics import ViewerMetrics
from ptycho_streamd.web.hub import Hub
from ptycho_streamd.web.security_headers import security_headers
from ptycho_streamd.web.session import Session

TOO_MANY, NOT_UNDERSTOOD, TOKEN_NEEDED = 1013, 1008, 4401
"""Codes with which a WebSocket is closed (RFC 6455, 7.4, and its registry); the last is ours."""
NO_PAGE = Refused(
    "origin", HTTPStatus.FORBIDDEN, "this is for pages; programs have the control socket"
)
"""A WebSocket without Origin: browsers always send one."""

log = LimitedLog(logging.getLogger(__name__))


class Guarded:
    """Lets nobody in whom :class:`~ptycho_streamd.http_access.HttpAccess` takes for a stranger."""

    def __init__(self, app: ASGIApp, access: HttpAccess, metrics: ViewerMetrics) -> None:
        self._app, self._access, self._metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._access.stranger(headers)
        if refused is None and scope["type"] == "websocket" and "origin" not in headers:
            refused = NO_PAGE
        if refused is not None:
            self._metrics.refused.labels(refused.reason).inc()
            said = f"host {headers.get('host')!r:.200}, origin {headers.get('origin')!r:.200}"
            log.warning(refused.reason, f"a request was refused for its {refused.reason}: {said}")
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": NOT_UNDERSTOOD})  # answered with 403
            else:
                answer = PlainTextResponse(f"{refused.text}\n", refused.status)
                await answer(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(security_headers(headers["host"]))
            await send(message)

        await self._app(scope, receive, send_guarded)


class Pages:
    """What answers requests.

    Args:
        hub: what all pages share.
        settings: of the viewer.
        access: who may talk to it, and with which token.
        metrics: to count in.
    """

    def __init__(
        self, hub: Hub, settings: ViewerSettings, access: HttpAccess, metrics: ViewerMetrics
    ) -> None:
        self._hub, self._settings, self._metrics = hub, settings, metrics
        self._access = access
        self._files = static_files()

    def application(self) -> ASGIApp:
        """All of it, guarded."""
        routes = [
            Route("/", self._file),
            Route("/static/{name}", self._file),
            Route("/thumbnail/{scan_id}.png", self._thumbnail),
            WebSocketRoute("/ws", self._page),
        ]
        return Guarded(Starlette(routes=routes), self._access, self._metrics)

    async def _file(self, request: Request) -> Response:
        held = self._files.get(request.path_params.get("name", "index.html"))
        if held is None:
            return PlainTextResponse("there is no such file\n", 404)
        content, kind, tag = held
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(None, 304, headers)
        return Response(content, 200, headers, kind)

    def _shows_token(self, connection: HTTPConnection) -> bool:
        """Whether a page has shown the token, if one is needed: for all but the page's files."""
        if self._access.shows_token(connection.query_params.get("token", "")):
            return True
        self._metrics.refused.labels("token").inc()
        return False

    async def _thumbnail(self, request: Request) -> Response:
        if not self._shows_token(request):
            return PlainTextResponse("a token is needed\n", HTTPStatus.UNAUTHORIZED)
        png = self._hub.thumbnails.png(request.path_params["scan_id"])
        if png is None:
            return PlainTextResponse("there is no picture of this scan\n", 404)
        # Pages name the version of the picture in the query.
        headers = {"cache-control": "private, max-age=3600, immutable"}
        return Response(png, 200, headers, "image/png")

    async def _page(self, socket: WebSocket) -> None:
        await socket.accept()  # else the page could not tell why it is refused
        if not self._shows_token(socket):
            await socket.close(TOKEN_NEEDED, "a token is needed")
            return
        if self._hub.pages >= self._settings.max_pages:
            self._metrics.refused.labels("pages").inc()
            await socket.close(TOO_MANY, f"{self._settings.max_pages} pages are open already")
            return
        self._hub.page_opened()
        self._metrics.pages.set(self._hub.pages)
        try:
            await self._serve(socket)
        finally:
            self._hub.page_closed()
            self._metrics.pages.set(self._hub.pages)

    async def _serve(self, socket: WebSocket) -> None:
        async def send(message: str | bytes) -> None:
            if isinstance(message, bytes):
                await socket.send_bytes(message)
            else:
                await socket.send_text(message)

        session = Session(self._hub, self._settings, self._metrics, send)
        telling = asyncio.create_task(session.run())
        hearing = asyncio.create_task(self._hear(socket, session))
        try:
            await asyncio.wait((telling, hearing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (telling, hearing):
                task.cancel()
            outcomes = await asyncio.gather(telling, hearing, return_exceptions=True)
        for outcome in outcomes:
            await self._end(socket, outcome)

    @staticmethod
    async def _hear(socket: WebSocket, session: Session) -> None:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1000))
            text = message.get("text")
            if text is None:
                raise MalformedMessage("pages send text")
            await session.hear(text)

    async def _end(self, socket: WebSocket, outcome: Any) -> None:
        """Say why a page is given up, unless it has gone by itself."""
        if isinstance(outcome, asyncio.CancelledError | WebSocketDisconnect) or outcome is None:
            return
        if not isinstance(outcome, MalformedMessage):
            raise outcome
        self._metrics.refused.labels("message").inc()
        log.warning("message", f"a page is closed: {outcome}")
        if socket.application_state is WebSocketState.CONNECTED:
            await socket.close(NOT_UNDERSTOOD, str(outcome)[:100])


def static_files() -> dict[str, tuple[bytes, str, str]]:
    """The page's files by name: content, type and tag.  Nothing else is ever served."""
    found: dict[str, tuple[bytes, str, str]] = {}
    for file in files("ptycho_streamd.web").joinpath("static").iterdir():
        content = file.read_bytes()
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        found[file.name] = (content, kind, tag)
    return found
