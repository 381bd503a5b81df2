"""Pairs that one process lends to another to predict, and what that one makes of them.

A scan's image (:mod:`ptycho_stream.reconstruct.scan_image`) lends and takes back; a helper makes a
small generation of the lent pairs alone. Canvases only ever add, so that the sum is the image which
one process would have made.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import MalformedMessage, ModelError
from ptycho_stream.reconstruct.generation import Generation, GenerationIdentity
from ptycho_stream.reconstruct.patches import PatchMaker
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.scan_pairs import ScanPairs
from ptycho_stream.scans.reader import ScanReader

_MADE = "made."


@dataclass(frozen=True, slots=True)
class Loan:
    """Pairs of a scan, by their ``indices`` int64 (n,) in its log, and what to make of them.

    ``identity`` is that of the generation that they are for, as JSON, ``generation`` its number.
    """

    scan_id: str
    generation: int
    identity: str
    indices: NDArray[np.int64]

    def encode(self) -> bytes:
        """As bytes, for :meth:`decode`."""
        told = (self.scan_id, self.generation, self.identity, self.indices.tobytes())
        return msgspec.msgpack.encode(told)

    @classmethod
    def decode(cls, data: bytes) -> Loan:
        """The loan that :meth:`encode` wrote.

        Raises:
            MalformedMessage: it did not write this.
        """
        try:
            told = msgspec.msgpack.decode(data, type=tuple[str, int, str, bytes])
            return cls(*told[:3], np.frombuffer(told[3], np.int64))
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
        recipe: what its image is made with, as this process would make it.
        loan: the first of the generation's.

    Raises:
        ModelError: what the loan's generation is made with is not what this process would take.
    """

    def __init__(self, reader: ScanReader, recipe: Recipe, loan: Loan) -> None:
        self.reader = reader
        self._pairs = ScanPairs(reader)
        self._loan = loan
        self._identity = GenerationIdentity.from_json(loan.identity)
        self._viewed = self._pairs.viewed
        wanted, identity = (recipe.model_sha256, recipe.probe_digest), self._identity
        if wanted != (identity.model_sha256, identity.probe_digest):
            raise ModelError(
                f"scan {reader.scan_id}: its image is made with another model or probe than this "
                "helper has loaded"
            )
        if reader.header.view.version != identity.view_version:
            raise ModelError(f"scan {reader.scan_id}: its view has changed")
        self._maker = PatchMaker(self._viewed, recipe, identity.photons)
        self._batch_frames = recipe.batch_frames

    def is_for(self, loan: Loan) -> bool:
        """Whether ``loan`` is of the same generation, and frames are looked at as they were."""
        mine = (self._loan.scan_id, self._loan.generation, self._loan.identity)
        return mine == (loan.scan_id, loan.generation, loan.identity) and self._viewed.is_current

    def make(self, loan: Loan, between: Callable[[], None]) -> Made:
        """Predict what is lent; ``between`` is called after each batch.

        Raises:
            GeometryError: the probe does not fit the scan.
            StoreError: the store cannot be read.
        """
        self._pairs.corrections.look()
        made = Generation(loan.generation, self._identity, self._maker.probe)
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
