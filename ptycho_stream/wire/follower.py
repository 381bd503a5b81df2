"""The receiving end of the results protocol without its sockets: messages in, images out.

A :class:`Follower` puts updates together, notices gaps and restarts of the sender, and says what to
ask the resync socket for and when.  The clients in :mod:`ptycho_stream.client` give it sockets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import ScanNotFound, WireError
from ptycho_stream.messages import BytesLike
from ptycho_stream.results import Image, ImageState, Tile, TileKey
from ptycho_stream.wire import results as wire

REPLY_TIMEOUT_S = 2.0
# Slightly longer than the sender's limit, so that it seldom has to say "busy".
REQUEST_INTERVAL_S = wire.MIN_RESYNC_INTERVAL_S + 0.005
# A scan that others have overtaken, and of which no image comes for so long, is not held any more.
GONE_AFTER_S = 10.0


@dataclass(slots=True)
class _Growing:
    """One image as far as it has come."""

    epoch: str
    words: ImageState
    words_seq: int = -1
    tiles: dict[TileKey, Tile] = field(default_factory=dict[TileKey, Tile])
    numbers: list[NDArray[np.int64]] = field(default_factory=list[NDArray[np.int64]])
    positions: list[NDArray[np.float64]] = field(default_factory=list[NDArray[np.float64]])
    frames: int = 0
    probe: NDArray[np.complex64] | None = None
    probe_version: int = 0
    seq: int = -1
    """All updates up to this one are in."""
    newest: int = 0
    """Highest number that the sender is known to have sent."""
    ahead: set[int] = field(default_factory=set[int])
    """Updates beyond ``seq`` that are in already."""
    partial: bool = False
    sent_ns: int = 0
    received_ns: int = 0

    @property
    def identity(self) -> tuple[str, str, int, int]:
        words = self.words
        return self.epoch, words.scan_id, words.generation, words.tile_px

    @property
    def settled(self) -> bool:
        """Nothing that was sent is missing."""
        return 0 <= self.newest <= self.seq and not self.partial

    def add(self, update: wire.ImageUpdate) -> bool:
        """Take in what is new; whether anything is."""
        changed = self._add_words(update)
        for key, tile in update.content.tiles.items():
            if key not in self.tiles or tile.version > self.tiles[key].version:
                self.tiles[key] = tile
                changed = True
        if update.content.probe.size and update.probe_version > self.probe_version:
            self.probe, self.probe_version = update.content.probe, update.probe_version
            changed = True
        whole = update.frames_from <= self.frames
        if whole and update.frames_from + update.content.frame_numbers.size > self.frames:
            start = self.frames - update.frames_from
            self.numbers.append(update.content.frame_numbers[start:])
            self.positions.append(update.content.position_yx_m[start:])
            self.frames += self.numbers[-1].size
            changed = True
        self.newest = max(self.newest, update.seq)
        if update.reply_to is not None:
            if not update.more and whole:
                self.seq = max(self.seq, update.seq)
        elif whole and update.seq > self.seq:
            if update.fresh:
                self.seq = update.seq
            else:
                self.ahead.add(update.seq)
        self._advance()
        return changed

    def _add_words(self, update: wire.ImageUpdate) -> bool:
        if update.seq < self.words_seq:
            return False
        changed = update.seq > self.words_seq
        self.words, self.words_seq = update.content, update.seq
        self.partial = update.more
        self.sent_ns, self.received_ns = update.sent_ns, time.time_ns()
        return changed

    def _advance(self) -> None:
        while self.seq + 1 in self.ahead:
            self.seq += 1
        self.ahead = {seq for seq in self.ahead if seq > self.seq}

    def image(self) -> Image:
        """A picture of now; later updates do not change it."""
        self.numbers = [np.concatenate(self.numbers)] if self.numbers else []
        self.positions = [np.concatenate(self.positions)] if self.positions else []
        content = replace(
            self.words,
            tiles=dict(self.tiles),
            frame_numbers=self.numbers[0] if self.numbers else np.zeros(0, np.int64),
            position_yx_m=self.positions[0] if self.positions else np.zeros((0, 2), np.float64),
            probe=np.zeros((0, 0, 0), np.complex64) if self.probe is None else self.probe,
        )
        latency_s = (self.received_ns - self.sent_ns) * 1e-9
        return Image(content, self.received_ns, latency_s, self.settled)


class Follower:
    """Follows one scan's image, or that of the newest scan.

    Args:
        wanted_scan_id: the scan to follow; None: always the newest one.

    Attributes:
        heard: whether anything at all has come from the sender.
        empty: the sender says that it has no image yet.
        newest_scan_id: the newest scan of which the sender has an image; empty if none.
        held: generation and newest update of each image that the sender holds, by scan, as its last
            beacon told.
        undecodable: messages that were not understood; the last one's fault is in ``problem``.
    """

    def __init__(self, wanted_scan_id: str | None = None) -> None:
        self.heard = False
        self.empty = False
        self.newest_scan_id = ""
        self.held: dict[str, tuple[int, int]] = {}
        self.undecodable = 0
        self.problem = ""
        self._wanted = wanted_scan_id
        self._growing: _Growing | None = None
        self._epoch = ""
        self._past_epochs: set[str] = set()
        self._changed = False
        self._behind = True
        self._next_id = 1
        self._valid_from_id = 1
        self._ask_at_s = 0.0
        self._absent_since_s: float | None = None

    def want(self, scan_id: str | None) -> None:
        """Follow another scan from now on, or the newest one."""
        self._wanted = scan_id
        if self._growing is not None and scan_id not in (None, self._growing.words.scan_id):
            self._forget()
        self._absent_since_s = None
        self.empty = False
        self._behind = True

    def receive(self, parts: Sequence[BytesLike]) -> None:
        """Take a message of either socket, without its topic."""
        try:
            message = wire.decode_server_message(parts)
        except WireError as error:
            self.undecodable += 1
            self.problem = str(error)
            return
        self.heard = True
        match message:
            case wire.ImageUpdate():
                self._on_update(message)
            case wire.Beacon():
                self._on_beacon(message)
            case wire.Refusal():
                self._on_refusal(message)
            case wire.ScanNotice():
                pass  # the update that comes with it says the same

    def request(self, now_s: float) -> wire.Parts | None:
        """What to send to the resync socket now; None if nothing is missing or it is too soon."""
        if not self._behind or now_s < self._ask_at_s:
            return None
        self._ask_at_s = now_s + REPLY_TIMEOUT_S
        request_id = self._next_id
        self._next_id += 1
        have = self._growing
        if have is None:
            return wire.encode(wire.ResyncRequest(id=request_id, wanted_scan_id=self._wanted))
        return wire.encode(
            wire.ResyncRequest(
                id=request_id,
                epoch=have.epoch,
                scan_id=have.words.scan_id,
                generation=have.words.generation,
                frames=have.frames,
                probe_version=have.probe_version,
                tiles=[(ty, tx, tile.version) for (ty, tx), tile in have.tiles.items()],
                wanted_scan_id=self._wanted,
            )
        )

    def not_sent(self, now_s: float) -> None:
        """The last request could not leave: make it anew shortly."""
        self._ask_at_s = now_s + REQUEST_INTERVAL_S

    def wait_s(self, now_s: float) -> float:
        """Seconds until :meth:`request` may have something; infinite if nothing is missing."""
        return max(0.0, self._ask_at_s - now_s) if self._behind else float("inf")

    def take(self) -> Image | None:
        """The image, if it has changed since the last call and is of one moment."""
        growing = self._growing
        if growing is None or not self._changed or growing.partial:
            return None
        self._changed = False
        return growing.image()

    def settled(self) -> Image | None:
        """The image, if nothing that was sent of it is missing."""
        growing = self._growing
        return growing.image() if growing and growing.settled and not self._behind else None

    def check_wanted(self, now_s: float) -> None:
        """Give up on a scan whose image the sender no longer holds.

        Raises:
            ScanNotFound: newer scans have images, the wanted one has not had one for a while.
        """
        since_s = self._absent_since_s
        if since_s is not None and now_s - since_s > GONE_AFTER_S:
            raise ScanNotFound(
                f"no image of scan {self._wanted} is held any more, the newest is of "
                f"{self.newest_scan_id}: write it from the store with "
                f"`ptycho-stream ctl export {self._wanted}`"
            )

    def _on_update(self, update: wire.ImageUpdate) -> None:
        if update.reply_to is not None:
            if update.reply_to < self._valid_from_id:
                return  # it answers what was asked about another image
            self._ask_at_s = time.monotonic() + REQUEST_INTERVAL_S
        if not self._concerns_us(update):
            return
        self._enter_epoch(update.epoch)
        self.empty = False
        self._absent_since_s = None
        self.newest_scan_id = max(self.newest_scan_id, update.content.scan_id)
        growing = self._growing
        identity = (
            update.epoch,
            update.content.scan_id,
            update.content.generation,
            update.content.tile_px,
        )
        if (
            growing is None
            or growing.identity != identity
            or (update.fresh and update.seq > growing.newest)
        ):
            growing = self._growing = _Growing(update.epoch, update.content)
            self._valid_from_id = self._next_id if update.reply_to is None else update.reply_to
            self._changed = True
        self._changed |= growing.add(update)
        self._set_behind(not growing.settled and not (update.more and update.reply_to is None))

    def _concerns_us(self, update: wire.ImageUpdate) -> bool:
        content = update.content
        if update.epoch in self._past_epochs or self._wanted not in (None, content.scan_id):
            return False
        growing = self._growing
        if growing is None or growing.epoch != update.epoch:
            return True
        # Of an older scan, or of a generation that was given up, nothing is wanted any more.
        held = (growing.words.scan_id, growing.words.generation)
        return (content.scan_id, content.generation) >= held

    def _on_beacon(self, beacon: wire.Beacon) -> None:
        if beacon.epoch in self._past_epochs:
            return
        self._enter_epoch(beacon.epoch)
        marks = {mark.scan_id: mark for mark in beacon.images}
        self.newest_scan_id = max(marks, default="")
        self.held = {mark.scan_id: (mark.generation, mark.seq) for mark in beacon.images}
        self.empty = not marks
        mark = marks.get(self._wanted or self.newest_scan_id)
        self._note_absence(mark is None and self._wanted is not None)
        if mark is None:
            self._behind = False
            return
        growing = self._growing
        if growing is not None and (mark.scan_id, mark.generation) == (
            growing.words.scan_id,
            growing.words.generation,
        ):
            growing.newest = max(growing.newest, mark.seq)
            self._set_behind(not growing.settled)
        else:
            self._set_behind(True)

    def _on_refusal(self, refusal: wire.Refusal) -> None:
        now_s = time.monotonic()
        match refusal.reason:
            case "busy":
                self._ask_at_s = now_s + max(refusal.retry_s, REQUEST_INTERVAL_S)
            case "empty":
                self.empty = True
                self._behind = False  # until a beacon or an update tells of an image
            case "unknown_scan":
                self.newest_scan_id = refusal.newest_scan_id
                self._note_absence(True)
                self._behind = False
            case _:
                self.problem = refusal.message
                self._ask_at_s = now_s + REPLY_TIMEOUT_S

    def _note_absence(self, absent: bool) -> None:
        overtaken = self._wanted is not None and self.newest_scan_id > self._wanted
        if not absent or not overtaken:
            self._absent_since_s = None
        elif self._absent_since_s is None:
            self._absent_since_s = time.monotonic()

    def _set_behind(self, behind: bool) -> None:
        if behind and not self._behind:
            self._ask_at_s = min(self._ask_at_s, time.monotonic() + REQUEST_INTERVAL_S)
        self._behind = behind

    def _enter_epoch(self, epoch: str) -> None:
        if epoch == self._epoch:
            return
        if self._epoch:
            # Messages of the sender that is gone may still lie in a queue.
            self._past_epochs.add(self._epoch)
            self._forget()
        self._epoch = epoch

    def _forget(self) -> None:
        self._growing = None
        self._valid_from_id = self._next_id
        self._ask_at_s = 0.0
        self._behind = True
