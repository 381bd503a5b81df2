"""The image of one scan: reads pairs from the store, predicts patches, stitches them.

The reconstruct stage drives one for each open scan; a program may drive one over a stored scan
without any daemon.  Where it stands is saved in one file beside the scan's frames.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream import __version__
from ptycho_stream.errors import PtychoStreamError
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import TileIndex
from ptycho_stream.reconstruct.generation import Generation, GenerationIdentity
from ptycho_stream.reconstruct.groups import GroupFormer
from ptycho_stream.reconstruct.ledger import PairLedger
from ptycho_stream.reconstruct.lending import Loan, Made
from ptycho_stream.reconstruct.live_misfit import GOOD_PROBE_EXCESS, MAX_START_EXCESS, newest_misfit
from ptycho_stream.reconstruct.patches import (
    PHOTON_FRAMES,
    Patches,
    PatchMaker,
    measured_photons,
)
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.refined_layer import RefinedLayer, basis_of, restored
from ptycho_stream.reconstruct.renewal import Renewals, explains_more
from ptycho_stream.reconstruct.saved_image import image_state, load_state, write_state
from ptycho_stream.reconstruct.scan_pairs import ScanPairs
from ptycho_stream.reconstruct.shown_frames import ShownFrames
from ptycho_stream.results import ImageState, Tile
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import positions_of
from ptycho_stream.scans.viewed_scan import ViewedScan
from ptycho_stream.settings import RefinementSettings

_log = logging.getLogger(__name__)

_START_FRAMES = 16
"""After so many frames (twice as many, and so on, where none lies inside the image yet) it is asked
whether the network's image is one to begin refinement from."""
_FIT_S = 0.06
"""For a probe that is being fitted, before each slice of refinement. That has steps of 0.015 s on a
slow core: with less the fit would have half of the time."""
_FEED = 512
"""Pairs given to the refined layer at once: their frames' checksums are verified."""


class ScanImage:
    """A scan's image as it grows.

    ``current`` is what subscribers see.  After a change of recipe, view or positions ``following``
    is a new generation, filled from the store while no new pair waits for ``current``; it takes
    over when it covers as many pairs.  So it is when refinement has made a better probe, but then
    new pairs go to it at once, and what ``current`` shows waits.

    Args:
        reader: of the scan.
        recipe: network, probe and device.
        tile_px: side of the canvas' tiles.
        refinement: how it is refined; None: what was refined once is shown, and nothing more is.

    Attributes:
        refined: the refined layer of ``current``, if there is one.
        renewals: whether the network should be given a better probe.
        patches_collapsed: of the last step: collapsed, though in the image (see ``collapse.py``).
        patches_not_finite: of the last step: no numbers, and left out.
    """

    def __init__(
        self,
        reader: ScanReader,
        recipe: Recipe,
        tile_px: int,
        refinement: RefinementSettings | None = None,
    ) -> None:
        self.reader = reader
        self._pairs = ScanPairs(reader)
        self._tile_px = tile_px
        self._tiles: dict[TileIndex, Tile] = {}
        self._shown_tiles: dict[TileIndex, Tile] = {}
        self._frames, self._listed, self._listed_shown = ShownFrames(), 0, 0
        self._makers: dict[int, PatchMaker] = {}
        self._formers: dict[int, GroupFormer] = {}
        self.patches_collapsed = self.patches_not_finite = 0
        self._recipe = recipe
        self._refinement = refinement
        self._gave_up: GenerationIdentity | None = None
        self.renewals = Renewals(refinement)
        self._told = np.empty(0, np.int64)  # pairs that were seen before a renewal took over
        saved = load_state(reader, recipe.device)
        self.current, self.following = saved.current, saved.following
        held = (one for one in (self.current, self.following) if one is not None)
        self._last_number = max((one.number for one in held), default=0)
        self.refined: RefinedLayer | None = None
        if saved.refined and saved.current is not None:
            settings = refinement or RefinementSettings()
            self.refined = restored(reader, saved.current, settings, recipe.device, saved.refined)

    def use(self, recipe: Recipe) -> None:
        """Go on with ``recipe``; the next step opens a generation for it."""
        self._recipe = recipe
        self.renewals.forget()

    @property
    def viewed(self) -> ViewedScan:
        """The scan as its frames are looked at now."""
        return self._pairs.viewed

    @property
    def problem(self) -> str:
        """Why this scan cannot be reconstructed; empty if it can."""
        if self.reader.header.pixel_yx_m is not None:
            return ""
        return (
            f"scan {self.reader.header.scan_id} has no pixel size, because its stream told no "
            "photon energy, distance or detector pixel: set them under [geometry]; its frames are "
            "kept"
        )

    @property
    def has_work(self) -> bool:
        """Whether the image is not complete yet, for what the store holds."""
        pairs = self.reader.pair_count
        if not pairs or self.problem:
            return False
        newest = self._newest
        return newest is None or self._workable(newest.ledger) > 0 or not self._is_present(newest)

    @property
    def backlog(self) -> int:
        """How many pairs no subscriber has seen, but for those that wait for their group."""
        return self._workable(self.current.ledger) if self.current else self.reader.pair_count

    @property
    def pending(self) -> int:
        """How many pairs no subscriber has seen, but for those that are lent or wait."""
        return self.backlog - (self.current.ledger.lent_count if self.current else 0)

    @property
    def can_step(self) -> bool:
        """Whether :meth:`step` should be called; not where all that is left is lent.

        And not while a probe is fitted for the network, as long as the scan runs.
        """
        newest = self._newest
        if not self.has_work or newest is None or not self._is_present(newest):
            return self.has_work
        if self.network_waits:
            return False
        return self._workable(newest.ledger) > newest.ledger.lent_count

    def _workable(self, ledger: PairLedger) -> int:
        """How many pairs could be worked on; at a scan's end there is nothing to wait for."""
        waiting = ledger.waiting_count if self.reader.header.sealed else 0
        return self.reader.pair_count - ledger.taken + waiting

    def oldest_pending_monotonic_ns(self) -> int | None:
        """When the oldest pair that no subscriber has seen became complete; None without one."""
        index = 0
        if self.current is not None:
            waiting = self.current.ledger.pending(self.reader.pair_count, 1)
            if not len(waiting):
                return None
            index = int(waiting[0])
        pairs = self.reader.pairs(index, index + 1)
        return int(pairs["paired_monotonic_ns"][0]) if len(pairs) else None

    def step(self, limit: int, on_damaged: Callable[[list[int]], None]) -> NDArray[np.int64]:
        """Reconstruct one batch; it must be possible.

        Args:
            limit: most pairs in the batch.
            on_damaged: told the slots of stored frames that fail their checksum and are left out.

        Returns:
            ``paired_monotonic_ns`` (n,) of the pairs that subscribers will see for the first time.

        Raises:
            GeometryError: the probe does not fit the scan, or the view shows nothing.
            StoreError: the store cannot be read.
        """
        self.patches_collapsed = self.patches_not_finite = 0
        self._pairs.corrections.look()
        newest = self._newest
        if newest is None or newest.number not in self._makers or not self._is_present(newest):
            self._open_generation(newest)
        target = self._to_extend
        if target is None:
            return np.empty(0, np.int64)
        return self._seen(target, self._extend(target, limit, on_damaged))

    @property
    def _to_extend(self) -> Generation | None:
        """The generation that the next pairs go to."""
        current = self.current
        assert current is not None
        if current.number in self._makers and self.pending and not self._renewing:
            return current
        return self.following

    def _seen(self, extended: Generation, paired_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of the pairs that a generation was extended by subscribers will see, by time.

        The following one takes over when it covers as much as the current one.
        """
        current = self.current
        assert current is not None
        if extended is current:
            return paired_ns
        if self._is_renewal(extended):
            return self._seen_renewal(extended, current)
        left_over = self.reader.header.sealed and extended.ledger.waiting_count
        if extended.ledger.taken < current.ledger.taken or left_over:
            return np.empty(0, np.int64)
        self._take_over(extended)
        return paired_ns

    def _seen_renewal(self, renewal: Generation, current: Generation) -> NDArray[np.int64]:
        """The same for a generation with a better probe; one that is worse is dropped."""
        seen = current.ledger.taken
        if self.refined is not None:  # it may be ahead of the network
            seen = max(seen, self.refined.looked_at)
        try:
            better = explains_more(self.viewed, renewal, current, seen, self._recipe)
        except PtychoStreamError as error:
            _log.error("scan %s goes on with the probe as it was: %s", self.reader.scan_id, error)
            better = False
        if better is None:
            return np.empty(0, np.int64)
        if not better:
            self.renewals.failed(current, renewal)
            self.following = None
            self._forget(renewal)
            return np.empty(0, np.int64)
        if renewal.identity.probe_finding != current.identity.probe_finding:
            _log.warning("scan %s: %s", self.reader.scan_id, renewal.identity.probe_finding)
        self._take_over(renewal)
        self._told = np.union1d(self._told, current.ledger.added)
        added = renewal.ledger.added
        return self._paired_ns(added, self._pairs.at(added))

    def _take_over(self, generation: Generation) -> None:
        """Let subscribers see the following generation."""
        assert self.current is not None
        self._forget(self.current)
        self._show(generation)
        self.following = None

    def _forget(self, generation: Generation) -> None:
        self._makers.pop(generation.number, None)
        self._formers.pop(generation.number, None)

    def _paired_ns(self, indices: NDArray[np.int64], pairs: NDArray[Any]) -> NDArray[np.int64]:
        """When pairs that subscribers have not seen before became complete."""
        fresh = ~np.isin(indices, self._told)
        return pairs["paired_monotonic_ns"][fresh].astype(np.int64)

    # -- helpers ------------------------------------------------------------------------------

    def lend(self, limit: int) -> Loan | None:
        """Up to ``limit`` pairs for another process to predict; None where there are none.

        The oldest ones, which lie together, so that few tiles come back; :meth:`step` covers the
        whole scan meanwhile. Networks that take frames in groups predict here alone: groups hang on
        the order of pairs.
        """
        target = None if self.current is None else self._to_extend
        maker = None if target is None else self._makers.get(target.number)
        if target is None or maker is None or maker.group_frames > 1:
            return None
        if not self._is_present(target) or self.network_waits:
            return None
        indices = target.ledger.pending(self.reader.pair_count, limit)
        if not len(indices):
            return None
        target.ledger.lend(indices)
        identity = target.identity.to_json()
        return Loan(self.reader.scan_id, target.number, identity, indices, target.probe)

    def take_back(self, loan: Loan, made: Made | None) -> NDArray[np.int64]:
        """Take what a helper made of a loan; None: nothing, and its pairs are to be done again.

        Returns:
            As :meth:`step`. A loan of a generation that is gone, or of a former image of the scan,
            adds nothing: its pairs are done again already.
        """
        self.patches_collapsed = self.patches_not_finite = 0
        held = (one for one in (self.current, self.following) if one is not None)
        target = next((one for one in held if one.ledger.has_lent(loan.indices)), None)
        if target is None:
            return np.empty(0, np.int64)
        target.ledger.take_back(loan.indices)
        if made is None:
            return np.empty(0, np.int64)
        target.merge(made.generation)
        self.patches_collapsed, self.patches_not_finite = made.collapsed, made.not_finite
        added = made.generation.ledger.added
        return self._seen(target, self._paired_ns(added, self._pairs.at(added)))

    def _show(self, generation: Generation) -> None:
        """Let subscribers see another generation."""
        self.current, self._tiles, self._shown_tiles = generation, {}, {}
        self._frames, self._listed, self._listed_shown = ShownFrames(), 0, 0
        if self.refined is not None and self.refined.basis != basis_of(generation.identity):
            self.refined = None

    @property
    def predictor(self) -> Predictor | None:
        """What makes the patches of ``current``; None while it is not being extended."""
        maker = None if self.current is None else self._makers.get(self.current.number)
        return None if maker is None else maker.predictor

    # -- refinement ---------------------------------------------------------------------------

    @property
    def wants_refinement(self) -> bool:
        """Whether :meth:`refine` would do something."""
        generation = self.current
        if self._refinement is None or generation is None or not len(generation.ledger.added):
            return False
        if generation.identity.view_version != self.reader.header.view.version:
            return False  # another generation, of the new view, is on its way
        if self._gave_up is not None and basis_of(generation.identity) == self._gave_up:
            return False
        if self._renewing:
            return False  # it begins anew with the better probe
        refined = self.refined
        if refined is None:
            return generation.ledger.taken >= min(_START_FRAMES, self.reader.pair_count)
        waiting = refined.looked_at < self._refinable(refined, generation)
        return refined.has_work or waiting or self._fits(generation)

    def _fits(self, generation: Generation) -> bool:
        """Whether a probe is being fitted that could be given to the network."""
        return self.renewals.fits(generation) and self._settled(generation)

    @property
    def network_waits(self) -> bool:
        """Whether the network is about to get another probe: its image is of little use now."""
        current = self.current
        if current is None or self.reader.header.sealed or not self._fits(current):
            return False
        return self.wants_refinement

    def _settled(self, generation: Generation) -> bool:
        """Whether no other generation is on its way."""
        return self.following is None and self._is_present(generation)

    @property
    def in_the_wake(self) -> bool:
        """Whether frames are refined only after the network has had its pick of them.

        Networks that take frames in groups have none: they go through the scan from its start.
        """
        followed = self.refined is not None and bool(self.refined.follows)
        return followed and self._recipe.network.group_frames == 1

    @property
    def sweeps(self) -> float:
        """Visits by refinement of a frame that may be refined by now, on average."""
        if self.refined is None or self.current is None:
            return 0.0
        frames = max(self._refinable(self.refined, self.current), 1)
        return self.refined.sweeps * self.refined.looked_at / frames

    def refine(self, budget_s: float, *, may_renew: bool = True) -> int:
        """Refine for about ``budget_s``; refinement must be wanted.

        Args:
            budget_s: seconds.
            may_renew: whether a better probe may be sought for the network, too.

        Returns:
            How many visits of frames were made.

        Raises:
            PtychoStreamError: it does not work for this scan; see :meth:`RefinedLayer.work`. It is
                not wanted any more then, with this probe, view, photons and positions, and what was
                refined before is still shown.
        """
        assert self.current is not None
        try:
            if self.refined is None:
                settings = self._refinement or RefinementSettings()
                device = self._recipe.device
                self.refined = RefinedLayer(self.reader, self.current, settings, device)
            if self.refined.follows is None:
                self._decide_to_follow(self.refined, self.current)
            self._feed(self.refined, self.current)
            fits = self._fits(self.current)
            if fits:  # the image goes on meanwhile
                self.renewals.fit(self.reader.header, _FIT_S)
            if not self.refined.has_work:
                return 0
            visits = self.refined.work(self.current.canvas, budget_s)
            if may_renew and not fits and self._settled(self.current):
                self.renewals.look(self.viewed, self.refined, self.current, self._recipe)
            return visits
        except PtychoStreamError:
            self._gave_up = basis_of(self.current.identity)
            raise

    def _decide_to_follow(self, refined: RefinedLayer, generation: Generation) -> None:
        """Whether refinement starts from the network's image, as soon as that can be told."""
        taken = generation.ledger.taken
        last = self.reader.header.sealed and taken >= self.reader.pair_count
        if taken < refined.judged_again_at and not last:
            return
        misfit = newest_misfit(self.viewed, generation, self._recipe.device)
        if misfit.frames or last:
            refined.network_excess = misfit.excess
            refined.follows = bool(misfit.frames) and misfit.excess <= MAX_START_EXCESS
            as_told = not generation.identity.probe_frames
            good = as_told and misfit.excess <= GOOD_PROBE_EXCESS
            refined.probe_waits = good or generation.identity.probe_settled
            _log.info(
                "scan %s: the network's image of %d frames explains %d of them with an excess R of "
                "%.3f: refinement %s",
                self.reader.scan_id,
                taken,
                misfit.frames,
                misfit.excess,
                "begins from it" if refined.follows else "does without it",
            )
        refined.judged_again_at = 2 * taken

    @property
    def _renewing(self) -> bool:
        """Whether a generation with a better probe is to be made, or is being made."""
        following = self.following
        return self.renewals.found is not None or (
            following is not None and self._is_renewal(following)
        )

    def _is_renewal(self, generation: Generation) -> bool:
        """Whether a generation is as the current one, with a probe refined with more frames."""
        current = self.current
        return (
            current is not None and generation.identity.probe_frames > current.identity.probe_frames
        )

    def _feed(self, refined: RefinedLayer, generation: Generation) -> None:
        """Give the refined layer the pairs that have come since."""
        first = refined.looked_at
        last = min(self._refinable(refined, generation), first + _FEED)
        if first < last:
            indices, pairs = np.arange(first, last), self.reader.pairs(first, last)
            self._pairs.corrections.look()  # after a restart there may be no step that does
            usable, _ = self._pairs.usable(generation.identity, indices, pairs)
            refined.add(indices[usable], pairs[usable], last)

    def _refinable(self, refined: RefinedLayer, generation: Generation) -> int:
        """How far in the log of pairs frames may be refined.

        Where the network's image is followed, not before the network has had its pick of them: a
        frame that is visited where there is no image yet needs two visits more.
        """
        pairs = self.reader.pair_count
        if not (self.in_the_wake and generation.number in self._makers):
            return pairs
        return max(refined.looked_at, min(pairs, generation.ledger.offered_below))

    @property
    def collapsed(self) -> bool:
        """Whether the network's output has collapsed, in what subscribers see."""
        return self.current is not None and self.current.spread.collapsed

    @property
    def _newest(self) -> Generation | None:
        return self.following or self.current

    def _open_generation(self, newest: Generation | None) -> None:
        """Make the newest generation one of the present recipe, view and positions."""
        frames = self._photon_frames(newest)
        if self._recipe.photons is not None:
            photons = self._recipe.photons
        elif (
            newest is not None
            and newest.identity.photon_frames == frames
            and newest.identity.view_version == self.viewed.view.version
        ):
            photons = newest.identity.photons
        else:
            photons = measured_photons(self.viewed, frames)
        identity = self._wanted(newest, photons)
        recipe = self._recipe
        if identity.probe_frames:
            assert newest is not None
            renewed = self.renewals.found
            recipe = recipe.with_probe(Probe(newest.probe) if renewed is None else renewed.probe)
        self.renewals.found = None
        maker = PatchMaker(self.viewed, recipe, photons)
        if newest is None or newest.identity != identity:
            self._last_number += 1
            newest = Generation(self._last_number, identity, maker.probe, self._recipe.device)
        if self.current is not None and self.current.identity == identity:
            newest, self.following = self.current, None
        elif self.current is None or (
            self.current.ledger.count <= recipe.batch_frames and not self._is_renewal(newest)
        ):
            self._show(newest)  # soon made again
            self.following = None
        else:
            self.following = newest
        self._makers[newest.number] = maker
        self._formers.pop(newest.number, None)

    def _former(self, generation: Generation, group_frames: int) -> GroupFormer:
        """What forms a generation's groups, as it was when the last pair was looked at."""
        identity, ledger = generation.identity, generation.ledger
        reach_m = self.reader.header.size_px * max(identity.pixel_yx_m)
        former = GroupFormer(group_frames, identity.neighbours, reach_m)
        # Patches that were no numbers were skipped after their frames had gone into a group.
        skipped = np.sort(ledger.skipped)
        skipped = skipped[
            self._pairs.usable(generation.identity, skipped, self._pairs.at(skipped))[0]
        ]
        used, waiting = np.concatenate([ledger.added, skipped]), ledger.waiting
        pairs = self._pairs.at(np.concatenate([used, waiting]))
        former.restore(used, waiting, positions_of(pairs))
        return former

    def _is_present(self, generation: Generation) -> bool:
        """Whether ``generation`` is made with the present recipe, view and positions."""
        photons = self._recipe.photons or generation.identity.photons
        return generation.identity == self._wanted(generation, photons)

    def _wanted(self, held: Generation | None, photons: float) -> GenerationIdentity:
        """What the newest generation should be made with, given the one there is."""
        header, recipe = self.reader.header, self._recipe
        assert header.pixel_yx_m is not None
        return GenerationIdentity(
            software=__version__,
            model=recipe.model,
            model_sha256=recipe.model_sha256,
            probe_digest=recipe.probe_digest,
            view_version=header.view.version,
            photons=photons,
            photon_frames=self._photon_frames(held),
            pixel_yx_m=header.pixel_yx_m,
            tile_px=self._tile_px,
            corrected_below=self._corrected_below(held),
            neighbours=recipe.neighbours if recipe.network.group_frames > 1 else 0,
            **self._better_probe(held),
        )

    def _better_probe(self, held: Generation | None) -> dict[str, Any]:
        """What an identity says of the probe that the network should get, if it is a better one.

        One that was made for frames that are looked at otherwise, or from another one, is of no
        use.
        """
        if held is None:
            return {}
        identity, view = held.identity, self.reader.header.view
        if identity.probe_digest != self._recipe.probe_digest:
            return {}
        if identity.view_version != view.version:
            return {}
        found = self.renewals.found
        if found is None:
            frames, settled, finding = identity.probe_frames, identity.probe_settled, ""
        else:
            frames, settled, finding = found.frames, found.settled, found.finding
        return {
            "probe_frames": frames,
            "probe_settled": settled,
            "probe_finding": finding or identity.probe_finding,
        }

    def _photon_frames(self, held: Generation | None) -> int:
        """How many frames, the first of the scan, the photon count should be measured from.

        Always the same ones, so that it does not hang on timing: an image that had to begin with
        fewer is made again.  0 where the settings tell the photons.
        """
        if self._recipe.photons is not None:
            return 0
        frames = len(self.viewed.first_open(PHOTON_FRAMES))
        settled = frames == PHOTON_FRAMES or self.reader.header.sealed
        if held is not None and held.identity.photon_frames and not settled:
            return held.identity.photon_frames
        return frames

    def _corrected_below(self, held: Generation | None) -> int:
        """Corrections wait until the image has caught up, so that many make one new generation."""
        pairs = self.reader.pair_count
        if held is None:
            return pairs
        below = held.identity.corrected_below
        due = held.ledger.taken >= pairs and self._pairs.corrections.any_from(below)
        return pairs if due else below

    def _extend(
        self, target: Generation, limit: int, on_damaged: Callable[[list[int]], None]
    ) -> NDArray[np.int64]:
        by_groups = self._makers[target.number].group_frames > 1
        # Groups hang on the order of the pairs; single frames may be taken in any.
        choose = target.ledger.pending if by_groups else target.ledger.spread
        indices = choose(self.reader.pair_count, limit)
        indices, pairs = self._pairs.sift(target, indices, on_damaged)
        if by_groups:
            return self._extend_by_groups(target, indices, pairs, limit)
        if len(pairs):
            patches = self._makers[target.number].make(pairs, target.identity.pixel_yx_m)
            self._add(target, indices, pairs, patches)
        return self._paired_ns(indices, pairs)

    def _extend_by_groups(
        self, target: Generation, indices: NDArray[np.int64], pairs: NDArray[Any], limit: int
    ) -> NDArray[np.int64]:
        """Add the groups that are complete with these pairs; at the scan's end, what is left."""
        maker = self._makers[target.number]
        # Held again when this has worked: what fails is done again from what the ledger knows.
        former = self._formers.pop(target.number, None)
        former = former or self._former(target, maker.group_frames)
        places = zip(indices.tolist(), pairs["y_m"].tolist(), pairs["x_m"].tolist(), strict=True)
        groups = [group for place in places if (group := former.arrive(*place)) is not None]
        members = np.array(groups, np.int64).reshape(-1, maker.group_frames)
        fresh = np.ones(members.shape, bool)
        if not groups:
            target.ledger.wait(indices)
        if not groups and self.reader.header.sealed and self._all_looked_at(target):
            last = target.ledger.waiting[: max(1, limit // maker.group_frames)].tolist()
            members = np.array([former.leftover(index) for index in last], np.int64)
            members = members.reshape(-1, maker.group_frames)
            fresh = np.zeros(members.shape, bool)
            fresh[:, 0] = True  # their partners are in the image, or get there by themselves
        if not members.size:
            self._formers[target.number] = former
            return np.empty(0, np.int64)
        rows, new = members.ravel(), fresh.ravel()
        pairs = self._pairs.at(rows)
        patches = maker.make(pairs, target.identity.pixel_yx_m).only(new)
        if groups:
            target.ledger.wait(indices)
        self._add(target, rows[new], pairs[new], patches)
        self._formers[target.number] = former
        return self._paired_ns(rows[new], pairs[new])

    def _all_looked_at(self, target: Generation) -> bool:
        return target.ledger.taken >= self.reader.pair_count

    def _add(
        self,
        target: Generation,
        indices: NDArray[np.int64],
        pairs: NDArray[Any],
        patches: Patches,
    ) -> None:
        target.add(indices, pairs, patches)
        self.patches_collapsed += int(patches.verdicts.collapsed.sum())
        self.patches_not_finite += int((~patches.verdicts.finite).sum())

    def image(self, final: bool) -> ImageState:
        """What subscribers are to see now; without tiles before the first patch."""
        header, generation = self.reader.header, self.current
        if final and self.refined is not None:
            self.refined.show()
        told: dict[str, Any] = {
            "scan_id": header.scan_id,
            "state": header.state,
            "tile_px": self._tile_px,
            "counts": self.counts(),
            "metadata": dict(header.metadata),
            "final": final,
        }
        if generation is None:
            pixel_yx_m = header.pixel_yx_m or (0.0, 0.0)
            return ImageState(generation=0, pixel_yx_m=pixel_yx_m, tiles={}, **told)
        refined, frames = self.refined, self.frames
        return ImageState(
            generation=generation.number,
            layer="refined" if refined is not None and refined.shown else "predicted",
            sweeps=0.0 if refined is None else refined.shown_sweeps,
            pixel_yx_m=generation.identity.pixel_yx_m,
            tiles=self._tiles_to_show(generation),
            frame_numbers=frames.number,
            position_yx_m=frames.position_yx_m,
            predicted=dict(self._tiles) if refined is not None and refined.shown else {},
            probe=generation.probe if refined is None else refined.shown_probe,
            model=generation.identity.model,
            spread=generation.spread.spread,
            collapsed=generation.spread.collapsed,
            **told,
        )

    @property
    def frames(self) -> ShownFrames:
        """Frames in the image."""
        if self.current is None:
            return self._frames
        added, refined = self.current.ledger.added[self._listed :], self.refined
        shown = 0 if refined is None else refined.shown
        if not len(added) and shown == self._listed_shown:
            return self._frames  # asked for in every turn of the stage's loop
        self._listed, self._listed_shown = self._listed + len(added), shown
        if refined is not None:
            added = np.concatenate([added, refined.shown_pairs])
        _, first = np.unique(added, return_index=True)
        fresh = self._frames.missing(added[np.sort(first)])
        if len(fresh):
            self._frames.add(fresh, self._pairs.at(fresh))
        return self._frames

    def _tiles_to_show(self, generation: Generation) -> dict[TileIndex, Tile]:
        """The predicted tiles, with the refined object over them where there is one."""
        for index, version in generation.canvas.versions.items():
            known = self._tiles.get(index)
            if known is None or known.version != version:
                self._tiles[index] = Tile(version, *generation.canvas.object_tile(index))
        if self.refined is None or not self.refined.shown:
            return dict(self._tiles)
        for index in {*self._tiles, *self.refined.tiles(self._tile_px)}:
            tile, known = self._tiles.get(index), self._shown_tiles.get(index)
            version = self.refined.shown + (tile.version if tile else 0)
            if known is None or known.version != version:
                shown = self.refined.over(index, self._tile_px, tile)
                if shown is not None:
                    self._shown_tiles[index] = shown
        return dict(self._shown_tiles)

    def counts(self) -> dict[str, int]:
        """Frames committed, paired, reconstructed and left out, and the ingest's own accounting.

        ``waiting`` are those that wait for the rest of their group, if any do.
        """
        header, generation = self.reader.header, self.current
        expected = {} if header.expected_frames is None else {"expected": header.expected_frames}
        waiting = 0 if generation is None else generation.ledger.waiting_count
        return {
            **header.counts,
            **expected,
            **({"waiting": waiting} if waiting else {}),
            "committed": self.reader.committed,
            "paired": self.reader.pair_count,
            "reconstructed": len(self.frames),
            "skipped": 0 if generation is None else len(generation.ledger.skipped),
        }

    def save(self) -> None:
        """Write generations and refined layer into one file, whole or not at all.

        Raises:
            StoreError: the disk refused.
        """
        write_state(self.reader.directory, self.snapshot())

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """All of it as arrays of their own, for :func:`write_state` in another thread."""
        refined = None if self.refined is None else self.refined.state()
        return image_state(self.current, self.following, refined)
