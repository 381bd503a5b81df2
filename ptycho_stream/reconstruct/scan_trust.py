"""How far the image of an open scan can be trusted: looked at bit by bit, told with each image.

Paces the library's :class:`~ptycho_stream.reconstruct.trust_watch.TrustWatch` beside the network
and refinement, and keeps the scan's history. Used by the reconstruct stage, and where a recorded
scan is reconstructed.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ptycho_stream.errors import ModelError
from ptycho_stream.geometry import Orientation
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.allowance import Allowance
from ptycho_stream.reconstruct.diagnosis import Finding
from ptycho_stream.reconstruct.generation import Generation
from ptycho_stream.reconstruct.history import HistoryEntry, append_history
from ptycho_stream.reconstruct.layouts import composed
from ptycho_stream.reconstruct.pattern_watch import PatternWatch
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.reconstruct.trust_watch import Shown, TrustReport, TrustWatch
from ptycho_stream.results import ImageState
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.settings import TrustSettings
from ptycho_stream.verdicts import HARMLESS

LOOK_S = 0.05
"""A look takes about so long, which is the longest that a batch waits for it."""

VIEW_WAIT_S = 5.0
"""So long a scan that is over is kept open for the view that it should have."""

log = logging.getLogger(__name__)


class ScanTrust:
    """Trust in one scan's image.

    Args:
        image: of the scan.
        settings: of trust.
        positions_move: refinement corrects positions.
        mask_pixels: pixels that count far too much or nothing are masked by itself.
        device: where to compute.

    Attributes:
        report: the newest that subscribers may see; None before there is one.
    """

    def __init__(
        self,
        image: ScanImage,
        settings: TrustSettings,
        device: torch.device,
        *,
        positions_move: bool,
        mask_pixels: bool = False,
    ) -> None:
        self._image, self._settings, self._device = image, settings, device
        self._positions_move, self._mask_pixels = positions_move, mask_pixels
        self._watch: TrustWatch | None = None
        self._pattern = PatternWatch(image)
        self._generation = 0
        self._told = self._shown = 0
        self._look_at_s = 0.0
        self._report_at_s = 0.0
        self._view_time = Allowance(VIEW_WAIT_S)
        self.report: TrustReport | None = None

    def _has_work(self, *, hurried: bool) -> bool:
        """Whether a look would tell more of the image; ``hurried``: nothing comes before it."""
        generation, refined = self._image.current, self._image.refined
        if generation is None or not self._usable(generation):
            return False
        behind = self._generation != generation.number or self._told < len(self._image.frames)
        if refined is not None:
            behind |= self._shown < refined.shown or (hurried and refined.unshown)
        return behind or self._watch is None or self._watch.has_work

    def due(self, *, hurried: bool) -> bool:
        """Whether it is time for a look; ``hurried``: nothing else is left to be done."""
        in_time = hurried or time.monotonic() >= self._look_at_s
        return in_time and self._has_work(hurried=hurried)

    def look(self, state: ImageState) -> bool:
        """Look for about ``LOOK_S`` at the image as it is published.

        Returns:
            Whether there is a new report to be published.

        Raises:
            StoreError: frames, or the history, cannot be read or written.
            ModelError: the device refuses, for want of memory for example.
        """
        began_s = time.monotonic()
        generation, refined = self._image.current, self._image.refined
        assert generation is not None
        self._shown = 0 if refined is None else refined.shown
        watch = self._brought_up_to_date(generation)
        if self._settings.diagnosis != "off":
            self._pattern.look(generation)
        probe, canvas = Probe(state.probe), generation.canvas
        shown = Shown(state.tiles, probe, canvas, state.layer, state.sweeps)
        try:
            report = watch.look(shown, LOOK_S)
        except RuntimeError as error:  # torch's own, out of memory among them
            raise ModelError(
                f"{self._device} cannot simulate frames: {str(error).splitlines()[0]}"
            ) from error
        ended_s = time.monotonic()
        share = self._settings.share
        self._look_at_s = ended_s + (ended_s - began_s) * (1 - share) / share
        if ended_s < self._report_at_s and not (state.final or not watch.has_work):
            return False
        self._report_at_s = ended_s + self._settings.interval_s
        self._note(report)
        append_history(self._image.reader.directory, _entry(self.told(state)))
        return True

    @property
    def awaits_view(self) -> bool:
        """Whether another view of the scan should come any moment."""
        wanted = self.view_wanted is not None
        return self._view_time.left(running=wanted) and wanted

    @property
    def looks_first(self) -> bool:
        """Whether the pattern is to be looked at before the probe is another one.

        A refined probe makes up for a wrong centre, so that it would not be found any more.
        """
        version = self._image.reader.header.view.version
        to_look = self._settings.diagnosis != "off" and not self._pattern.has_looked(version)
        return to_look or self.view_wanted is not None

    @property
    def suggestions(self) -> tuple[str, ...]:
        """What to set differently for the next scan, in words."""
        current = self._image.current
        finding = "" if current is None else current.identity.probe_finding
        if not finding or self._pattern.center_is_off:  # which the fitted probe makes up for
            return self._pattern.suggestions
        return (*self._pattern.suggestions, finding)

    @property
    def view_wanted(self) -> dict[str, Any] | None:
        """Orientation, centre and masked pixels of frames, if they are to be corrected by itself.

        Each is None where it is as it should be.
        """
        header, generation = self._image.reader.header, self._image.current
        if self.report is None or generation is None:
            return None
        # What was found is of the view that the image had then; it is not to be undone again.
        if generation.number != self._generation:
            return None
        if generation.identity.view_version != header.view.version:
            return None
        orientation = center_yx_px = None
        if self._settings.diagnosis == "auto":
            orientation = self._orientation_wanted(header, self.report.finding)
            center_yx_px = self._pattern.center_wanted(header)
        bad_pixels_yx = self._pattern.mask_wanted(header) if self._mask_pixels else None
        if orientation is None and center_yx_px is None and bad_pixels_yx is None:
            return None
        return {
            "scan_id": header.scan_id,
            "view_version": header.view.version,
            "orientation": orientation,
            "center_yx_px": center_yx_px,
            "bad_pixels_yx": bad_pixels_yx,
        }

    def _orientation_wanted(
        self, header: ScanHeader, finding: Finding | None
    ) -> Orientation | None:
        if finding is None or finding.best is None:
            return None
        layouts = (finding.best.layout, *finding.best.equivalent)
        # Positions are as the stage says; only the detector can be looked at another way.
        turn: Orientation | None = next(
            (one.detector for one in layouts if one.positions == "identity"), None
        )
        if finding.fits_as_set or turn is None:
            return None
        orientation = composed(header.view.orientation, turn)
        tried = orientation in (view.orientation for view in header.views)
        return None if tried else orientation

    def told(self, state: ImageState) -> ImageState:
        """An image with what is known of it, if it is of the generation that was looked at."""
        if self.report is None or state.generation != self._generation:
            return state
        report, reasons = self.report, (*self.report.reasons, *self.suggestions)
        misfit = {} if self._watch is None else self._watch.misfit_tiles()
        return replace(
            state, trust=report.figures, verdict=report.verdict, reasons=reasons, misfit=misfit
        )

    def _usable(self, generation: Generation) -> bool:
        if not len(self._image.frames):
            return False
        # While another view is on its way the frames are no longer read as the image has them.
        return generation.identity.view_version == self._image.reader.header.view.version

    def _brought_up_to_date(self, generation: Generation) -> TrustWatch:
        """The watch over the present generation, that knows all frames in the image."""
        image = self._image
        if self._watch is None or self._generation != generation.number:
            scan = image.viewed
            self.close()
            self._watch = TrustWatch(
                scan.counts,
                generation.identity.pixel_yx_m,
                generation.identity.tile_px,
                valid=scan.valid,
                device=self._device,
                predictor=None if self._settings.diagnosis == "off" else image.predictor,
            )
            self._generation, self._told, self.report = generation.number, 0, None
        frames, new = image.frames, slice(self._told, None)
        self._watch.add(frames.slot[new], frames.number[new], frames.position_yx_m[new])
        self._told = len(frames)
        refined = image.refined
        if self._positions_move and refined is not None:
            slots, position_px = refined.position_yx_px
            known = np.isin(slots, frames.slot)
            pixel = np.asarray(generation.identity.pixel_yx_m)
            self._watch.move(slots[known], position_px[known] * pixel)
        return self._watch

    def close(self) -> None:
        """Let go of the images that are being looked at."""
        if self._watch is not None:
            self._watch.close()

    def _note(self, report: TrustReport) -> None:
        """Say in the log when the verdict changes."""
        was = "" if self.report is None else self.report.verdict
        self.report = report
        if report.verdict != was:
            level = logging.INFO if report.verdict in HARMLESS else logging.WARNING
            scan_id = self._image.reader.scan_id
            log.log(level, "scan %s: %s: %s", scan_id, report.verdict, "; ".join(report.reasons))


def _entry(state: ImageState) -> HistoryEntry:
    return HistoryEntry(
        time_ns=time.time_ns(),
        generation=state.generation,
        frames=state.frame_numbers.size,
        layer=state.layer,
        sweeps=state.sweeps,
        model=state.model,
        figures=state.trust,
        verdict=state.verdict,
        reasons=state.reasons,
    )
