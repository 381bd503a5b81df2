"""Pairs that one process lends to another to predict, and what that one makes of them.

A scan's image (:mod:`ptycho_stream.reconstruct.scan_image`) lends and takes back; a helper makes a
small generation of the lent pairs alone. Canvases only ever add, so that the sum is the image which
one process would have made.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import GeometryError, MalformedMessage, ModelError
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.generation import Generation, GenerationIdentity
from ptycho_stream.reconstruct.patches import PatchMaker
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.scan_pairs import ScanPairs
from ptycho_stream.scans.reader import ScanReader

_MADE = "made."
_Told = tuple[str, int, str, bytes, tuple[tuple[int, int, int], bytes] | None]


@dataclass(frozen=True, slots=True)
class Loan:
    """Pairs of a scan, by their ``indices`` int64 (n,) in its log, and what to make of them.

    Attributes:
        scan_id: of the scan.
        generation: number of the one that they are for.
        identity: of that, as JSON.
        indices: int64 (n,).
        probe: complex64 (modes, N, N), of that; None for who has it of an earlier loan. Which probe
            it is nobody else can know: that of the scan before may have been saved since.
    """

    scan_id: str
    generation: int
    identity: str
    indices: NDArray[np.int64]
    probe: NDArray[np.complex64] | None

    @property
    def purpose(self) -> tuple[str, int, str]:
        """What it is for: loans of one purpose are made with one probe."""
        return self.scan_id, self.generation, self.identity

    def to_who_has_the_probe(self) -> Loan:
        """The same loan without its probe."""
        return replace(self, probe=None)

    def encode(self) -> bytes:
        """As bytes, for :meth:`decode`."""
        probe = None if self.probe is None else (self.probe.shape, self.probe.tobytes())
        return msgspec.msgpack.encode((*self.purpose, self.indices.tobytes(), probe))

    @classmethod
    def decode(cls, data: bytes) -> Loan:
        """The loan that :meth:`encode` wrote.

        Raises:
            MalformedMessage: it did not write this.
        """
        try:
            scan_id, number, identity, indices, held = msgspec.msgpack.decode(data, type=_Told)
            probe = None
            if held is not None:
                probe = np.frombuffer(held[1], np.complex64).reshape(held[0])
            return cls(scan_id, number, identity, np.frombuffer(indices, np.int64), probe)
        except (msgspec.MsgspecError, ValueError) as error:
            raise MalformedMessage(f"not a loan: {error}") from error


@dataclass(frozen=True, slots=True)
class Made:
    """What was made of a loan.

    Attributes:
        generation: of the lent pairs alone.
        damaged: slots of frames that failed their checksum and were left out.
        collapsed: so many patches are in it though they cannot be true.
        not_finite: so many were no numbers and were left out.
    """

    generation: Generation
    damaged: list[int]
    collapsed: int
    not_finite: int

    def encode(self) -> bytes:
        """As bytes, for :meth:`decode`."""
        file = io.BytesIO()
        arrays: dict[str, Any] = {
            _MADE + key: value for key, value in self.generation.state().items()
        }
        arrays["damaged"] = np.array(self.damaged, np.int64)
        arrays["bad"] = np.array([self.collapsed, self.not_finite], np.int64)
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def decode(cls, data: bytes) -> Made:
        """What :meth:`encode` wrote.

        Raises:
            MalformedMessage: it did not write this.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as held:
                arrays = {key: held[key] for key in held.files}
            state = {k.removeprefix(_MADE): v for k, v in arrays.items() if k.startswith(_MADE)}
            collapsed, not_finite = arrays["bad"].tolist()
            generation = Generation.from_state(state)
            return cls(generation, arrays["damaged"].tolist(), collapsed, not_finite)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise MalformedMessage(f"not what is made of a loan: {error!r}") from error


class LentScan:
    """A scan as a helper holds it, for loans of one generation.

    Args:
        reader: of the scan.
        recipe: network and device; the probe is the loan's.
        loan: the first of the generation's, with its probe.

    Raises:
        ModelError: the loan's generation is made with another network than this process has.
        MalformedMessage: it came without a probe.
        GeometryError: it is of another view, or its probe does not fit the scan.
    """

    def __init__(self, reader: ScanReader, recipe: Recipe, loan: Loan) -> None:
        self.reader = reader
        self._pairs = ScanPairs(reader)
        self._purpose = loan.purpose
        self._identity = GenerationIdentity.from_json(loan.identity)
        self._viewed = self._pairs.viewed
        if recipe.model_sha256 != self._identity.model_sha256:
            raise ModelError(
                f"scan {reader.scan_id}: its image is made with another model than this helper has "
                "loaded"
            )
        if loan.probe is None:
            raise MalformedMessage(f"scan {reader.scan_id}: the loan came without its probe")
        if reader.header.view.version != self._identity.view_version:
            raise GeometryError(f"scan {reader.scan_id}: its view has changed")
        recipe = replace(recipe, probe=Probe(loan.probe))
        self._maker = PatchMaker(self._viewed, recipe, self._identity.photons)
        self._batch_frames, self._device = recipe.batch_frames, recipe.device

    def is_for(self, loan: Loan) -> bool:
        """Whether ``loan`` is of the same generation, and frames are looked at as they were."""
        return self._purpose == loan.purpose and self._viewed.is_current

    def make(self, loan: Loan, between: Callable[[], None]) -> Made:
        """Predict what is lent; ``between`` is called after each batch.

        Raises:
            GeometryError: the probe does not fit the scan.
            StoreError: the store cannot be read.
        """
        self._pairs.corrections.look()
        made = Generation(loan.generation, self._identity, self._maker.probe, self._device)
        damaged = list[int]()
        collapsed = not_finite = 0
        for start in range(0, len(loan.indices), self._batch_frames):
            batch = loan.indices[start : start + self._batch_frames]
            indices, pairs = self._pairs.sift(made, batch, damaged.extend)
            if len(pairs):
                patches = self._maker.make(pairs, self._identity.pixel_yx_m)
                made.add(indices, pairs, patches)
                collapsed += int(patches.verdicts.collapsed.sum())
                not_finite += int((~patches.verdicts.finite).sum())
            between()
        return Made(made, damaged, collapsed, not_finite)
