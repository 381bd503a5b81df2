"""Images that are kept with their scans, as they are asked for over the control socket.

The reconstruct stage keeps the final image of a scan and its snapshots; the supervisor reads them
for the command ``image``, piece by piece and binned, so that replies and memory are bounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.bins import binned_window
from ptycho_stream.errors import ControlError, FileFormatError
from ptycho_stream.files.npz_members import map_npz
from ptycho_stream.results import MISFIT_BIN_PX
from ptycho_streamd.snapshots import FOLDER

IMAGE_FILE = "image.npz"
"""The final image of a scan, in its folder."""
MAX_PIECE_PX = 1 << 18
MAX_PROBE_VALUES = 1 << 20
MAX_POSITIONS = 20_000
_WORDS = (
    *("state", "final", "generation", "layer", "sweeps", "model", "counts"),
    *("trust", "verdict", "reasons", "spread", "collapsed"),
)


def stored_image(folder: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Answer the command ``image`` of a scan with the folder ``folder``.

    Args:
        folder: of the scan.
        arguments: ``scan_id``, ``snapshot`` (None: the final image), ``parts``, and of the part
            ``object`` the window ``corner_yx_px``, ``shape_yx``, ``bin_px``.

    Raises:
        ControlError: ``not_found``: there is no such image; ``bad_arguments``: the window is too
            large.
        FileFormatError: the file is damaged.
    """
    snapshot: str | None = arguments["snapshot"]
    path = folder / IMAGE_FILE if snapshot is None else folder / FOLDER / f"{snapshot}.npz"
    if not path.is_file():
        raise ControlError("not_found", _absence(arguments["scan_id"], snapshot))
    held = map_npz(path, "image of a scan")
    try:
        return _described(held, arguments) | {
            part: _PARTS[part](held, arguments) for part in arguments["parts"]
        }
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise FileFormatError(f"{path} is no image that ptycho-stream saved: {error!r}") from error


def _absence(scan_id: str, snapshot: str | None) -> str:
    if snapshot is not None:
        return f"scan {scan_id} has no snapshot {snapshot!r}: `ctl snapshots {scan_id}` lists them"
    return (
        f"no finished image is kept with scan {scan_id}: while it is being made it comes over the "
        "results socket; `ctl scan` says how the scan is"
    )


def _described(held: Mapping[str, NDArray[Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads(str(held["metadata"]))
    said: dict[str, Any] = metadata.pop("ptycho_stream")
    return {
        "scan_id": str(held["scan_id"]),
        "snapshot": arguments["snapshot"],
        **{word: said[word] for word in _WORDS},
        "metadata": metadata,
        "frames": len(held["frame_numbers"]),
        "pixel_yx_m": held["pixel_yx_m"].tolist(),
        "corner_yx_px": list(_corner(held)),
        "shape_yx": list(held["object"].shape),
        "modes": len(held["probe"]),
    }


def _corner(held: Mapping[str, NDArray[Any]]) -> tuple[int, int]:
    """Canvas pixel of the object's [0, 0]."""
    corner = np.rint(held["origin_yx_m"] / held["pixel_yx_m"])
    return int(corner[0]), int(corner[1])


def _object(held: Mapping[str, NDArray[Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The window of the object, in bins that are counted from the canvas' pixel (0, 0)."""
    top_left, (height, width) = _corner(held), held["object"].shape
    top, left = arguments["corner_yx_px"] or top_left
    rest = top_left[0] + height - top, top_left[1] + width - left
    bin_px: int = arguments["bin_px"] or _smallest_bin(rest)
    corner = bin_px * (top // bin_px), bin_px * (left // bin_px)
    ends = top_left[0] + height - corner[0], top_left[1] + width - corner[1]
    rows, columns = arguments["shape_yx"] or (-(-ends[0] // bin_px), -(-ends[1] // bin_px))
    shape = max(rows, 1), max(columns, 1)
    if shape[0] * shape[1] > MAX_PIECE_PX:
        raise ControlError(
            "bad_arguments",
            f"a piece of {shape[0]} x {shape[1]} pixels; at most {MAX_PIECE_PX} at once: ask for "
            "a smaller shape_yx, or a larger bin_px",
        )
    object_yx = binned_window(held["object"], top_left, corner, shape, bin_px)
    weight_yx = binned_window(held["weight"], top_left, corner, shape, bin_px)
    return {
        "corner_yx_px": list(corner),
        "bin_px": bin_px,
        "shape_yx": list(shape),
        "object": object_yx.astype("<c8").tobytes(),
        "weight": np.nan_to_num(weight_yx).astype("<f4").tobytes(),
    }


def _smallest_bin(shape: tuple[int, int]) -> int:
    """With which so many pixels make a piece."""
    bin_px = 1
    while -(-shape[0] // bin_px + 1) * -(-shape[1] // bin_px + 1) > MAX_PIECE_PX:
        bin_px *= 2
    return bin_px


def _misfit(held: Mapping[str, NDArray[Any]], _arguments: Mapping[str, Any]) -> Any:
    """The whole misfit map, binned further where it is large; None: there is none."""
    if "misfit" not in held:
        return None
    middle_yx_px = held["misfit_origin_yx_m"] / held["pixel_yx_m"]
    top, left = np.rint(middle_yx_px / MISFIT_BIN_PX - 0.5).astype(int).tolist()
    excess = held["misfit"]
    further = _smallest_bin(excess.shape)
    corner = further * (top // further), further * (left // further)
    ends = top + excess.shape[0] - corner[0], left + excess.shape[1] - corner[1]
    shape = -(-ends[0] // further), -(-ends[1] // further)
    binned = binned_window(excess, (top, left), corner, shape, further)
    return {
        "corner_yx_px": [at * MISFIT_BIN_PX for at in corner],
        "bin_px": further * MISFIT_BIN_PX,
        "shape_yx": list(shape),
        "excess": binned.astype("<f4").tobytes(),
    }


def _probe(held: Mapping[str, NDArray[Any]], _arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The first modes, as many as fit."""
    probe = held["probe"]
    modes = max(1, MAX_PROBE_VALUES // max(probe[0].size, 1)) if len(probe) else 0
    return {"shape": list(probe[:modes].shape), "probe": probe[:modes].astype("<c8").tobytes()}


def _positions(held: Mapping[str, NDArray[Any]], _arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Where frames were taken, evenly spread ones of very many."""
    position_yx_m = held["positions_yx_m"]
    step = max(1, -(-len(position_yx_m) // MAX_POSITIONS))
    return {
        "step": step,
        "frame_numbers": held["frame_numbers"][::step].astype("<i8").tobytes(),
        "position_yx_m": position_yx_m[::step].astype("<f8").tobytes(),
    }


_PARTS: dict[str, Callable[[Mapping[str, NDArray[Any]], Mapping[str, Any]], Any]] = {
    "object": _object,
    "misfit": _misfit,
    "probe": _probe,
    "positions": _positions,
}
