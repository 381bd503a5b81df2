"""What a page is sent beside the image: the scan's path, the probe, a diffraction frame.

They have a budget of their own, a quarter of the page's, so that the image does not wait for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import PtychoStreamError
from ptycho_stream.wire.stored import StoredFrame
from ptycho_streamd.web.budget import Budget
from ptycho_streamd.web.frame_and_probe import frame_bytes, probe_bytes
from ptycho_streamd.web.hub import Hub
from ptycho_streamd.web.messages import Watch, encode_text
from ptycho_streamd.web.sources import Shown

FRAME_S, PROBE_S, PATH_S = 1.0, 4.0, 1.0
PATH_POINTS = 20_000
PROBE_CHANGE = 0.01
"""A probe that has changed by less of its norm is not sent again."""
SHARE = 0.25

SendText = Callable[[str], Awaitable[None]]
SendBinary = Callable[..., Awaitable[int]]


class Beside:
    """Of one page.

    Args:
        hub: what all pages share.
        bytes_per_s: of the page.
        send_text: a message to the page.
        send_binary: one with a kind, a payload and words; returns its bytes.
    """

    def __init__(
        self, hub: Hub, bytes_per_s: float, send_text: SendText, send_binary: SendBinary
    ) -> None:
        self._hub, self._send_text, self._send_binary = hub, send_text, send_binary
        self._budget = Budget(SHARE * bytes_per_s, time.monotonic())
        self._watch = Watch()
        self._asked = "", self._watch
        self._fetching: asyncio.Task[StoredFrame | str] | None = None
        self.begin()

    def begin(self) -> None:
        """Another picture is shown: begin anew."""
        self._path_next, self._path_step = 0, 1
        self._probe: NDArray[np.complex64] | None = None
        self._frame: object = None
        self._path_due_s = self._probe_due_s = self._frame_due_s = 0.0

    def wish(self, watch: Watch) -> None:
        """The page shows something else beside the image."""
        self._watch = watch
        self._frame, self._frame_due_s = None, 0.0

    def close(self) -> None:
        """The page is closed."""
        if self._fetching is not None:
            self._fetching.cancel()

    async def turn(self, shown: Shown, stream: int) -> None:
        """Send what is new and due."""
        now_s = time.monotonic()
        if self._watch.path and now_s >= self._path_due_s and self._may_send:
            await self._send_path(shown, stream)
        if self._watch.probe and now_s >= self._probe_due_s and self._may_send:
            await self._send_probe(shown)
        if self._watch.frame:
            await self._send_frame(str(shown.words["scan_id"]))

    @property
    def _may_send(self) -> bool:
        return self._budget.left(time.monotonic()) > 0

    async def _send(self, kind: str, payload: bytes, **words: Any) -> None:
        self._budget.spend(await self._send_binary(kind, payload, **words))

    async def _send_path(self, shown: Shown, stream: int) -> None:
        """Where frames were taken, evenly spread ones of very many: canvas pixels, and numbers.

        Frames come into the image in another order than that in which they were taken.
        """
        step = 1
        while len(shown.position_yx_m) > step * PATH_POINTS:
            step *= 2
        if step != self._path_step:
            self._path_next, self._path_step = 0, step
        new = shown.position_yx_m[self._path_next :: step]
        numbers = shown.frame_numbers[self._path_next :: step].astype("<u4")
        if not len(new):
            return
        fresh = self._path_next == 0
        self._path_next += step * len(new)
        self._path_due_s = time.monotonic() + PATH_S
        points = (new / np.asarray(shown.words["pixel_yx_m"])).astype("<f4")
        payload = points.tobytes() + numbers.tobytes()
        await self._send("path", payload, stream=stream, fresh=fresh, count=len(new))

    async def _send_probe(self, shown: Shown) -> None:
        probe, before = shown.probe, self._probe
        if probe is before or not probe.size:
            return
        if before is not None and before.shape == probe.shape and not shown.words["final"]:
            change = np.linalg.norm(probe - before) / max(float(np.linalg.norm(before)), 1e-30)
            if change < PROBE_CHANGE:
                return
        self._probe = probe
        self._probe_due_s = time.monotonic() + PROBE_S
        words, payload = probe_bytes(probe)
        await self._send("probe", payload, **words)

    async def _send_frame(self, scan_id: str) -> None:
        """Send the frame that was asked for in a turn before, and ask for the next."""
        task = self._fetching
        if task is not None and task.done():
            self._fetching = None
            if self._asked == (scan_id, self._watch):  # else it was for what is not shown now
                await self._show_frame(task.result())
        if self._fetching is None and time.monotonic() >= self._frame_due_s:
            self._frame_due_s = time.monotonic() + FRAME_S
            self._asked = scan_id, self._watch
            self._fetching = asyncio.create_task(self._fetched(*self._asked))

    async def _show_frame(self, frame: StoredFrame | str) -> None:
        if isinstance(frame, str):
            if frame != self._frame:
                self._frame = frame
                await self._send_text(encode_text("no_frame", reason=frame))
            return
        what = (frame.scan_id, frame.slot, frame.look)
        if what != self._frame and self._may_send:
            self._frame = what
            words, payload = frame_bytes(frame)
            await self._send("frame", payload, **words)

    async def _fetched(self, scan_id: str, watch: Watch) -> StoredFrame | str:
        """The frame that the page shows, or why there is none."""
        try:
            return await self._hub.frame(scan_id, watch.frame_number, watch.frame_look)
        except PtychoStreamError as error:
            return str(error)
