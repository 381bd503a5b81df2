"""One version of a scan's image: a canvas and the pairs in it, all made with one recipe.

A change of model, probe, view, photon count or pixel size makes old and new patches incomparable,
so it opens a new generation with a canvas of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.reconstruct.canvas import Canvas
from ptycho_stream.reconstruct.ledger import PairLedger


@dataclass(frozen=True, slots=True)
class GenerationIdentity:
    """What an image is made with.  Patches of equal identity may be added together."""

    model: str
    model_sha256: str
    probe_digest: str
    view_version: int
    photons: float
    pixel_yx_m: tuple[float, float]
    tile_px: int

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
    """A canvas, the pairs in it, and the probe (modes, N, N) complex64 that made them."""

    number: int
    identity: GenerationIdentity
    probe: NDArray[np.complex64]
    canvas: Canvas = field(init=False)
    ledger: PairLedger = field(default_factory=PairLedger)

    def __post_init__(self) -> None:
        self.canvas = Canvas(self.identity.tile_px)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for one file."""
        return {
            **self.canvas.state(),
            "number": np.array(self.number),
            "identity": np.array(self.identity.to_json()),
            "probe": self.probe,
            "added": self.ledger.added,
            "skipped": self.ledger.skipped,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray[Any]]) -> Generation:
        """The generation whose :meth:`state` this is."""
        identity = GenerationIdentity.from_json(str(state["identity"]))
        generation = cls(int(state["number"]), identity, state["probe"])
        generation.canvas = Canvas.from_state(state, identity.tile_px)
        generation.ledger = PairLedger(state["added"], state["skipped"])
        return generation
