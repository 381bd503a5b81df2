"""A child's link to the supervisor: heartbeats out, requests, reload and stop in.

Every stage (ingest, reconstruct) makes one :class:`Stage` first of all, polls its ``socket`` beside
its own and calls :meth:`Stage.beat` in its loop; :func:`run_stage` is the ``main`` of a stage.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import zmq
from prometheus_client import CollectorRegistry

from ptycho_stream.errors import PtychoStreamError, SettingsError
from ptycho_stream.settings import Settings, load_settings
from ptycho_streamd.bus import (
    BUS_VARIABLE,
    SUPERVISOR_VARIABLE,
    Answer,
    Beat,
    Cancel,
    Fatal,
    Refusal,
    Reload,
    StageRequest,
    Stop,
    decode,
    encode,
    identity,
)
from ptycho_streamd.log_format import configure_logging
from ptycho_streamd.metrics import snapshot

BEAT_INTERVAL_S = 0.25
PR_SET_PDEATHSIG = 1

StopReason = Literal["", "requested", "signal", "orphaned"]
log = logging.getLogger(__name__)


class Stage:
    """The link of the stage ``name``; use as a context manager.

    Not thread-safe: one thread, that of the stage's loop, may call it.  Nothing here waits.

    Args:
        name: of the stage, as the supervisor knows it.
        labels: of all its metrics, which tell it from other stages that have the same.

    Attributes:
        socket: to register with the stage's poller (``zmq.POLLIN``: call :meth:`requests`).
        reload_requested: set by the supervisor's reload; whoever has re-read the settings clears it
            with :meth:`reloaded`.
        cancelled: the job that this stage was started for is not wanted any more.
    """

    def __init__(self, name: str, labels: Mapping[str, str] | None = None) -> None:
        endpoint = os.environ.get(BUS_VARIABLE)
        if not endpoint:
            raise SettingsError(
                f"the {name} stage is started by the daemon (it sets {BUS_VARIABLE}): run "
                "ptycho-streamd --config FILE"
            )
        self.name = name
        self._labels = labels
        self.reload_requested = False
        self.cancelled = False
        self._stop_reason: StopReason = ""
        self._parent = int(os.environ.get(SUPERVISOR_VARIABLE, os.getppid()))
        self._last_beat_s = float("-inf")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, identity(name, os.getpid()))
        self.socket.setsockopt(zmq.LINGER, 500)
        self.socket.connect(endpoint)
        end_with_parent()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def stopping(self) -> bool:
        """Whether the stage must end now; see :attr:`stop_reason`."""
        return self.stop_reason != ""

    @property
    def stop_reason(self) -> StopReason:
        """Why the stage must end, or ``""``.

        ``requested`` by the supervisor (the daemon stops for good: seal), a ``signal`` to this
        process alone, or ``orphaned`` (the supervisor died): a later incarnation goes on.
        """
        if os.getppid() != self._parent:
            return "orphaned"
        return self._stop_reason

    def beat(
        self, status: dict[str, Any], registry: CollectorRegistry, *, now: bool = False
    ) -> None:
        """Tell that the stage lives, at most every 0.25 s unless ``now``.

        Args:
            status: plain values, shown by ``ptycho-stream ctl status``.
            registry: all metrics of this process.
            now: send in any case, for the last words of a stage.
        """
        at_s = time.monotonic()
        if not now and at_s - self._last_beat_s < BEAT_INTERVAL_S:
            return
        self._last_beat_s = at_s
        self._send(Beat(self.name, os.getpid(), status, snapshot(registry, self._labels)))

    def requests(self) -> Iterator[StageRequest]:
        """The requests that have come; takes in stop and reload on the way."""
        while True:
            try:
                message = decode(self.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            match message:
                case StageRequest():
                    yield message
                case Stop():
                    self._stop_reason = "requested"
                case Reload():
                    self.reload_requested = True
                case Cancel():
                    self.cancelled = True
                case _:
                    log.error("%s: the supervisor sent an unexpected %r", self.name, message)

    def reply(self, request: StageRequest, result: Any) -> None:
        """Answer ``request`` with plain values."""
        self._send(Answer(self.name, request.request_id, result))

    def fail(self, request: StageRequest, code: str, message: str) -> None:
        """Refuse ``request``; ``code`` is one of those listed in ``docs/protocol.md``."""
        self._send(Refusal(self.name, request.request_id, code, message))

    def reloaded(self) -> None:
        """The settings have been read again."""
        self.reload_requested = False

    def fatal(self, message: str) -> None:
        """Say why this process exits, so that a daemon that is just starting can say it too."""
        self._send(Fatal(self.name, os.getpid(), message))

    def close(self) -> None:
        """Send what is queued (for at most half a second) and close."""
        self.socket.close()
        self._context.term()

    def _send(self, message: Beat | Answer | Refusal | Fatal) -> None:
        try:
            self.socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.warning("%s: the bus is full, a %s is lost", self.name, type(message).__name__)

    def _on_sigterm(self, _number: int, _frame: object) -> None:
        if not self._stop_reason:
            self._stop_reason = "signal"


def run_stage(name: str, body: Callable[[Stage, Path, Settings], None]) -> int:
    """The main of ``python -m ptycho_streamd.<name>``: runs ``body(stage, config, settings)``.

    With ``--detector`` the stage is that of a stored detector, and the settings are those for it;
    with ``--number`` it is one of several.

    Returns:
        The exit status: 0, or 1 after a fault that the log and the supervisor were told of.
    """
    parser = argparse.ArgumentParser(
        prog=f"ptycho_streamd.{name}", description="A stage of ptycho-streamd, which starts it."
    )
    parser.add_argument("--config", type=Path, required=True, help="the daemon's TOML file")
    parser.add_argument("--detector", default="", help="of [[more_detectors]], for its ingest")
    parser.add_argument("--number", default="", help="of a helper")
    options = parser.parse_args()
    config: Path = options.config
    detector: str = options.detector
    name = f"{name}-{options.number}" if options.number else stage_of_detector(name, detector)
    try:
        settings = load_settings(config).of_detector(detector)
        configure_logging(settings.log_level, name)
        with Stage(name, {"detector": detector} if detector else {}) as stage:
            try:
                body(stage, config, settings)
            except PtychoStreamError as error:
                stage.fatal(str(error))
                raise
    except PtychoStreamError as error:
        log.error("%s", error)
        return 1
    return 0


def stage_of_detector(stage: str, detector: str) -> str:
    """What the supervisor calls a stage of a stored detector; of the other one (empty): itself."""
    return f"{stage}-{detector}" if detector else stage


def end_with_parent() -> None:
    """Get SIGTERM when whoever started this process ends, even if it was killed (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
