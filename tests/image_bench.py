"""A scan that a test writes frame by frame, and images of it: predicted, refined, compared.

For tests of refinement and of trust that need no daemon.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scan_samples import running_header

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image
from ptycho_stream.scans import PAIR_RECORD, ScanReader, ScanWriter
from ptycho_stream.settings import RefinementSettings
from ptycho_stream.simulate.experiment import SimulatedExperiment
from ptycho_stream.simulate.score import nrmse_to_truth

SIZE, TILE = 64, 32
SETTINGS = RefinementSettings(modes=1, sweeps=12)


def shipped_recipe(experiment: SimulatedExperiment) -> Recipe:
    """The network that ships, with the true probe."""
    network, manifest = ModelRegistry().load()
    return Recipe(
        network=network,
        model=manifest.name,
        model_sha256=manifest.sha256,
        probe=experiment.probe,
        photons=None,
        device=torch.device("cpu"),
        batch_frames=16,
    )


@dataclass
class Bench:
    """A scan that is being written, and images of it."""

    writer: ScanWriter
    root: Path
    recipe: Recipe
    experiment: SimulatedExperiment

    def write(self, numbers: range, moved_m: float = 0.0) -> None:
        pairs = np.zeros(len(numbers), PAIR_RECORD)
        for row, number in enumerate(numbers):
            counts = self.experiment.counts[number]
            slot = self.writer.append(number, counts, received_ns=0, received_monotonic_ns=0)
            pairs["number"][row], pairs["slot"][row] = number, slot
            y_m, x_m = self.experiment.positions_yx_m[number] + moved_m
            pairs["y_m"][row], pairs["x_m"][row] = y_m, x_m
        self.writer.append_pairs(pairs)
        self.writer.commit()

    def open(
        self, recipe: Recipe | None = None, settings: RefinementSettings | None = SETTINGS
    ) -> ScanImage:
        reader = ScanReader.open(self.root, self.writer.scan_id)
        return ScanImage(reader, recipe or self.recipe, TILE, settings)

    def error(self, image: ScanImage) -> float:
        shown = Image(image.image(final=False))
        return nrmse_to_truth(shown, self.experiment.object, self.experiment.origin_yx_m)


@contextmanager
def running_scan(root: Path, experiment: SimulatedExperiment, recipe: Recipe) -> Iterator[Bench]:
    """A scan without frames yet, in the store at ``root``."""
    header = running_header(
        (SIZE, SIZE), experiment.counts.dtype.str, SIZE, pixel_yx_m=experiment.pixel_yx_m
    )
    with ScanWriter.create(root, header, frames_per_file=32) as writer:
        yield Bench(writer, root, recipe, experiment)


def predict(image: ScanImage) -> None:
    while image.has_work:
        image.step(16, list[int]().extend)


def refine(image: ScanImage, sweeps: float = float("inf")) -> None:
    """Until nothing more is wanted, or a frame was visited so often on average; show it."""
    while image.wants_refinement and image.sweeps < sweeps:
        image.refine(0.0)  # one batch, on any machine
    assert image.refined is not None
    image.refined.show()
