"""A simulated detector and a simulated positioner: they stream a scan file as real ones would.

The demo, ``ptycho-stream replay`` and the tests drive the daemon with these.  The detector binds
PUSH like a DECTRIS detector; frames come paced or as fast as they are taken, whole or with every
part as a message of its own, and a series can be left unfinished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import SettingsError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.outlet import Outlet, SocketKind
from ptycho_stream.simulate.position_series import PositionOptions, PositionSeries, position_series
from ptycho_stream.simulate.series import DectrisSeries, DetectorOptions, NativeSeries

PositionTiming = Literal["before", "during", "after", "inline"]


class DetectorSimulator:
    """Streams scan files, one series after another, from one bound PUSH socket.

    Example::

        with DetectorSimulator("tcp://127.0.0.1:9999") as detector:
            detector.send_series(load_scan(Path("scan.npz")), series=1)
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:*",
        options: DetectorOptions | None = None,
        attach: Literal["bind", "connect"] = "bind",
        timeout_s: float = 30.0,
    ) -> None:
        self.options = options or DetectorOptions()
        self._outlet = Outlet(endpoint, "push", attach, timeout_s=timeout_s)
        self.endpoint = self._outlet.endpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._outlet.close(linger=error is None)

    def wait_for_receiver(self, timeout_s: float | None = None) -> None:
        """Return when somebody is connected.

        Raises:
            EndpointError: nobody came in time.
        """
        self._outlet.wait_for_receiver(timeout_s)

    def send_series(
        self,
        scan: ScanFile,
        series: int = 1,
        stop_after: int | None = None,
        inline_positions: bool = False,
    ) -> int:
        """Stream a whole series and return the number of frames sent; see :meth:`frames`."""
        return sum(1 for _ in self.frames(scan, series, stop_after, inline_positions))

    def frames(
        self,
        scan: ScanFile,
        series: int = 1,
        stop_after: int | None = None,
        inline_positions: bool = False,
    ) -> Iterator[int]:
        """Stream a series, yielding each frame's index in the file once it is sent.

        Args:
            scan: what to send.
            series: its number; real detectors begin again at 1 when they are switched on.
            stop_after: abort after so many frames: no series end is sent.
            inline_positions: put each frame's position into its message (native dialect only).

        Raises:
            EndpointError: nobody receives.
            SettingsError: inline positions in a dialect that has none.
        """
        stream = NativeSeries if self.options.dialect == "native" else DectrisSeries
        messages = stream(scan, series, self.options, inline_positions)
        count = len(scan) if stop_after is None else min(stop_after, len(scan))
        self._send(messages.start())
        started_s = time.monotonic()
        for index in range(count):
            if self.options.rate_hz is not None:
                wait_s = started_s + index / self.options.rate_hz - time.monotonic()
                time.sleep(max(wait_s, 0))
            self._send(messages.frame(index))
            yield index
        if count == len(scan):
            self._send(messages.end())

    def _send(self, parts: Sequence[bytes]) -> None:
        if self.options.one_part_each:
            for part in parts:
                self._outlet.send([part])
        else:
            self._outlet.send(parts)


class PositionSimulator:
    """Streams the positions of scan files, one epoch a scan, in the dialect of its options.

    PUSH by default: a PUB loses what it sends before its subscribers are there, which
    :meth:`wait_for_receiver` helps against.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:*",
        kind: SocketKind = "push",
        attach: Literal["bind", "connect"] = "bind",
        timeout_s: float = 30.0,
        options: PositionOptions | None = None,
    ) -> None:
        self._outlet = Outlet(endpoint, kind, attach, timeout_s=timeout_s)
        self.endpoint = self._outlet.endpoint
        self._options = options or PositionOptions()
        self._epoch: PositionSeries | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._outlet.close(linger=error is None)

    def wait_for_receiver(self, timeout_s: float | None = None) -> None:
        """Return when somebody is connected or subscribed.

        Raises:
            EndpointError: nobody came in time.
        """
        self._outlet.wait_for_receiver(timeout_s)

    def start(
        self,
        series: int | str,
        epoch: str | None = None,
        name_series: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin an epoch, of a new unique name if None is given."""
        self._epoch = position_series(
            self._options, str(series), epoch, metadata or {}, name_series=name_series
        )
        self._send(self._epoch.start())

    def send(self, numbers: NDArray[np.int64], position_yx_m: NDArray[np.float64]) -> None:
        """Send a batch of the epoch that was begun."""
        self._send(self._started().positions(numbers, position_yx_m))

    def end(self) -> None:
        """End the epoch."""
        self._send(self._started().end())

    def send_scan(self, scan: ScanFile, series: int | str = 1, batch: int = 50) -> None:
        """Stream all positions of ``scan`` as one epoch, ``batch`` a message."""
        self.start(series, metadata=scan.metadata)
        for first in range(0, len(scan), batch):
            part = slice(first, first + batch)
            self.send(scan.frame_numbers[part], scan.positions_yx_m[part])
        self.end()

    def _send(self, messages: Iterable[Sequence[bytes]]) -> None:
        for parts in messages:
            self._outlet.send(parts)

    def _started(self) -> PositionSeries:
        if self._epoch is None:
            raise SettingsError("no epoch of positions was begun: call start() first")
        return self._epoch


def play(
    scan: ScanFile,
    detector: DetectorSimulator,
    positions: PositionSimulator | None,
    timing: PositionTiming = "during",
    series: int = 1,
    stop_after: int | None = None,
    batch: int = 10,
    on_frame: Callable[[int], None] | None = None,
) -> int:
    """Stream one scan, frames and positions, and return the number of frames sent.

    Args:
        scan: what to send.
        detector: sends the frames.
        positions: sends the positions; not used where they are ``inline``.
        timing: when positions come, relative to the frames.
        series: number of the series.
        stop_after: abort after so many frames; neither the series nor a ``during`` epoch is ended.
        batch: positions a message.
        on_frame: called with the number of frames sent so far.

    Raises:
        EndpointError: nobody receives.
    """
    inline = timing == "inline"
    source = None if inline else positions
    if source is not None and timing == "before":
        source.send_scan(scan, series, batch)
    if source is not None and timing == "during":
        source.start(series, metadata=scan.metadata)
    sent = 0
    for index in detector.frames(scan, series, stop_after, inline_positions=inline):
        sent = index + 1
        if source is not None and timing == "during" and sent % batch == 0:
            part = slice(sent - batch, sent)
            source.send(scan.frame_numbers[part], scan.positions_yx_m[part])
        if on_frame is not None:
            on_frame(sent)
    if source is not None and timing == "during":
        rest = slice(sent - sent % batch, sent)
        if sent % batch:
            source.send(scan.frame_numbers[rest], scan.positions_yx_m[rest])
        if sent == len(scan):
            source.end()
    if source is not None and timing == "after":
        source.send_scan(scan, series, batch)
    return sent
