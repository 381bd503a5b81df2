"""Read an image back from the NPZ file that :meth:`ptycho_stream.results.Image.save` wrote.

Exports and snapshots are such files; ``ptycho-stream export --image`` draws them again.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.results import (
    MISFIT_BIN_PX,
    Image,
    ImageState,
    MisfitTile,
    Tile,
    TileKey,
)

TILE_PX = 256


def load_image(path: Path) -> Image:
    """The image in ``path``, cut into tiles again.

    Raises:
        FileFormatError: the file is missing, unreadable, or no image of ours.
    """
    if not path.is_file():
        raise FileFormatError(f"there is no image file {path}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return Image(_content({key: held[key] for key in held.files}))
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, EOFError),
        zipfile.BadZipFile,
    ) as error:
        raise FileFormatError(
            f"{path} is not an image that ptycho-stream saved: {error!r}"
        ) from error


def _content(arrays: dict[str, NDArray[Any]]) -> ImageState:
    metadata: dict[str, Any] = json.loads(str(arrays["metadata"]))
    said: dict[str, Any] = metadata.pop("ptycho_stream")
    y_m, x_m = map(float, arrays["pixel_yx_m"])
    corner_yx = np.rint(arrays["origin_yx_m"] / (y_m, x_m)).astype(np.int64)
    return ImageState(
        scan_id=str(arrays["scan_id"]),
        state=said["state"],
        generation=said["generation"],
        pixel_yx_m=(y_m, x_m),
        tile_px=TILE_PX,
        tiles=cut(arrays["object"], arrays["weight"], (int(corner_yx[0]), int(corner_yx[1]))),
        misfit=_misfit(arrays, (y_m, x_m)),
        frame_numbers=arrays["frame_numbers"],
        position_yx_m=arrays["positions_yx_m"],
        probe=arrays["probe"],
        model=said["model"],
        layer=said["layer"],
        sweeps=said.get("sweeps", 0.0),
        counts=said["counts"],
        metadata=metadata,
        final=said["final"],
        trust=said["trust"],
        verdict=said.get("verdict", ""),
        reasons=tuple(said.get("reasons", ())),
        spread=said["spread"],
        collapsed=said["collapsed"],
    )


def _misfit(
    arrays: dict[str, NDArray[Any]], pixel_yx_m: tuple[float, float]
) -> dict[TileKey, MisfitTile]:
    if "misfit" not in arrays:
        return {}
    middle_yx_px = arrays["misfit_origin_yx_m"] / pixel_yx_m
    corner_yx = np.rint(middle_yx_px - (MISFIT_BIN_PX - 1) / 2).astype(np.int64)
    return cut_misfit(arrays["misfit"], (int(corner_yx[0]), int(corner_yx[1])))


def cut_misfit(
    excess_yx: NDArray[np.float32], corner_yx: tuple[int, int]
) -> dict[TileKey, MisfitTile]:
    """Tiles of a misfit map (h, w) that begins at the canvas pixel ``corner_yx``.

    Raises:
        ValueError: the array is no map, or begins between its bins.
    """
    top, left = corner_yx
    if excess_yx.ndim != 2 or top % MISFIT_BIN_PX or left % MISFIT_BIN_PX:
        raise ValueError(f"misfit {excess_yx.shape} at {corner_yx}")
    side = TILE_PX // MISFIT_BIN_PX
    top, left = top // MISFIT_BIN_PX, left // MISFIT_BIN_PX
    tiles: dict[TileKey, MisfitTile] = {}
    for key, inside, outside in _parts(excess_yx.shape, (top, left), side):
        excess = np.full((side, side), np.nan, np.float32)
        excess[inside] = excess_yx[outside]
        tiles[key] = MisfitTile(1, excess)
    return tiles


def _parts(
    shape: tuple[int, ...], corner_yx: tuple[int, int], side: int
) -> Iterator[tuple[TileKey, tuple[slice, slice], tuple[slice, slice]]]:
    """How an array that begins at ``corner_yx`` falls into tiles: key, place in tile, in array."""
    (top, left), (height, width) = corner_yx, shape
    for ty in range(top // side, -(-(top + height) // side)):
        for tx in range(left // side, -(-(left + width) // side)):
            y, x = ty * side - top, tx * side - left
            rows = slice(max(y, 0), min(y + side, height))
            columns = slice(max(x, 0), min(x + side, width))
            inside = (
                slice(rows.start - y, rows.stop - y),
                slice(columns.start - x, columns.stop - x),
            )
            yield (ty, tx), inside, (rows, columns)


def cut(
    object_yx: NDArray[np.complex64], weight_yx: NDArray[np.float32], corner_yx: tuple[int, int]
) -> dict[TileKey, Tile]:
    """Tiles of a stitched image (H, W), whose [0, 0] is the canvas pixel ``corner_yx``.

    Raises:
        ValueError: the arrays are no image.
    """
    if object_yx.ndim != 2 or object_yx.shape != weight_yx.shape:
        raise ValueError(f"object {object_yx.shape} and weight {weight_yx.shape}")
    tiles: dict[TileKey, Tile] = {}
    for key, inside, outside in _parts(object_yx.shape, corner_yx, TILE_PX):
        obj = np.full((TILE_PX, TILE_PX), complex(np.nan, np.nan), np.complex64)
        weight = np.zeros((TILE_PX, TILE_PX), np.float32)
        obj[inside] = object_yx[outside]
        weight[inside] = weight_yx[outside]
        if weight.any():
            tiles[key] = Tile(1, obj, weight)
    return tiles
