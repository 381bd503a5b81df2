"""Read an image back from the NPZ file that :meth:`ptycho_stream.results.Image.save` wrote.

Exports and snapshots are such files; ``ptycho-stream export --image`` draws them again.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.results import Image, ImageState, Tile, TileKey

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
    (top, left), (height, width) = corner_yx, object_yx.shape
    for ty in range(top // TILE_PX, -(-(top + height) // TILE_PX)):
        for tx in range(left // TILE_PX, -(-(left + width) // TILE_PX)):
            y, x = ty * TILE_PX - top, tx * TILE_PX - left
            rows = slice(max(y, 0), min(y + TILE_PX, height))
            columns = slice(max(x, 0), min(x + TILE_PX, width))
            inside = (
                slice(rows.start - y, rows.stop - y),
                slice(columns.start - x, columns.stop - x),
            )
            obj = np.full((TILE_PX, TILE_PX), complex(np.nan, np.nan), np.complex64)
            weight = np.zeros((TILE_PX, TILE_PX), np.float32)
            obj[inside] = object_yx[rows, columns]
            weight[inside] = weight_yx[rows, columns]
            if weight.any():
                tiles[ty, tx] = Tile(1, obj, weight)
    return tiles
