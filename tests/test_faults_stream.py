"""Losses, duplicates, disorder, torn and undecodable messages: counters equal what was injected.

One daemon a dialect serves all seeds.  Each is a scan that is disturbed at random; a model that
knows what was done to the stream says what the scan's accounting and the metrics must be, exactly.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from beamline import SHAPE, Beamline, check_scan, headers, pixels
from daemon_harness import DaemonHarness, wait_for

from ptycho_stream.scans import Catalogue, ScanHeader
from ptycho_stream.wire import DectrisV1Encoder, NativeEncoder

FRAMES = 120
Parts = Sequence[bytes]
METRICS = {
    "received": "ptycho_stream_frames_received_total",
    "committed": "ptycho_stream_frames_committed_total",
    "duplicate": "ptycho_stream_frames_duplicate_total",
    "out_of_order": "ptycho_stream_frames_out_of_order_total",
    "missing": "ptycho_stream_frames_missing_total",
    "torn": 'ptycho_stream_messages_undecodable_total{reason="torn"}',
    "undecodable": 'ptycho_stream_messages_undecodable_total{reason="undecodable"}',
    "malformed": 'ptycho_stream_messages_undecodable_total{reason="malformed"}',
    "limit": 'ptycho_stream_messages_undecodable_total{reason="limit"}',
}
ACTIONS = ("send", "lose", "double", "delay", "tear", "damage", "precede by garbage", "absurd")
CHANCES = (0.72, 0.06, 0.05, 0.05, 0.03, 0.04, 0.03, 0.02)


class Dialect:
    """The messages of a scan, and what can be done to them."""

    def __init__(self, name: str, series: int) -> None:
        self._native = name == "native"
        self.series = series
        self._encoder: Any = (
            NativeEncoder(str(series), encoding="bslz4")
            if self._native
            else DectrisV1Encoder(series)
        )

    def start(self) -> Parts:
        if self._native:
            return self._encoder.scan_start(FRAMES, SHAPE, "<u2")
        config = {"nimages": FRAMES, "ntrigger": 1, "trigger_mode": "ints", "bit_depth_image": 16}
        config |= {"x_pixels_in_detector": SHAPE[1], "y_pixels_in_detector": SHAPE[0]}
        return self._encoder.start("basic", config)

    def end(self) -> Parts:
        return self._encoder.scan_end() if self._native else self._encoder.end()

    def frame(self, number: int) -> list[bytes]:
        return self._encoder.frame(number, pixels(self.series, number % FRAMES))

    def torn(self, number: int) -> Parts:
        return self.frame(number)[: 1 if self._native else 2]

    def damaged(self, number: int) -> Parts:
        parts = self.frame(number)
        at = 1 if self._native else 2
        parts[at] = parts[at][: len(parts[at]) // 2]
        return parts

    def garbage(self) -> Parts:
        return [b"\xc1\xff"] if self._native else [b'{"htype":']


@dataclass
class Model:
    """What must be counted of a scan."""

    counts: Counter[str] = field(default_factory=Counter)
    stored: set[int] = field(default_factory=set)
    highest: int = -1

    def arrived(self, number: int, *, whole: bool = True) -> None:
        self.counts["received"] += 1
        if number in self.stored:
            self.counts["duplicate"] += 1
            return
        self.counts["out_of_order"] += number < self.highest
        self.highest = max(self.highest, number)
        if whole:
            self.stored.add(number)
            self.counts["committed"] += 1
        else:
            self.counts["undecodable"] += 1

    @property
    def final(self) -> dict[str, int]:
        missing = FRAMES - len(self.stored)
        return dict.fromkeys(METRICS, 0) | self.counts | {"missing": missing}


def disturbed(dialect: Dialect, rng: np.random.Generator) -> tuple[list[Parts], Model]:
    """A scan's messages after what happened to them on the way, and the model of the outcome."""
    messages: list[Parts] = [dialect.start()]
    model = Model()
    late: list[tuple[int, int]] = []  # (after which frame, number)

    def send(number: int) -> None:
        messages.append(dialect.frame(number))
        model.arrived(number)

    torn: Parts | None = None
    for number in range(FRAMES):
        match rng.choice(ACTIONS, p=CHANCES):
            case "lose":
                pass
            case "double":
                send(number)
                send(number)
            case "delay":
                late.append((number + int(rng.integers(1, 6)), number))
            case "tear":
                torn = dialect.torn(number)
                messages.append(torn)
                model.counts["torn"] += 1
            case "damage":
                messages.append(dialect.damaged(number))
                model.arrived(number, whole=False)
            # Behind a head without pixels anything that is no head is taken for the pixels.
            case "precede by garbage" if messages[-1] is not torn:
                messages.append(dialect.garbage())
                model.counts["malformed"] += 1
                send(number)
            case "absurd":
                messages.append(dialect.frame(2**60 + number))
                model.counts["limit"] += 1
            case _:
                send(number)
        for due in [one for one in late if one[0] == number]:
            send(due[1])
            late.remove(due)
    for _, number in late:
        send(number)
    messages.append(dialect.end())
    return messages, model


@pytest.fixture(scope="module", params=["native", "dectris-v1"])
def daemon(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonHarness]:
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"detector": {"dialect": request.param}}
    with DaemonHarness(folder, settings, stages=("ingest",)) as harness:
        yield harness


def counted(daemon: DaemonHarness) -> dict[str, float]:
    metrics = daemon.metrics()
    return {name: metrics.get(metric, 0.0) for name, metric in METRICS.items()}


def check_seeds(daemon: DaemonHarness, seeds: range) -> None:
    catalogue = Catalogue(daemon.data)
    name = daemon.settings.detector.dialect
    with Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as beamline:
        for seed in seeds:
            before = counted(daemon)
            dialect = Dialect(name, seed + 1)
            messages, model = disturbed(dialect, np.random.default_rng(seed))
            for parts in messages:
                beamline.send(parts)
            beamline.send_positions(range(FRAMES), str(seed + 1), f"e{seed}")

            def over(series: str = str(seed + 1)) -> ScanHeader | None:
                found = [h for h in headers(catalogue) if h.series == series and h.sealed]
                return found[0] if found else None

            header = wait_for(over, 20, f"the end of seed {seed}\n{daemon.log[-3000:]}")
            check_scan(catalogue, header.scan_id, seed + 1, model.stored)
            final = model.final
            assert header.state == "complete"
            assert header.counts["frames"] == len(model.stored)
            for key in ("missing", "duplicate", "out_of_order"):
                assert header.counts[key] == final[key], (seed, key)
            for key in ("torn", "undecodable", "malformed", "limit"):
                assert header.counts.get(key, 0) == final[key], (seed, key)

            expected = {key: before[key] + final[key] for key in METRICS}
            until_s = time.monotonic() + 5
            while counted(daemon) != expected and time.monotonic() < until_s:
                time.sleep(0.05)
            assert counted(daemon) == expected, seed
    assert daemon.status()["stages"]["ingest"]["restarts"] == 0


def test_counters_equal_what_was_injected(daemon: DaemonHarness) -> None:
    check_seeds(daemon, range(6))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_counters_equal_what_was_injected_in_100_scans(daemon: DaemonHarness) -> None:
    check_seeds(daemon, range(100, 200))
