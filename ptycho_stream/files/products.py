"""Write a result into the file that somebody's next program opens: the one door for all formats.

Used by the daemon's exports and ``ptycho-stream export`` and ``reconstruct``. ``docs/files.md``
says what is in each format and how its programs open it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, get_args

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.cxi_output import save_cxi
from ptycho_stream.files.hdf5_output import Progress
from ptycho_stream.files.image_frames import frames_of_image
from ptycho_stream.files.images import save_png, save_tiff
from ptycho_stream.files.ptychodus_names import diffraction_path
from ptycho_stream.files.ptychodus_output import Losses, save_diffraction, save_product
from ptycho_stream.files.ptychopinn_npz import save_ptychopinn
from ptycho_stream.files.result_values import in_order
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.results import Image
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.settings import ExportFormat

FORMATS: Final[tuple[ExportFormat, ...]] = get_args(ExportFormat)

_ENDINGS: Final[Mapping[str, ExportFormat]] = {
    ".ptychopinn.npz": "ptychopinn",
    ".npz": "npz",
    ".png": "png",
    ".tiff": "tiff",
    ".tif": "tiff",
    ".cxi": "cxi",
    ".h5": "ptychodus",
    ".hdf5": "ptychodus",
}
ENDINGS: Final = tuple(_ENDINGS)


def format_of(path: Path) -> ExportFormat | None:
    """The format that the name of a file asks for by its ending; None if it asks for none."""
    name = path.name.lower()
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)


def result_path(directory: Path, scan_id: str, kind: ExportFormat) -> Path:
    """Where the file of a scan's image goes in a folder of exports.

    ``<scan id>.<ending>``; ptychodus' files lie together in a folder of their own, under the names
    that ptychodus has for them: ``<scan id>/product.h5``, ``<scan id>/diffraction.h5``.
    """
    if kind == "ptychodus":
        return directory / scan_id / "product.h5"
    ending = next(ending for ending, of in _ENDINGS.items() if of == kind)
    return directory / f"{scan_id}{ending}"


def write_result(
    image: Image,
    path: Path,
    kind: ExportFormat,
    frames: ScanReader | None = None,
    *,
    geometry: DetectorGeometry | None = None,
    losses: Losses = (),
    progress: Progress | None = None,
) -> list[Path]:
    """Write an image, and where the format has room for them its frames.

    Every file is there whole or not at all. Frames are copied in blocks; the scan is never held in
    memory.

    Args:
        image: the result.
        path: of the file; its folder exists.
        kind: of the file.
        frames: the scan of the image. With ``ptychodus`` its frames go into a second file
            (:func:`diffraction_path`); without them that file is not written, ``cxi`` holds the
            image only, and ``ptychopinn`` is refused.
        geometry: energy, distance and detector pixel; None: as ``frames`` have them.
        losses: of the reconstruction, (epoch, value).
        progress: told of the frames that are written.

    Returns:
        The files written.

    Raises:
        FileFormatError: the image has nothing to write, the format needs what is not there, or the
            path cannot be written.
        StoreError: the scan cannot be read.
    """
    if not image.object_yx.size:
        raise FileFormatError(f"scan {image.scan_id} has no pixel yet: {path} is not written")
    if geometry is None:
        geometry = DetectorGeometry() if frames is None else frames.header.geometry
    held = None
    if kind in ("ptychodus", "cxi", "ptychopinn"):
        image = in_order(image)
        held = None if frames is None else frames_of_image(image, frames)
    match kind:
        case "npz":
            image.save(path)
        case "png":
            save_png(image, path)
        case "tiff":
            save_tiff(image, path)
        case "cxi":
            save_cxi(path, image, geometry, held, losses, progress)
        case "ptychodus":
            if held is not None:
                save_diffraction(diffraction_path(path), held, progress)
            save_product(path, image, geometry, losses)
            return [path] if held is None else [path, diffraction_path(path)]
        case "ptychopinn":
            if held is None:
                raise FileFormatError(
                    f"{path}: PtychoPINN's file is made of frames, and the scan is not at hand: "
                    "name its folder, or have the daemon write it (`ctl export`)"
                )
            save_ptychopinn(path, held, progress)
    return [path]
