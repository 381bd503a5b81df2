"""One page that is open: hears what it wants to see, and tells it what is new, at its pace.

Nothing is queued for a page but answers to its own commands.  Each turn looks at what is there and
sends what the page lacks, and none is made while two messages wait to be shown: a browser that is
slow, hidden or stopped gets less, and costs nobody anything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ptycho_stream import __version__
from ptycho_stream.errors import ControlError, MalformedMessage, PtychoStreamError
from ptycho_stream.settings import ViewerSettings
from ptycho_streamd.viewer_metrics import ViewerMetrics
from ptycho_streamd.web.beside import Beside
from ptycho_streamd.web.budget import Budget
from ptycho_streamd.web.hub import Hub
from ptycho_streamd.web.messages import (
    Ack,
    Command,
    Look,
    PaneName,
    Watch,
    decode_page_message,
    encode_binary,
    encode_text,
)
from ptycho_streamd.web.pane import Pane
from ptycho_streamd.web.sources import Shown

MAX_UNSHOWN = 2
"""Binary messages that the page has not said to have shown."""
MAX_COMMANDS = 8
"""That a page may wait for."""
MAX_UNANSWERED = 64
"""Commands, refused ones too, of which a page has not taken the answer."""
MAX_ANSWER = 4 << 20
MAX_MESSAGES_PER_S = 200
MORE_S = 0.02
"""Before the next message where tiles are left over."""
RATIO = 0.5
"""Deflated over plain bytes, before it is known."""

ALLOWED = frozenset(
    {"abort", "cancel", "export", "finetune", "history", "job", "reprocess", "rollback_model"}
    | {"scan", "snapshot", "snapshots", "stop", "use_model"}
)
"""Control commands that a page may give."""

log = logging.getLogger(__name__)
Send = Callable[[str | bytes], Awaitable[None]]


class Session:
    """A page.

    Args:
        hub: what all pages share.
        settings: of the viewer.
        metrics: to count in.
        send: a message to the page; waits until there is room for it.
    """

    def __init__(
        self, hub: Hub, settings: ViewerSettings, metrics: ViewerMetrics, send: Send
    ) -> None:
        self._hub, self._metrics, self._send_raw = hub, metrics, send
        self._interval_s = 1 / settings.updates_per_s
        now_s = time.monotonic()
        self._budget = Budget(settings.bytes_per_s, now_s)
        self._beside = Beside(hub, settings.bytes_per_s, self._send, self._send_binary)
        self._ratio = RATIO
        self._panes: dict[PaneName, Pane] = {}
        self._told: dict[str, int] = {}
        self._scans: dict[str, dict[str, Any]] = {}
        self._seq = self._shown_seq = 0
        self._left_over = False
        self._wake = asyncio.Event()
        self._commands: set[asyncio.Task[str]] = set()
        self._heard: tuple[float, int] = (now_s, 0)

    async def hear(self, text: str) -> None:
        """Take what the page says.

        Raises:
            MalformedMessage: it is nothing that a page says, or far too often.
        """
        began_s, count = self._heard
        now_s = time.monotonic()
        self._heard = (began_s, count + 1) if now_s - began_s < 1 else (now_s, 1)
        if self._heard[1] > MAX_MESSAGES_PER_S:
            raise MalformedMessage(f"more than {MAX_MESSAGES_PER_S} messages a second")
        match decode_page_message(text):
            case Look() as look:
                self._look(look)
            case Watch() as watch:
                self._beside.wish(watch)
                self._wake.set()
            case Ack(seq=seq):
                self._shown_seq = min(max(self._shown_seq, seq), self._seq)
                if self._left_over:  # of a picture that is sent in several messages
                    self._wake.set()
            case Command() as command:
                self._begin(command)

    def _look(self, look: Look) -> None:
        if look.nothing:
            self._panes.pop(look.pane, None)
        elif look.pane in self._panes:
            self._panes[look.pane].wish(look)
        else:
            self._panes[look.pane] = Pane(look)
        self._wake.set()

    def _begin(self, command: Command) -> None:
        """Have a command done; the answer comes when it comes."""
        if len(self._commands) >= MAX_UNANSWERED:
            raise MalformedMessage(f"{MAX_UNANSWERED} commands, and no answers were taken")
        task = asyncio.create_task(self._answer(command, len(self._commands)))
        self._commands.add(task)
        task.add_done_callback(lambda _done: self._wake.set())

    async def _answer(self, command: Command, before: int) -> str:
        """What to tell the page of a command that it gave."""
        try:
            if command.command not in ALLOWED:
                raise ControlError("unknown_command", f"pages may not {command.command!r}")
            if before >= MAX_COMMANDS:
                raise ControlError("unavailable", "too many commands at once: wait for the others")
            self._metrics.commands.labels(command.command).inc()
            result = await self._hub.command(command.command, command.arguments)
        except PtychoStreamError as error:
            code = error.code if isinstance(error, ControlError) else "unavailable"
            fault = {"code": code, "message": str(error)}
            return encode_text("reply", id=command.id, ok=False, error=fault)
        answer = encode_text("reply", id=command.id, ok=True, result=result)
        if len(answer) > MAX_ANSWER:
            fault = {"code": "failed", "message": "the answer is too long for a page: ask for less"}
            return encode_text("reply", id=command.id, ok=False, error=fault)
        return answer

    async def run(self) -> None:
        """Tell the page what is new, turn by turn, until it is cancelled."""
        await self._send(
            encode_text("hello", version=__version__, updates_per_s=round(1 / self._interval_s, 3))
        )
        try:
            while True:
                await self._turn()
                try:
                    pause_s = MORE_S if self._left_over and not self.busy else self._interval_s
                    await asyncio.wait_for(self._wake.wait(), pause_s)
                except TimeoutError:
                    pass
                self._wake.clear()
        finally:
            self._beside.close()
            for task in self._commands:
                task.cancel()

    async def _turn(self) -> None:
        """Send what is new, as far as the page can take it."""
        for task in [one for one in self._commands if one.done()]:
            self._commands.discard(task)
            await self._send(task.result())
        await self._tell_lists()
        shown: dict[PaneName, Shown | None] = {}
        for name, pane in list(self._panes.items()):
            shown[name] = await self._tell_words(name, pane)
        self._left_over &= self.busy
        for name, one in shown.items():
            if one is not None:
                await self._send_tiles(name, one)
        first = shown.get("a")
        if first is not None and not self.busy and "a" in self._panes:
            await self._beside.turn(first, self._panes["a"].look.stream)

    async def _tell_lists(self) -> None:
        for name, (version, value) in self._hub.told.items():
            if self._told.get(name) == version:
                continue
            self._told[name] = version
            if name == "scans":
                await self._tell_scans(value)
            else:
                await self._send(encode_text(name, value=value))

    async def _tell_scans(self, scans: list[dict[str, Any]]) -> None:
        """Tell which scans there are, and of those that are new or have changed what is known."""
        held, self._scans = self._scans, {scan["scan_id"]: scan for scan in scans}
        changed = [scan for name, scan in self._scans.items() if held.get(name) != scan]
        order = list(self._scans)
        same = order == list(held)
        await self._send(encode_text("scans", changed=changed, order=None if same else order))

    async def _tell_words(self, name: PaneName, pane: Pane) -> Shown | None:
        """Tell what is said of the picture, where that has changed."""
        look = pane.look
        source = self._hub.source(look.scan_id, look.snapshot)
        shown = source and source.shown(look.part, look.generation, look.quantity)
        if shown is None:
            problem = "too many different scans are looked at" if source is None else source.problem
            words = pane.new_words({"problem": problem})
            if pane.picture is not None or words:
                pane.picture = None
                head = {"pane": name, "stream": look.stream}
                await self._send(encode_text("picture", **head, fresh=True, words=words))
            return None
        fresh = pane.begin(shown)
        if fresh:
            self._budget.new_picture(time.monotonic())
        if fresh and name == "a":
            self._beside.begin()
        picture = shown.picture
        bounds = picture.bounds_yx_px
        words = pane.new_words(
            {
                **shown.words,
                "tile_px": picture.tile_px,
                "max_level": picture.max_level,
                "bounds_yx_px": None if bounds is None else list(bounds),
                "misfit_known": bool(picture.versions("misfit", picture.level_of("misfit", 0))),
                "problem": "",
            }
        )
        if words:
            head = {"pane": name, "stream": look.stream, "fresh": fresh}
            await self._send(encode_text("picture", **head, words=words))
        return shown

    async def _send_tiles(self, name: PaneName, shown: Shown) -> None:
        """Send tiles that the page lacks, as many as one message may hold."""
        left = self._budget.left(time.monotonic())
        pane = self._panes.get(name)
        if self.busy or left <= 0 or pane is None:
            return
        try:
            update = await pane.update(shown.picture, left / self._ratio)
        except PtychoStreamError as error:  # of a kept image that cannot be read just now
            log.debug("tiles of %s: %s", shown.words["scan_id"], error)
            return
        if update is None or self._panes.get(name) is not pane:
            return
        sent = await self._send_binary(
            "tiles",
            update.payload,
            pane=name,
            stream=pane.look.stream,
            side=shown.picture.tile_px,
            count=update.tiles,
            dropped=update.dropped,
        )
        if update.tiles:
            self._ratio = 0.7 * self._ratio + 0.3 * min(sent / len(update.payload), 1.0)
        self._left_over |= update.more

    @property
    def busy(self) -> bool:
        """Whether the page has enough to show."""
        return self._seq - self._shown_seq >= MAX_UNSHOWN

    async def _send_binary(self, kind: str, payload: bytes, **head: Any) -> int:
        self._seq += 1
        message = encode_binary(kind, payload, seq=self._seq, **head)
        self._metrics.updates.inc()
        await self._send(message)
        return len(message)

    async def _send(self, message: str | bytes) -> None:
        self._budget.spend(len(message))
        self._metrics.sent_bytes.inc(len(message))
        await self._send_raw(message)
