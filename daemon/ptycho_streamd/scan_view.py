"""The view of a scan that is being written: files, background, monitor scale.

Beside the recorder: it begins with what the settings name, adds up dark frames, and takes the usual
reading of the beam monitor. A change is a new view in the scan's header, for which the reconstruct
stage makes its image anew, so there are few of them.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.files.view_files import DARK_FRAMES, view_of_settings
from ptycho_stream.geometry import View
from ptycho_stream.scans.dark_frames import (
    DarkFrames,
    dark_frames_of,
    is_dark_series,
    keep_dark_series,
)
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.join import Join
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.view_data import keep_view_data
from ptycho_stream.scans.writer import ScanWriter
from ptycho_stream.settings import ViewSettings

FIRST_READINGS: Final = 32
"""So many readings of the monitor give the first scale."""
_READING_SHIFT: Final = 0.02
"""At the scan's end the scale is corrected if the median of all readings differs by so much."""

log = logging.getLogger(__name__)


class ScanView:
    """The view of one open scan.

    Args:
        root: the data directory.
        writer: of the scan.
        join: of the scan, which knows the readings of the monitor.
        settings: of views.

    Attributes:
        readings: how many readings of the monitor have come.
    """

    def __init__(self, root: Path, writer: ScanWriter, join: Join, settings: ViewSettings) -> None:
        self._root, self._writer, self._join, self._settings = root, writer, join, settings
        header = writer.header
        self._directory = scan_directory(root, header.scan_id)
        self._dark_series = is_dark_series(header)
        wanted = self._dark_series or settings.background == DARK_FRAMES
        self._darks = DarkFrames(header) if wanted else None
        self.darks_due = False
        self.readings = 0

    def begin(self) -> None:
        """Look at a new scan as the settings say.

        Raises:
            StoreError: header or files cannot be written.
        """
        header = self._writer.header
        view = view_of_settings(header.view, self._settings, header, self._directory)
        if view != header.view:  # nobody has seen the first one yet
            self._writer.update_header(views=(view,))

    def resume(self) -> None:
        """Go on with a scan that was recovered: its dark frames and readings are in the store.

        Raises:
            StoreError: they cannot be read.
        """
        self.readings = len(self._join.readings())
        if self._darks is not None:
            with ScanReader(self._directory) as reader:
                self._darks = dark_frames_of(reader)
            if self._writer.header.view.background is not None:
                self._darks.used()
            self.darks_due = self._darks.due()

    def set(self, view: View) -> None:
        """Look at the frames that way from now on, if that is not how it is done already.

        Raises:
            StoreError: the header cannot be written.
        """
        views = self._writer.header.views
        if view != self._writer.header.view:
            self._writer.update_header(views=(*views, view))

    def change(self, settings: ViewSettings) -> bool:
        """Add a view if the settings now ask for another one; whether it did.

        Raises:
            StoreError: header or files cannot be written.
        """
        header, former = self._writer.header, self._settings
        self._settings = settings
        view = header.view
        wanted = replace(
            view,
            orientation=settings.orientation,
            dc=settings.dc,
            center_yx_px=settings.center_yx_px or view.center_yx_px,
            bad_value_from=settings.bad_value_from if header.bin_px == 1 else None,
            i0_reference=view.i0_reference if settings.use_i0 else None,
        )
        if _files(settings) != _files(former):  # else what was corrected by hand stays
            wanted = view_of_settings(wanted, settings, header, self._directory)
        if wanted == view:
            return False
        self.set(replace(wanted, version=view.version + 1))
        return True

    # ---- background ----------------------------------------------------------------------------

    def add_dark(self, pixels: NDArray[Any]) -> None:
        """Take the pixels (h, w) of a dark frame, as stored."""
        if self._darks is not None:
            self._darks.add(pixels[None])
            self.darks_due = self._darks.due()

    def use_darks(self) -> None:
        """Make the mean of the dark frames so far the background.

        Raises:
            StoreError: header or files cannot be written.
        """
        self.darks_due = False
        mean = None if self._darks is None else self._darks.mean
        if self._darks is None or mean is None:
            return
        self._darks.used()
        digest = keep_view_data(self._directory, mean)
        if self._settings.background == DARK_FRAMES and not self._dark_series:
            view = self._writer.header.view
            if view.background != digest:
                self.set(view.next(background=digest))
                log.info(
                    "scan %s: the mean of %d dark frames is its background",
                    self._writer.scan_id,
                    self._darks.count,
                )

    # ---- beam monitor --------------------------------------------------------------------------

    @property
    def reference_due(self) -> bool:
        """Whether enough readings of the monitor have come for the first scale."""
        enough = self.readings >= FIRST_READINGS and self._settings.use_i0
        return enough and self._writer.header.view.i0_reference is None

    def use_readings(self) -> None:
        """Scale frames to the median of the readings so far.

        Raises:
            StoreError: the header cannot be written.
        """
        readings = self._join.readings()
        if not self._settings.use_i0 or not len(readings):
            return
        view, median = self._writer.header.view, float(np.median(readings))
        held = view.i0_reference
        if held is None or abs(held / median - 1) > _READING_SHIFT:
            self.set(view.next(i0_reference=median))

    def finish(self) -> None:
        """Use all dark frames and readings of the scan; keep a dark series for the scans after it.

        Raises:
            StoreError: header or files cannot be written.
        """
        self.use_readings()
        if self._darks is None:
            return
        if self._darks.due(finally_=True):
            self.use_darks()
        mean = self._darks.mean
        if self._dark_series and mean is not None and not self._writer.header.detector:
            keep_dark_series(self._root, self._writer.header, mean)
            log.info(
                "scan %s: the mean of its %d dark frames is the background of scans after it, "
                "where view.background = 'dark-frames'",
                self._writer.scan_id,
                self._darks.count,
            )


def _files(settings: ViewSettings) -> tuple[object, ...]:
    return (
        settings.bad_pixels_path,
        settings.flat_field_path,
        settings.background,
        settings.background_path,
        settings.bad_frames_path,
    )
