"""When a live scan's image keeps fitting its frames badly, fine-tune the network on them.

The reconstruct stage measures the misfit (``training.automatic_above`` set), the supervisor looks
here at what it says and queues the job, at most one for a scan.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ptycho_stream.errors import PtychoStreamError
from ptycho_stream.settings import TrainingSettings
from ptycho_streamd.jobs import Jobs

LOOKS = 3
"""So many measurements in a row must lie above the threshold."""

log = logging.getLogger(__name__)


class MisfitTrigger:
    """Watches the misfit of the newest scan, and has ``jobs`` fine-tune on it."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._scan_id = ""
        self._look = 0
        self._above = 0

    def look(self, status: Mapping[str, Any], settings: TrainingSettings) -> None:
        """Take the reconstruct stage's status; a measurement that was seen before counts once."""
        misfit = status.get("misfit")
        limit = settings.automatic_above
        if misfit is None or limit is None:
            return
        if misfit["scan_id"] != self._scan_id:
            self._scan_id, self._above = misfit["scan_id"], 0
        elif misfit["look"] == self._look:
            return
        self._look = misfit["look"]
        self._above = self._above + 1 if misfit["excess"] > limit else 0
        if self._above >= LOOKS and not self._jobs.busy and not self._jobs.triggered(self._scan_id):
            self._queue(misfit["excess"], settings)

    def _queue(self, excess: float, settings: TrainingSettings) -> None:
        log.warning(
            "scan %s: its misfit stays above training.automatic_above (%.4g > %.4g): fine-tuning",
            self._scan_id,
            excess,
            settings.automatic_above,
        )
        arguments = {"scan_ids": (self._scan_id,), "minutes": settings.automatic_minutes}
        try:
            self._jobs.submit("finetune", arguments, automatic=True)
        except PtychoStreamError as error:
            self._above = 0  # not at every measurement: after as many again
            log.error("scan %s cannot be fine-tuned on: %s", self._scan_id, error)
