"""From a request to all that a training job needs, or an error that says at once what is wrong.

Checked here is what can be without torch: scans, names, the parent model's files.  Used by the
daemon's supervisor and by ``ptycho-stream train``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from ptycho_stream.errors import ScanNotFound, TrainingError
from ptycho_stream.models.active import check_unpinned, model_in_use
from ptycho_stream.models.folders import (
    model_folder,
    new_model_folder,
    read_manifest,
    read_weights,
)
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.ulid import new_scan_id
from ptycho_stream.settings import ModelSettings, Settings
from ptycho_stream.training.job import JobKind


def completed(
    kind: JobKind,
    arguments: Mapping[str, Any],
    settings: Settings,
    taken_names: Collection[str] = (),
) -> dict[str, Any]:
    """The values of the :class:`~ptycho_stream.training.job.JobSpec` that a request asks for.

    Args:
        kind: of the request.
        arguments: what was asked for; None, or no scan at all, stands for what is usual.
        settings: of the daemon.
        taken_names: of models that other jobs will make.

    Raises:
        ScanNotFound: a scan is not in the store.
        StoreError: it cannot be read.
        ModelError: the parent is missing or damaged, or the new name cannot be had.
        TrainingError: a scan has nothing to train on.
    """
    catalogue = Catalogue(settings.data.directory)
    given = {key: value for key, value in arguments.items() if value is not None}
    scan_ids = tuple(given.pop("scan_ids", ())) or (_newest_scan(catalogue),)
    for scan_id in scan_ids:
        _check_scan(catalogue, scan_id, given.get("frames"))
    if kind == "finetune":
        given["model"] = _parent(settings.model, given.get("model"))
    name = given.pop("name", None) or _made_up_name(kind, given, taken_names)
    if name in taken_names:
        raise TrainingError(f"another job makes a model {name!r}: choose a new name")
    new_model_folder(settings.model.registry, name)
    if given.get("promote") == "always":
        check_unpinned(settings.model)
    return {"job_id": new_scan_id(), "kind": kind, "name": name, "scan_ids": scan_ids, **given}


def _newest_scan(catalogue: Catalogue) -> str:
    newest = catalogue.latest()
    if newest is None:
        raise ScanNotFound("there is no scan in the store yet: train when one runs")
    return newest.scan_id


def _check_scan(catalogue: Catalogue, scan_id: str, frames: tuple[int, int] | None) -> None:
    with catalogue.open(scan_id) as reader:
        pairs, header = reader.pair_count, reader.header
    if header.detector:
        raise TrainingError(
            f"scan {scan_id} is of detector {header.detector}, whose frames are stored and not "
            f"reconstructed; it is beside scan {header.beside}"
        )
    if header.pixel_yx_m is None:
        raise TrainingError(
            f"scan {scan_id} has no pixel size: set energy and distance under [geometry] and scan "
            "again"
        )
    first = frames[0] if frames else 0
    if pairs <= first:
        raise TrainingError(
            f"scan {scan_id} has {pairs} frames with a position, none from {first} on: wait for "
            "more of them, or name another scan"
        )


def _parent(settings: ModelSettings, name: str | None) -> str:
    """Name of the model that a fine-tuning starts from, whose files are whole."""
    if name is None or name == "default":
        name = model_in_use(settings)
    folder = model_folder(settings.registry, name)
    read_weights(folder, read_manifest(folder))
    return name


def _made_up_name(kind: JobKind, given: Mapping[str, Any], taken_names: Collection[str]) -> str:
    """A name that tells what the model is and when it was asked for."""
    stem = "finetuned" if kind == "finetune" else str(given.get("architecture", "unrolled"))[:32]
    name = f"{stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return name if name not in taken_names else f"{name}-{len(taken_names) + 1}"
