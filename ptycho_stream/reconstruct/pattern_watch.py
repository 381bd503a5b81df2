"""What the first frames of an open scan advise to set, found out once for each of its views.

Kept beside the scan's trust, which tells the suggestions with each image and has the centre of the
pattern corrected where ``trust.diagnosis`` is ``auto``.
"""

from __future__ import annotations

import logging

from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.generation import Generation
from ptycho_stream.reconstruct.pattern_advice import (
    PatternAdvice,
    center_of,
    chosen_frames,
    pattern_advice,
)
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.scans.header import ScanHeader

MAX_MASKED = 256
"""So many pixels at most are masked at once without a person."""

log = logging.getLogger(__name__)


class PatternWatch:
    """The advice for one scan.

    Args:
        image: of the scan.
    """

    def __init__(self, image: ScanImage) -> None:
        self._image = image
        self._view_version = 0
        self._advice = PatternAdvice()
        self._said: set[str] = set()

    @property
    def suggestions(self) -> tuple[str, ...]:
        """In words, with the settings to change."""
        return self._advice.suggestions

    @property
    def center_is_off(self) -> bool:
        """Whether another centre of the pattern is among them."""
        return self._advice.center_yx_px is not None

    def has_looked(self, view_version: int) -> bool:
        """Whether the frames of a view were looked at."""
        return self._view_version == view_version

    def look(self, generation: Generation) -> None:
        """Look at the frames, if there are enough of them and this view was not looked at yet.

        Args:
            generation: the present one, of the present view.

        Raises:
            StoreError: frames cannot be read.
        """
        image, version = self._image, generation.identity.view_version
        if self.has_looked(version):
            return
        frames, size = image.frames, image.reader.header.size_px
        chosen = chosen_frames(frames.position_yx_m, generation.identity.pixel_yx_m, size)
        if chosen is None:
            return
        view, probe = image.reader.header.view, Probe(generation.probe)
        self._advice = pattern_advice(image.reader, frames.slot[chosen], view, probe)
        self._view_version = version
        for suggestion in self._advice.suggestions:
            if suggestion not in self._said:
                self._said.add(suggestion)
                log.warning("scan %s: a suggestion: %s", image.reader.scan_id, suggestion)

    def mask_wanted(self, header: ScanHeader) -> list[list[int]] | None:
        """Stored pixels (y, x) that should be masked in the present view too; None: there are none.

        Where half the pattern is called bad something else is wrong: then none are.
        """
        bad, view = self._advice.stored_bad, header.view
        if not bad or view.version != self._view_version or len(bad) > MAX_MASKED:
            return None
        return [list(pixel) for pixel in bad]

    def center_wanted(self, header: ScanHeader) -> list[float] | None:
        """Where zero frequency should be in the present view; None: where it is."""
        center, view = self._advice.center_yx_px, header.view
        if center is None or view.version != self._view_version:
            return None
        shape = header.frame_shape_yx
        wanted = (round(center[0]), round(center[1]))
        for tried in header.views:
            same = (tried.orientation, tried.dc) == (view.orientation, view.dc)
            if same and center_of(tried, shape) == wanted:
                return None
        return list(center)
