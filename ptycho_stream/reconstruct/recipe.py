"""What an image is made with: network, probe and the device they run on.

Loaded from the settings by the reconstruct stage; a change of recipe opens a new generation of the
image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import xxhash

from ptycho_stream.errors import ProbeError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import Probe, load_probe
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.settings import Settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """A network and a probe, with what identifies them in results and saved states.

    ``probe`` is as the file has it; ``photons`` is what to scale it to, None: from the frames.
    """

    network: torch.nn.Module
    model: str
    model_sha256: str
    probe: Probe
    photons: float | None
    device: torch.device
    batch_frames: int

    @property
    def probe_digest(self) -> str:
        """Hash of the probe's modes."""
        return xxhash.xxh3_128_hexdigest(self.probe.modes.tobytes())

    def warm_up(self) -> None:
        """Run one batch of nothing, so that a scan's first frames wait for no set-up."""
        Predictor(self.network, self.probe, self.device, self.batch_frames).warm_up()


def load_recipe(settings: Settings) -> Recipe:
    """Load the network and the probe that the settings name.

    Raises:
        ProbeError: the probe file is missing, unusable, or not of ``reconstruct.size_px``.
        ModelError: the model is missing or damaged.
    """
    probe = load_probe(settings.probe.path)
    if settings.probe.modes is not None:
        probe = Probe(probe.modes[: settings.probe.modes])
    size = settings.reconstruct.size_px
    if probe.size_px != size:
        raise ProbeError(
            f"the probe in {settings.probe.path} has {probe.size_px} pixels a side, but "
            f"reconstruct.size_px is {size}: make them equal"
        )
    network, manifest = ModelRegistry(settings.model.registry).load(settings.model.name)
    name = settings.reconstruct.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return Recipe(
        network=network,
        model=manifest.name,
        model_sha256=manifest.sha256,
        probe=probe,
        photons=settings.probe.photons,
        device=torch.device(name),
        batch_frames=settings.reconstruct.batch_frames,
    )
