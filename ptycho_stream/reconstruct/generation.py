"""One version of a scan's image: a canvas and the pairs in it, all made with one recipe.

A change of model, probe, view, photon count or pixel size makes old and new patches incomparable,
so it opens a new generation with a canvas of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.reconstruct.canvas import Canvas, half_of
from ptycho_stream.reconstruct.collapse import SpreadWatch
from ptycho_stream.reconstruct.device_canvas import canvas_on
from ptycho_stream.reconstruct.ledger import PairLedger
from ptycho_stream.reconstruct.patches import Patches


@dataclass(frozen=True, slots=True)
class GenerationIdentity:
    """What an image is made with.  Patches of equal identity may be added together.

    Attributes:
        software: version of this package; the next one may predict otherwise.
        probe_digest: of the probe that the image began with.
        photons: of the unattenuated beam, a frame.
        photon_frames: how many frames that was measured from; 0: it is from the settings.
        corrected_below: corrections of positions up to this pair are in the image.
        neighbours: among so many a frame's group was sought; 0 where the network takes single ones.
        probe_frames: to so many frames the probe was fitted, or refined with them, before the
            network got it; 0: it is the one that the image began with.
        probe_settled: whether it is so good that there will be no other.
        probe_finding: what is wrong with the one that the image began with, in words; empty: it is
            not known.
    """

    software: str
    model: str
    model_sha256: str
    probe_digest: str
    view_version: int
    photons: float
    photon_frames: int
    pixel_yx_m: tuple[float, float]
    tile_px: int
    corrected_below: int
    neighbours: int
    probe_frames: int = 0
    probe_settled: bool = False
    probe_finding: str = ""

    @classmethod
    def from_json(cls, text: str) -> GenerationIdentity:
        """Read what :meth:`to_json` wrote."""
        values = json.loads(text)
        values["pixel_yx_m"] = tuple(values["pixel_yx_m"])
        return cls(**values)

    def to_json(self) -> str:
        """As JSON text, for the saved state."""
        return json.dumps(asdict(self))


@dataclass(slots=True)
class Generation:
    """A canvas, the pairs in it, and the probe (modes, N, N) complex64 that made them.

    The canvas lies on ``canvas_device``, where the patches are made.
    """

    number: int
    identity: GenerationIdentity
    probe: NDArray[np.complex64]
    canvas_device: InitVar[torch.device | str] = "cpu"
    canvas: Canvas = field(init=False)
    ledger: PairLedger = field(default_factory=PairLedger)
    spread: SpreadWatch = field(default_factory=SpreadWatch)
    _frames: list[NDArray[Any]] = field(default_factory=list[NDArray[Any]])

    def __post_init__(self, canvas_device: torch.device | str) -> None:
        self.canvas = canvas_on(canvas_device, self.identity.tile_px)

    def add(self, indices: NDArray[np.int64], pairs: NDArray[Any], patches: Patches) -> None:
        """Stitch the patches of ``pairs`` (B,), whose ``indices`` (B,) in the log these are.

        Patches that are no numbers never reach the canvas; their pairs are skipped.
        """
        self.spread.add(patches.verdicts)
        finite = patches.verdicts.finite
        if not finite.all():
            self.ledger.skip(indices[~finite])
            indices, pairs, patches = indices[finite], pairs[finite], patches.only(finite)
        self.canvas.add(
            patches.object_yx, patches.weight_yx, patches.corner_yx_px, half_of(pairs["number"])
        )
        self.ledger.add(indices)
        self._frames.append(_frames_of(pairs["number"], pairs["y_m"], pairs["x_m"]))

    def merge(self, other: Generation) -> None:
        """Take in the patches of another one of equal identity, made of other pairs."""
        self.spread.merge(other.spread)
        self.canvas.merge(other.canvas)
        self.ledger.add(other.ledger.added)
        self.ledger.skip(other.ledger.skipped)
        self._frames.append(other._joined())

    @property
    def frame_numbers(self) -> NDArray[np.int64]:
        """Numbers (n,) of the frames in the image, in the order in which they were added."""
        return self._joined()["number"]

    def _joined(self) -> NDArray[Any]:
        if len(self._frames) != 1:
            self._frames[:] = [np.concatenate([np.empty(0, _FRAME), *self._frames])]
        return self._frames[0]

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for one file."""
        return {
            **self.canvas.state(),
            "number": np.array(self.number),
            "identity": np.array(self.identity.to_json()),
            "probe": self.probe,
            "added": self.ledger.added,
            "skipped": self.ledger.skipped,
            "waiting": self.ledger.waiting,
            "spread": self.spread.history,
            "frames": self._joined(),
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, NDArray[Any]], device: torch.device | str = "cpu"
    ) -> Generation:
        """The generation whose :meth:`state` this is, its canvas on ``device``."""
        identity = GenerationIdentity.from_json(str(state["identity"]))
        generation = cls(int(state["number"]), identity, state["probe"], device)
        generation.canvas.restore(state)
        generation.ledger = PairLedger(state["added"], state["skipped"], state["waiting"])
        generation.spread = SpreadWatch(state["spread"])
        generation._frames = [state["frames"]]
        return generation


_FRAME = np.dtype([("number", np.int64), ("position_yx_m", np.float64, 2)])


def _frames_of(
    number: NDArray[Any], y_m: NDArray[np.float64], x_m: NDArray[np.float64]
) -> NDArray[Any]:
    frames = np.empty(len(number), _FRAME)
    frames["number"] = number
    frames["position_yx_m"][:, 0] = y_m
    frames["position_yx_m"][:, 1] = x_m
    return frames
