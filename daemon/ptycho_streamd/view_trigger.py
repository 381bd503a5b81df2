"""Corrects a detector turned the wrong way or off its centre, and masks pixels that lie.

If ``trust.diagnosis`` and ``view.hot_pixels`` are ``auto``.

The reconstruct stage finds out and says so in its status; the supervisor looks here, and has ingest
give the scan another view, which opens a new generation of its image.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ptycho_streamd.requests import SET_VIEW, Requests

log = logging.getLogger(__name__)


class ViewTrigger:
    """Orders a scan's view to be changed, at most once for each view that it has had."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._ordered: tuple[str, int] = ("", 0)

    def look(self, status: Mapping[str, Any]) -> None:
        """Take the reconstruct stage's status."""
        wanted = status.get("view_wanted")
        if wanted is None or self._ordered == (wanted["scan_id"], wanted["view_version"]):
            return
        arguments = {
            "scan_id": wanted["scan_id"],
            "orientation": wanted["orientation"],
            "center_yx_px": wanted["center_yx_px"],
            "dc": None,
            "bad_pixels_yx": wanted["bad_pixels_yx"],
        }
        if self._requests.order(SET_VIEW, arguments):
            self._ordered = (wanted["scan_id"], wanted["view_version"])
            log.warning("scan %s: %s", wanted["scan_id"], _words(wanted))


def _words(wanted: Mapping[str, Any]) -> str:
    said: list[str] = []
    if wanted["orientation"] is not None:
        said.append(
            f"its detector is the wrong way round; orientation becomes {wanted['orientation']}"
        )
    if wanted["center_yx_px"] is not None:
        said.append(f"its pattern is off centre; center_yx_px becomes {wanted['center_yx_px']}")
    if wanted["bad_pixels_yx"] is not None:
        pixels = ", ".join(str(tuple(pixel)) for pixel in wanted["bad_pixels_yx"][:5])
        said.append(
            f"{len(wanted['bad_pixels_yx'])} of its stored pixels lie and are masked: {pixels}"
        )
    return "; ".join(said)
