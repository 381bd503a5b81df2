"""Simulated scans in a store, and settings for training on them.

Also a program that runs one job in a process of its own, which can be killed:
``python training_scans.py SETTINGS.json SPEC.json FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from ptycho_stream.files.npz import save_arrays
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.unrolled import UnrolledNetwork, UnrolledSettings
from ptycho_stream.settings import Settings
from ptycho_stream.simulate.experiment import SimulatedExperiment, simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.training import fitting
from ptycho_stream.training.job import JobProgress, JobSpec
from ptycho_stream.training.jobs import run_job

SIZE = 32
PARENT = "parent"
_SMALL = UnrolledSettings(stages=2, steps=2, channels=(8, 8, 8), memory=2)


def make_experiment(frames: int = 60, size_px: int = SIZE, **changes: Any) -> SimulatedExperiment:
    return simulate_experiment(seed=5, frames=frames, size_px=size_px, **changes)


def write_scan(root: Path, experiment: SimulatedExperiment) -> str:
    """A complete scan of the store ``root``; its id."""
    return store_scan(root, scan_file_of(experiment))


def make_settings(folder: Path, experiment: SimulatedExperiment, **training: Any) -> Settings:
    """Settings of a daemon whose data, probe and models lie in ``folder``."""
    probe = folder / "probe.npz"
    save_arrays(probe, {"probe": experiment.probe.modes})
    return Settings.model_validate(
        {
            "data": {"directory": str(folder / "data")},
            "probe": {"path": str(probe)},
            "model": {"registry": str(folder / "models")},
            "reconstruct": {"size_px": experiment.counts.shape[-1]},
            "training": {"device": "cpu", "batch_frames": 6, "held_out": 0.2} | training,
        }
    )


def save_parent(settings: Settings, name: str = PARENT) -> None:
    """Put a small untrained network into the registry and take it into use."""
    registry = ModelRegistry(settings.model.registry)
    torch.manual_seed(0)
    network = UnrolledNetwork(_SMALL)
    registry.save(network, Manifest(name, "unrolled", network.settings_json()))
    registry.use(name)


def make_spec(scan_id: str, **changes: Any) -> JobSpec:
    return JobSpec(
        **{"job_id": "job-1", "name": "tuned", "scan_ids": (scan_id,), "steps": 6} | changes
    )


def main() -> None:
    settings = Settings.model_validate_json(Path(sys.argv[1]).read_text())
    spec = JobSpec.from_json(Path(sys.argv[2]).read_text())

    def report(progress: JobProgress) -> None:
        print(progress.to_json(), flush=True)

    fitting.SAVE_INTERVAL_S = 0.3
    run_job(spec, settings, Path(sys.argv[3]), report, lambda: "")


if __name__ == "__main__":
    main()
