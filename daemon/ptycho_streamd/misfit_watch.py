"""The live misfit, measured now and then, for the supervisor's decision to fine-tune.

Used by the reconstruct stage, which tells it in its status (:mod:`ptycho_streamd.misfit_trigger`).
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from ptycho_stream.errors import ModelError, StoreError
from ptycho_stream.reconstruct.live_misfit import live_misfit
from ptycho_stream.reconstruct.scan_image import ScanImage

INTERVAL_S = 3.0
SHARE = 0.1
"""Of the stage's time, which the looks at large frames take at most."""

log = logging.getLogger(__name__)


class MisfitWatch:
    """Looks at one image after the other.

    Attributes:
        newest: scan, number of the look, frames compared and their excess R; None before the first.
    """

    def __init__(self) -> None:
        self.newest: dict[str, Any] | None = None
        self._looks = 0
        self._next_s = float("-inf")

    def look(self, image: ScanImage, device: torch.device) -> float | None:
        """The excess R of the image's newest frames, if it is time to measure it and it can be."""
        began_s = time.monotonic()
        if began_s < self._next_s:
            return None
        scan_id = image.reader.scan_id
        try:
            misfit = live_misfit(image, device)
        except (ModelError, StoreError) as error:
            log.warning("scan %s: its misfit cannot be measured: %s", scan_id, error)
            return None
        finally:
            ended_s = time.monotonic()
            self._next_s = ended_s + max(INTERVAL_S, (ended_s - began_s) / SHARE)
        if misfit is None or not misfit.frames:
            return None
        self._looks += 1
        self.newest = {
            "scan_id": scan_id,
            "look": self._looks,
            "frames": misfit.frames,
            "excess": misfit.excess,
        }
        return misfit.excess
