"""The program that writes the files of an image, so that neither ingest nor reconstruct waits.

Started by :class:`ptycho_streamd.exports.Exports` as ``python -m ptycho_streamd.export_files``; it
takes a task as JSON on its standard input, and says on its standard output what came of it. It
yields to the stages, and a file that it could not finish leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptycho_stream.errors import FileFormatError, PtychoStreamError
from ptycho_stream.files.image_npz import load_image
from ptycho_stream.files.products import result_path, write_result
from ptycho_stream.reconstruct.history import losses_of
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.settings import ExportFormat
from ptycho_streamd.stage import end_with_parent

NICE = 10
_PARTIAL = re.compile(r"product\.(\d{6})\.h5")


@dataclass(frozen=True, slots=True)
class ExportTask:
    """Files to write.

    Attributes:
        image: NPZ of the image, as ``Image.save`` writes it.
        scan: folder of its scan, on which the stage holds a lease.
        directory: of exports.
        formats: to write; none for a partial product, of which the newest ``keep_partial`` stay.
        keep_partial: so many.
    """

    image: str
    scan: str
    directory: str
    formats: tuple[ExportFormat, ...] = ()
    keep_partial: int = 0

    def to_json(self) -> str:
        """As text for the program."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ExportTask:
        """Read what :meth:`to_json` wrote."""
        told: dict[str, Any] = json.loads(text)
        told["formats"] = tuple(told["formats"])
        return cls(**told)


@dataclass(frozen=True, slots=True)
class ExportOutcome:
    """What was written, and what could not be."""

    paths: tuple[str, ...]
    problems: tuple[str, ...]

    @classmethod
    def from_json(cls, text: str) -> ExportOutcome:
        """Read what the program said.

        Raises:
            ValueError: it said something else.
        """
        told = json.loads(text)
        return cls(tuple(told["paths"]), tuple(told["problems"]))


def carry_out(task: ExportTask) -> ExportOutcome:
    """Write the files; a format that fails does not keep the others from being written.

    Raises:
        FileFormatError: the image cannot be read, or the folder not made.
        StoreError: the scan cannot be read.
    """
    image, directory, scan = load_image(Path(task.image)), Path(task.directory), Path(task.scan)
    paths: list[Path] = []
    problems: list[str] = []
    with ScanReader(scan) as reader:
        losses = losses_of(scan, image.content.generation)
        if not task.formats:
            folder = made(directory / image.scan_id)
            path = _next_partial(folder)
            write_result(image, path, "ptychodus", geometry=reader.header.geometry, losses=losses)
            _forget_old(folder, task.keep_partial)
            return ExportOutcome((str(path),), ())
        for kind in task.formats:
            path = result_path(directory, image.scan_id, kind)
            try:
                made(path.parent)
                paths += write_result(image, path, kind, reader, losses=losses)
            except PtychoStreamError as error:
                problems.append(f"{kind}: {error}")
    return ExportOutcome(tuple(map(str, paths)), tuple(problems))


def made(folder: Path) -> Path:
    """A folder that is there.

    Raises:
        FileFormatError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileFormatError(
            f"cannot make the export folder {folder}: {error.strerror}; set export.directory to "
            "one that the daemon may write"
        ) from error
    return folder


def _partials(folder: Path) -> list[Path]:
    """Partial products of a scan, oldest first."""
    return sorted(path for path in folder.iterdir() if _PARTIAL.fullmatch(path.name))


def _next_partial(folder: Path) -> Path:
    there = _partials(folder)
    last = _PARTIAL.fullmatch(there[-1].name) if there else None
    number = 1 if last is None else int(last[1]) + 1
    return folder / f"product.{number:06d}.h5"


def _forget_old(folder: Path, keep: int) -> None:
    for path in _partials(folder)[:-keep]:
        path.unlink(missing_ok=True)


def _stop(_number: int, _frame: object) -> None:
    """End in order, so that what is half written is deleted."""
    sys.exit(1)


def main() -> int:
    """Carry out the task on standard input; the exit status."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    os.nice(NICE)
    try:
        outcome = carry_out(ExportTask.from_json(sys.stdin.read()))
    except PtychoStreamError as error:
        outcome = ExportOutcome((), (str(error),))
    sys.stdout.write(json.dumps(asdict(outcome)))
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
