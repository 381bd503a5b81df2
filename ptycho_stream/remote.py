"""Call a daemon over its control socket, blocking or with asyncio.

Used by the terminal commands and the viewer; import :class:`Daemon` and :class:`AsyncDaemon` from
:mod:`ptycho_stream.client`.  What a command returns is described in ``docs/protocol.md``.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import zmq
import zmq.asyncio

from ptycho_stream.connection import Line, exchange, exchange_async
from ptycho_stream.errors import EndpointError
from ptycho_stream.keys import ClientKeys
from ptycho_stream.wire import control as wire
from ptycho_stream.wire.stored import StoredFrame, StoredImage, frame_of, image_of

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


def _silent(endpoint: str, command: str, timeout_s: float, doubt: str) -> EndpointError:
    return EndpointError(
        f"no answer to {command!r} from {endpoint} within {timeout_s:g} s: is ptycho-streamd "
        f"running, and is this its control.endpoint?{doubt}"
    )


class Daemon:
    """A running ptycho-streamd; blocking.  One thread may use an object at a time.

    Every method raises :class:`~ptycho_stream.errors.ControlError` (with a ``code``) if the daemon
    refuses or fails the request, and :class:`~ptycho_stream.errors.EndpointError` if it does not
    answer in time (:class:`~ptycho_stream.errors.KeyRefused` if it does not let this key in).

    Args:
        endpoint: its ``control.endpoint``.
        timeout_s: how long an answer may take.
        keys: of a daemon that asks for keys (:func:`ptycho_stream.keys.load_client_keys`).

    Example::

        with Daemon() as daemon:
            print(daemon.status()["state"])
    """

    def __init__(
        self,
        endpoint: str = CONTROL_ENDPOINT,
        *,
        timeout_s: float = 5.0,
        keys: ClientKeys | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._line = Line(context, endpoint, keys, wire.MAX_REPLY_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Daemon at {self._line.endpoint}>"

    def close(self) -> None:
        """Give the socket back."""
        self._line.close()

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

    def frame(
        self, scan_id: str | None = None, frame: int | None = None, *, look: str = "view"
    ) -> StoredFrame:
        """A stored frame of a scan (None: the newest scan; its newest frame).

        Args:
            scan_id: of the scan.
            frame: the detector's number of it.
            look: ``view``: as the network sees it; ``stored``: as it lies in the store.
        """
        return frame_of(self.call("frame", {"scan_id": scan_id, "frame": frame, "look": look}))

    def image(
        self,
        scan_id: str | None = None,
        snapshot: str | None = None,
        *,
        parts: Sequence[str] = (),
        corner_yx_px: tuple[int, int] | None = None,
        shape_yx: tuple[int, int] | None = None,
        bin_px: int | None = None,
    ) -> StoredImage:
        """An image that is kept with its scan: the final one, or a snapshot.

        Args:
            scan_id: of the scan; None: the newest.
            snapshot: its name; None: the final image.
            parts: of it that are wanted: ``object``, ``misfit``, ``probe``, ``positions``.
            corner_yx_px: canvas pixel at which the piece of the object begins; None: its first.
            shape_yx: rows and columns of the piece; None: up to the object's end.
            bin_px: canvas pixels a side that become one, a power of two; None: the smallest with
                which the piece fits into an answer.
        """
        arguments = {
            "scan_id": scan_id,
            "snapshot": snapshot,
            "parts": list(parts),
            "corner_yx_px": corner_yx_px,
            "shape_yx": shape_yx,
            "bin_px": bin_px,
        }
        return image_of(self.call("image", arguments))

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
        connection = self._line.connection()
        until_s = time.monotonic() + timeout_s
        request = wire.encode_request(request_id, command, arguments or {})
        try:
            reply = exchange(connection, [request], partial(_reply_to, request_id), until_s)
            if reply is None:
                raise _silent(self._line.endpoint, command, timeout_s, connection.doubt)
        except EndpointError:
            self._line.hang_up()
            raise
        return wire.result_of(reply)


class AsyncDaemon:
    """A running ptycho-streamd; for asyncio.  Like :class:`Daemon`, with ``await``."""

    def __init__(
        self,
        endpoint: str = CONTROL_ENDPOINT,
        *,
        timeout_s: float = 5.0,
        keys: ClientKeys | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._one_at_a_time = asyncio.Lock()
        self._line = Line(zmq.asyncio.Context(), endpoint, keys, wire.MAX_REPLY_BYTES)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<AsyncDaemon at {self._line.endpoint}>"

    def close(self) -> None:
        """Give the socket back."""
        self._line.close()

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

    async def frame(
        self, scan_id: str | None = None, frame: int | None = None, *, look: str = "view"
    ) -> StoredFrame:
        """A stored frame of a scan (None: the newest scan; its newest frame).

        Args:
            scan_id: of the scan.
            frame: the detector's number of it.
            look: ``view``: as the network sees it; ``stored``: as it lies in the store.
        """
        return frame_of(
            await self.call("frame", {"scan_id": scan_id, "frame": frame, "look": look})
        )

    async def image(
        self,
        scan_id: str | None = None,
        snapshot: str | None = None,
        *,
        parts: Sequence[str] = (),
        corner_yx_px: tuple[int, int] | None = None,
        shape_yx: tuple[int, int] | None = None,
        bin_px: int | None = None,
    ) -> StoredImage:
        """An image that is kept with its scan: the final one, or a snapshot.

        Args:
            scan_id: of the scan; None: the newest.
            snapshot: its name; None: the final image.
            parts: of it that are wanted: ``object``, ``misfit``, ``probe``, ``positions``.
            corner_yx_px: canvas pixel at which the piece of the object begins; None: its first.
            shape_yx: rows and columns of the piece; None: up to the object's end.
            bin_px: canvas pixels a side that become one, a power of two; None: the smallest with
                which the piece fits into an answer.
        """
        arguments = {
            "scan_id": scan_id,
            "snapshot": snapshot,
            "parts": list(parts),
            "corner_yx_px": corner_yx_px,
            "shape_yx": shape_yx,
            "bin_px": bin_px,
        }
        return image_of(await self.call("image", arguments))

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
            connection = self._line.connection()
            request = wire.encode_request(request_id, command, arguments or {})
            try:
                answer = exchange_async(connection, [request], partial(_reply_to, request_id))
                reply = await asyncio.wait_for(answer, timeout_s)
            except TimeoutError:
                doubt = connection.doubt
                self._line.hang_up()
                raise _silent(self._line.endpoint, command, timeout_s, doubt) from None
            except EndpointError:
                self._line.hang_up()
                raise
        return wire.result_of(reply)


def _reply_to(request_id: int, parts: list[bytes]) -> wire.Reply | None:
    """The reply in a message; None if it is that to an earlier request.

    Raises:
        WireError: it is no reply.
    """
    reply = wire.decode_reply(b"".join(parts))  # of one part; several are no reply
    # None: the daemon could not read even the id of what can only be this request.
    return reply if reply.id in (request_id, None) else None
