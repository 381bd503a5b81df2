"""Refinement: batched iterative ptychography over the frames so far, on whatever device torch has.

The network proposes, this polishes: object, probe modes and, if asked, positions are fitted to the
counts. Frames may be added at any time. Used by the reconstruct stage between arrivals and after
the last frame, by :mod:`~ptycho_stream.reconstruct.refine_file` and by programs of their own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import GeometryError
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import MIN_WEIGHT
from ptycho_stream.reconstruct.misfit import compared_frames
from ptycho_stream.reconstruct.positions_fit import Positions
from ptycho_stream.reconstruct.refine_frames import COUNT_OFFSET, ReadFrames, RootCache
from ptycho_stream.reconstruct.refine_model import Batch, Model
from ptycho_stream.reconstruct.refine_prior import PriorWeights
from ptycho_stream.reconstruct.refine_schedule import Schedule
from ptycho_stream.reconstruct.refine_settings import RefineSettings

_MARGIN_PX = 2
"""Beyond the windows, so that rounding of a moved position stays inside the arrays."""

_FARTHEST_PX = 2.0**40
"""Beyond this, pixels are no longer told apart to a fraction."""

_LOST = 5.0
"""Frames whose misfit is so many robust deviations above the median may be in the wrong place."""

_LOST_AT_ONCE = 8
"""So many frames are searched for after a round, so that a step stays short."""

_SEARCHES = 6
"""Most searches for a frame; one that is then still not found is no matter of its position."""

_SEARCH_EVERY_VISITS = 4

_JUDGES = 16
"""So many frames held out are looked at after a round, three times mostly, or fewer large ones."""

_FEW_FRAMES = 48
"""With fewer, a new image of the network is a better start than what was refined from a former one:
on the siemens star (no other scan was tried) refinement of the first frames, alone in one row,
leaves an error of slow phase that all later visits mend only by half, and an image of a quarter of
the frames a tenth worse."""

_FEW_VISITS = 6.0
"""On average, that count since new frames came; after more what was refined is a better start."""

_CLEARLY = 0.9
"""A place is taken if the frame's misfit there is below this share of what it was."""

_DARK_ROOT = float(np.sqrt(np.float32(COUNT_OFFSET))) * 1.001
"""A frame whose brightest root is not above this has no photon at all."""


@dataclass(frozen=True, slots=True)
class RefinedImage:
    """The refined object.

    Attributes:
        object_yx: complex64 (H, W), NaN where no visited frame saw it.
        weight_yx: float32 (H, W), illumination, 1 = one frame at the probe's peak; 0 where unseen.
        corner_yx_px: canvas pixel of [0, 0].
    """

    object_yx: NDArray[np.complex64]
    weight_yx: NDArray[np.float32]
    corner_yx_px: tuple[int, int]


class Refiner:
    """Iterative ptychography over a growing set of frames.

    Positions are in canvas pixels, the probe's centre, index (N - 1) / 2 of its window: the world
    position in metres over the pixel size. ::

        refiner = Refiner(counts, probe.normalised(photons))
        refiner.add(np.arange(len(counts)), position_yx_m / pixel_yx_m)
        refiner.sweep(10.0)
        image, probe = refiner.image(), refiner.probe

    Args:
        frames: counts (n, N, N), zero frequency at [N // 2, N // 2], or what reads them by key;
            keys are then whatever it takes, else indices of the array.
        probe: in photons; their sum is kept. Modes are added if there are fewer than asked for.
        settings: how to go about it.
        valid: bool (N, N), False where the detector has no answer; ordered as the counts.
        device: where to compute.
        seed: of the order of visits.

    Raises:
        GeometryError: the mask does not fit, or leaves no pixel.
    """

    def __init__(
        self,
        frames: NDArray[Any] | ReadFrames,
        probe: Probe,
        settings: RefineSettings | None = None,
        *,
        valid: NDArray[np.bool_] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.settings = settings or RefineSettings()
        self._device = torch.device(device)
        self._size_px = probe.size_px
        read = _reader_of(frames) if isinstance(frames, np.ndarray) else frames
        self._roots = RootCache(
            read,
            probe.size_px,
            valid,
            self.settings.saturation,
            self.settings.cache_bytes,
            self._device,
        )
        self._model = Model(probe, self.settings, self._device)
        self._schedule = Schedule(self.settings.batch_frames, seed)
        steps, limit = self.settings.subpixel_steps, self.settings.position_limit_px
        self._positions = Positions(probe.size_px, steps, limit)
        self._since_round = self._round_frames = 0
        self._searches: NDArray[np.int64] = np.zeros(0, np.int64)
        # Not kept: each is looked at once a round.
        self._held_roots = RootCache(
            read, probe.size_px, valid, self.settings.saturation, 0, self._device
        )
        self._held_yx_px: NDArray[np.float64] = np.zeros((0, 2))
        self.fits_probe = True
        """False: the probe waits, as with ``probe_step`` 0; may be changed at any time."""
        self.unusable: dict[str, int] = {"dark": 0, "masked": 0}
        """Frames that are never visited: without a single photon, or without a measured pixel."""

    def add(
        self, keys: NDArray[np.integer[Any]], position_yx_px: NDArray[np.floating[Any]]
    ) -> None:
        """Take in frames (n,) at positions (n, 2); they are read when they are first visited.

        Raises:
            GeometryError: a position is not finite, the numbers differ, or the positions span more
                pixels than allowed. Nothing has been added then.
        """
        position = _checked(keys, position_yx_px)
        if len(position):
            self._take_in(np.asarray(keys, np.int64), position, position)

    def hold_out(
        self, keys: NDArray[np.integer[Any]], position_yx_px: NDArray[np.floating[Any]]
    ) -> None:
        """Take in frames that are never visited, to judge by.

        What :meth:`image` gives is then the mean of what was refined and the image given to
        :meth:`start_from`, which gets the weights that explain these frames best: none, if it is
        wrong.

        Raises:
            GeometryError: as :meth:`add`.
        """
        position = _checked(keys, position_yx_px)
        if len(position):
            self._cover(position)
            self._held_roots.add(np.asarray(keys, np.int64))
            self._held_yx_px = np.concatenate([self._held_yx_px, position])

    def _take_in(
        self,
        keys: NDArray[np.int64],
        measured: NDArray[np.float64],
        position: NDArray[np.float64],
    ) -> None:
        self._cover(measured)
        self._roots.add(keys)
        self._schedule.add(len(position))
        self._positions.add(measured, position)
        self._searches = np.concatenate([self._searches, np.zeros(len(position), np.int64)])

    def _cover(self, measured: NDArray[np.float64]) -> None:
        reach = self.settings.position_limit_px if self.settings.position_step else 0
        margin = _MARGIN_PX + int(np.ceil(reach))
        top = measured - (self._size_px - 1) / 2
        low = np.floor(top.min(0)) - margin
        high = np.ceil(top.max(0)) + self._size_px + margin
        if np.abs([low, high]).max() > _FARTHEST_PX:
            raise GeometryError(
                f"a position lies {np.abs([low, high]).max():.3g} pixels from the origin: correct "
                "the pixel size or the position's units"
            )
        self._model.field.cover(low.astype(np.int64), high.astype(np.int64))

    def start_from(self, object_yx: NDArray[np.complex64], corner_yx_px: tuple[int, int]) -> None:
        """Give the stitched image of the network, as often as it grows.

        It is the starting object where visited frames have seen nothing, or next to nothing if
        it explains those held out; and everywhere, while there are few frames, visited a few
        times. :meth:`image` and :attr:`probe` are given with its phase and phase ramp. With frames
        that were given to :meth:`hold_out` it is also part of :meth:`image`.

        Args:
            object_yx: complex (H, W), NaN where unseen.
            corner_yx_px: canvas pixel of [0, 0].
        """
        settled = self._schedule.settled
        anew = 0 < len(settled) < _FEW_FRAMES and float(settled.mean()) < _FEW_VISITS
        self._model.start_from(object_yx, corner_yx_px, anew=anew)
        if anew:
            settled[:] = 0

    def forget_prior(self) -> None:
        """Have the weights of the image given to :meth:`start_from` chosen anew: it is another."""
        self._model.prior_weights = PriorWeights()

    def sweep(self, budget_s: float) -> int:
        """Take steps until the time is up; at least one, if there is a frame to visit.

        Returns:
            How many visits of frames were made.
        """
        until = time.monotonic() + budget_s
        visits = 0
        while True:
            started = time.monotonic()
            done = self.step()
            visits += done
            now = time.monotonic()
            if not done or now + (now - started) / 2 > until:
                return visits

    def step(self) -> int:
        """Visit one batch of frames; returns how many. 0: there is none that could be used."""
        while True:
            indices = self._schedule.next(self._positions.group)
            if not len(indices):
                return 0
            roots = self._roots.get(indices)
            good = self._judged(indices, roots)
            if good.any():
                break
        if not good.all():
            indices, roots = indices[good], roots[torch.as_tensor(good).to(self._device)]
        self._visit(indices, roots)
        if not self._since_round:  # its length is fixed now: frames may come faster than they go
            self._round_frames = int(self._schedule.usable.sum())
        self._since_round += len(indices)
        if self._since_round >= self._round_frames:
            self._finish_round()
        return len(indices)

    def _judged(self, indices: NDArray[np.int64], roots: Tensor) -> NDArray[np.bool_]:
        """Which of the frames (B,) can be used; looked at when they are visited first."""
        good = np.ones(len(indices), bool)
        fresh = np.flatnonzero(self._schedule.visits[indices] == 0)
        if not len(fresh):
            return good
        brightest = roots[torch.as_tensor(fresh).to(self._device)].amax((1, 2)).cpu().numpy()
        masked = brightest < 0
        dark = ~masked & (brightest <= _DARK_ROOT)
        self.unusable["masked"] += int(masked.sum())
        self.unusable["dark"] += int(dark.sum())
        good[fresh[masked | dark]] = False
        self._schedule.exclude(indices[~good])
        return good

    def _batch(self, indices: NDArray[np.int64], roots: Tensor) -> Batch:
        at = self._positions
        corner, fraction = at.corner_yx_px[indices], at.fraction_yx[indices]
        return Batch(corner, fraction, roots, self._roots.complete)

    def _visit(self, indices: NDArray[np.int64], roots: Tensor) -> None:
        """One step with the frames ``indices`` (B,), whose ``roots`` (B, N, N) these are."""
        settings, visits = self.settings, self._schedule.visits[indices]
        batch = self._batch(indices, roots)
        ready = (visits >= settings.position_start_visits) & (settings.position_step > 0)
        fresh = visits == 0
        if fresh.any():
            self._model.cover(batch.corner_yx_px[fresh])
        found = self._model.visit(
            batch,
            1 / (1 + self._schedule.settled[indices] / settings.settle_visits),
            probe=self.fits_probe,
            positions=bool(ready.any()),
        )
        if found.position_step_yx_px is not None:
            step = settings.position_step * found.position_step_yx_px[ready]
            self._positions.move(indices[ready], step)
        self._schedule.note(indices, found.misfit)

    def _finish_round(self) -> None:
        """What is done once for every frame visited."""
        self._since_round = 0
        self._model.finish_round()
        if self.settings.position_step:
            self._positions.centre()
            self._find_lost()
        else:
            self._choose_prior()

    def _choose_prior(self) -> None:
        """Ask some of the frames held out, spread over the scan, how much of the prior they want.

        Not where positions are corrected: theirs are not, and a blurred image would suit them.
        """
        held = len(self._held_yx_px)
        if not held:
            return
        count = min(held, compared_frames(self._size_px, _JUDGES))
        some = np.linspace(0, held - 1, count).astype(np.int64)
        roots = self._held_roots.get(some)
        lit = (roots.amax((1, 2)) > _DARK_ROOT).cpu().numpy()
        if lit.any():
            corner, fraction = self._positions.on_grid(self._held_yx_px[some[lit]])
            roots = roots[torch.as_tensor(lit).to(self._device)]
            batch = Batch(corner, fraction, roots, self._held_roots.complete)
            self._model.choose_prior(batch, self._schedule.common_misfit())

    def _find_lost(self) -> None:
        """Try frames that fit nowhere near at all positions that are allowed.

        The slope leads a frame that starts too far away to the wrong place, and it would stay.
        """
        visits = self._schedule.visits
        ready = visits >= _SEARCH_EVERY_VISITS * (1 + self._searches)
        ready &= (self._searches < _SEARCHES) & self._schedule.outliers(_LOST)
        lost = np.flatnonzero(ready)
        lost = lost[np.argsort(-self._schedule.misfit[lost])][:_LOST_AT_ONCE]
        for index in lost.tolist():
            self._searches[index] += 1
            roots = self._roots.get(np.array([index]))
            places = self._positions.around(index)
            corner, fraction = self._positions.on_grid(places)
            misfit = np.empty(len(places), np.float32)
            for start in range(0, len(places), self.settings.batch_frames):
                part = slice(start, start + self.settings.batch_frames)
                here = roots.expand(len(places[part]), -1, -1)
                batch = Batch(corner[part], fraction[part], here, self._roots.complete)
                misfit[part] = self._model.misfit(batch)
            best = int(misfit.argmin())
            if misfit[best] < _CLEARLY * self._schedule.misfit[index]:
                step = places[best] - self._positions.position_yx_px[index]
                self._positions.move(np.array([index]), step[None])

    @property
    def probe(self) -> Probe:
        """The probe as it is now, its modes orthogonal up to the steps since the last round."""
        return self._model.probe_held()

    @property
    def keys(self) -> NDArray[np.int64]:
        """Keys (n,) of the frames, in the order in which they were added."""
        return self._roots.keys

    @property
    def position_yx_px(self) -> NDArray[np.float64]:
        """Positions (n, 2) as they are now, canvas pixels."""
        return self._positions.position_yx_px.copy()

    @property
    def visits(self) -> NDArray[np.int64]:
        """How often each frame (n,) was visited; -1: it cannot be used."""
        return self._schedule.visits.copy()

    @property
    def misfit(self) -> NDArray[np.float32]:
        """Misfit of each frame (n,) before its last visit; NaN before the first.

        Squared differences of the roots in units of their variance, a pixel: about 1 where counts
        are many and the model is right.
        """
        return self._schedule.misfit.copy()

    @property
    def prior_weights(self) -> PriorWeights:
        """Of the image given to :meth:`start_from`, in :meth:`image`."""
        return self._model.prior_weights

    @property
    def repairs(self) -> int:
        """How often parts of the object left the range of numbers and were started anew."""
        return self._model.repairs

    @property
    def sweeps(self) -> float:
        """Visits of a frame on average."""
        visits = self._schedule.visits
        return float(visits[visits >= 0].mean()) if (visits >= 0).any() else 0.0

    def image(self) -> RefinedImage:
        """The object as it is now; NaN where no visited frame saw it, never anywhere else.

        See :meth:`hold_out` for what else than refinement is in it.
        """
        field = self._model.field
        weight, obj = field.weight.cpu().numpy(), self._model.object_held().cpu().numpy()
        seen = (weight >= MIN_WEIGHT) & np.isfinite(obj)
        return RefinedImage(
            np.where(seen, obj, np.complex64(complex(np.nan, np.nan))),
            np.where(seen, weight, np.float32(0)),
            field.corner_yx_px,
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """All that is needed to go on, as arrays; :meth:`from_state` is the way back."""
        field = self._model.field
        return {
            "object": field.object.cpu().numpy().copy(),
            "mean": field.mean.cpu().numpy().copy(),
            "anchor": field.anchor.cpu().numpy().copy(),
            "weight": field.weight.cpu().numpy().copy(),
            "corner_yx_px": np.array(field.corner_yx_px, np.int64),
            "probe": self._model.beam.modes.cpu().numpy().copy(),
            "keys": self.keys.copy(),
            "measured_yx_px": self._positions.measured_yx_px.copy(),
            "position_yx_px": self.position_yx_px,
            "visits": self.visits,
            "settled": self._schedule.settled.copy(),
            "misfit": self.misfit,
            "held_keys": self._held_roots.keys.copy(),
            "held_yx_px": self._held_yx_px.copy(),
            "prior_weights": np.array(astuple(self._model.prior_weights)),
        }

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, NDArray[Any]],
        frames: NDArray[Any] | ReadFrames,
        settings: RefineSettings | None = None,
        *,
        valid: NDArray[np.bool_] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> Refiner:
        """The refiner whose :meth:`state` this is, on the same frames."""
        made = cls(frames, Probe(state["probe"]), settings, valid=valid, device=device, seed=seed)
        # A state that is older than the mean and the prior goes on without them.
        made._model.field.restore(
            state["object"],
            state.get("mean", state["object"]),
            state["anchor"],
            state["weight"],
            state["corner_yx_px"],
        )
        if len(state["keys"]):
            made._take_in(state["keys"], state["measured_yx_px"], state["position_yx_px"])
            made._schedule.visits[:] = state["visits"]
            made._schedule.settled[:] = state["settled"]
            made._schedule.misfit[:] = state["misfit"]
        if "held_keys" in state:
            made.hold_out(state["held_keys"], state["held_yx_px"])
        if "prior_weights" in state:
            made._model.prior_weights = PriorWeights(*state["prior_weights"].tolist())
        return made


def _checked(
    keys: NDArray[np.integer[Any]], position_yx_px: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Positions (n, 2) of as many frames."""
    position = np.asarray(position_yx_px, np.float64).reshape(-1, 2)
    if len(keys) != len(position):
        raise GeometryError(f"{len(keys)} frames were given with {len(position)} positions")
    bad = np.flatnonzero(~np.isfinite(position).all(1))
    if len(bad):
        raise GeometryError(
            f"the position of frame {int(keys[bad[0]])} is not a number (one of {len(bad)}): "
            "leave such frames out until their positions are known"
        )
    return position


def _reader_of(frames: NDArray[Any]) -> ReadFrames:
    if frames.ndim != 3:
        raise GeometryError(f"frames are {frames.shape}; (n, N, N) is needed")
    return lambda keys: frames[keys]
