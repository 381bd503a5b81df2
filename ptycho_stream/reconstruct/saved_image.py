"""An image's state on disk: generations and refined layer of a scan in one file beside its frames.

Written whole or not at all, so that canvas and pairs done always belong together; read when a scan
is opened again. Used by the scan image and by the stage that saves it in a thread.
"""

from __future__ import annotations

import logging
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.atomic_file import sync_path
from ptycho_stream.errors import StoreError
from ptycho_stream.reconstruct.generation import Generation
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import positions_of

STATE_FILE = "reconstruct.npz"

_log = logging.getLogger(__name__)
_UNREADABLE = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, EOFError),
    *(MemoryError, NotImplementedError, RuntimeError, SyntaxError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)
"""What numpy, zipfile and this module raise over a file that was altered: encrypted members and
unknown compressions (RuntimeError, NotImplementedError), absurd shapes (MemoryError) among it."""
_CURRENT, _FOLLOWING, _REFINED = "current.", "following.", "refined."


def image_state(
    current: Generation | None,
    following: Generation | None,
    refined: dict[str, NDArray[Any]] | None,
) -> dict[str, NDArray[Any]]:
    """Generations and refined layer as arrays of their own, for :func:`write_state` in a thread."""
    arrays = {_REFINED + key: value for key, value in (refined or {}).items()}
    for prefix, generation in ((_CURRENT, current), (_FOLLOWING, following)):
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
        sync_path(directory)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(
            f"cannot save the image's state to {path}: {error.strerror}; free space there. The "
            "frames are safe; after a restart the image is made again from them"
        ) from error


@dataclass(frozen=True, slots=True)
class SavedImage:
    """Both generations saved with a scan and what its refined layer told; None: there is none."""

    current: Generation | None = None
    following: Generation | None = None
    refined: dict[str, NDArray[Any]] | None = None


def load_state(reader: ScanReader, device: torch.device) -> SavedImage:
    """What is saved with a scan, as far as it is usable; canvases go to ``device``.

    The state is derived data: a damaged one, or one whose pairs a power cut took from the store,
    costs the time to make it again, nothing else.
    """
    path = reader.directory / STATE_FILE
    try:
        arrays = _arrays(path)
        refined = {k.removeprefix(_REFINED): v for k, v in arrays.items() if k.startswith(_REFINED)}
        return SavedImage(
            _generation(reader, arrays, _CURRENT, device),
            _generation(reader, arrays, _FOLLOWING, device),
            refined or None,
        )
    except FileNotFoundError:
        return SavedImage()
    except _UNREADABLE as error:
        _log.warning("the saved image %s is unusable (%s) and is made again", path, error)
        path.rename(path.with_suffix(".damaged"))
        return SavedImage()


def state_problem(directory: Path) -> str:
    """What is wrong with the file of a scan's saved image; empty: nothing, or there is none."""
    try:
        _arrays(directory / STATE_FILE)
    except FileNotFoundError:
        return ""
    except _UNREADABLE as error:
        return f"it cannot be read: {error}"
    return ""


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
        return {key: held[key] for key in held.files}


def _generation(
    reader: ScanReader, arrays: dict[str, NDArray[Any]], prefix: str, device: torch.device
) -> Generation | None:
    state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    if not state:
        return None
    added, frames, pairs = state["added"], state["frames"], reader.pairs()
    taken = np.concatenate([added, state["skipped"], state["waiting"]])
    if len(taken) and taken.max() >= len(pairs):
        raise ValueError("it holds more pairs than the store")
    stored = pairs[added]
    position_yx_m = positions_of(stored)
    if not np.array_equal(stored["number"], frames["number"]) or not np.array_equal(
        position_yx_m, frames["position_yx_m"]
    ):
        raise ValueError("its pairs are not those of the store")
    return Generation.from_state(state, device)
