"""When a scan is predicted again with a better probe than it began with, and with which.

Where the network does not know the beam its image is of no use, and a probe fitted to a few dozen
frames, or refined with them, is (docs/decisions/0024). Owned by
:class:`~.scan_image.ScanImage`, which makes the generation and lets it take over.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch

from ptycho_stream.errors import GeometryError, ProbeError
from ptycho_stream.physics.probe import Probe, distance_m
from ptycho_stream.reconstruct.generation import Generation, GenerationIdentity
from ptycho_stream.reconstruct.live_misfit import MAX_START_EXCESS, newest_misfit
from ptycho_stream.reconstruct.neighbourhood import Neighbours, nearest_frames
from ptycho_stream.reconstruct.probe_fit import FittedProbe, fitting
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.refined_layer import RefinedLayer, basis_of
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.records import positions_of
from ptycho_stream.scans.viewed_scan import ViewedScan
from ptycho_stream.settings import RefinementSettings

_log = logging.getLogger(__name__)

_POOR_EXCESS = 0.15
"""So bad must the network's image be with the probe of the scan's start, where none could be fitted
and a refined one is taken: on the siemens star with the file's guess it is 0.27, and 0.03 with the
refined one. Where few frames are there yet it may be 0.11 with a true probe."""
_CLEARLY = 0.5
"""With the better probe it must be this share of that, or that probe is not used."""
_TOLD_RAD = 0.5
"""Of defocus, or more, people are told."""
_FRAMES, _SWEEPS = 32, 3.0
"""So many frames tell of a better probe; a refined one when visited so often on average."""
_MOST_FITTED = 64
"""Of the first frames, as many as there are by then: with more it is a better probe, but later."""
_GROWTH, _LAST = 1.4, 256
"""Again when there are so many times as many frames; of more than so many not: the image would
stand still for long, and be no better after it than with as many more visits."""
_GROWTH_AFTER_FAILURE = 2
_ALIKE, _GROWTH_WHILE_ALIKE = 0.98, 1.2
"""A refined probe that overlaps so much with the network's is no better; it is looked at again when
there are so many times as many frames."""
_SHARE = 8
"""It takes over with every so manieth frame, and the others follow."""
_SECONDS = 5.0
"""Of refinement after the scan: with less the image may end less refined than it was before."""
_MOST_FRAMES = 1024
"""Of more frames the prediction is not made again: it would take too long."""


@dataclass(frozen=True, slots=True)
class RenewedProbe:
    """A probe that was fitted to ``frames`` frames, or refined with them.

    ``settled`` if it is so good that none is to be found that is better; ``finding``: what is
    wrong with the one that the scan began with, in words, or empty.
    """

    probe: Probe
    frames: int
    settled: bool = False
    finding: str = ""


@dataclass(slots=True)
class _Fit:
    """A probe that is being fitted for generations of one basis."""

    basis: GenerationIdentity
    frames: int
    steps: Generator[None, None, FittedProbe]


class Renewals:
    """Which better probe one scan should be predicted again with.

    Args:
        settings: of the refinement; None: there is none.

    Attributes:
        found: the probe for the next generation; None: there is none.
    """

    def __init__(self, settings: RefinementSettings | None) -> None:
        self._settings = settings or RefinementSettings()
        self.found: RenewedProbe | None = None
        self._failed: tuple[GenerationIdentity, int] | None = None
        self._fit: _Fit | None = None
        self._fitted: GenerationIdentity | None = None
        self._rather_turned: GenerationIdentity | None = None
        self._alike: tuple[GenerationIdentity, int] | None = None

    def forget(self) -> None:
        """Begin anew, with another recipe."""
        self.found = self._fit = self._fitted = self._rather_turned = None

    def failed(self, current: Generation, renewal: Generation) -> None:
        """The generation with the better probe explains the frames no better."""
        self._failed = basis_of(current.identity), renewal.identity.probe_frames

    def look(
        self, scan: ViewedScan, refined: RefinedLayer, generation: Generation, recipe: Recipe
    ) -> None:
        """Take the refined probe if it is time to, or begin to fit one to the first frames.

        Args:
            scan: as its frames are looked at.
            refined: layer of the generation.
            generation: what subscribers see, with the present recipe.
            recipe: whose network it is.

        Raises:
            StoreError: the frames cannot be read.
        """
        self._fit = None  # of another basis
        if not self._possible(refined, generation, recipe):
            return
        if self._should_fit(refined, generation):
            self._fit = self._begun(scan, refined, generation, recipe)
            return
        if not self._should_take(refined, generation):
            return
        self.found = RenewedProbe(refined.probe, len(refined.pairs))
        _log.info(
            "scan %s: the network predicts it again with the probe refined with %d frames",
            scan.reader.scan_id,
            self.found.frames,
        )

    def _possible(self, refined: RefinedLayer, generation: Generation, recipe: Recipe) -> bool:
        settings, frames = self._settings, len(refined.pairs)
        wanted = settings.probe and not settings.positions and settings.seconds >= _SECONDS
        return (
            wanted
            and self._rather_turned != basis_of(generation.identity)
            and recipe.network.uses_probe
            and not generation.identity.probe_settled
            and _FRAMES <= frames <= _MOST_FRAMES
        )

    def _should_fit(self, refined: RefinedLayer, generation: Generation) -> bool:
        """Whether the network may not know the beam, and no probe was fitted yet."""
        identity = generation.identity
        knows_beam = refined.network_excess <= MAX_START_EXCESS  # not if that is unknown
        return not knows_beam and not identity.probe_frames and self._fitted != basis_of(identity)

    def _should_take(self, refined: RefinedLayer, generation: Generation) -> bool:
        """Whether the refined probe is likely to be much better."""
        before, now = generation.identity.probe_frames, len(refined.pairs)
        if refined.sweeps < _SWEEPS or (before and now > _LAST):
            return False
        basis = basis_of(generation.identity)
        failed, alike = (
            known[1] if known and known[0] == basis else 0 for known in (self._failed, self._alike)
        )
        beyond = max(_GROWTH * before, _GROWTH_AFTER_FAILURE * failed, _GROWTH_WHILE_ALIKE * alike)
        if now < beyond:
            return False
        if not before:
            return refined.network_excess > _POOR_EXCESS
        if refined.probe.overlap(Probe(generation.probe)) < _ALIKE:
            return True
        self._alike = basis, now
        return False

    def _begun(
        self, scan: ViewedScan, refined: RefinedLayer, generation: Generation, recipe: Recipe
    ) -> _Fit:
        indices = refined.pairs[:_MOST_FITTED]
        pairs = scan.reader.pairs(int(indices.min()), int(indices.max()) + 1)
        pairs = pairs[indices - indices.min()]
        position_yx_px = positions_of(pairs) / np.asarray(generation.identity.pixel_yx_m)
        near = nearest_frames(position_yx_px, _MOST_FITTED)
        counts = scan.counts(pairs["slot"][near])
        blank = np.broadcast_to(np.complex64(1), counts.shape)
        frames = Neighbours(counts, position_yx_px[near], blank, scan.valid)
        pixel_yx_m = generation.identity.pixel_yx_m
        probe, modes = Probe(generation.probe), self._settings.modes
        steps = fitting(frames, probe, pixel_yx_m, recipe.device, modes)
        return _Fit(basis_of(generation.identity), len(near), steps)

    def fits(self, generation: Generation) -> bool:
        """Whether a probe is being fitted that is of use for this generation."""
        return self._fit is not None and self._fit.basis == basis_of(generation.identity)

    def fit(self, header: ScanHeader, budget_s: float) -> None:
        """Go on with it for about ``budget_s``; ``header``: of the scan."""
        assert self._fit is not None
        until_s = time.monotonic() + budget_s
        try:
            while True:
                next(self._fit.steps)
                if time.monotonic() >= until_s:
                    return
        except StopIteration as end:
            self._judge(header, self._fit, end.value)
        except (GeometryError, ProbeError, RuntimeError) as error:
            _log.error("scan %s: no probe could be fitted: %s", header.scan_id, error)
        self._fitted, self._fit = self._fit.basis, None

    def _judge(self, header: ScanHeader, fit: _Fit, fitted: FittedProbe) -> None:
        if not fitted.needed:
            _log.info(
                "scan %s: its probe fits the first frames (excess R %.3f)",
                header.scan_id,
                fitted.told_excess,
            )
        elif not fitted.clear:
            _log.info(
                "scan %s: no other defocus or far field explains the first frames much better than "
                "the probe does (excess R %.3f, and %.3f)",
                header.scan_id,
                fitted.excess,
                fitted.told_excess,
            )
        elif fitted.rather_turned:
            self._rather_turned = fit.basis
            _log.info(
                "scan %s: a detector turned by 180 degrees explains the first frames as well as "
                "another defocus does: the probe stays as it is",
                header.scan_id,
            )
        else:
            finding = _words(header, fitted)
            self.found = RenewedProbe(fitted.refined, fit.frames, fitted.settled, finding)
            _log.info(
                "scan %s: the network predicts it again with a probe fitted to %d frames, because "
                "%s",
                header.scan_id,
                fit.frames,
                finding,
            )


def _words(header: ScanHeader, fitted: FittedProbe) -> str:
    """What was found, and what to do about it."""
    wrong: list[str] = []
    if abs(fitted.defocus_rad) >= _TOLD_RAD:
        wrong.append(_defocus_words(header, fitted))
    if fitted.far_field == "as measured":
        wrong.append("its far field is not that of the frames")
    return (
        f"the probe that the scan began with is wrong: {' and '.join(wrong) or 'a little'} "
        f"(excess R of the first frames {fitted.told_excess:.3f}, and {fitted.excess:.3f} with a "
        "corrected one): correct what [probe] names, or give the refined probe of this scan"
    )


def _defocus_words(header: ScanHeader, fitted: FittedProbe) -> str:
    energy_eV, pixel_yx_m = header.geometry.photon_energy_eV, header.pixel_yx_m
    if energy_eV is None or pixel_yx_m is None:
        return f"it is {abs(fitted.defocus_rad):.1f} rad out of focus"
    further_m = distance_m(fitted.probe, fitted.defocus_rad, energy_eV, pixel_yx_m)
    where = "downstream" if further_m > 0 else "upstream"
    return f"the sample lies {1e6 * abs(further_m):.3g} um further {where} of the focus"


def explains_more(
    scan: ViewedScan, renewal: Generation, current: Generation, seen: int, recipe: Recipe
) -> bool | None:
    """Whether a generation with a better probe should be seen instead of the current one.

    The first one must explain the frames much better; after that, and where it is not known how
    well the current one does, it is enough that refinement may begin from it.

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
    if not math.isfinite(before):
        most = MAX_START_EXCESS
    elif current.identity.probe_frames:
        most = max(before, MAX_START_EXCESS)
    else:
        most = _CLEARLY * before
    if made <= most:
        return True
    if not covers:
        return None
    _log.warning(
        "scan %s: the new probe does not explain the frames better (excess R %.3f, before "
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
