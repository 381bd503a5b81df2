"""``ptycho-stream export-detectors``: write the frames of the detectors beside a scan into files.

It reads the store's folder on this machine; no daemon is asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ptycho_stream.cli.options import AsJson
from ptycho_stream.errors import ScanNotFound


def export_detectors(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The daemon's TOML file, for data.directory.")
    ],
    scan: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]",
            help="Of the reconstructed detector, or of another; without it the newest one.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.")] = Path(),
    detector: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of this detector only.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the frames of the other detectors of a scan as HDF5, with the scan's positions.

    Makes ID-NAME.h5 for each scan of another detector that is beside the scan ID.

    Example: ptycho-stream export-detectors --config beamline.toml --detector fluo --out results
    """
    from ptycho_stream.files.detector_frames import write_detector_frames
    from ptycho_stream.scans.catalogue import Catalogue
    from ptycho_stream.settings import load_settings

    catalogue = Catalogue(load_settings(config).data.directory)
    headers = catalogue.scans()
    newest = next((header.scan_id for header in headers if not header.detector), None)
    wanted = scan or newest
    found = [
        header
        for header in headers
        if header.detector
        and wanted in (header.scan_id, header.beside)
        and detector in (None, header.detector)
    ]
    if not found:
        raise ScanNotFound(
            f"no scan of {detector or 'another detector'} is beside scan {wanted}: "
            "`ptycho-stream ctl scans` lists all, with what they are beside"
        )
    known = {header.scan_id for header in headers}
    written: list[dict[str, str | int]] = []
    for header in found:
        path = out / f"{header.beside or header.scan_id}-{header.detector}.h5"
        with catalogue.lease(header.scan_id, "export"), catalogue.open(header.scan_id) as reader:
            if header.beside in known:
                with catalogue.open(header.beside) as beside:
                    frames = write_detector_frames(path, reader, beside)
            else:
                frames = write_detector_frames(path, reader, None)
        written.append({"file": str(path), "scan_id": header.scan_id, "frames": frames})
    if as_json:
        typer.echo(json.dumps(written))
        return
    for one in written:
        typer.echo(f"{one['file']}: {one['frames']} frames of scan {one['scan_id']}")
