"""The publisher of results: image updates over XPUB, and snapshots over the resync ROUTER.

The reconstruct process owns one and drives it from its loop: :meth:`Publisher.publish` when there
is something new, :meth:`Publisher.serve` whenever its sockets are readable and at least each
second.  Nothing here ever blocks: what a slow subscriber cannot take is dropped for it alone, and
it gets what it missed from the resync socket.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import zmq
from numpy.typing import NDArray

from ptycho_stream.errors import EndpointError, WireError
from ptycho_stream.results import ImageState, MisfitTile, Tile, TileKey
from ptycho_stream.settings import ResultSettings
from ptycho_stream.wire import results as wire
from ptycho_stream.wire.layers import Layer, LayerName, LayerUpdate, encode_layer, layer_tiles
from ptycho_streamd.door import Door
from ptycho_streamd.log_limit import LimitedLog
from ptycho_streamd.security import Gate

BEACON_INTERVAL_S = 1.0
MAX_REQUESTS_PER_SERVE = 16
MAX_PEERS = 1024
MAX_REQUEST_BYTES = 2 << 20
MAX_SUBSCRIPTION_BYTES = 4096
MAX_NOTICES_PER_SERVE = 1024
MAX_SUBSCRIPTIONS = 256
"""Of one connection, ends of subscriptions included: more than a client has any use for."""
# Images of scans before the newest stay within reach of clients that come a little late.
KEPT_IMAGES = 8
KEPT_BYTES = 256 << 20

_WORDS = (
    "state",
    "final",
    "model",
    "layer",
    "sweeps",
    "counts",
    "trust",
    "verdict",
    "reasons",
    "metadata",
)
"""What may change in an image besides its arrays."""

_log = logging.getLogger(__name__)
AnyTile = TypeVar("AnyTile", bound=Tile | MisfitTile)


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What one call of :meth:`Publisher.publish` sent; ``messages`` is 0 if nothing was new."""

    seq: int
    messages: int
    tiles: int
    frames: int
    bytes: int
    sent_monotonic_ns: int


@dataclass(slots=True)
class _Sent:
    """What subscribers of one scan's image were sent, up to update number ``seq``."""

    image: ImageState
    versions: dict[TileKey, int]
    frames: int
    probe_version: int
    seq: int

    @property
    def mark(self) -> wire.ImageMark:
        """Of this image in a beacon."""
        return wire.ImageMark(self.image.scan_id, self.image.generation, self.seq)


class Publisher:
    """Sends images to any number of subscribers and answers those that missed something.

    Args:
        gate: of this process.
        results: endpoints and the budget of bytes that may wait for a slow subscriber.
        epoch: names this run of the daemon; a suffix of its own makes it unique to this publisher,
            because sequence numbers and tile versions start again with it.

    Raises:
        EndpointError: an endpoint cannot be bound.
    """

    def __init__(self, gate: Gate, results: ResultSettings, epoch: str):
        self.epoch = _unique(epoch)
        self.subscribers = 0
        self.resyncs = 0
        self.refusals: Counter[str] = Counter()
        self._images: dict[str, _Sent] = {}
        self._updates_sent = 0
        self._trouble = LimitedLog(_log)
        self._answered_s: OrderedDict[bytes, float] = OrderedDict()
        self._beacon_due_s = 0.0
        self._doors: list[Door] = []
        self._xpub = gate.context.socket(zmq.XPUB)
        # XPUB_VERBOSER: without it a second subscriber of a topic, and its leaving, go unseen.
        self._xpub.setsockopt(zmq.XPUB_VERBOSER, 1)
        messages = max(1, results.queue_bytes // wire.MAX_UPDATE_BYTES)
        self._xpub.setsockopt(zmq.SNDHWM, messages)
        self._xpub.setsockopt(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION_BYTES)
        # A final image must still leave when the process stops right after sending it.
        self._xpub.setsockopt(zmq.LINGER, 500)
        self._router = gate.context.socket(zmq.ROUTER)
        # A peer that asks and does not read gets no more; it asks again if it lives.
        self._router.setsockopt(zmq.SNDHWM, 4)
        self._router.setsockopt(zmq.RCVHWM, 2)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
        self._router.setsockopt(zmq.LINGER, 0)
        places = (
            (self._xpub, results.endpoint, "results.endpoint", "results"),
            (self._router, results.resync_endpoint, "results.resync_endpoint", "resync"),
        )
        try:
            for socket, endpoint, setting, name in places:
                self._doors.append(gate.bind(socket, endpoint, setting, name, "subscribe"))
            self._doors[0].max_messages = MAX_SUBSCRIPTIONS
        except EndpointError:
            self.close()
            raise

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], ...]:
        """To register with a poller for ``POLLIN``; :meth:`serve` handles what comes."""
        return self._xpub, self._router

    def publish(self, image: ImageState) -> PublishReport:
        """Send what is new in ``image`` since the last call; cheap if nothing is.

        ``image`` and its arrays are kept and sent without a copy: they must not change any more.
        """
        before = self._images.get(image.scan_id)
        if before is not None and image is before.image:
            return _nothing_sent(before)
        sent, tiles, probe = self._compared(before, image)
        frames = image.frame_numbers.size - sent.frames
        fresh = before is None or sent.versions is not before.versions
        new = bool(fresh or tiles or frames or probe)
        if before is not None and not new and _same_words(image, before.image):
            before.image = image  # its other layers may have changed
            return _nothing_sent(before)
        self._images[image.scan_id] = sent
        topic = wire.IMAGE_TOPIC + image.scan_id.encode()
        messages = size = 0
        for update in _updates(sent, tiles, sent.frames, probe):
            sent.seq += 1
            self._updates_sent += 1
            update = replace(update, epoch=self.epoch, seq=sent.seq, fresh=fresh)
            fresh = False
            size += self._send(topic, wire.encode_image(update))
            messages += 1
        sent.frames += frames
        sent.versions.update((key, tile.version) for key, tile in tiles.items())
        if before is None or _stage(before.image) != _stage(image):
            self._notice(image)
        if before is None:
            self._forget_oldest()
        return PublishReport(sent.seq, messages, len(tiles), frames, size, time.monotonic_ns())

    def _compared(
        self, before: _Sent | None, image: ImageState
    ) -> tuple[_Sent, dict[TileKey, Tile], bool]:
        """What will have been sent, and which tiles and whether the probe must be."""
        if before is None:
            # Counting on from all that was ever sent keeps the numbers of an image that was
            # forgotten and comes back above those that its clients have seen.
            return _Sent(image, {}, 0, 1, self._updates_sent), dict(image.tiles), True
        if _identity(before.image) != _identity(image):
            return _Sent(image, {}, 0, 1, before.seq), dict(image.tiles), True
        if image.frame_numbers.size < before.frames:
            # The same image with fewer frames was built anew: what clients have is void, and only
            # a new epoch tells them so.
            self.epoch = _unique(self.epoch.rsplit(".", 1)[0])
            return _Sent(image, {}, 0, 1, before.seq), dict(image.tiles), True
        versions = before.versions
        tiles = {k: tile for k, tile in image.tiles.items() if tile.version > versions.get(k, 0)}
        probe = not _same_array(image.probe, before.image.probe)
        sent = _Sent(image, versions, before.frames, before.probe_version + probe, before.seq)
        return sent, tiles, probe

    def serve(self) -> int:
        """Answer waiting requests and send the beacon if it is due; never waits.

        Returns:
            The number of messages taken from the sockets.
        """
        taken = self._take_subscriptions()
        for _ in range(MAX_REQUESTS_PER_SERVE):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            taken += 1
            if self._doors[1].admits(frames[0]):
                peer, *parts = [frame.bytes for frame in frames]
                self._reply(peer, self._answer(peer, parts))
        if time.monotonic() >= self._beacon_due_s:
            self._beacon()
        return taken

    def close(self) -> None:
        """Give the sockets back."""
        for door in self._doors:
            door.close()
        self._xpub.close()
        self._router.close()

    def _take_subscriptions(self) -> int:
        for taken in range(MAX_NOTICES_PER_SERVE):
            try:
                frame = self._xpub.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return taken
            notice, door = frame.bytes, self._doors[0]
            door.admits(frame)  # whose connection it is, so that it can be cut
            door.count(frame)  # libzmq keeps each subscription, whatever its topic
            # Anything but a subscription (1) or its end (0) is a stranger's message.
            if notice[1:] in (wire.BEACON_TOPIC, b"") and notice[:1] in (b"\0", b"\1"):
                self.subscribers += 1 if notice[0] else -1
                # The newcomer need not wait a second to learn what there is.
                self._beacon_due_s = min(self._beacon_due_s, time.monotonic() + 0.02)
        return MAX_NOTICES_PER_SERVE

    def _beacon(self) -> None:
        self._beacon_due_s = time.monotonic() + BEACON_INTERVAL_S
        marks = [sent.mark for _, sent in sorted(self._images.items())]
        beacon = wire.Beacon(epoch=self.epoch, images=marks, sent_ns=time.time_ns())
        self._send(wire.BEACON_TOPIC, wire.encode(beacon))

    def _notice(self, image: ImageState) -> None:
        notice = wire.ScanNotice(
            epoch=self.epoch,
            scan_id=image.scan_id,
            state=image.state,
            final=image.final,
            sent_ns=time.time_ns(),
            counts=dict(image.counts),
        )
        self._send(wire.SCAN_TOPIC + image.scan_id.encode(), wire.encode(notice))

    def _answer(self, peer: bytes, parts: list[bytes]) -> wire.Parts:
        try:
            request = wire.decode_resync(parts)
        except WireError as error:
            self._trouble.warning("resync", f"resync request refused: {error}")
            return self._refuse(None, "bad_request", str(error))
        now = time.monotonic()
        wait_s = self._answered_s.get(peer, 0.0) + wire.MIN_RESYNC_INTERVAL_S - now
        if wait_s > 0:
            return self._refuse(request.id, "busy", "asked again too soon", wait_s)
        self._answered_s[peer] = now
        self._answered_s.move_to_end(peer)
        while len(self._answered_s) > MAX_PEERS:
            self._answered_s.popitem(last=False)
        if not self._images:
            return self._refuse(request.id, "empty", "there is no image yet")
        wanted = request.wanted_scan_id or max(self._images)
        held = self._images.get(wanted)
        if held is None:
            return self._refuse(request.id, "unknown_scan", f"no image of scan {wanted} is held")
        self.resyncs += 1
        if request.layer:
            return encode_layer(self._newer_of_layer(held.image, request, request.layer))
        return wire.encode_image(replace(self._newer(held, request), reply_to=request.id))

    def _newer(self, held: _Sent, request: wire.ResyncRequest) -> wire.ImageUpdate:
        """The first message of what ``request`` lacks; its ``more`` makes the client ask again."""
        image = held.image
        same = self._is_of(image, request)
        tiles = self._lacked(image, request, image.tiles)
        probe = not same or request.probe_version != held.probe_version
        first_frame = min(request.frames, held.frames) if same else 0
        update = next(_updates(held, tiles, max(first_frame, 0), probe))
        return replace(update, epoch=self.epoch, seq=held.seq)

    def _newer_of_layer(
        self, image: ImageState, request: wire.ResyncRequest, name: LayerName
    ) -> LayerUpdate:
        """The first tiles that ``request`` lacks of a layer beside the image."""
        lacked = self._lacked(image, request, layer_tiles(image, name))
        sizes = itertools.accumulate(tile.size_bytes for tile in lacked.values())
        count = max(1, sum(size <= wire.MAX_UPDATE_BYTES for size in sizes))
        content = Layer(
            name=name,
            scan_id=image.scan_id,
            generation=image.generation,
            tile_px=image.tile_px,
            pixel_yx_m=image.pixel_yx_m,
            tiles=dict(itertools.islice(lacked.items(), count)),
        )
        return LayerUpdate(request.id, self.epoch, count < len(lacked), content)

    def _is_of(self, image: ImageState, request: wire.ResyncRequest) -> bool:
        """Whether what ``request`` has is of this image."""
        return (request.epoch, request.scan_id, request.generation) == (
            self.epoch,
            image.scan_id,
            image.generation,
        )

    def _lacked(
        self, image: ImageState, request: wire.ResyncRequest, tiles: Mapping[TileKey, AnyTile]
    ) -> dict[TileKey, AnyTile]:
        """Those of ``tiles`` of an image that ``request`` does not have, or only older."""
        known = request.tiles if self._is_of(image, request) else ()
        has = {(ty, tx): version for ty, tx, version in known}
        return {key: tile for key, tile in tiles.items() if tile.version > has.get(key, 0)}

    def _refuse(
        self, reply_to: int | None, reason: str, message: str, retry_s: float = 0.0
    ) -> wire.Parts:
        self.refusals[reason] += 1
        refusal = wire.Refusal(
            reply_to=reply_to,
            epoch=self.epoch,
            reason=reason,
            message=message,
            newest_scan_id=max(self._images, default=""),
            retry_s=retry_s,
        )
        return wire.encode(refusal)

    def _forget_oldest(self) -> None:
        """Let go of old scans' images beyond the limits; the newest always stays."""
        while len(self._images) > 1 and (
            len(self._images) > KEPT_IMAGES
            or sum(_size_bytes(sent.image) for sent in self._images.values()) > KEPT_BYTES
        ):
            del self._images[min(self._images)]

    def _send(self, topic: bytes, parts: wire.Parts) -> int:
        try:
            self._xpub.send_multipart([topic, *parts], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            # XPUB drops by itself for a subscriber that is full; this is a queue that refuses.
            _log.warning("the results socket refused an update; subscribers will ask for it")
        return sum(len(part) for part in parts)

    def _reply(self, peer: bytes, parts: wire.Parts) -> None:
        # A ROUTER drops what a vanished or full peer cannot take; that client asks again.
        self._router.send_multipart([peer, *parts], zmq.NOBLOCK, copy=False)


def _updates(
    sent: _Sent, tiles: dict[TileKey, Tile], first_frame: int, with_probe: bool
) -> Iterator[wire.ImageUpdate]:
    """Cut what is to be sent into messages of at most ``MAX_UPDATE_BYTES``, at least one."""
    image = sent.image
    keys = list(tiles)
    frame = first_frame
    total = image.frame_numbers.size
    probe = image.probe if with_probe else image.probe[:0, :0, :0]
    while True:
        stop = min(total, frame + wire.MAX_FRAMES_PER_UPDATE)
        room = wire.MAX_UPDATE_BYTES - 24 * (stop - frame) - probe.nbytes
        per_tile = tiles[keys[0]].size_bytes if keys else 1
        count = max(1, room // per_tile)
        now, keys = keys[:count], keys[count:]
        more = bool(keys) or stop < total
        yield wire.ImageUpdate(
            epoch="",
            seq=0,
            content=replace(
                image,
                tiles={key: tiles[key] for key in now},
                frame_numbers=image.frame_numbers[frame:stop],
                position_yx_m=image.position_yx_m[frame:stop],
                probe=probe,
            ),
            frames_from=frame,
            frames_total=total,
            probe_version=sent.probe_version,
            fresh=False,
            more=more,
            sent_ns=time.time_ns(),
        )
        if not more:
            return
        frame = stop
        probe = image.probe[:0, :0, :0]


def _unique(epoch: str) -> str:
    return f"{epoch}.{secrets.token_hex(4)}"


def _nothing_sent(sent: _Sent) -> PublishReport:
    return PublishReport(sent.seq, 0, 0, 0, 0, time.monotonic_ns())


def _identity(image: ImageState) -> tuple[str, int, int]:
    return image.scan_id, image.generation, image.tile_px


def _stage(image: ImageState) -> tuple[str, str, bool]:
    return image.scan_id, image.state, image.final


def _same_array(a: NDArray[np.complex64], b: NDArray[np.complex64]) -> bool:
    return a is b or np.array_equal(a, b)


def _same_words(image: ImageState, before: ImageState) -> bool:
    return all(getattr(image, name) == getattr(before, name) for name in _WORDS)


def _size_bytes(image: ImageState) -> int:
    layers = (image.tiles, image.predicted, image.misfit)
    return sum(tile.size_bytes for layer in layers for tile in layer.values())
