"""Files of an image: written at a scan's end if the settings say so, and on request in between.

Used by the reconstruct stage.
"""

from __future__ import annotations

from pathlib import Path

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.images import save_png
from ptycho_stream.results import Image, ImageState

FORMATS = ("npz", "png")


def export(state: ImageState, directory: Path, formats: tuple[str, ...]) -> list[Path]:
    """Write an image as ``<directory>/<scan id>.<format>``; the paths.

    Raises:
        FileFormatError: a format is unknown, or the folder cannot be written.
    """
    for name in formats:
        if name not in FORMATS:
            raise FileFormatError(f"no export format {name!r}: use {' or '.join(FORMATS)}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileFormatError(
            f"cannot make the export folder {directory}: {error.strerror}; set export.directory to "
            "one that the daemon may write"
        ) from error
    image, paths = Image(state), []
    for name in formats:
        path = directory / f"{state.scan_id}.{name}"
        image.save(path) if name == "npz" else save_png(image, path)
        paths.append(path)
    return paths
