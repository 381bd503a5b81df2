"""Call a daemon over its control socket, blocking or with asyncio.

Used by the terminal commands and the viewer; import :class:`Daemon` and :class:`AsyncDaemon` from
:mod:`ptycho_stream.client`.  What a command returns is described in ``docs/protocol.md``.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import zmq
import zmq.asyncio

from ptycho_stream.errors import EndpointError
from ptycho_stream.wire import control as wire

CONTROL_ENDPOINT = "tcp://127.0.0.1:9602"
PATIENCE_S = {
    "export": 600.0,
    "snapshot": 120.0,
    "use_model": 30.0,
    "rollback_model": 30.0,
    "reprocess": 45.0,
}
"""Commands that may take longer: an export copies a whole scan, a model is loaded and tried out."""

Result = dict[str, Any]


def _prepare(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, endpoint: str) -> None:
    # What could not be delivered is dropped with the socket: a `start` must not be carried out
    # minutes later, when the daemon is back.
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_REPLY_BYTES)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise EndpointError(
            f"cannot connect to {endpoint}: {error.strerror}; write tcp://HOST:PORT or ipc:///PATH"
        ) from error


def _silent(endpoint: str, command: str, timeout_s: float) -> EndpointError:
    return EndpointError(
        f"no answer to {command!r} from {endpoint} within {timeout_s:g} s: is ptycho-streamd "
        "running, and is this its control.endpoint?"
    )


class Daemon:
    """A running ptycho-streamd; blocking.  One thread may use an object at a time.

    Every method raises :class:`~ptycho_stream.errors.ControlError` (with a ``code``) if the daemon
    refuses or fails the request, and :class:`~ptycho_stream.errors.EndpointError` if it does not
    answer in time.

    Args:
        endpoint: its ``control.endpoint``.
        timeout_s: how long an answer may take.

    Example::

        with Daemon() as daemon:
            print(daemon.status()["state"])
    """

    def __init__(self, endpoint: str = CONTROL_ENDPOINT, *, timeout_s: float = 5.0) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Daemon at {self._endpoint}>"

    def close(self) -> None:
        """Give the socket back."""
        self._hang_up()
        self._context.term()

    def status(self) -> Result:
        """Version, uptime, and what each stage is doing."""
        return self.call("status")

    def scans(self, limit: int = 100) -> list[Result]:
        """Headers of the newest scans in the store, newest first."""
        return self.call("scans", {"limit": limit})

    def scan(self, scan_id: str | None = None) -> Result:
        """Header and counts of one scan; None: the newest."""
        return self.call("scan", {"scan_id": scan_id})

    def models(self) -> list[Result]:
        """The models that the daemon can use."""
        return self.call("models")

    def start(
        self,
        metadata: Mapping[str, Any] | None = None,
        expected_frames: int | None = None,
        series: str | None = None,
    ) -> Result:
        """Arm a scan before the detector sends a header."""
        arguments = {
            "metadata": dict(metadata or {}),
            "expected_frames": expected_frames,
            "series": series,
        }
        return self.call("start", arguments)

    def stop(self, scan_id: str | None = None) -> Result:
        """End a scan as if its detector had; None: the running one."""
        return self.call("stop", {"scan_id": scan_id})

    def abort(self, scan_id: str | None = None) -> Result:
        """Give a scan up; None: the running one.  What it has stored stays."""
        return self.call("abort", {"scan_id": scan_id})

    def export(self, scan_id: str | None = None, formats: Sequence[str] = ("npz",)) -> Result:
        """Write a scan's image (None: the newest) into the daemon's export folder."""
        arguments = {"scan_id": scan_id, "formats": list(formats)}
        return self.call("export", arguments)

    def snapshot(self, name: str, scan_id: str | None = None, *, force: bool = False) -> Result:
        """Keep a scan's image (None: the newest) as it is now, under a name, with the scan.

        With ``force`` a snapshot of that name is replaced.
        """
        arguments = {"name": name, "scan_id": scan_id, "force": force}
        return self.call("snapshot", arguments)

    def snapshots(self, scan_id: str | None = None) -> list[Result]:
        """The snapshots of a scan (None: the newest), oldest first."""
        return self.call("snapshots", {"scan_id": scan_id})

    def history(self, scan_id: str | None = None, limit: int = 10_000) -> Result:
        """How a scan's image came about (None: the newest): figures of trust over time."""
        return self.call("history", {"scan_id": scan_id, "limit": limit})

    def reprocess(
        self,
        scan_id: str | None = None,
        *,
        orientation: str | None = None,
        center_yx_px: tuple[float, float] | None = None,
        dc: str | None = None,
        bad_pixels: str | None = None,
        flat_field: str | None = None,
        background: str | None = None,
        bad_frames: str | None = None,
        probe: str | None = None,
        model: str | None = None,
    ) -> Result:
        """Make a scan's image anew (None: the newest); the present one is shown meanwhile.

        Args:
            scan_id: of the scan.
            orientation: of the detector, from now on; None: as it is.
            center_yx_px: zero frequency in pixels of the stored frames; None: as it is.
            dc: ``center`` or ``corner``; None: as it is.
            bad_pixels: absolute path of a file that the daemon can read, or ``none``; None: as it
                is. So are the next three.
            flat_field: the response of each pixel.
            background: counts a frame; also ``dark-frames``.
            bad_frames: numbers of frames to leave out.
            probe: absolute path of a file that the daemon can read; None: that of its settings.
            model: of its registry; None: the one in use.
        """
        arguments = {
            "scan_id": scan_id,
            "orientation": orientation,
            "center_yx_px": center_yx_px,
            "dc": dc,
            "bad_pixels": bad_pixels,
            "flat_field": flat_field,
            "background": background,
            "bad_frames": bad_frames,
            "probe": probe,
            "model": model,
        }
        return self.call("reprocess", arguments)

    def use_model(self, name: str) -> Result:
        """Take a model into use, which has to load; images begin a new generation."""
        return self.call("use_model", {"name": name})

    def rollback_model(self) -> Result:
        """Go back to the model that was in use before."""
        return self.call("rollback_model")

    def finetune(self, *scan_ids: str, **choices: Any) -> Result:
        """Queue a fine-tuning on scans (none: the newest); returns the job.

        Args:
            scan_ids: of scans in the store, running ones too.
            choices: any of the request's arguments: ``name``, ``model``, ``frames``, ``loss``,
                ``minutes`` or ``steps``, ``promote``, ``seed``, ...
        """
        return self.call("finetune", {"scan_ids": list(scan_ids), **choices})

    def train(self, *scan_ids: str, **choices: Any) -> Result:
        """Queue a training from nothing; like :meth:`finetune`, with ``architecture``."""
        return self.call("train", {"scan_ids": list(scan_ids), **choices})

    def jobs(self, limit: int = 20) -> list[Result]:
        """The newest training jobs, newest first."""
        return self.call("jobs", {"limit": limit})

    def job(self, job_id: str | None = None) -> Result:
        """How a training job is (None: the newest), and what was asked for."""
        return self.call("job", {"job_id": job_id})

    def cancel(self, job_id: str | None = None) -> Result:
        """End a training job without a model; None: the one that runs."""
        return self.call("cancel", {"job_id": job_id})

    def reload(self) -> Result:
        """Make the daemon read its settings again."""
        return self.call("reload")

    def endpoints(self) -> Any:
        """What the daemon knows of the sockets it listens to."""
        return self.call("endpoints")

    def call(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Send any command and return its result."""
        if timeout_s is None:
            timeout_s = max(self._timeout_s, PATIENCE_S.get(command, 0.0))
        request_id = next(self._ids)
        if self._socket is None:
            self._socket = self._context.socket(zmq.DEALER)
            _prepare(self._socket, self._endpoint)
        until_s = time.monotonic() + timeout_s
        self._socket.send(wire.encode_request(request_id, command, arguments or {}))
        while self._socket.poll(max(0, int((until_s - time.monotonic()) * 1e3))):
            reply = wire.decode_reply(self._socket.recv())
            # None: the daemon could not read even the id of what can only be this request.
            if reply.id in (request_id, None):
                return wire.result_of(reply)
        self._hang_up()
        raise _silent(self._endpoint, command, timeout_s)

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class AsyncDaemon:
    """A running ptycho-streamd; for asyncio.  Like :class:`Daemon`, with ``await``."""

    def __init__(self, endpoint: str = CONTROL_ENDPOINT, *, timeout_s: float = 5.0) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._one_at_a_time = asyncio.Lock()
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<AsyncDaemon at {self._endpoint}>"

    def close(self) -> None:
        """Give the socket back."""
        self._hang_up()
        self._context.term()

    async def status(self) -> Result:
        """Version, uptime, and what each stage is doing."""
        return await self.call("status")

    async def scans(self, limit: int = 100) -> list[Result]:
        """Headers of the newest scans in the store, newest first."""
        return await self.call("scans", {"limit": limit})

    async def scan(self, scan_id: str | None = None) -> Result:
        """Header and counts of one scan; None: the newest."""
        return await self.call("scan", {"scan_id": scan_id})

    async def models(self) -> list[Result]:
        """The models that the daemon can use."""
        return await self.call("models")

    async def start(
        self,
        metadata: Mapping[str, Any] | None = None,
        expected_frames: int | None = None,
        series: str | None = None,
    ) -> Result:
        """Arm a scan before the detector sends a header."""
        arguments = {
            "metadata": dict(metadata or {}),
            "expected_frames": expected_frames,
            "series": series,
        }
        return await self.call("start", arguments)

    async def stop(self, scan_id: str | None = None) -> Result:
        """End a scan as if its detector had; None: the running one."""
        return await self.call("stop", {"scan_id": scan_id})

    async def abort(self, scan_id: str | None = None) -> Result:
        """Give a scan up; None: the running one.  What it has stored stays."""
        return await self.call("abort", {"scan_id": scan_id})

    async def export(self, scan_id: str | None = None, formats: Sequence[str] = ("npz",)) -> Result:
        """Write a scan's image (None: the newest) into the daemon's export folder."""
        arguments = {"scan_id": scan_id, "formats": list(formats)}
        return await self.call("export", arguments)

    async def snapshot(
        self, name: str, scan_id: str | None = None, *, force: bool = False
    ) -> Result:
        """Keep a scan's image (None: the newest) as it is now, under a name, with the scan.

        With ``force`` a snapshot of that name is replaced.
        """
        arguments = {"name": name, "scan_id": scan_id, "force": force}
        return await self.call("snapshot", arguments)

    async def snapshots(self, scan_id: str | None = None) -> list[Result]:
        """The snapshots of a scan (None: the newest), oldest first."""
        return await self.call("snapshots", {"scan_id": scan_id})

    async def history(self, scan_id: str | None = None, limit: int = 10_000) -> Result:
        """How a scan's image came about (None: the newest): figures of trust over time."""
        return await self.call("history", {"scan_id": scan_id, "limit": limit})

    async def reprocess(
        self,
        scan_id: str | None = None,
        *,
        orientation: str | None = None,
        center_yx_px: tuple[float, float] | None = None,
        dc: str | None = None,
        bad_pixels: str | None = None,
        flat_field: str | None = None,
        background: str | None = None,
        bad_frames: str | None = None,
        probe: str | None = None,
        model: str | None = None,
    ) -> Result:
        """Make a scan's image anew (None: the newest); the present one is shown meanwhile.

        Args:
            scan_id: of the scan.
            orientation: of the detector, from now on; None: as it is.
            center_yx_px: zero frequency in pixels of the stored frames; None: as it is.
            dc: ``center`` or ``corner``; None: as it is.
            bad_pixels: absolute path of a file that the daemon can read, or ``none``; None: as it
                is. So are the next three.
            flat_field: the response of each pixel.
            background: counts a frame; also ``dark-frames``.
            bad_frames: numbers of frames to leave out.
            probe: absolute path of a file that the daemon can read; None: that of its settings.
            model: of its registry; None: the one in use.
        """
        arguments = {
            "scan_id": scan_id,
            "orientation": orientation,
            "center_yx_px": center_yx_px,
            "dc": dc,
            "bad_pixels": bad_pixels,
            "flat_field": flat_field,
            "background": background,
            "bad_frames": bad_frames,
            "probe": probe,
            "model": model,
        }
        return await self.call("reprocess", arguments)

    async def use_model(self, name: str) -> Result:
        """Take a model into use, which has to load; images begin a new generation."""
        return await self.call("use_model", {"name": name})

    async def rollback_model(self) -> Result:
        """Go back to the model that was in use before."""
        return await self.call("rollback_model")

    async def finetune(self, *scan_ids: str, **choices: Any) -> Result:
        """Queue a fine-tuning on scans (none: the newest); returns the job.

        Args:
            scan_ids: of scans in the store, running ones too.
            choices: any of the request's arguments: ``name``, ``model``, ``frames``, ``loss``,
                ``minutes`` or ``steps``, ``promote``, ``seed``, ...
        """
        return await self.call("finetune", {"scan_ids": list(scan_ids), **choices})

    async def train(self, *scan_ids: str, **choices: Any) -> Result:
        """Queue a training from nothing; like :meth:`finetune`, with ``architecture``."""
        return await self.call("train", {"scan_ids": list(scan_ids), **choices})

    async def jobs(self, limit: int = 20) -> list[Result]:
        """The newest training jobs, newest first."""
        return await self.call("jobs", {"limit": limit})

    async def job(self, job_id: str | None = None) -> Result:
        """How a training job is (None: the newest), and what was asked for."""
        return await self.call("job", {"job_id": job_id})

    async def cancel(self, job_id: str | None = None) -> Result:
        """End a training job without a model; None: the one that runs."""
        return await self.call("cancel", {"job_id": job_id})

    async def reload(self) -> Result:
        """Make the daemon read its settings again."""
        return await self.call("reload")

    async def endpoints(self) -> Any:
        """What the daemon knows of the sockets it listens to."""
        return await self.call("endpoints")

    async def call(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Send any command and return its result; calls of several tasks take turns."""
        if timeout_s is None:
            timeout_s = max(self._timeout_s, PATIENCE_S.get(command, 0.0))
        async with self._one_at_a_time:
            request_id = next(self._ids)
            if self._socket is None:
                self._socket = self._context.socket(zmq.DEALER)
                _prepare(self._socket, self._endpoint)
            request = wire.encode_request(request_id, command, arguments or {})
            try:
                reply = await asyncio.wait_for(self._exchange(request, request_id), timeout_s)
            except TimeoutError:
                self._hang_up()
                raise _silent(self._endpoint, command, timeout_s) from None
        return wire.result_of(reply)

    async def _exchange(self, request: bytes, request_id: int) -> wire.Reply:
        assert self._socket is not None
        await self._socket.send(request)
        while True:
            reply = wire.decode_reply(await self._socket.recv())
            if reply.id in (request_id, None):
                return reply

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
