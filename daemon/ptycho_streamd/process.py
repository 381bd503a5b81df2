"""A stage as a process: started fresh, heard on the bus, asked to stop, killed if silent.

The supervisor's children are such processes, with restarts
(:class:`ptycho_streamd.child.Child`) or for one job only (:class:`ptycho_streamd.jobs.Jobs`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptycho_stream.settings import SupervisorSettings
from ptycho_streamd.bus import BUS_VARIABLE, SUPERVISOR_VARIABLE, Beat, Bus, Fatal, Stop, ToStage

START_TIMEOUT_S = 120.0
"""From start to the first heartbeat: importing torch from a cold disk takes long."""

log = logging.getLogger(__name__)


class StageProcess:
    """The stage ``name``, run as ``python -m ptycho_streamd.<module> --config FILE ...``.

    Args:
        name: of the stage.
        config: the settings that the daemon goes by, as a file.
        bus: on which the stage is heard.
        inherited_fd: the lock on the data directory, which ends with the last process.
        module: that it runs; None: the one of its name.

    Attributes:
        status: what it last said of itself; empty when it does not run.
        last_words: the fault that it exited with, or "".
    """

    def __init__(
        self, name: str, config: Path, bus: Bus, inherited_fd: int, module: str | None = None
    ) -> None:
        self.name = name
        self._module = module or name
        self.status: dict[str, Any] = {}
        self.last_words = ""
        self._config = config
        self._bus = bus
        self._inherited_fd = inherited_fd
        self._process: subprocess.Popen[bytes] | None = None
        self._last_pid = 0
        self._started_s = 0.0
        self._last_beat_s: float | None = None

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

    @property
    def age_s(self) -> float:
        """Since the newest start."""
        return time.monotonic() - self._started_s

    def start(self, environment: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
        """Start the process, with these variables and words beside the usual ones.

        It is a session of its own, so that a Ctrl-C in the supervisor's terminal does not reach it
        before the supervisor's orderly stop does.
        """
        command = [sys.executable, "-m", f"ptycho_streamd.{self._module}"]
        self._process = subprocess.Popen(
            [*command, "--config", str(self._config), *arguments],
            env={
                **os.environ,
                **environment,
                BUS_VARIABLE: self._bus.endpoint,
                SUPERVISOR_VARIABLE: str(os.getpid()),
            },
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

    def send(self, message: ToStage) -> None:
        """Send to it, if it runs."""
        if self._process is not None:
            self._bus.send(self.name, self._process.pid, message)

    def reap(self, settings: SupervisorSettings) -> int | None:
        """Exit status of a process that has ended since the last call, else None.

        A process that was silent for too long is killed.
        """
        if self._process is None:
            return None
        status = self._process.poll()
        if status is None:
            self._kill_if_silent(settings)
        else:
            self._gone()
        return status

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()

    def ask_to_stop(self) -> None:
        """Tell it that the daemon stops for good; by signal if it has not come to the bus yet."""
        if self._process is None or self._process.poll() is not None:
            return
        if self._last_beat_s is None:
            self._process.send_signal(signal.SIGTERM)
        else:
            self.send(Stop())

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

    def _kill_if_silent(self, settings: SupervisorSettings) -> None:
        assert self._process is not None
        if self._last_beat_s is None:
            silent = self.age_s > START_TIMEOUT_S
        else:
            silent = time.monotonic() - self._last_beat_s > settings.heartbeat_timeout_s
        if silent:
            log.error("stage %s (pid %d) is silent: killed", self.name, self._process.pid)
            self._process.kill()

    def _gone(self) -> None:
        # What it had started itself (other ranks of a training) ends with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._last_pid, signal.SIGKILL)
        self._process = None
        self._last_beat_s = None
        self.status = {}
