"""A stage that always runs: started again with back-off when it ends.

Used by the supervisor only, which calls :meth:`Child.check` every turn of its loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from ptycho_stream.settings import SupervisorSettings
from ptycho_streamd.bus import Bus
from ptycho_streamd.process import StageProcess

FIRST_BACKOFF_S = 0.1
SHORT_PAUSES = 3
"""The first so many pauses in a row are short; each further one is twice the one before."""
STEADY_AFTER_S = 5.0
"""A stage that lived this long failed by accident, and none that came before it counts."""
_MOST_DOUBLINGS = 30

log = logging.getLogger(__name__)


class Child(StageProcess):
    """A stage of the daemon.

    Args:
        name: of the stage.
        config: see :class:`StageProcess`, as bus and inherited_fd.
        environment: variables beside the daemon's own.
        module: that it runs; None: the one of its name.
        arguments: words for it beside the usual ones.

    Attributes:
        restarts: how often it was started again.
    """

    def __init__(
        self,
        name: str,
        config: Path,
        bus: Bus,
        *,
        environment: Mapping[str, str],
        inherited_fd: int,
        module: str | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name, config, bus, inherited_fd, module)
        self.restarts = 0
        self._arguments = arguments
        self._environment = dict(environment)
        self._ends_in_a_row = 0
        self._start_at_s = float("-inf")

    def begin(self) -> None:
        """Start it for the first time."""
        self.start(self._environment, self._arguments)

    def check(self, settings: SupervisorSettings) -> bool:
        """Notice that it ended, kill it if it is silent, start it again when its time has come.

        Returns:
            Whether it has ended since the last call.
        """
        pid = self.pid
        if pid is None:
            if time.monotonic() >= self._start_at_s:
                self.restarts += 1
                self.start(self._environment, self._arguments)
            return False
        status = self.reap(settings)
        if status is None:
            return False
        if self.age_s >= STEADY_AFTER_S:
            self._ends_in_a_row = 0
        doublings = min(max(self._ends_in_a_row - SHORT_PAUSES + 1, 0), _MOST_DOUBLINGS)
        backoff_s = min(FIRST_BACKOFF_S * 2**doublings, settings.max_backoff_s)
        self._ends_in_a_row += 1
        log.error(
            "stage %s (pid %d) ended with status %s; it is started again in %.1f s",
            self.name,
            pid,
            status,
            backoff_s,
        )
        self._start_at_s = time.monotonic() + backoff_s
        return True
