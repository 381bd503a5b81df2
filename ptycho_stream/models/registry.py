"""The model registry: shipped models and those of a folder, loaded strictly, saved atomically.

A model is a directory with weights.safetensors and manifest.json. Used by the reconstruct stage,
training and the CLI. Nothing here can execute what it reads.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ptycho_stream.atomic_file import sync_path
from ptycho_stream.errors import ModelError
from ptycho_stream.models.active import ActiveModels, active_model, former_model
from ptycho_stream.models.folders import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    model_folder,
    model_folders,
    new_model_folder,
    read_manifest,
    read_weights,
)
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.networks.cnn import CnnNetwork, CnnSettings
from ptycho_stream.networks.network import Network
from ptycho_stream.networks.unrolled import UnrolledNetwork, UnrolledSettings

log = logging.getLogger(__name__)


def _unrolled(settings: dict[str, Any]) -> Network:
    return UnrolledNetwork(UnrolledSettings.from_json(settings))


def _cnn(settings: dict[str, Any]) -> Network:
    return CnnNetwork(CnnSettings.from_json(settings))


ARCHITECTURES: dict[str, Callable[[dict[str, Any]], Network]] = {
    "unrolled": _unrolled,
    "cnn": _cnn,
}
"""From the name in a manifest to the network, untrained."""


class ModelRegistry:
    """Models of the package and, before them, of a folder.

    Args:
        root: the folder; need not exist before the first save. None: shipped models only.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root) if root is not None else None

    def list(self) -> list[Manifest]:
        """All models by name; a model of the folder hides a shipped one of the same name.

        A folder that is no model, or a damaged one, is left out with a warning in the log.
        """
        manifests: list[Manifest] = []
        for _, directory in sorted(model_folders(self.root).items()):
            try:
                manifests.append(read_manifest(directory))
            except ModelError as error:
                log.warning("left out of the models: %s", error)
        return manifests

    def load(self, name: str = "default") -> tuple[Network, Manifest]:
        """Load a model, ready for inference on the CPU; ``default`` is the one in use.

        Raises:
            ModelError: it is missing, truncated or altered, of an unknown architecture, or its
                weights do not fit the network that its manifest describes.
        """
        return _load(model_folder(self.root, self.active() if name == "default" else name))

    def active(self) -> str:
        """Name of the model in use, which ``default`` stands for.

        Raises:
            ModelError: the file that tells it is damaged.
        """
        return active_model(self.root)

    def use(self, name: str) -> None:
        """Take a model into use, which has to load.

        Raises:
            ModelError: it does not load, or there is no folder to keep note of it; the former one
                stays in use.
        """
        if self.root is None:
            raise ModelError(
                "this registry has no folder to note the model in use in; set model.registry"
            )
        _load(model_folder(self.root, name))
        if name != self.active():
            ActiveModels(self.root).push(name)

    def rollback(self) -> str:
        """Go back to the model in use before, which has to load; its name.

        Raises:
            ModelError: none was, or it does not load; the present one stays in use.
        """
        name = former_model(self.root)
        present = self.active()
        _load(model_folder(self.root, name))
        assert self.root is not None
        ActiveModels(self.root).pop(present)
        return name

    def export(self, name: str, target: Path) -> Path:
        """Copy a model, which has to load, into the folder ``target``; where it is now.

        Raises:
            ModelError: it does not load, ``target`` has a model of this name or cannot be written.
        """
        manifest = self.load(name)[1]
        source = model_folder(self.root, manifest.name)
        place = new_model_folder(target, manifest.name)
        files = {file: (source / file).read_bytes() for file in (WEIGHTS_FILE, MANIFEST_FILE)}
        _place(place, files)
        return place

    def save(self, network: Network, manifest: Manifest) -> Manifest:
        """Add a model to the folder, and return its manifest as it was written.

        sha256 and, if empty, the time are filled in. The directory appears complete or not at all.

        Raises:
            ModelError: there is no folder, or it already has a model of this name.
        """
        target = self.check_new(manifest.name)
        content, written = packed(network, manifest)
        _place(target, {WEIGHTS_FILE: content, MANIFEST_FILE: written.to_json().encode()})
        return read_manifest(target)

    def check_new(self, name: str) -> Path:
        """Where a new model of this name will be; its parent folder is made if it is missing.

        Training asks before it spends hours on a model that could not be saved.

        Raises:
            ModelError: it is no name, there is no folder or it cannot be written, or it already has
                a model of this name.
        """
        return new_model_folder(self.root, name)


def packed(network: Network, manifest: Manifest) -> tuple[bytes, Manifest]:
    """A network's weights as a safetensors file, and its manifest with digest and time filled in.

    Raises:
        ModelError: the manifest does not describe this network.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    content = save_tensors(state)
    written = replace(
        manifest,
        sha256=hashlib.sha256(content).hexdigest(),
        created=manifest.created or datetime.now(UTC).isoformat(timespec="seconds"),
    )
    fill(build(written), state, written.name)
    return content, written


def _place(target: Path, files: dict[str, bytes]) -> None:
    """Write a model's files into the new folder ``target``, all or none."""
    root = target.parent
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        for name, content in files.items():
            _write_synced(draft / name, content)
        draft.chmod(0o755)
        draft.rename(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise ModelError(f"cannot write model {target.name} to {target}: {error}") from error
    sync_path(root)


def _load(folder: Path) -> tuple[Network, Manifest]:
    manifest = read_manifest(folder)
    content = read_weights(folder, manifest)
    return assemble(manifest, content, str(folder / WEIGHTS_FILE)), manifest


def assemble(manifest: Manifest, content: bytes, where: str) -> Network:
    """The network that a manifest describes, with the weights of a safetensors file.

    Raises:
        ModelError: ``content`` is no such file (``where`` names it), or does not fit the network.
    """
    try:
        tensors = load_tensors(content)
    except SafetensorError as error:
        raise ModelError(
            f"model {manifest.name}: {where} is no safetensors file ({error})"
        ) from error
    network = build(manifest)
    fill(network, tensors, manifest.name)
    return network.eval()


def build(manifest: Manifest) -> Network:
    """The untrained network that a manifest describes.

    Raises:
        ModelError: the architecture is unknown or its settings make no sense.
    """
    make = ARCHITECTURES.get(manifest.architecture)
    if make is None:
        raise ModelError(
            f"model {manifest.name}: unknown architecture {manifest.architecture!r}; this version "
            f"knows {sorted(ARCHITECTURES)}"
        )
    return make(manifest.settings)


def fill(network: Network, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Put weights into a network, strictly: every name and shape has to fit.

    Raises:
        ModelError: one is missing, unknown or of another shape.
    """
    expected = network.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    wrong = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & tensors.keys())
        if expected[key].shape != tensors[key].shape
    ]
    if missing or unknown or wrong:
        raise ModelError(
            f"model {name}: the weights do not fit its architecture; missing {missing[:4]}, "
            f"unknown {unknown[:4]}, of wrong shape {wrong[:4]}; the settings in its manifest are "
            "not those that it was trained with"
        )
    network.load_state_dict(tensors, strict=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
