"""A trained model as one file, ``wts.h5.zip``: weights, probe and configuration, strictly read.

Layout: ``manifest.dill`` and ``manifest.json`` (see ``archive_manifest``), ``params.json`` with the
configuration, and a folder for each model: ``diffraction_to_obj`` is a network as the registry has
it, ``autoencoder`` what leads from its patches back to frames. Used by training and inference.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ptycho_stream.atomic_file import atomic_file, make_folder
from ptycho_stream.errors import ModelError, ProbeError, PtychoPinnError
from ptycho_stream.models.folders import MANIFEST_FILE, WEIGHTS_FILE, check_digest
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry, assemble, packed
from ptycho_stream.networks.network import Network
from ptycho_stream.physics.probe import Probe
from ptycho_stream.ptychopinn import archive_manifest
from ptycho_stream.ptychopinn.config import TrainingConfig, flat, plain, training_config

ARCHIVE_FILE = "wts.h5.zip"
PARAMS_FILE = "params.json"
_NETWORK, _FORWARD = "diffraction_to_obj", "autoencoder"

_MAX_TEXT_BYTES = 1 << 20
_MAX_WEIGHTS_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A model with all that its use needs.

    Attributes:
        network: in evaluation mode, on the CPU.
        config: that it was trained with.
        probe: in any unit.
        beam_ratio: photons of the unattenuated beam over those of a frame on average.
        metrics: figures of its training.
    """

    network: Network
    config: TrainingConfig
    probe: Probe
    beam_ratio: float
    metrics: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def input_scale_factor(self) -> float:
        """What makes ``X_full`` the root of photons, where a frame has ``config.nphotons``."""
        return 2 * self.config.nphotons**0.5 / self.config.model.N


def registry_bundle(
    name: str,
    probe: Probe,
    registry: Path | None = None,
    config: TrainingConfig | None = None,
    *,
    beam_ratio: float = 1.0,
) -> Bundle:
    """A model of the registry, for programs that speak PtychoPINN.

    Args:
        name: of the model; ``default`` is the one in use.
        probe: that frames are taken with.
        registry: its folder; None: shipped models only.
        config: photons, neighbours and seed for its use; its model is replaced.
        beam_ratio: photons of the unattenuated beam over those of a frame on average.

    Raises:
        ModelError: it does not load.
        PtychoPinnError: it takes no square groups.
    """
    network, manifest = ModelRegistry(registry).load(name)
    gridsize = round(network.group_frames**0.5)
    if gridsize**2 != network.group_frames:
        raise PtychoPinnError(f"model {name} takes {network.group_frames} frames, no square number")
    told = flat(config or TrainingConfig())
    told |= {"N": probe.size_px, "gridsize": gridsize, "architecture": manifest.architecture}
    return Bundle(network, training_config(told), probe, beam_ratio, manifest.metrics)


def register(bundle: Bundle, name: str, registry: ModelRegistry) -> Manifest:
    """Add a bundle's network to a registry, for the daemon: it serves the bundle's probe.

    Raises:
        ModelError: the registry has no room for the name.
    """
    manifest = Manifest(
        name=name,
        architecture=bundle.config.model.architecture,
        settings=bundle.network.settings_json(),
        training={"imported_from": ARCHIVE_FILE, "ptychopinn": plain(bundle.config)},
        metrics=bundle.metrics,
    )
    return registry.save(bundle.network, manifest)


def save(bundle: Bundle, folder: Path | str) -> Path:
    """Write ``wts.h5.zip`` into ``folder``; a reader sees the old one or the whole new one.

    How it was computed is not written: see :class:`~ptycho_stream.ptychopinn.execution`.

    Returns:
        Where the file is.

    Raises:
        FileFormatError: it cannot be written.
    """
    network = bundle.network
    weights, manifest = packed(
        network,
        Manifest(
            name=_NETWORK,
            architecture=bundle.config.model.architecture,
            settings=network.settings_json(),
            metrics=bundle.metrics,
        ),
    )
    forward = save_tensors(
        {
            "probe": torch.view_as_real(torch.as_tensor(bundle.probe.modes)).contiguous(),
            "beam_ratio": torch.tensor(bundle.beam_ratio, dtype=torch.float64),
        }
    )
    about_forward = {"network": _NETWORK, "sha256": hashlib.sha256(forward).hexdigest()}
    files = {
        **archive_manifest.ArchiveManifest().files(),
        PARAMS_FILE: _json(plain(bundle.config)),
        f"{_NETWORK}/{MANIFEST_FILE}": manifest.to_json().encode(),
        f"{_NETWORK}/{WEIGHTS_FILE}": weights,
        f"{_FORWARD}/{MANIFEST_FILE}": _json(about_forward),
        f"{_FORWARD}/{WEIGHTS_FILE}": forward,
    }
    path = Path(folder) / ARCHIVE_FILE
    make_folder(path.parent)
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def load_bundle(path: Path | str) -> Bundle:
    """Read a bundle.

    Args:
        path: of ``wts.h5.zip``, or of its folder.

    Raises:
        ModelError: it is missing, damaged, altered, of another backend or an unknown version, or
            its weights are not those of its network.
    """
    file = Path(path)
    file = file / ARCHIVE_FILE if file.is_dir() else file
    if not file.is_file():
        raise ModelError(f"there is no bundle {file}: give the folder of {ARCHIVE_FILE}")
    try:
        with zipfile.ZipFile(file) as archive:
            return _read(archive, str(file))
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError) as error:
        raise ModelError(f"{file} is no readable archive: {error}; copy it again") from error


def _read(archive: zipfile.ZipFile, where: str) -> Bundle:
    manifests = (archive_manifest.PICKLE_FILE, archive_manifest.JSON_FILE)
    there = [name for name in manifests if name in archive.namelist()]
    files = {name: _member(archive, name, archive_manifest.MAX_BYTES, where) for name in there}
    archive_manifest.read_manifest(files, where)
    config = _config(_member(archive, PARAMS_FILE, _MAX_TEXT_BYTES, where), where)
    name = f"{_NETWORK}/{MANIFEST_FILE}"
    text = _member(archive, name, _MAX_TEXT_BYTES, where)
    manifest = Manifest.from_json(text, f"{where}: {name}")
    name = f"{_NETWORK}/{WEIGHTS_FILE}"
    weights = _member(archive, name, _MAX_WEIGHTS_BYTES, where)
    check_digest(weights, manifest, f"{where}: {name}")
    network = assemble(manifest, weights, f"{where}: {name}")
    if network.group_frames != config.model.gridsize**2:
        raise ModelError(
            f"{where}: its network takes groups of {network.group_frames} frames, its "
            f"configuration says gridsize {config.model.gridsize}"
        )
    probe, beam_ratio = _forward(archive, where)
    if probe.size_px != config.model.N or not 0 < beam_ratio < math.inf:
        raise ModelError(
            f"{where}: its probe has {probe.size_px} pixels and {beam_ratio} of a frame's photons, "
            f"its configuration says N = {config.model.N}"
        )
    return Bundle(network, config, probe, beam_ratio, manifest.metrics)


def _forward(archive: zipfile.ZipFile, where: str) -> tuple[Probe, float]:
    name = f"{_FORWARD}/{MANIFEST_FILE}"
    about = _object(_member(archive, name, _MAX_TEXT_BYTES, where), f"{where}: {name}")
    name = f"{_FORWARD}/{WEIGHTS_FILE}"
    content = _member(archive, name, _MAX_WEIGHTS_BYTES, where)
    if about.get("sha256") != hashlib.sha256(content).hexdigest():
        raise ModelError(f"{where}: {name} is truncated or altered, copy the bundle again")
    try:
        tensors = load_tensors(content)
        modes = torch.view_as_complex(tensors["probe"]).numpy()
        return Probe(modes), float(tensors["beam_ratio"])
    except (SafetensorError, KeyError, RuntimeError, ProbeError) as error:
        raise ModelError(f"{where}: {name} holds no probe: {error}") from error


def _member(archive: zipfile.ZipFile, name: str, most: int, where: str) -> bytes:
    try:
        size = archive.getinfo(name).file_size
    except KeyError as error:
        raise ModelError(
            f"{where} lacks {name}; it holds {', '.join(archive.namelist()[:12])}"
        ) from error
    if size > most:
        raise ModelError(f"{where}: {name} has {size} bytes, at most {most} are accepted")
    try:
        return archive.read(name)
    except RuntimeError as error:  # zipfile's word for a member with a password
        raise ModelError(f"{where}: {name} cannot be read: {error}") from error


def _config(content: bytes, where: str) -> TrainingConfig:
    try:
        return training_config(_object(content, f"{where}: {PARAMS_FILE}"))
    except PtychoPinnError as error:
        raise ModelError(f"{where}: {PARAMS_FILE}: {error}") from error


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        held: object = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not JSON: {error}") from error
    if not isinstance(held, dict):
        raise ModelError(f"{where} holds no JSON object")
    return cast("dict[str, Any]", held)


def _json(held: dict[str, Any]) -> bytes:
    return (json.dumps(held, indent=2) + "\n").encode()
