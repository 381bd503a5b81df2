"""Scans whose messages are dropped, doubled, delayed and mixed up at random, and what is left.

What has to come of them is worked out from the messages that are delivered, by other means than the
project's: which frames were sent, and which samples, events or batches hold their positions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.settings import BlueskySettings, PandaSettings
from ptycho_stream.simulate.position_series import (
    BlueskyPositions,
    NativePositions,
    PandaPositions,
    PositionOptions,
    PositionSeries,
)
from ptycho_stream.wire import NativeEncoder

SHAPE = (8, 8)
Due = tuple[float, list[bytes]]
KINDS = ("native", "panda-1", "panda-10", "bluesky-units", "bluesky-scale", "bluesky-pages")
PANDA = PandaSettings(y="/Y", x="/X", scale_yx_m=(-1e-9, 2e-9), offset_yx_m=(1e-4, -1e-4))
SERIES_S = 16.0
"""From one scan's header to the next one's."""


def pixels(series: int, number: int) -> NDArray[np.uint16]:
    return np.full(SHAPE, series * 1000 + number, np.uint16)


@dataclass
class Mangled:
    """One scan as it is delivered.

    Attributes:
        frames: numbers of the frames that arrive, in their order, doubled ones twice.
        position_yx_m: of the frames whose positions arrive whole.
        torn: frames that have lost a part of their samples and are known to have.
        header: of the detector's series arrives; ``end`` likewise.
        told: what the run says of itself arrives.
        positions: so many are received, those of an alignment before it with them.
    """

    series: int
    expected: int
    header: bool
    end: bool
    told: bool = True
    torn: int = 0
    positions: int = 0
    frames: list[int] = field(default_factory=list[int])
    position_yx_m: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def stored(self) -> set[int]:
        return set(self.frames)

    @property
    def out_of_order(self) -> int:
        highest, count, seen = -1, 0, set[int]()
        for number in self.frames:
            count += number < highest and number not in seen
            seen.add(number)
            highest = max(highest, number)
        return count

    @property
    def missing(self) -> int:
        known = self.expected if self.end and self.header else max(self.frames) + 1
        return known - len(self.stored)


class Story:
    """Scans of a positioner of one kind, and all that goes wrong with them.

    Attributes:
        tables: the settings that a daemon needs for it.
        frames: messages of the detector, by time in seconds; ``positions`` of the positioner.
        scans: what is to come of it.
    """

    def __init__(self, kind: str, seed: int, scans: int = 3) -> None:
        self._random = np.random.default_rng([KINDS.index(kind), seed])
        self._kind = kind
        self._chance = self._random.choice([0.0, 0.05, 0.15])
        self.options = self._options()
        self.frames: list[Due] = []
        self.positions: list[Due] = []
        self.scans: list[Mangled] = []
        self._stopped = True
        self._start = ""
        lag_s = self._random.uniform(-2, 2)  # of positions behind frames
        for number in range(scans):
            self._add(number, 9 + number * SERIES_S, lag_s)
        if self._kind.startswith("panda") and not self._stopped:
            self.scans[-1].torn = 0  # nobody knows yet whether more will come

    @property
    def tables(self) -> dict[str, Any]:
        dialect = self.options.dialect
        table: dict[str, Any] = {"source": dialect, "endpoint": "tcp://127.0.0.1:9", "wait_s": 6.0}
        table["match_window_s"] = 20.0
        if dialect != "native":
            table[dialect] = getattr(self.options, dialect).model_dump()
        return {"positions": table, "detector": {"dialect": "native", "silence_s": 3.0}}

    def _options(self) -> PositionOptions:
        random = self._random
        match self._kind.split("-"):
            case ["panda", many]:
                panda = PANDA.model_copy(
                    update={
                        "samples_per_frame": int(many),
                        "first_sample": int(random.choice([0, 7])),
                    }
                )
                size = int(random.choice([7, 41]))
                return PositionOptions(
                    "panda", panda, samples_per_message=size, jitter_m=float(many != "1") * 1e-7
                )
            case ["bluesky", how]:
                scale = None if how == "units" else (1e-3, -1e-3)
                bluesky = BlueskySettings(y="samy", x="samx", scale_yx_m=scale)
                written = random.choice(["msgpack", "json"])
                return PositionOptions(
                    "bluesky", bluesky=bluesky, serializer=written, pages=how == "pages"
                )
            case _:
                return PositionOptions("native")

    # ---- one scan ------------------------------------------------------------------------------

    def _add(self, index: int, at_s: float, lag_s: float) -> None:
        random = self._random
        scan = Mangled(
            series=index + 1,
            expected=int(random.integers(20, 60)),
            header=bool(random.random() < 0.8),
            end=bool(random.random() < 0.8),
        )
        self.scans.append(scan)
        begin_s = at_s + random.uniform(0.1, 1.5)  # of the first frame
        self._add_frames(scan, at_s, begin_s)
        aligned = self.options.dialect != "native" and random.random() < 0.4
        if aligned:
            self._stopped = True  # the alignment before it
        self._add_positions(scan, at_s, begin_s, lag_s)
        # Where nothing at all is heard of a scan's own run, an alignment is as good.
        heard = [one.told or bool(one.position_yx_m) for one in self.scans[-2:]]
        if aligned and all(heard):
            self._add_alignment(scan, at_s - 5.5 + lag_s)

    def _add_frames(self, scan: Mangled, at_s: float, begin_s: float) -> None:
        encoder = NativeEncoder(str(scan.series), encoding="raw")
        if scan.header:
            self.frames.append((at_s, encoder.scan_start(scan.expected, SHAPE, "<u2")))
        due = [
            (begin_s + 0.05 * number, number, encoder.frame(number, pixels(scan.series, number)))
            for number in range(scan.expected)
        ]
        due = self._mangle(due)
        scan.frames = [number for _, number, _ in due]
        self.frames += [(when, parts) for when, _, parts in due]
        if scan.end:
            self.frames.append((max(when for when, _, _ in due) + 0.01, encoder.scan_end()))

    def _mangle(self, due: list[tuple[float, int, list[bytes]]]) -> list[Any]:
        """Drop, delay and double messages (time, number, parts); in order of their arrival."""
        random, out = self._random, []
        for when, number, parts in due:
            copies = 0 if random.random() < self._chance else 1 + (random.random() < self._chance)
            for _ in range(copies):
                late_s = random.uniform(0, 0.4) if random.random() < self._chance else 0.0
                out.append((when + late_s, number, parts))
        return sorted(out, key=lambda one: one[0])

    def _add_positions(self, scan: Mangled, at_s: float, begin_s: float, lag_s: float) -> None:
        random, series = self._random, self._series(scan)
        numbers = np.arange(scan.expected)
        where = np.cumsum(random.uniform(-1e-6, 1e-6, (scan.expected, 2)), axis=0)
        batch = int(random.integers(1, 8))
        start_s = self._start_s(at_s, begin_s, 0.05 * batch)
        scan.told = start_s is not None
        for n, parts in enumerate(series.start()):
            if start_s is not None:
                self.positions.append((start_s + lag_s + 0.001 * n, parts))
        due: list[tuple[float, int, list[bytes]]] = []
        for first in range(0, scan.expected, batch):
            part = slice(first, first + batch)
            when = begin_s + lag_s + 0.05 * (first + batch)
            due += [(when, first, parts) for parts in series.positions(numbers[part], where[part])]
        last_s = begin_s + lag_s + 0.05 * (scan.expected + batch)
        *rest, stop = series.end()
        due += [(last_s, scan.expected, parts) for parts in rest]
        due = self._mangle(due)
        self.positions += [(when, parts) for when, _, parts in due]
        self._stopped = bool(random.random() < 0.75 and due)
        if self._stopped:
            # Only our own says nothing of how much there was, and cannot be overtaken.
            early_s = -0.5 if self._kind == "native" else random.uniform(-0.2, 0.5)
            first_s = due[0][0] if due and self._start in ("overtaken", "without") else 0.0
            self.positions.append((max(last_s - early_s, first_s + 0.01), stop))
        self._work_out(scan, [parts for _, _, parts in due], stop)

    def _add_alignment(self, scan: Mangled, at_s: float) -> None:
        """A run of the same motors shortly before a scan, that is no scan's."""
        series, count = self._series(scan, "alignment"), int(self._random.integers(3, 9))
        where = np.full((count, 2), 5e-5)
        parts = [*series.start(), *series.positions(np.arange(count), where), *series.end()]
        for n, message in enumerate(parts):
            self.positions.append((at_s + 0.02 * n, message))
        scan.positions += count

    def _start_s(self, at_s: float, begin_s: float, batch_s: float) -> float | None:
        """When the positioner begins: before, after or without the detector's header."""
        choices = ["before", "after", "overtaken", "without"]
        if self._kind == "bluesky-units":
            choices = ["before", "after"]  # nothing else tells the units
        elif self._kind.startswith("bluesky") and not self._stopped:
            choices = ["before", "after"]  # of two runs in a row something has to be heard
        self._start = str(self._random.choice(choices))
        match self._start:
            case "before":
                return at_s - self._random.uniform(0.1, 2.0)
            case "after":
                return at_s + self._random.uniform(0.0, begin_s - at_s)
            case "overtaken":
                return begin_s + batch_s + self._random.uniform(0.0, 0.3)
            case _:
                return None

    def _series(self, scan: Mangled, kind: str = "epoch") -> PositionSeries:
        series, epoch = str(scan.series), f"{kind} {scan.series}"
        metadata = {"sample": f"sample {scan.series}"}
        match self.options.dialect:
            case "native":
                named = bool(self._random.random() < 0.5)
                return NativePositions(series if named else None, epoch, metadata)
            case "panda":
                return PandaPositions(self.options, epoch)
            case "bluesky":
                return BlueskyPositions(self.options, series, epoch, metadata)

    # ---- what is to come of it -----------------------------------------------------------------

    def _work_out(self, scan: Mangled, messages: list[list[bytes]], stop: list[bytes]) -> None:
        match self.options.dialect:
            case "native":
                for (part,) in messages:
                    held = msgpack.unpackb(part)
                    numbers = np.frombuffer(held["frames"], "<i8").tolist()
                    where = np.frombuffer(held["position_yx_m"], "<f8").reshape(-1, 2).tolist()
                    scan.position_yx_m |= dict(zip(numbers, map(tuple, where), strict=True))
                    scan.positions += len(numbers)
            case "bluesky":
                self._events(scan, messages)
            case "panda":
                self._samples(scan, messages, json.loads(stop[0])["emitted_frames"])
                scan.positions += len(scan.position_yx_m)

    def _events(self, scan: Mangled, messages: list[list[bytes]]) -> None:
        scale = self.options.bluesky.scale_yx_m or (1e-6, 1e-6)
        for (part,) in messages:
            text = part.split(b" ", 2)[2]
            held = json.loads(text) if text[:1] == b"{" else msgpack.unpackb(text)
            rows = [(held["seq_num"], held["data"]["samy"], held["data"]["samx"])]
            if self.options.pages:
                rows = list(zip(*rows[0], strict=True))
            for number, y, x in rows:
                scan.position_yx_m[number - 1] = (y * scale[0], x * scale[1])
            scan.positions += len(rows)

    def _samples(self, scan: Mangled, messages: list[list[bytes]], emitted: int) -> None:
        panda = self.options.panda
        many = panda.samples_per_frame
        known: dict[int, tuple[float, float]] = {}
        heard: set[int] = set()
        for (part,) in messages:
            held = json.loads(part)
            heard.add(held["frame_number"])
            y, x = held["datasets"]["/Y"], held["datasets"]["/X"]
            first = y["starting_sample_number"] - panda.first_sample
            known |= dict(enumerate(zip(y["data"], x["data"], strict=True), first))
        partly: list[int] = []
        for frame in range(scan.expected):
            numbers = range(frame * many, (frame + 1) * many)
            held = [known[n] for n in numbers if n in known]
            if len(held) == many:
                mean = np.ascontiguousarray(np.array(held).T).sum(axis=1) / many
                where = mean * panda.scale_yx_m + np.array(panda.offset_yx_m)
                scan.position_yx_m[frame] = (float(where[0]), float(where[1]))
            elif held:
                partly.append(frame)
        # A frame that lacks samples has lost them if others were lost, or have followed.
        begun = 0 if scan.told else min(heard, default=0)
        if not (self._stopped and heard.issuperset(range(begun, emitted))):
            newest = (max(known, default=-1) + 1) // many
            scan.torn = sum(1 for frame in partly if self._stopped or frame < newest)


def check(catalogue: Catalogue, header: ScanHeader, scan: Mangled, dialect: str) -> None:
    """Assert that a scan in the store is what was to come of it."""
    both = scan.stored & scan.position_yx_m.keys()
    state = "complete" if scan.end else "interrupted"
    assert header.state == ("unmatched" if scan.end and not both else state), header.reason
    assert header.joined_late == (not scan.header)
    counts = header.counts
    assert counts["frames"] == len(scan.stored)
    assert counts["duplicate"] == len(scan.frames) - len(scan.stored)
    assert counts["out_of_order"] == scan.out_of_order
    assert counts["missing"] == scan.missing
    assert counts["positioned"] == len(both)
    assert counts["unpositioned"] == len(scan.stored) - len(both)
    if dialect == "panda":
        assert "panda_arm_time" in header.metadata or not (scan.told and both)
    else:
        sample = f"sample {scan.series}" if scan.told and both else None
        assert header.metadata.get("sample") == sample
    with catalogue.open(header.scan_id) as reader:
        numbers = reader.records()["number"].tolist()
        assert len(numbers) == len(scan.stored) and set(numbers) == scan.stored
        for slot, number in enumerate(numbers):
            np.testing.assert_array_equal(reader.frame(slot), pixels(scan.series, number))
        pairs = {int(pair["number"]): pair for pair in reader.pairs()}
    assert pairs.keys() == both
    for number, pair in pairs.items():
        assert (pair["y_m"], pair["x_m"]) == scan.position_yx_m[number], number
        assert numbers[pair["slot"]] == number
        assert pair["revision"] == pair["flags"] == 0
