"""What a simulated positioner says: positions of frames as the messages of one epoch, any dialect.

Used by :class:`ptycho_stream.simulate.detector.PositionSimulator`, which sends them, and by tests
that drop, double and mix them up.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.settings import BlueskySettings, PandaSettings
from ptycho_stream.wire.bluesky_encoder import BlueskyEncoder, Serializer
from ptycho_stream.wire.native import NativeEncoder
from ptycho_stream.wire.panda_encoder import PandaEncoder

PositionDialect = Literal["native", "panda", "bluesky"]
PANDA: Final = PandaSettings(y="/INENC3.VAL.Value", x="/INENC2.VAL.Value", scale_yx_m=(1e-9, 1e-9))
BLUESKY: Final = BlueskySettings(y="samy", x="samx")
MICROMETRES: Final = 1e-6
STEADY_BEAM: Final = 1.0
"""A reading of a beam monitor, where one is asked for."""

Messages = Iterator[list[bytes]]


@dataclass(frozen=True)
class PositionOptions:
    """How a simulated positioner behaves.

    Attributes:
        dialect: of its messages.
        panda: names, scale and samples, as the daemon's settings have them.
        bluesky: likewise; without a scale its fields are micrometres.
        samples_per_message: of PandA; frames straddle messages.
        jitter_m: standard deviation of a frame's samples about their mean.
        serializer: of Bluesky's documents.
        pages: Bluesky's events come in pages, one a batch.
    """

    dialect: PositionDialect = "native"
    panda: PandaSettings = PANDA
    bluesky: BlueskySettings = BLUESKY
    samples_per_message: int = 41
    jitter_m: float = 0.0
    serializer: Serializer = "msgpack"
    pages: bool = False


class PositionSeries(Protocol):
    """One epoch; each method gives the messages that are to be sent now."""

    def start(self) -> Messages:
        """It begins."""
        ...

    def positions(self, numbers: NDArray[np.int64], position_yx_m: NDArray[np.float64]) -> Messages:
        """Frames (n,) were taken at these places (n, 2)."""
        ...

    def end(self) -> Messages:
        """It is over."""
        ...


def position_series(
    options: PositionOptions,
    series: str | None,
    epoch: str | None,
    metadata: Mapping[str, Any],
) -> PositionSeries:
    """An epoch of ``series``, where it names one; its own name is made up where None is given."""
    match options.dialect:
        case "native":
            return NativePositions(series, epoch, metadata)
        case "panda":
            return PandaPositions(options, epoch)
        case "bluesky":
            return BlueskyPositions(options, series, epoch, metadata)


class NativePositions:
    """An epoch in our own dialect."""

    def __init__(self, series: str | None, epoch: str | None, metadata: Mapping[str, Any]) -> None:
        self._encoder = NativeEncoder(str(series), epoch or f"positions-{uuid.uuid4().hex}")
        self._metadata = metadata
        self._name_series = series is not None

    def start(self) -> Messages:
        """``positions_start``."""
        yield self._encoder.positions_start(self._metadata, name_series=self._name_series)

    def positions(self, numbers: NDArray[np.int64], position_yx_m: NDArray[np.float64]) -> Messages:
        """One batch."""
        yield self._encoder.positions(numbers, position_yx_m, name_series=self._name_series)

    def end(self) -> Messages:
        """``positions_end``."""
        yield self._encoder.positions_end()


class PandaPositions:
    """An arming of a PandA, which cuts its samples into messages wherever they are full."""

    def __init__(self, options: PositionOptions, epoch: str | None = None) -> None:
        self._options = options
        self._encoder = PandaEncoder(epoch or datetime.now(UTC).isoformat())
        self._random = np.random.default_rng(0)
        self._first = options.panda.first_sample
        self._waiting: NDArray[np.float64] = np.zeros((0, 2))

    def start(self) -> Messages:
        """It is armed."""
        yield self._encoder.start()

    def positions(self, numbers: NDArray[np.int64], position_yx_m: NDArray[np.float64]) -> Messages:
        """The messages that are full with the samples of these frames."""
        panda = self._options.panda
        many = panda.samples_per_frame
        jitter = self._random.normal(0, self._options.jitter_m, (len(numbers), many, 2))
        where_m = position_yx_m[:, None, :] + jitter - jitter.mean(axis=1, keepdims=True)
        counts = (where_m - np.asarray(panda.offset_yx_m)) / np.asarray(panda.scale_yx_m)
        for number, samples in zip(numbers.tolist(), counts, strict=True):
            first = panda.first_sample + number * many
            if first != self._first + len(self._waiting):  # frames were left out
                yield from self._messages(1)
                self._first = first
            self._waiting = np.concatenate([self._waiting, samples])
            yield from self._messages(self._options.samples_per_message)

    def end(self) -> Messages:
        """The samples that are left, and the stop."""
        yield from self._messages(1)
        yield self._encoder.stop()

    def _messages(self, at_least: int) -> Messages:
        """Messages of the samples that wait, while there are so many."""
        panda, most = self._options.panda, self._options.samples_per_message
        opened = panda.gate_threshold + (1 if panda.gate_open == "above" else -1)
        while len(self._waiting) >= at_least:
            samples, self._waiting = self._waiting[:most], self._waiting[most:]
            datasets = {panda.y: samples[:, 0], panda.x: samples[:, 1]}
            if panda.i0 is not None:
                datasets[panda.i0] = np.full(len(samples), STEADY_BEAM)
            if panda.gate is not None:
                datasets[panda.gate] = np.full(len(samples), opened)
            yield self._encoder.data(self._first, datasets)
            self._first += len(samples)


class BlueskyPositions:
    """A run of Bluesky, an event a step."""

    def __init__(
        self,
        options: PositionOptions,
        series: str | None,
        epoch: str | None,
        metadata: Mapping[str, Any],
    ) -> None:
        bluesky = options.bluesky
        self._options = options
        self._scale_yx_m = bluesky.scale_yx_m or (MICROMETRES, MICROMETRES)
        unit = "um" if bluesky.scale_yx_m is None else None
        units = {bluesky.y: unit, bluesky.x: unit}
        more = (bluesky.i0, bluesky.frame)
        units |= {name: None for name in more if name is not None}
        self._encoder = BlueskyEncoder(units, epoch, options.serializer, bluesky.prefix or "")
        told: dict[str, Any] = {key: held[0] for key, held in bluesky.only.items() if held}
        if series is not None:
            told["scan_id"] = int(series) if series.isdecimal() else series
            if bluesky.series_key is not None:
                told[bluesky.series_key] = series
        self._metadata = {**metadata, "plan_name": "replay", **told}

    def start(self) -> Messages:
        """The run's start and the descriptor of its events."""
        yield self._encoder.start(**self._metadata)
        yield self._encoder.descriptor(self._options.bluesky.stream)

    def positions(self, numbers: NDArray[np.int64], position_yx_m: NDArray[np.float64]) -> Messages:
        """An event, or all of them in a page, for the first frame of each step."""
        bluesky = self._options.bluesky
        steps = numbers % bluesky.frames_per_event == 0
        numbers, position_yx_m = numbers[steps], position_yx_m[steps]
        if not len(numbers):
            return
        values = (position_yx_m - np.asarray(bluesky.offset_yx_m)) / np.asarray(self._scale_yx_m)
        data = {bluesky.y: values[:, 0].tolist(), bluesky.x: values[:, 1].tolist()}
        if bluesky.i0 is not None:
            data[bluesky.i0] = [STEADY_BEAM] * len(numbers)
        if bluesky.frame is not None:
            data[bluesky.frame] = (numbers + bluesky.first_frame).tolist()
        seq_num: list[int] = (numbers // bluesky.frames_per_event + 1).tolist()
        if self._options.pages:
            yield self._encoder.event_page(seq_num, data)
            return
        for at, number in enumerate(seq_num):
            yield self._encoder.event(number, {name: held[at] for name, held in data.items()})

    def end(self) -> Messages:
        """The run's stop."""
        yield self._encoder.stop()
