"""What an image is made with: network, probe and the device they run on.

Loaded from the settings by the reconstruct stage; a change of recipe opens a new generation of the
image.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
import xxhash

from ptycho_stream.errors import DeviceError, ProbeError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.network import Network
from ptycho_stream.physics.optics import ZonePlate
from ptycho_stream.physics.optics_probe import probe_behind, probe_of_optics
from ptycho_stream.physics.probe import Probe, load_probe
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.settings import OpticsSettings, ProbeSettings, Settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """A network and a probe, with what identifies them in results and saved states.

    ``probe`` is as the file has it; ``photons`` is what to scale it to, None: from the frames.
    Of a probe that was refined the network gets ``modes``, None: all.
    Among ``neighbours`` of a frame its group is sought, where the network takes several together.
    With ``optics`` the probe is one to warm up with until :meth:`made_for` makes that of a scan.
    """

    network: Network
    model: str
    model_sha256: str
    probe: Probe
    photons: float | None
    device: torch.device
    batch_frames: int
    neighbours: int = 4
    optics: OpticsSettings | None = None
    modes: int | None = None

    @property
    def probe_digest(self) -> str:
        """Hash of the probe's modes."""
        return xxhash.xxh3_128_hexdigest(self.probe.modes.tobytes())

    @property
    def origin_digest(self) -> str:
        """Hash of what the settings say of the probe: of the optics, else of the file's modes."""
        if self.optics is None:
            return self.probe_digest
        return xxhash.xxh3_128_hexdigest(self.optics.model_dump_json().encode())

    def with_probe(self, probe: Probe) -> Recipe:
        """This recipe with another probe, of as many modes as it may have."""
        have = len(probe.modes)
        return replace(self, probe=probe.leading(min(self.modes or have, have)))

    def made_for(self, header: ScanHeader) -> Recipe:
        """This recipe with the probe that the optics make for a scan, where there are optics.

        A scan of unknown pixel size, which has no image, is left with any probe.

        Raises:
            ProbeError: the scan tells no energy, or the optics do not suit it.
        """
        if self.optics is None or header.pixel_yx_m is None:
            return self
        return replace(self, probe=probe_for(self.optics, header))

    def warm_up(self) -> float:
        """Run a batch of nothing, so that a scan's first frames wait for no set-up.

        Returns:
            The seconds that one frame takes.

        Raises:
            DeviceError: the device refuses, for want of memory for example.
        """
        try:
            predictor = Predictor(self.network, self.probe, self.device, 1)
            predictor.warm_up()
            started_s = time.monotonic()
            predictor.warm_up()
        except RuntimeError as error:  # torch's own, out of memory among them
            raise DeviceError(
                f"model {self.model} does not run on {self.device}: {str(error).splitlines()[0]}"
            ) from error
        return (time.monotonic() - started_s) / predictor.batch_size


def probe_for(optics: OpticsSettings, header: ScanHeader) -> Probe:
    """The probe that the settings' optics make for a scan, of its energy and pixels.

    Raises:
        ProbeError: the scan tells no energy or pixel size, or the optics do not suit it.
    """
    energy, pixel_yx_m = header.geometry.photon_energy_eV, header.pixel_yx_m
    if energy is None or pixel_yx_m is None:
        raise ProbeError(
            f"scan {header.scan_id} tells no photon energy or pixel size, so that [probe.optics] "
            "makes no probe: set the former under [geometry], or give a file as probe.path"
        )
    try:
        return probe_of_optics(optics, energy, pixel_yx_m, header.size_px)
    except ProbeError as error:
        raise ProbeError(f"[probe.optics] does not suit scan {header.scan_id}: {error}") from error


def told_probe(settings: ProbeSettings, header: ScanHeader) -> Probe:
    """The probe that the settings name for a scan, from the file or made from optics.

    Raises:
        ProbeError: the file is missing or unusable, or the optics do not suit the scan.
    """
    if settings.optics is not None:
        return probe_for(settings.optics, header)
    return _of_file(settings)


def _of_file(settings: ProbeSettings) -> Probe:
    assert settings.path is not None
    probe = load_probe(settings.path)
    return probe if settings.modes is None else probe.leading(settings.modes)


def load_recipe(settings: Settings) -> Recipe:
    """Load the network and the probe that the settings name.

    Raises:
        ProbeError: the probe file is missing, unusable, or not of ``reconstruct.size_px``.
        ModelError: the model is missing or damaged.
        DeviceError: this machine lacks the device.
    """
    size = settings.reconstruct.size_px
    if settings.probe.optics is not None:
        probe = probe_behind(ZonePlate.standard(size), size)
    else:
        probe = _of_file(settings.probe)
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
        optics=settings.probe.optics,
        modes=settings.probe.modes,
    )


def usable_device(name: str, key: str = "reconstruct.device") -> torch.device:
    """The device of that name; ``auto`` is the first GPU where there is one.

    Args:
        name: auto, cpu, cuda or cuda:N.
        key: of the setting that it comes from, for the error.

    Raises:
        DeviceError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"{key} is {name!r} and cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return device
