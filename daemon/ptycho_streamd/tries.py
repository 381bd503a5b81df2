"""How often the stage has died at a scan's image without getting further, kept with the scan.

A scan that ends the process each time (memory that does not suffice, a fault in a library) would
keep all others from their images. Used by the image store of the reconstruct stage.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ptycho_stream.errors import StoreError
from ptycho_stream.scans.disk import copy_file

TRIES_FILE = "reconstruct.tries"
MAX_TRIES = 5

log = logging.getLogger(__name__)


def begin_try(directory: Path) -> None:
    """Note that the image of the scan in ``directory`` is worked on.

    Raises:
        StoreError: so often that was begun already, and never got so far as to be saved.
    """
    path = directory / TRIES_FILE
    try:
        tries = int(path.read_text())
    except (FileNotFoundError, ValueError):
        tries = 0
    except OSError as error:  # a bad sector, say: the image matters more
        log.warning("cannot read %s: %s", path, error.strerror)
        tries = 0
    if tries >= MAX_TRIES:
        raise StoreError(
            f"the stage has died {tries} times in a row at the image of scan {directory.name}: it "
            f"is left alone, and `ptycho-stream ctl reprocess {directory.name}` tries it again"
        )
    try:
        copy_file(path, str(tries + 1).encode())
    except StoreError as error:  # a full disk: the image matters more
        log.warning("%s", error)


def end_tries(directory: Path) -> None:
    """It got further, or another try is asked for."""
    (directory / TRIES_FILE).unlink(missing_ok=True)
