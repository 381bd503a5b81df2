"""One stage as a child process: started fresh, watched by heartbeats, restarted with back-off.

Used by the supervisor only, which calls :meth:`Child.check` every turn of its loop.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptycho_stream.settings import SupervisorSettings
from ptycho_streamd.bus import BUS_VARIABLE, SUPERVISOR_VARIABLE, Beat, Bus, Fatal, Stop

START_TIMEOUT_S = 120.0
"""From start to the first heartbeat: importing torch from a cold disk takes long."""
FIRST_BACKOFF_S = 0.1
STEADY_AFTER_S = 30.0
"""A stage that lived this long failed by accident: its back-off starts again."""

log = logging.getLogger(__name__)


class Child:
    """The stage ``name``, run as ``python -m ptycho_streamd.<name> --config FILE``.

    Attributes:
        restarts: how often it was started again.
        status: what it last said of itself; empty when it does not run.
        last_words: the fault that it exited with, or "".
    """

    def __init__(
        self,
        name: str,
        config: Path,
        bus: Bus,
        *,
        environment: Mapping[str, str],
        inherited_fd: int,
    ) -> None:
        self.name = name
        self.restarts = 0
        self.status: dict[str, Any] = {}
        self.last_words = ""
        self._config = config
        self._bus = bus
        self._environment = dict(environment)
        self._inherited_fd = inherited_fd
        self._process: subprocess.Popen[bytes] | None = None
        self._last_pid = 0
        self._started_s = 0.0
        self._last_beat_s: float | None = None
        self._backoff_s = FIRST_BACKOFF_S
        self._start_at_s = float("-inf")

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process else None

    @property
    def beating(self) -> bool:
        """It runs and has been heard of."""
        return self._process is not None and self._last_beat_s is not None

    @property
    def last_beat_age_s(self) -> float | None:
        """Since the last heartbeat; None before the first."""
        return None if self._last_beat_s is None else time.monotonic() - self._last_beat_s

    def start(self) -> None:
        """Start the process.

        It is a session of its own, so that a Ctrl-C in the supervisor's terminal does not reach it
        before the supervisor's orderly stop does.
        """
        environment = {
            **os.environ,
            **self._environment,
            BUS_VARIABLE: self._bus.endpoint,
            SUPERVISOR_VARIABLE: str(os.getpid()),
        }
        command = [sys.executable, "-m", f"ptycho_streamd.{self.name}"]
        self._process = subprocess.Popen(
            [*command, "--config", str(self._config)],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(self._inherited_fd,),
            start_new_session=True,
        )
        self._last_pid = self._process.pid
        self._started_s = time.monotonic()
        self._last_beat_s = None
        self.last_words = ""

    def heard(self, beat: Beat) -> bool:
        """Take a heartbeat; False if it comes from an incarnation that is gone."""
        if beat.pid != self.pid:
            return False
        self._last_beat_s = time.monotonic()
        self.status = beat.status
        return True

    def failed(self, fatal: Fatal) -> None:
        """Keep the last words of the newest incarnation, which may have been reaped meanwhile."""
        if fatal.pid == self._last_pid:
            self.last_words = fatal.message

    def check(self, settings: SupervisorSettings) -> bool:
        """Notice that it ended, kill it if it is silent, start it again when its time has come.

        Returns:
            Whether it has ended since the last call.
        """
        now_s = time.monotonic()
        if self._process is None:
            if now_s >= self._start_at_s:
                self.restarts += 1
                self.start()
            return False
        if self._process.poll() is None:
            self._kill_if_silent(settings, now_s)
            return False
        if now_s - self._started_s >= STEADY_AFTER_S:
            self._backoff_s = FIRST_BACKOFF_S
        log.error(
            "stage %s (pid %d) ended with status %s; it is started again in %.1f s",
            self.name,
            self._process.pid,
            self._process.returncode,
            self._backoff_s,
        )
        self._start_at_s = now_s + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, settings.max_backoff_s)
        self._gone()
        return True

    def ask_to_stop(self) -> None:
        """Tell it that the daemon stops for good; by signal if it has not come to the bus yet."""
        if self._process is None or self._process.poll() is not None:
            return
        if self._last_beat_s is None:
            self._process.send_signal(signal.SIGTERM)
        else:
            self._bus.send(self.name, self._process.pid, Stop())

    def wait_until(self, deadline_s: float) -> None:
        """Wait for its end until ``time.monotonic()`` is ``deadline_s``, then kill it."""
        if self._process is None:
            return
        try:
            self._process.wait(max(deadline_s - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            log.error("stage %s did not stop in time: killed", self.name)
            self._process.kill()
            self._process.wait()
        self._gone()

    def _kill_if_silent(self, settings: SupervisorSettings, now_s: float) -> None:
        assert self._process is not None
        if self._last_beat_s is None:
            silent = now_s - self._started_s > START_TIMEOUT_S
        else:
            silent = now_s - self._last_beat_s > settings.heartbeat_timeout_s
        if silent:
            log.error("stage %s (pid %d) is silent: killed", self.name, self._process.pid)
            self._process.kill()

    def _gone(self) -> None:
        self._process = None
        self._last_beat_s = None
        self.status = {}
