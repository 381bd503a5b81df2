"""What a job settled when it first started, kept in its folder so that a resumed one is the same.

A live scan grows and settings change while a job waits; its frames, photons, parent and choices do
not.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import TrainingError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.reconstruct.patches import PHOTON_FRAMES, measured_photons
from ptycho_stream.scans import Catalogue, ScanReader
from ptycho_stream.scans.viewed_scan import ViewedScan
from ptycho_stream.settings import Settings
from ptycho_stream.training.budget import Budget
from ptycho_stream.training.job import DEFAULT_ARCHITECTURE, JobSpec

PLAN_FILE = "plan.json"


class PlannedScan(msgspec.Struct, frozen=True):
    """Which part of a scan a job uses.

    Attributes:
        scan_id: of the store.
        pairs: half-open range of its log of pairs.
        photons: of the unattenuated beam, a frame.
    """

    scan_id: str
    pairs: tuple[int, int]
    photons: float


class JobPlan(msgspec.Struct, frozen=True):
    """A job with everything decided.

    Attributes:
        spec: with nothing left to the settings.
        parent: name of the model that a fine-tuning starts from.
        architecture: of the new model.
        scans: what is trained on.
    """

    spec: JobSpec
    parent: str | None
    architecture: str
    scans: tuple[PlannedScan, ...]

    @property
    def budget(self) -> Budget:
        """How long to train."""
        return Budget(steps=self.spec.steps, minutes=self.spec.minutes)


def settle(spec: JobSpec, settings: Settings, folder: Path, registry: ModelRegistry) -> JobPlan:
    """Read the plan in a job's folder, or make it and put it there.

    Raises:
        ModelError: the new model's name is taken, or the parent does not load.
        TrainingError: there is nothing to train on.
        StoreError: a scan is gone or cannot be read.
    """
    path = folder / PLAN_FILE
    if path.exists():
        return read_plan(folder)
    registry.check_new(spec.name)
    parent, architecture = None, spec.architecture or DEFAULT_ARCHITECTURE
    if spec.kind == "finetune":
        manifest = registry.load(spec.model or settings.model.name)[1]
        parent, architecture = manifest.name, manifest.architecture
    catalogue = Catalogue(settings.data.directory)
    scans = tuple(_plan_scan(catalogue, scan_id, spec, settings) for scan_id in spec.scan_ids)
    plan = JobPlan(spec.resolved(settings.training), parent, architecture, scans)
    with atomic_file(path) as file:
        file.write(msgspec.json.encode(plan))
    return plan


def read_plan(folder: Path) -> JobPlan:
    """The plan in a job's folder.

    Raises:
        TrainingError: it is not there, or damaged.
    """
    path = folder / PLAN_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=JobPlan)
    except (OSError, msgspec.DecodeError) as error:
        raise TrainingError(
            f"the plan {path} cannot be read ({error}): request the job again"
        ) from error


def _plan_scan(
    catalogue: Catalogue, scan_id: str, spec: JobSpec, settings: Settings
) -> PlannedScan:
    with catalogue.open(scan_id) as reader:
        first, last = spec.frames or (0, reader.pair_count)
        last = min(last, reader.pair_count)
        if first >= last:
            raise TrainingError(
                f"scan {scan_id} has {reader.pair_count} pairs of frame and position, none of "
                f"them from {first} on: wait for more, or name other frames"
            )
        return PlannedScan(scan_id, (first, last), settings.probe.photons or _photons(reader))


def _photons(reader: ScanReader) -> float:
    return measured_photons(ViewedScan(reader), PHOTON_FRAMES)
