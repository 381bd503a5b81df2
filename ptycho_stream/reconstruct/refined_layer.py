"""The refined layer of a scan's image: physics polishes what the network made, while there is time.

One for the generation that subscribers see, owned by the scan image. It takes frames in as they
come, also those that the network has not got to, is given slices of time between batches, and lays
what it has over the predicted tiles.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.errors import ModelError, ProbeError, PtychoStreamError
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import Canvas, TileIndex
from ptycho_stream.reconstruct.generation import Generation, GenerationIdentity
from ptycho_stream.reconstruct.refine import RefinedImage, Refiner
from ptycho_stream.reconstruct.refine_settings import RefineSettings
from ptycho_stream.reconstruct.trust import held_out
from ptycho_stream.results import Tile
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import positions_of
from ptycho_stream.scans.viewed_scan import ViewedScan
from ptycho_stream.settings import RefinementSettings

_log = logging.getLogger(__name__)
_POSITION_STEP = 2.0
_PROBE_WAITS_SWEEPS = 6.0
_PROBE_WAITS_FRAMES = 256
"""Visits of a frame, on average, and frames before a probe that is good is fitted; at a scan's end
the visits are enough. With an object that is still rough, or in part, it gets worse, and a visit
takes 1.5 times as long (a quarter of the siemens star, after six visits: nrmse 0.085, and 0.074 if
it waits)."""
_PROBE_UNKNOWN_FRAMES = 64
"""It waits, too, while there are fewer and nobody knows whether it is good: thirty frames refined
for some visits take a tenth of a good one, and the images of the whole scan get twice as bad."""
_SHOW_EVERY_S = 0.25
_SHOW_BYTES_PER_S = 50e6
"""Every sweep changes every tile: images are shown so seldom that subscribers get no more."""
_SHOW_SHARE, _SHOW_WAITS_S = 0.1, 2.0
"""And so seldom that computing them takes no more of the time, unless that is a longer wait."""


class RefinedLayer:
    """Refinement of one scan.

    Args:
        reader: of the scan.
        generation: whose predicted image it starts from and is held to.
        settings: of the refinement.
        device: where to compute.
        state: what :meth:`state` told when it was saved; None: begin.

    Raises:
        GeometryError: the mask of the view leaves no pixel.
        StoreError: the store cannot be read.
        ModelError: the device refuses, for want of memory for example.

    Attributes:
        basis: what the object hangs on; a generation of another one needs a layer of its own.
        looked_at: how far in the log of pairs all have been taken in, or left out.
        pairs: int64 (n,), indices in that log of the frames that were taken in.
        follows: whether what the network made is good enough to start from; None: not known yet.
        probe_waits: whether the probe is so good that it is kept until there are enough frames, or
            the scan has ended, and a few sweeps were made.
        network_excess: excess R of what the network made, when that was judged; NaN: not yet.
        judged_again_at: where it is not known whether to follow: from so many predicted frames on
            it may be.
        shown: how many times :meth:`show` has renewed what :meth:`over` lays over tiles.
        shown_pairs: of :attr:`pairs`, those visited by then.
        shown_sweeps: visits of a frame on average, of what is shown.
        shown_probe: modes (M, N, N) in photons, of what is shown.
    """

    def __init__(
        self,
        reader: ScanReader,
        generation: Generation,
        settings: RefinementSettings,
        device: torch.device,
        state: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self._reader, self._device = reader, device
        self._most_sweeps = settings.sweeps
        self._pixel_yx_m = np.asarray(generation.identity.pixel_yx_m)
        self.basis = basis_of(generation.identity)
        version = generation.identity.view_version
        header = reader.header
        view = next((v for v in header.views if v.version == version), header.view)
        scan = ViewedScan(reader, view)
        library = _library_settings(settings)
        valid = None if scan.valid.all() else scan.valid
        try:
            if state is None:
                probe = Probe(generation.probe)
                self._refiner = Refiner(scan.counts, probe, library, valid=valid, device=device)
            else:
                # What was made before the limit was lowered is still shown.
                most_px = max(library.max_object_px, state["object"].size)
                library = replace(library, max_object_px=most_px)
                self._refiner = Refiner.from_state(
                    state, scan.counts, library, valid=valid, device=device
                )
        except RuntimeError as error:
            raise _refused(device, error) from error
        self.looked_at = 0 if state is None else int(state["looked_at"])
        self.pairs = np.zeros(0, np.int64) if state is None else state["pairs"]
        known = {} if state is None else state
        self.follows: bool | None = bool(known["follows"]) if "follows" in known else None
        self.probe_waits = bool(known.get("probe_waits", False))
        self.network_excess = float(known.get("network_excess", float("nan")))
        self.judged_again_at = 0
        self._predicted: Canvas | None = None
        self._started_from: dict[TileIndex, int] = {}
        self._shown_at_s, self._show_took_s = float("-inf"), 0.0
        self._stuck = self._lost = False
        self._visits = self._shown_visits = 0
        self._image: RefinedImage | None = None
        self.shown = 0
        self.shown_sweeps = 0.0
        self.shown_pairs = np.zeros(0, np.int64)
        self.shown_probe = generation.probe
        if self.sweeps > 0:
            self._visits = 1
            self.show()

    @property
    def sweeps(self) -> float:
        """How often a frame was visited on average."""
        return self._refiner.sweeps

    @property
    def probe(self) -> Probe:
        """The probe as it is now, in photons."""
        return self._refiner.probe

    @property
    def image(self) -> RefinedImage | None:
        """What :meth:`show` has taken last."""
        return self._image

    @property
    def position_yx_px(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Slots (n,) of the frames and their positions (n, 2) as they are now, canvas pixels."""
        return self._refiner.keys, self._refiner.position_yx_px

    @property
    def has_work(self) -> bool:
        """Whether more sweeps over the frames taken in are wanted.

        As long as the probe is kept for want of frames half of them, so that some are left for it.
        """
        idle = self._stuck or self._lost
        share = 0.5 if self._keeps_probe and self._awaits_frames else 1.0
        return len(self.pairs) > 0 and not idle and self.sweeps < share * self._most_sweeps

    def add(self, indices: NDArray[np.int64], pairs: NDArray[Any], looked_at: int) -> None:
        """Take in frames; those held out are judged by, and not refined.

        Args:
            indices: (n,), of the usable ones among the pairs not looked at so far.
            pairs: (n,), their records in the scan's log of pairs.
            looked_at: how far in the log all have been looked at then.

        Raises:
            GeometryError: the positions span more pixels than are refined.
        """
        slots = pairs["slot"].astype(np.int64)
        position_yx_px = positions_of(pairs) / self._pixel_yx_m
        held = held_out(pairs["number"])
        self._refiner.hold_out(slots[held], position_yx_px[held])
        if not held.all():
            self._refiner.add(slots[~held], position_yx_px[~held])
            self.pairs = np.concatenate([self.pairs, indices[~held]])
            self._stuck = False
        self.looked_at = looked_at

    def work(self, predicted: Canvas, budget_s: float) -> int:
        """Refine for about ``budget_s``.

        Args:
            predicted: what to start from where nothing is yet, if it is followed.
            budget_s: seconds.

        Returns:
            How many visits of frames were made.

        Raises:
            GeometryError: the object would have more pixels than are refined.
            ProbeError: the steps have left the range of numbers.
            StoreError: the frames cannot be read.
            ModelError: the device refuses, for want of memory for example.
        """
        if predicted is not self._predicted:
            if self._predicted is not None:  # of another model
                self._refiner.forget_prior()
            self._predicted, self._started_from = predicted, {}
        try:
            for index, version in predicted.versions.items() if self.follows else ():
                if self._started_from.get(index) != version:
                    self._started_from[index] = version
                    corner = (index[0] * predicted.tile_px, index[1] * predicted.tile_px)
                    self._refiner.start_from(predicted.object_tile(index)[0], corner)
            enough = min(_PROBE_WAITS_SWEEPS, self._most_sweeps / 2)
            if not self._awaits_frames and self.sweeps >= enough:
                self.probe_waits = False  # for good, though with more frames sweeps are fewer again
            self._refiner.fits_probe = not self._keeps_probe
            visits = self._refiner.sweep(budget_s)
        except ProbeError:
            self._lost = True
            raise
        except RuntimeError as error:
            raise _refused(self._device, error) from error
        self._stuck = not visits
        self._visits += visits
        return visits

    @property
    def _keeps_probe(self) -> bool:
        """Whether the probe is left as it is for now."""
        unknown = self.follows is None and len(self.pairs) < _PROBE_UNKNOWN_FRAMES
        return self.probe_waits or unknown

    @property
    def _awaits_frames(self) -> bool:
        """Whether frames are still to come before a good probe is fitted."""
        return len(self.pairs) < _PROBE_WAITS_FRAMES and not self._reader.header.sealed

    @property
    def unshown(self) -> bool:
        """Whether :meth:`show` would show something new."""
        return self._visits != self._shown_visits and not self._lost

    @property
    def show_due(self) -> bool:
        """Whether there is something new that subscribers should see by now."""
        if not self.unshown:
            return False
        size_bytes = 0 if self._image is None else 3 * self._image.weight_yx.nbytes
        rested_s = min(self._show_took_s / _SHOW_SHARE, _SHOW_WAITS_S)
        wait_s = max(_SHOW_EVERY_S, size_bytes / _SHOW_BYTES_PER_S, rested_s)
        return time.monotonic() - self._shown_at_s >= wait_s

    def show(self) -> None:
        """Lay the object as it is now over the tiles; if it is lost, what was shown stays."""
        if not self.unshown:
            return
        self._shown_at_s = time.monotonic()
        try:
            image, probe = self._refiner.image(), self._refiner.probe
        except (ProbeError, RuntimeError) as error:
            self._lost = True
            _log.error("scan %s is not refined any more: %s", self._reader.scan_id, error)
            return
        self._show_took_s = time.monotonic() - self._shown_at_s
        self._image, self.shown_probe = image, probe.modes
        self.shown_sweeps = self.sweeps
        self.shown_pairs = self.pairs[self._refiner.visits > 0]
        self._shown_visits = self._visits
        self.shown += 1

    def over(self, index: TileIndex, tile_px: int, tile: Tile | None) -> Tile | None:
        """A tile of the predicted layer with the refined object where there is one.

        Args:
            index: of the tile.
            tile_px: its side.
            tile: predicted; None where the network has made nothing yet.

        Returns:
            None where nothing is to be seen.
        """
        image = self._image
        if image is None:
            return tile
        top, left = (index[k] * tile_px - image.corner_yx_px[k] for k in (0, 1))
        height, width = image.object_yx.shape
        y0, y1 = max(top, 0), min(top + tile_px, height)
        x0, x1 = max(left, 0), min(left + tile_px, width)
        if y0 >= y1 or x0 >= x1:
            return tile and replace(tile, version=tile.version + self.shown)
        here = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        refined, light = image.object_yx[y0:y1, x0:x1], image.weight_yx[y0:y1, x0:x1]
        seen = light > 0
        if tile is None:
            if not seen.any():
                return None
            nothing = np.full((tile_px, tile_px), complex(np.nan, np.nan), np.complex64)
            tile = Tile(0, nothing, np.zeros((tile_px, tile_px), np.float32))
        object_yx, weight_yx = tile.object_yx.copy(), tile.weight_yx.copy()
        object_yx[here] = np.where(seen, refined, object_yx[here])
        weight_yx[here] = np.where(seen, light, weight_yx[here])
        return Tile(tile.version + self.shown, object_yx, weight_yx)

    def tiles(self, tile_px: int) -> list[TileIndex]:
        """Indices of the tiles that :attr:`image` reaches into."""
        if self._image is None:
            return []
        corner, shape = self._image.corner_yx_px, self._image.object_yx.shape
        rows, columns = (
            range(corner[k] // tile_px, (corner[k] + shape[k] - 1) // tile_px + 1) for k in (0, 1)
        )
        return [(ty, tx) for ty in rows for tx in columns]

    def state(self) -> dict[str, NDArray[Any]]:
        """All that is needed to go on, as arrays; empty if nothing is left to go on with."""
        refiner = self._refiner.state()
        if self._lost:
            if self._image is None:
                return {}
            refiner |= _last_shown(self._image, self.shown_probe)
        return {
            **refiner,
            "pairs": self.pairs,
            "looked_at": np.array(self.looked_at),
            **({} if self.follows is None else {"follows": np.array(self.follows)}),
            "probe_waits": np.array(self.probe_waits),
            "network_excess": np.array(self.network_excess),
            "basis": np.array(self.basis.to_json()),
        }


def restored(
    reader: ScanReader,
    generation: Generation,
    settings: RefinementSettings,
    device: torch.device,
    state: Mapping[str, NDArray[Any]],
) -> RefinedLayer | None:
    """The layer of a generation as it was saved; None: it is to be made again.

    It is derived data: one of another basis, or of another version, costs the time to make it.
    """
    try:
        basis = GenerationIdentity.from_json(str(state["basis"]))
        if basis != basis_of(generation.identity):
            return None
        return RefinedLayer(reader, generation, settings, device, state)
    except (PtychoStreamError, KeyError, ValueError, TypeError, IndexError) as error:
        _log.warning(
            "scan %s: its refined image is unusable (%r) and is made again", reader.scan_id, error
        )
        return None


def basis_of(identity: GenerationIdentity) -> GenerationIdentity:
    """What a refined object hangs on: all but the network that it started from."""
    return replace(identity, software="", model="", model_sha256="", neighbours=0)


def _library_settings(settings: RefinementSettings) -> RefineSettings:
    return RefineSettings(
        method=settings.method,
        noise=settings.noise,
        modes=settings.modes,
        probe_step=RefineSettings().probe_step if settings.probe else 0.0,
        position_step=_POSITION_STEP if settings.positions else 0.0,
        cache_bytes=settings.cache_bytes,
        max_object_px=settings.max_object_px,
    )


def _refused(device: torch.device, error: RuntimeError) -> ModelError:
    """Torch's own errors, out of memory among them."""
    return ModelError(f"refinement does not run on {device}: {str(error).splitlines()[0]}")


def _last_shown(image: RefinedImage, probe: NDArray[np.complex64]) -> dict[str, NDArray[Any]]:
    """What a refiner's state has instead of what it has lost."""
    object_yx = np.where(image.weight_yx > 0, image.object_yx, np.complex64(1))
    return {
        "object": object_yx,
        "mean": object_yx,
        "anchor": np.zeros_like(image.object_yx),
        "weight": image.weight_yx,
        "corner_yx_px": np.array(image.corner_yx_px, np.int64),
        "probe": probe,
    }
