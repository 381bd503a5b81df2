"""Where models lie, and whether one is whole: what can be told of them without loading torch.

Used by the registry and by the daemon's supervisor, which answers requests about models at once and
leaves torch to its stages.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ptycho_stream.errors import ModelError
from ptycho_stream.models.manifest import Manifest, check_name

WEIGHTS_FILE = "weights.safetensors"
MANIFEST_FILE = "manifest.json"

_SHIPPED = Path(__file__).parent / "shipped"


def model_folders(root: Path | None) -> dict[str, Path]:
    """Folders of all models by name: the package's and, before them, those under ``root``.

    Raises:
        ModelError: ``root`` cannot be read.
    """
    found: dict[str, Path] = {}
    for parent in (_SHIPPED, root):
        if parent is None:
            continue
        try:
            if parent.is_dir():
                found |= {
                    d.name: d for d in parent.iterdir() if d.is_dir() and not d.name.startswith(".")
                }
        except OSError as error:
            raise ModelError(f"cannot read the models in {parent}: {error.strerror}") from error
    return found


def model_folder(root: Path | None, name: str) -> Path:
    """Folder of the model ``name``.

    Raises:
        ModelError: there is none; the text lists those there are.
    """
    folders = model_folders(root)
    if name not in folders:
        where = f" or {root}" if root is not None else ""
        raise ModelError(f"no model {name!r} in the package{where}; there are: {sorted(folders)}")
    return folders[name]


def new_model_folder(root: Path | None, name: str) -> Path:
    """Where a new model of this name will be; its parent folder is made if it is missing.

    Raises:
        ModelError: it is no name, there is no folder or it cannot be written, or it already has
            a model of this name.
    """
    check_name(name)
    if root is None:
        raise ModelError("this registry has no folder to save to; set model.registry")
    target = root / name
    try:
        if target.exists():
            raise ModelError(f"{target} exists; models are never overwritten, choose a new name")
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make the registry {root}: {error.strerror}") from error
    if not os.access(root, os.W_OK):
        raise ModelError(f"cannot write to the registry {root}; choose another folder")
    return target


def read_manifest(folder: Path) -> Manifest:
    """What the model in ``folder`` says about itself.

    Raises:
        ModelError: the manifest is missing or damaged, or names another model.
    """
    path = folder / MANIFEST_FILE
    manifest = Manifest.read(path)
    if manifest.name != folder.name:
        raise ModelError(
            f"{path} names the model {manifest.name!r}, not {folder.name!r} as its folder: "
            "rename one of them"
        )
    return manifest


def read_weights(folder: Path, manifest: Manifest) -> bytes:
    """Content of the weights' file, which is the one that ``manifest`` was written with.

    Raises:
        ModelError: it is missing, truncated or altered.
    """
    weights = folder / WEIGHTS_FILE
    try:
        content = weights.read_bytes()
    except OSError as error:
        raise ModelError(
            f"model {manifest.name}: {weights} cannot be read ({error.strerror}); save or install "
            "it again"
        ) from error
    check_digest(content, manifest, str(weights))
    return content


def check_digest(content: bytes, manifest: Manifest, where: str) -> None:
    """Refuse weights that are not those that ``manifest`` was written with.

    Raises:
        ModelError: they are truncated or altered; ``where`` names the file.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != manifest.sha256:
        raise ModelError(
            f"model {manifest.name}: {where} has sha256 {found[:12]}…, its manifest says "
            f"{manifest.sha256[:12]}…; the file is truncated or altered, install it again"
        )
