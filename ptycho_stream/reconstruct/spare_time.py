"""What is done with the images of open scans in the time that the network leaves them.

Refinement and the look at how far an image can be trusted, in slices so short that no batch waits
long. Used by the loop of the reconstruct stage, and where a recorded scan is reconstructed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from ptycho_stream.errors import ModelError, PtychoStreamError, StoreError
from ptycho_stream.reconstruct.open_scan import OpenScan
from ptycho_stream.reconstruct.refined_layer import RefinedLayer
from ptycho_stream.reconstruct.trust_watch import TrustReport

SLICE_S = 0.02
"""Of refinement."""
OWED_SLICE_S = 0.1
"""The same, where the network cannot keep up and a batch follows at once."""
MAX_OWED_S = 5.0
"""Of refinement after a batch, where the network cannot keep up."""
LACKING_S = 0.25
"""Refinement may lack so much of its share, where the network keeps up, before a batch waits."""
ENOUGH_SWEEPS = 6.0
"""Visits of a frame on average, beyond which refinement no longer holds up the network: on the
siemens star more change little, and the final image waits for the network."""

log = logging.getLogger(__name__)


class Tally(Protocol):
    """Who counts what was done, and what went wrong."""

    def refined(self, visits: int) -> None:
        """Frames were visited by refinement so many times."""

    def shown(self, sweeps: float) -> None:
        """A newly refined image may be seen; ``sweeps``: visits of a frame on average."""

    def judged(self, report: TrustReport) -> None:
        """This is what is known of an image now."""

    def refinement_failed(self) -> None:
        """A scan is not refined any more."""

    def judgement_failed(self) -> None:
        """A scan's image is not judged any more."""


class SpareTime:
    """Gives each scan's refinement and trust their share, the newest scan first."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._owed_s: float | None = None
        self._lacking_s = 0.0

    def owe(self, batch_s: float, share: float, *, late: bool) -> None:
        """A batch took ``batch_s``: ``share`` of the time is for refinement.

        It has it at once if the network is ``late``, so that others wait; else in the pauses
        between batches, and at once only where there are no such pauses.
        """
        own_s = min(batch_s * share / (1 - share), MAX_OWED_S)
        if not late:
            self._lacking_s = min(self._lacking_s + own_s, MAX_OWED_S)
        if late or self._lacking_s > LACKING_S:
            self._owed_s = own_s

    @property
    def owes(self) -> bool:
        """Whether the next batch has to wait for refinement's share."""
        return bool(self._owed_s)

    def use(self, scans: Mapping[str, OpenScan], *, between_batches: bool) -> bool:
        """Do a slice of what is wanted; whether there was anything.

        Between two batches that follow on each other only what is owed.
        """
        if between_batches and self._owed_s is None:
            return False
        owed_s, self._owed_s = self._owed_s, None
        # Of nothing owed, where the settings give refinement no share, nothing is taken.
        refined = None
        if owed_s != 0:
            refined = _newest(
                scans, lambda s: s.refining and (owed_s is None or s.image.sweeps < ENOUGH_SWEEPS)
            )
        if refined is not None:
            started_s = time.monotonic()
            self._refine(refined, max(min(owed_s or 0.0, OWED_SLICE_S), SLICE_S))
            took_s = time.monotonic() - started_s
            self._lacking_s = max(self._lacking_s - took_s, 0.0)
            left_s = (owed_s or 0.0) - took_s
            self._owed_s = left_s if left_s > 0 else None
        elif owed_s != 0:
            self._lacking_s = 0.0  # nobody wants it
        judged = _newest(scans, lambda scan: scan.judging)
        if judged is not None:
            self._judge(judged)
        return refined is not None or judged is not None

    def _refine(self, scan: OpenScan, budget_s: float) -> None:
        try:
            visits = scan.image.refine(budget_s, may_renew=scan.may_renew)
        except PtychoStreamError as error:
            log.error("scan %s is not refined any more: %s", scan.reader.scan_id, error)
            self._tally.refinement_failed()
            return
        self._tally.refined(visits)
        layer = scan.image.refined
        if layer is not None and layer.show_due:
            self._show(scan, layer)

    def _show(self, scan: OpenScan, layer: RefinedLayer) -> None:
        layer.show()
        self._tally.shown(layer.shown_sweeps)
        scan.changed = scan.unsaved = True

    def _judge(self, scan: OpenScan) -> None:
        trust, layer = scan.trust, scan.image.refined
        assert trust is not None
        if layer is not None and layer.unshown and not scan.refining:
            self._show(scan, layer)  # the last sweeps: what is judged then is the final image
        try:
            if trust.look(scan.state(final=False)) and trust.report is not None:
                scan.changed = True
                self._tally.judged(trust.report)
        except (ModelError, StoreError) as error:
            log.error("scan %s is not judged any more: %s", scan.reader.scan_id, error)
            self._tally.judgement_failed()
            trust.close()
            scan.trust = None


def _newest(scans: Mapping[str, OpenScan], wanted: Callable[[OpenScan], bool]) -> OpenScan | None:
    newest_first = (scans[scan_id] for scan_id in sorted(scans, reverse=True))
    return next((scan for scan in newest_first if not scan.parked and wanted(scan)), None)
