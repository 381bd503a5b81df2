"""A stored detector's scans and those of the reconstructed one: who belongs to whom, in the store.

Used by the ingest of a stored detector, a process of its own, which meets the other's scans in the
store only.  A scan that is open may still get a nearer partner; at its end it is settled.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ptycho_stream.errors import StoreError
from ptycho_stream.scans.beside import scan_beside
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.scan_events import SealScan
from ptycho_stream.settings import StoredDetector
from ptycho_streamd.recorder import Recorder

ALONE = "no scan of the reconstructed detector was armed near it"

log = logging.getLogger(__name__)


class Companion:
    """Links scans of ``detector`` to those of the reconstructed one under ``root``."""

    def __init__(self, root: Path, detector: StoredDetector) -> None:
        self._catalogue = Catalogue(root)
        self._detector = detector

    def look(self, recorders: Mapping[str, Recorder]) -> None:
        """Link the scans that are open, if something in the store has changed."""
        if not self._catalogue.changed():
            return
        for recorder in recorders.values():
            self._link(recorder)

    def settle(self, sealing: SealScan, recorder: Recorder) -> SealScan:
        """Link a scan for good; how it is to be sealed."""
        if self._link(recorder) is None and sealing.state == "complete":
            return replace(sealing, state="unmatched", reason=ALONE)
        return sealing

    def _link(self, recorder: Recorder) -> str | None:
        """Note the scan that this one belongs to, and tell it, also where noting it failed."""
        header = recorder.header
        found = scan_beside(header, self._catalogue.scans(), self._detector)
        if found == header.beside:
            return found
        try:
            recorder.writer.update_header(beside=found)
        except StoreError as error:
            log.error("scan %s is not noted to be beside %s: %s", header.scan_id, found, error)
        else:
            log.info("scan %s is beside scan %s", header.scan_id, found)
        return found
