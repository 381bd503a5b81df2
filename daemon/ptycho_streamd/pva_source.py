"""The stream of an areaDetector channel over PV Access, as ingest reads its sockets.

PV Access is not ZeroMQ: a client library (p4p, extra ``[pva]``) calls back in a thread of its own.
What it brings waits here, bounded in bytes, and an eventfd wakes ingest's poller.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ptycho_stream.messages import Message, Undecodable
from ptycho_stream.settings import PVA_SCHEME, DetectorSettings
from ptycho_stream.wire.limits import WireLimits
from ptycho_stream.wire.pva import NdArrayUpdate, PvaDecoder
from ptycho_stream.wire.pva_library import client_configuration, pva_module
from ptycho_streamd.stream_health import Health

QUEUE_UPDATES: Final = 64
"""Kept by the server and the client library for a callback that is busy."""
MAX_ATTRIBUTES: Final = 1000
MAX_DIMENSIONS: Final = 10

log = logging.getLogger(__name__)

Event = Callable[[PvaDecoder], list[Message]]


class PvaSource:
    """Updates of one channel, and of the one that says whether the detector acquires.

    Args:
        name: ``detector``, the settings' table.
        detector: with ``endpoint`` = ``pva://CHANNEL``.
        limits: what is accepted.

    Raises:
        SettingsError: the client library is not installed.
    """

    def __init__(self, name: str, detector: DetectorSettings, limits: WireLimits) -> None:
        client, util = pva_module("client.thread"), pva_module("util")
        self.name = name
        self.endpoint = detector.endpoint
        self.health = Health()
        options = detector.pva
        self._decoder = PvaDecoder(options, limits, round(detector.silence_s * 1e9))
        self._most_bytes = detector.queue_bytes
        self._lock = threading.Lock()
        self._events: deque[tuple[Event, int]] = deque()
        self._bytes = 0
        self._dropped = 0
        self._fresh = True
        self.socket = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # One thread for all callbacks: several would get updates out of order.
        self._thread = util.ThreadedWorkQueue(name="pva", workers=1, maxsize=0, daemon=True)
        self._thread.start()
        configuration = client_configuration(options.servers)
        self._context = client.Context(
            "pva", conf=configuration, useenv=configuration is None, nt=False
        )
        # Kept: a subscription ends when nobody refers to it any more.
        self._subscriptions = [
            self._monitor(detector.endpoint.removeprefix(PVA_SCHEME), self._on_array)
        ]
        if options.acquire_channel is not None:
            self._subscriptions.append(self._monitor(options.acquire_channel, self._on_acquire))

    def receive(self) -> list[Message] | None:
        """What the next update holds (it may be nothing yet); None if there is none."""
        event, dropped = self._next()
        if event is None:
            with contextlib.suppress(BlockingIOError):  # nobody has written since we looked
                os.eventfd_read(self.socket)
            event, more = self._next()
            dropped += more
        lost: list[Message] = [_overrun() for _ in range(dropped)]
        if event is None:
            return [*lost, *self._decoder.overdue()] or None
        self.health.messages += 1
        return [*lost, *event(self._decoder)]

    def watch(self) -> None:
        """Nothing to do: the client library tells of connections by itself."""

    def describe(self) -> dict[str, Any]:
        """Plain values for ``ptycho-stream doctor`` and ``ctl endpoints``."""
        return {
            "name": self.name,
            "endpoint": self.endpoint,
            "attach": "connect",
            "socket": "pva",
            **self.health.plain(),
        }

    def close(self) -> None:
        """End the subscriptions and the threads behind them."""
        for subscription in self._subscriptions:
            subscription.close()
        self._context.close()
        self._thread.stop()
        os.close(self.socket)

    # ---- in the client library's thread --------------------------------------------------------

    def _monitor(self, channel: str, callback: Callable[[Any], None]) -> Any:
        return self._context.monitor(
            channel,
            callback,
            request=f"record[queueSize={QUEUE_UPDATES}]field()",
            notify_disconnect=True,
            queue=self._thread,
        )

    def _on_array(self, value: Any) -> None:
        if isinstance(value, Exception):
            self._lost_channel(value)
            return
        try:
            update = _plain(value)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            text = f"{self.endpoint} is no NTNDArray ({error})"
            self._put(lambda _decoder: [Undecodable("malformed", text)], 0)
            return
        if self._fresh:
            self._fresh = False
            self.health.connected += 1
            self.health.peers = 1
            self._put(_connected, 0)
        size = 0 if update.value is None else update.value.nbytes
        self._put(lambda decoder: decoder.receive(update), size)

    def _on_acquire(self, value: Any) -> None:
        if isinstance(value, Exception):
            return
        acquiring = _is_on(value)
        self._put(lambda decoder: decoder.acquire(acquiring), 0)

    def _lost_channel(self, error: Exception) -> None:
        if self._fresh:
            return  # it was not there before either
        self._fresh = True
        self.health.disconnected += 1
        self.health.peers = 0
        self.health.last_failure = str(error)
        log.warning("channel %s is gone: %s", self.endpoint, error)

    def _put(self, event: Event, size: int) -> None:
        with self._lock:
            if self._bytes + size > self._most_bytes:
                self._dropped += 1
            else:
                self._events.append((event, size))
                self._bytes += size
        os.eventfd_write(self.socket, 1)

    def _next(self) -> tuple[Event | None, int]:
        """The oldest event, if there is one, and how many updates were dropped since."""
        with self._lock:
            dropped, self._dropped = self._dropped, 0
            if not self._events:
                return None, dropped
            event, size = self._events.popleft()
            self._bytes -= size
            return event, dropped


def _connected(decoder: PvaDecoder) -> list[Message]:
    decoder.connected()
    return []


def _overrun() -> Undecodable:
    return Undecodable("overrun", "an array was dropped: ingest was slower than the channel")


def _plain(value: Any) -> NdArrayUpdate:
    """The fields of an NTNDArray as plain values."""
    stamp = value.dataTimeStamp
    if not stamp.secondsPastEpoch:
        stamp = value.timeStamp
    seconds = int(stamp.secondsPastEpoch)
    codec_type = value.codec.parameters
    return NdArrayUpdate(
        unique_id=int(value.uniqueId),
        dimensions=tuple(int(axis.size) for axis in value.dimension[:MAX_DIMENSIONS]),
        codec=str(value.codec.name),
        codec_type=codec_type if isinstance(codec_type, int) else None,
        value=value.value,
        uncompressed_bytes=int(value.uncompressedSize),
        time_ns=seconds * 1_000_000_000 + int(stamp.nanoseconds),
        attributes={str(told.name): told.value for told in value.attribute[:MAX_ATTRIBUTES]},
    )


def _is_on(value: Any) -> bool:
    """Whether a channel is not 0: of a number, or of an enumeration's index."""
    told = value.value
    index = told.get("index", None) if hasattr(told, "get") else told
    return isinstance(index, bool | int | float) and index != 0
