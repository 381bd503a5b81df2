"""When a scan is predicted again with the probe that refinement has made of it meanwhile.

Where the network does not know the beam its image is of no use, and the probe refined with a few
dozen frames is (docs/decisions/0024). Rules only, for :class:`~.scan_image.ScanImage`, which makes
the generation and lets it take over.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.generation import Generation
from ptycho_stream.reconstruct.live_misfit import MAX_START_EXCESS, newest_misfit
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.refined_layer import RefinedLayer
from ptycho_stream.scans.viewed_scan import ViewedScan
from ptycho_stream.settings import RefinementSettings

_log = logging.getLogger(__name__)

_POOR_EXCESS = 0.15
"""The network's image with the probe of the scan's start must be so bad: on the siemens star with
the file's guess it is 0.27, and 0.03 with the refined one. Where few frames are there yet it may be
0.11 with a true probe."""
_CLEARLY = 0.5
"""With a refined probe it must be this share of that, or the refined one is not used."""
_FRAMES, _SWEEPS = 32, 3.0
"""So many frames, visited so often on average, have made a better probe."""
_GROWTH, _LAST = 1.4, 256
"""Again when there are so many times as many frames, but not after so many: it is good by then."""
_GROWTH_AFTER_FAILURE = 2
_SHARE = 4
"""It takes over with every so manieth frame, and the others follow."""
_SECONDS = 5.0
"""Of refinement after the scan: with less the image may end less refined than it was before."""
_MOST_FRAMES = 1024
"""Of more frames the prediction is not made again: it would take too long."""


@dataclass(frozen=True, slots=True)
class RenewedProbe:
    """A probe as it was after refinement with ``frames`` frames."""

    probe: Probe
    frames: int


def is_due(
    refined: RefinedLayer,
    generation: Generation,
    recipe: Recipe,
    settings: RefinementSettings,
    failed_frames: int,
) -> bool:
    """Whether the network should predict the scan again with the probe as it is refined now.

    Args:
        refined: layer of the generation.
        generation: what subscribers see.
        recipe: whose network it is.
        settings: of the refinement.
        failed_frames: a probe refined with so many was no better; 0: none was.
    """
    frames, before = len(refined.pairs), generation.identity.probe_frames
    wanted = settings.probe and not settings.positions and settings.seconds >= _SECONDS
    poor = before > 0 or refined.network_excess > _POOR_EXCESS
    if not wanted or not recipe.network.uses_probe or not poor:
        return False
    if refined.sweeps < _SWEEPS or before >= _LAST:
        return False
    least = max(_FRAMES, _GROWTH * before, _GROWTH_AFTER_FAILURE * failed_frames)
    return least <= frames <= _MOST_FRAMES


def explains_more(
    scan: ViewedScan, renewal: Generation, current: Generation, seen: int, recipe: Recipe
) -> bool | None:
    """Whether a generation with a refined probe should be seen instead of the current one.

    The first one must explain the frames much better; after that it is enough that refinement may
    begin from it.

    Args:
        scan: as its frames are looked at.
        renewal: the generation.
        current: what subscribers see.
        seen: so many pairs are in that.
        recipe: whose network it is.

    Returns:
        None where it does not cover enough of the scan yet.

    Raises:
        ModelError: the device refuses, for want of memory for example.
        StoreError: the frames cannot be read.
    """
    covers = renewal.ledger.taken >= seen
    # Groups go through the scan from its start, and cover it only in the end.
    if renewal.ledger.taken < seen / (_SHARE if recipe.network.group_frames == 1 else 1):
        return None
    made = _excess(scan, renewal, recipe.device)
    before = _excess(scan, current, recipe.device)
    again = current.identity.probe_frames > 0
    if made <= (max(before, MAX_START_EXCESS) if again else _CLEARLY * before) < math.inf:
        return True
    if not covers:
        return None
    _log.warning(
        "scan %s: the refined probe does not explain the frames better (excess R %.3f, before "
        "%.3f) and is not used for the network",
        scan.reader.scan_id,
        made,
        before,
    )
    return False


def _excess(scan: ViewedScan, generation: Generation, device: torch.device) -> float:
    """Excess R of a generation's image under its newest frames; infinite if not known."""
    if not len(generation.ledger.added):
        return math.inf
    misfit = newest_misfit(scan, generation, device)
    return misfit.excess if misfit.frames else math.inf
