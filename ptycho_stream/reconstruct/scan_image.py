"""The image of one scan: reads pairs from the store, predicts patches, stitches them.

The reconstruct stage drives one for each open scan; a program may drive one over a stored scan
without any daemon.  Where it stands is saved in one file beside the scan's frames.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream import __version__
from ptycho_stream.errors import StoreError
from ptycho_stream.reconstruct.canvas import TileIndex
from ptycho_stream.reconstruct.corrections import Corrections
from ptycho_stream.reconstruct.generation import Generation, GenerationIdentity
from ptycho_stream.reconstruct.patches import PHOTON_FRAMES, PatchMaker, measured_photons
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.results import ImageState, Tile
from ptycho_stream.scans.reader import ScanReader

STATE_FILE = "reconstruct.npz"

_log = logging.getLogger(__name__)
_CURRENT, _FOLLOWING = "current.", "following."


class ScanImage:
    """A scan's image as it grows.

    ``current`` is what subscribers see.  After a change of recipe, view or positions ``following``
    is a new generation, filled from the store while no new pair waits for ``current``; it takes
    over when it covers as many pairs.

    Args:
        reader: of the scan.
        recipe: network, probe and device.
        tile_px: side of the canvas' tiles.
    """

    def __init__(self, reader: ScanReader, recipe: Recipe, tile_px: int) -> None:
        self.reader = reader
        self._tile_px = tile_px
        self._tiles: dict[TileIndex, Tile] = {}
        self._makers: dict[int, PatchMaker] = {}
        self._corrections = Corrections(reader)
        self._recipe = recipe
        self.current, self.following = _load_state(reader)

    def use(self, recipe: Recipe) -> None:
        """Go on with ``recipe``; the next step opens a generation for it."""
        self._recipe = recipe

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
        """Whether :meth:`step` would do something."""
        pairs = self.reader.pair_count
        if not pairs or self.problem:
            return False
        newest = self._newest
        return newest is None or newest.ledger.count < pairs or not self._is_present(newest)

    @property
    def backlog(self) -> int:
        """How many pairs no subscriber has seen."""
        return self.reader.pair_count - (self.current.ledger.count if self.current else 0)

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
        """Reconstruct one batch; there must be work.

        Args:
            limit: most pairs in the batch.
            on_damaged: told the slots of stored frames that fail their checksum and are left out.

        Returns:
            ``paired_monotonic_ns`` (n,) of the pairs that subscribers will see for the first time.

        Raises:
            GeometryError: the probe does not fit the scan, or the view shows nothing.
            StoreError: the store cannot be read.
        """
        self._corrections.look()
        newest = self._newest
        if newest is None or newest.number not in self._makers or not self._is_present(newest):
            self._open_generation(newest)
        assert self.current is not None
        if self.current.number in self._makers and self.backlog:
            return self._extend(self.current, limit, on_damaged)
        if self.following is None:
            return np.empty(0, np.int64)
        shown = self._extend(self.following, limit, on_damaged)
        if self.following.ledger.count < self.current.ledger.count:
            return np.empty(0, np.int64)
        self._makers.pop(self.current.number, None)
        self.current, self.following, self._tiles = self.following, None, {}
        return shown

    @property
    def _newest(self) -> Generation | None:
        return self.following or self.current

    def _open_generation(self, newest: Generation | None) -> None:
        """Make the newest generation one of the present recipe, view and positions."""
        frames = self._photon_frames(newest)
        if self._recipe.photons is not None:
            photons = self._recipe.photons
        elif newest is not None and newest.identity.photon_frames == frames:
            photons = newest.identity.photons
        else:
            photons = measured_photons(self.reader, frames)
        identity = self._wanted(newest, photons)
        maker = PatchMaker(self.reader, self._recipe, photons)
        if newest is None or newest.identity != identity:
            number = 1 if newest is None else newest.number + 1
            newest = Generation(number, identity, maker.probe)
        if self.current is not None and self.current.identity == identity:
            newest, self.following = self.current, None
        elif self.current is None or self.current.ledger.count <= self._recipe.batch_frames:
            self.current, self.following, self._tiles = newest, None, {}  # soon made again
        else:
            self.following = newest
        self._makers[newest.number] = maker

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
        )

    def _photon_frames(self, held: Generation | None) -> int:
        """How many frames, the first of the scan, the photon count should be measured from.

        Always the same ones, so that it does not hang on timing: an image that had to begin with
        fewer is made again.  0 where the settings tell the photons.
        """
        if self._recipe.photons is not None:
            return 0
        frames = min(self.reader.committed, PHOTON_FRAMES)
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
        due = held.ledger.count >= pairs and self._corrections.any_from(below)
        return pairs if due else below

    def _extend(
        self, target: Generation, limit: int, on_damaged: Callable[[list[int]], None]
    ) -> NDArray[np.int64]:
        indices = target.ledger.pending(self.reader.pair_count, limit)
        if not len(indices):
            return indices
        pairs = self.reader.pairs(int(indices[0]), int(indices[-1]) + 1)[indices - indices[0]]
        damaged = self.reader.verify(pairs["slot"])
        if damaged:
            on_damaged(damaged)
        usable = (pairs["flags"] == 0) & ~np.isin(pairs["slot"], damaged)
        usable &= self._corrections.usable(indices, pairs, target.identity.corrected_below)
        target.ledger.skip(indices[~usable])
        pairs = pairs[usable]
        if len(pairs):
            patches = self._makers[target.number].make(pairs, target.identity.pixel_yx_m)
            target.add(indices[usable], pairs, patches)
        return pairs["paired_monotonic_ns"].astype(np.int64)

    def image(self, final: bool) -> ImageState:
        """What subscribers are to see now; without tiles before the first patch."""
        header, generation = self.reader.header, self.current
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
        for index, tile in generation.canvas.tiles.items():
            known = self._tiles.get(index)
            if known is None or known.version != tile.version:
                object_yx, weight_yx = generation.canvas.object_tile(index)
                self._tiles[index] = Tile(tile.version, object_yx, weight_yx)
        return ImageState(
            generation=generation.number,
            layer="predicted",
            pixel_yx_m=generation.identity.pixel_yx_m,
            tiles=dict(self._tiles),
            frame_numbers=generation.frame_numbers,
            position_yx_m=generation.position_yx_m,
            probe=generation.probe,
            model=generation.identity.model,
            **told,
        )

    def counts(self) -> dict[str, int]:
        """Frames committed, paired, reconstructed and left out, and the ingest's own accounting."""
        header, generation = self.reader.header, self.current
        expected = {} if header.expected_frames is None else {"expected": header.expected_frames}
        return {
            **header.counts,
            **expected,
            "committed": self.reader.committed,
            "paired": self.reader.pair_count,
            "reconstructed": 0 if generation is None else len(generation.ledger.added),
            "skipped": 0 if generation is None else len(generation.ledger.skipped),
        }

    def save(self) -> None:
        """Write both generations into one file, whole or not at all.

        Raises:
            StoreError: the disk refused.
        """
        write_state(self.reader.directory, self.snapshot())

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """Both generations as arrays of their own, for :func:`write_state` in another thread."""
        arrays: dict[str, NDArray[Any]] = {}
        for prefix, generation in ((_CURRENT, self.current), (_FOLLOWING, self.following)):
            if generation is not None:
                arrays |= {prefix + key: value for key, value in generation.state().items()}
        return arrays


def write_state(directory: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a snapshot of a scan's image into the scan's folder, whole or not at all.

    Raises:
        StoreError: the disk refused.
    """
    path = directory / STATE_FILE
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(
            f"cannot save the image's state to {path}: {error.strerror}; free space there. The "
            "frames are safe; after a restart the image is made again from them"
        ) from error


def _load_state(reader: ScanReader) -> tuple[Generation | None, Generation | None]:
    """Both generations saved with a scan; None where there is none, or no usable one.

    The state is derived data: a damaged one, or one whose pairs a power cut took from the store,
    costs the time to make it again, nothing else.
    """
    path = reader.directory / STATE_FILE
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            arrays = {key: held[key] for key in held.files}
        return _generation(reader, arrays, _CURRENT), _generation(reader, arrays, _FOLLOWING)
    except FileNotFoundError:
        return None, None
    except (ValueError, TypeError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        _log.warning("the saved image %s is unusable (%s) and is made again", path, error)
        path.rename(path.with_suffix(".damaged"))
        return None, None


def _generation(
    reader: ScanReader, arrays: dict[str, NDArray[Any]], prefix: str
) -> Generation | None:
    state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    if not state:
        return None
    added, frames, pairs = state["added"], state["frames"], reader.pairs()
    if max((int(part.max()) for part in (added, state["skipped"]) if len(part)), default=-1) >= len(
        pairs
    ):
        raise ValueError("it holds more pairs than the store")
    stored = pairs[added]
    position_yx_m = np.stack([stored["y_m"], stored["x_m"]], axis=1)
    if not np.array_equal(stored["number"], frames["number"]) or not np.array_equal(
        position_yx_m, frames["position_yx_m"]
    ):
        raise ValueError("its pairs are not those of the store")
    return Generation.from_state(state)
