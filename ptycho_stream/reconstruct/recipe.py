"""What an image is made with: network, probe and the device they run on.

Loaded from the settings by the reconstruct stage; a change of recipe opens a new generation of the
image.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import xxhash

from ptycho_stream.errors import ModelError, ProbeError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.network import Network
from ptycho_stream.physics.probe import Probe, load_probe
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.settings import Settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """A network and a probe, with what identifies them in results and saved states.

    ``probe`` is as the file has it; ``photons`` is what to scale it to, None: from the frames.
    Among ``neighbours`` of a frame its group is sought, where the network takes several together.
    """

    network: Network
    model: str
    model_sha256: str
    probe: Probe
    photons: float | None
    device: torch.device
    batch_frames: int
    neighbours: int = 4

    @property
    def probe_digest(self) -> str:
        """Hash of the probe's modes."""
        return xxhash.xxh3_128_hexdigest(self.probe.modes.tobytes())

    def warm_up(self) -> float:
        """Run a batch of nothing, so that a scan's first frames wait for no set-up.

        Returns:
            The seconds that one frame takes.

        Raises:
            ModelError: the device refuses, for want of memory for example.
        """
        try:
            predictor = Predictor(self.network, self.probe, self.device, 1)
            predictor.warm_up()
            started_s = time.monotonic()
            predictor.warm_up()
        except RuntimeError as error:  # torch's own, out of memory among them
            raise ModelError(
                f"model {self.model} does not run on {self.device}: {str(error).splitlines()[0]}"
            ) from error
        return (time.monotonic() - started_s) / predictor.batch_size


def load_recipe(settings: Settings) -> Recipe:
    """Load the network and the probe that the settings name.

    Raises:
        ProbeError: the probe file is missing, unusable, or not of ``reconstruct.size_px``.
        ModelError: the model is missing or damaged, or this machine lacks the device.
    """
    probe = load_probe(settings.probe.path)
    if settings.probe.modes is not None:
        probe = probe.leading(settings.probe.modes)
    size = settings.reconstruct.size_px
    if probe.size_px != size:
        raise ProbeError(
            f"the probe in {settings.probe.path} has {probe.size_px} pixels a side, but "
            f"reconstruct.size_px is {size}: make them equal"
        )
    network, manifest = ModelRegistry(settings.model.registry).load(settings.model.name)
    return Recipe(
        network=network,
        model=manifest.name,
        model_sha256=manifest.sha256,
        probe=probe,
        photons=settings.probe.photons,
        device=usable_device(settings.reconstruct.device),
        batch_frames=settings.reconstruct.batch_frames,
        neighbours=settings.reconstruct.neighbours,
    )


def usable_device(name: str, key: str = "reconstruct.device") -> torch.device:
    """The device of that name; ``auto`` is the first GPU where there is one.

    Args:
        name: auto, cpu, cuda or cuda:N.
        key: of the setting that it comes from, for the error.

    Raises:
        ModelError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"{key} is {name!r} and cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return device
