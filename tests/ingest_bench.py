"""Ingest in this process, without sockets and with a clock that the test turns.

The stage is the real one, with its decoders, state machine and store; only the sources are made
up: they hold messages that are due at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ptycho_stream.messages import Message
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.settings import Settings
from ptycho_stream.wire import FrameDecoder, PatientDecoder, WireLimits, frame_decoders
from ptycho_stream.wire.bluesky import BlueskyDecoder
from ptycho_stream.wire.native import NativeDecoder
from ptycho_stream.wire.panda import PandaDecoder
from ptycho_streamd import ingest, recorder
from ptycho_streamd.stream_health import Health

Due = tuple[float, list[bytes]]
BEGIN_NS = 1_000_000_000_000
STEP_NS = 500_000_000
"""At most between two looks of ingest at its sources."""


class Clock:
    """Stands in for the module ``time`` in ingest."""

    def __init__(self) -> None:
        self.now_ns = BEGIN_NS

    def monotonic_ns(self) -> int:
        return self.now_ns

    def time_ns(self) -> int:
        return self.now_ns

    def monotonic(self) -> float:
        return self.now_ns / 1e9


class ScheduledSource:
    """A stream whose messages come when their time has come."""

    endpoint = "made up"

    def __init__(self, name: str, due: Iterable[Due], decoder: FrameDecoder, clock: Clock) -> None:
        self.name = name
        self.health = Health()
        due_ns = [(BEGIN_NS + round(at_s * 1e9), parts) for at_s, parts in due]
        self._due = sorted(due_ns, key=lambda one: one[0])[::-1]
        self._decoder = decoder
        self._patient = decoder if isinstance(decoder, PatientDecoder) else None
        self._clock = clock

    @property
    def next_ns(self) -> int | None:
        return self._due[-1][0] if self._due else None

    def receive(self) -> list[Message] | None:
        if self._due and self._due[-1][0] <= self._clock.now_ns:
            return self._decoder.receive(self._due.pop()[1])
        return (self._patient.overdue() or None) if self._patient is not None else None

    def watch(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}


class IdleStage:
    """A stage that nobody asks anything."""

    stopping, reload_requested, stop_reason, socket = False, False, "requested", None

    def beat(self, *_: object, **__: object) -> None:
        pass

    def requests(self) -> list[Any]:
        return []


class IngestBench:
    """One life of ingest.

    Args:
        folder: of the store.
        tables: of the settings, besides the probe and the data directory.
        frames: the detector's messages, by time in seconds.
        positions: the positioner's.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        tables: dict[str, Any],
        frames: Iterable[Due],
        positions: Iterable[Due],
    ) -> None:
        self.clock = Clock()
        self.settings = Settings.model_validate(
            {
                "probe": {"path": "probe.npz"},
                "data": {"directory": str(folder), "min_free_bytes": 0},
                **tables,
            }
        )
        limits = WireLimits()
        (decoder,) = frame_decoders(self.settings.detector, limits)
        self._sources = [
            ScheduledSource("positions", positions, self._position_decoder(limits), self.clock),
            ScheduledSource("detector", frames, decoder, self.clock),
        ]
        for module in (ingest, recorder):
            monkeypatch.setattr(module, "time", self.clock)
        monkeypatch.setattr(ingest, "open_sources", lambda *_: self._sources)
        self._ingest = ingest.Ingest(IdleStage(), folder / "daemon.toml", self.settings)  # type: ignore[arg-type]
        self.catalogue = Catalogue(folder)

    def run(self, idle_s: float) -> list[ScanHeader]:
        """Play all messages and ``idle_s`` after the last; the scans then, oldest first."""
        while due := [source.next_ns for source in self._sources if source.next_ns is not None]:
            self._until(min(due))
        self._until(self.clock.now_ns + round(idle_s * 1e9))
        return self.catalogue.scans()[::-1]

    def __enter__(self) -> IngestBench:
        return self

    def __exit__(self, *_: object) -> None:
        self._ingest._stop()
        self._ingest._gate.close()

    def metric(self, name: str, **labels: str) -> float:
        found = self._ingest._metrics.registry.get_sample_value(name, labels or None)
        return found or 0.0

    def _until(self, at_ns: int) -> None:
        while True:
            self._ingest._round()
            if self.clock.now_ns >= at_ns:
                return
            self.clock.now_ns = min(self.clock.now_ns + STEP_NS, at_ns)

    def _position_decoder(self, limits: WireLimits) -> FrameDecoder:
        positions, now = self.settings.positions, self.clock.monotonic_ns
        if positions.panda is not None:
            return PandaDecoder(positions.panda, limits, now)
        if positions.bluesky is not None:
            return BlueskyDecoder(positions.bluesky, limits, now)
        return NativeDecoder(limits)
