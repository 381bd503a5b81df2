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
from ptycho_stream.models.manifest import Manifest, check_name
from ptycho_stream.networks.network import Network
from ptycho_stream.networks.unrolled import UnrolledNetwork, UnrolledSettings

DEFAULT_MODEL = "unrolled-v1"
"""The shipped model that the name ``default`` stands for, unless the folder has a ``default``."""

WEIGHTS_FILE = "weights.safetensors"
MANIFEST_FILE = "manifest.json"

log = logging.getLogger(__name__)

_SHIPPED = Path(__file__).parent / "shipped"


def _unrolled(settings: dict[str, Any]) -> Network:
    return UnrolledNetwork(UnrolledSettings.from_json(settings))


ARCHITECTURES: dict[str, Callable[[dict[str, Any]], Network]] = {"unrolled": _unrolled}
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
        for _, directory in sorted(self._models().items()):
            try:
                manifests.append(_read_manifest(directory))
            except ModelError as error:
                log.warning("left out of the models: %s", error)
        return manifests

    def load(self, name: str = "default") -> tuple[Network, Manifest]:
        """Load a model, ready for inference on the CPU.

        Raises:
            ModelError: it is missing, truncated or altered, of an unknown architecture, or its
                weights do not fit the network that its manifest describes.
        """
        directory = self._directory(name)
        manifest = _read_manifest(directory)
        weights = directory / WEIGHTS_FILE
        try:
            content = weights.read_bytes()
        except FileNotFoundError as error:
            raise ModelError(f"model {name}: no {weights}; save or install it again") from error
        found = hashlib.sha256(content).hexdigest()
        if found != manifest.sha256:
            raise ModelError(
                f"model {name}: {weights} has sha256 {found[:12]}…, its manifest says "
                f"{manifest.sha256[:12]}…; the file is truncated or altered, install it again"
            )
        try:
            tensors = load_tensors(content)
        except SafetensorError as error:
            raise ModelError(f"model {name}: {weights} is no safetensors file ({error})") from error
        network = build(manifest)
        _fill(network, tensors, name)
        return network.eval(), manifest

    def save(self, network: Network, manifest: Manifest) -> Manifest:
        """Add a model to the folder, and return its manifest as it was written.

        sha256 and, if empty, the time are filled in. The directory appears complete or not at all.

        Raises:
            ModelError: there is no folder, or it already has a model of this name.
        """
        target = self.check_new(manifest.name)
        state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
        content = save_tensors(state)
        written = replace(
            manifest,
            sha256=hashlib.sha256(content).hexdigest(),
            created=manifest.created or datetime.now(UTC).isoformat(timespec="seconds"),
        )
        _fill(build(written), state, written.name)
        root = target.parent
        draft = Path(tempfile.mkdtemp(prefix=f".{written.name}-", dir=root))
        try:
            _write_synced(draft / WEIGHTS_FILE, content)
            _write_synced(draft / MANIFEST_FILE, written.to_json().encode())
            draft.chmod(0o755)
            draft.rename(target)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise ModelError(f"cannot save model {written.name} to {target}: {error}") from error
        sync_path(root)
        return _read_manifest(target)

    def check_new(self, name: str) -> Path:
        """Where a new model of this name will be; its parent folder is made if it is missing.

        Training asks before it spends hours on a model that could not be saved.

        Raises:
            ModelError: it is no name, there is no folder or it cannot be written, or it already has
                a model of this name.
        """
        check_name(name)
        if self.root is None:
            raise ModelError("this registry has no folder to save to; set model.registry")
        target = self.root / name
        if target.exists():
            raise ModelError(f"{target} exists; models are never overwritten, choose a new name")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(f"cannot make the registry {self.root}: {error.strerror}") from error
        if not os.access(self.root, os.W_OK):
            raise ModelError(f"cannot write to the registry {self.root}; choose another folder")
        return target

    def _models(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for root in (_SHIPPED, self.root):
            if root is not None and root.is_dir():
                found |= {
                    d.name: d for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")
                }
        return found

    def _directory(self, name: str) -> Path:
        models = self._models()
        directory = models.get(name) or (models.get(DEFAULT_MODEL) if name == "default" else None)
        if directory is None:
            where = f" or {self.root}" if self.root is not None else ""
            raise ModelError(
                f"no model {name!r} in the package{where}; there are: {sorted(models)}"
            )
        return directory


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_FILE
    manifest = Manifest.read(path)
    if manifest.name != directory.name:
        raise ModelError(
            f"{path} names the model {manifest.name!r}, not {directory.name!r} as its folder: "
            "rename one of them"
        )
    return manifest


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


def _fill(network: Network, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Strict load: every name and shape has to fit."""
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
