"""Take a PyTorch state dict that was made elsewhere into the registry, strictly and safely.

A ``.pt`` or ``.ckpt`` file is a pickle, which could run code: it is read by PyTorch's restricted
reader only, which admits tensors and plain containers. Used by ``ptycho-stream models import``.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ptycho_stream.errors import ModelError
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry, build, fill

MAX_BYTES = 1 << 30
"""Of a file, and of what it holds when unpacked: 250 M weights, a hundred times our networks."""

# What torch.load was seen to raise, or may raise, on files that are damaged or of another kind.
_UNREADABLE = (
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def import_state_dict(
    path: Path,
    manifest: Manifest,
    registry: ModelRegistry,
    *,
    prefix: str = "",
) -> Manifest:
    """Add the weights in a file to a registry, as the model that ``manifest`` describes.

    Args:
        path: what ``torch.save`` wrote: a state dict, or a checkpoint with one as ``state_dict``.
        manifest: name, architecture and settings; where the weights come from is noted in it.
        registry: to add to.
        prefix: take the weights whose names begin with this, without it.

    Returns:
        The manifest as it was written.

    Raises:
        ModelError: the file cannot be read, holds other things than tensors and plain containers,
            or its weights are not, by name and shape, those of the network; or the registry has no
            room for the name.
    """
    registry.check_new(manifest.name)
    network = build(manifest)
    tensors = _state_dict(path, prefix)
    fill(network, tensors, manifest.name)
    origin = {"imported_from": path.name, "file_sha256": _sha256(path)}
    described = Manifest(
        name=manifest.name,
        architecture=manifest.architecture,
        settings=network.settings_json(),
        training=manifest.training | origin,
        parent=manifest.parent,
    )
    return registry.save(network, described)


def _state_dict(path: Path, prefix: str) -> dict[str, Tensor]:
    """Names and float32 weights in a file."""
    held = _read(path)
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict):
        raise ModelError(f"{path} holds a {type(held).__name__}, not a state dict")
    found: dict[str, Tensor] = {}
    room = MAX_BYTES
    for name, value in cast("dict[object, object]", held).items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelError(
                f"{path} holds {name!r}: {type(value).__name__} among the weights; save "
                "model.state_dict() alone"
            )
        if name.startswith(prefix):
            # Its strides may make one stored number a tensor of any size.
            room -= value.numel() * 4
            if room < 0:
                raise ModelError(f"{path}: its weights take more than {MAX_BYTES} bytes")
            found[name.removeprefix(prefix)] = _weights(value, f"{path}: {name}")
    if not found:
        raise ModelError(
            f"{path} has no weights whose names begin with {prefix!r}"
            if prefix
            else f"{path} holds no weights"
        )
    return found


def _weights(tensor: Tensor, where: str) -> Tensor:
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        raise ModelError(f"{where} is {tensor.dtype}, {tensor.layout}: not plain real weights")
    weights = tensor.detach().float().contiguous()
    if not torch.isfinite(weights).all():
        raise ModelError(f"{where} holds NaN or infinity: that model's training failed")
    return weights


def _read(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(member.file_size for member in archive.infolist()))
        if size > MAX_BYTES:
            raise ModelError(f"{path} holds {size} bytes; at most {MAX_BYTES} are accepted")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        what = f"it asks for {named[1]}, which" if named else "what it asks for"
        raise ModelError(
            f"{path} is refused: it holds more than weights, or is no PyTorch file; {what} is not "
            "run or loaded from a file. Where the model is at home, save "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    except _UNREADABLE as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} is damaged, or no PyTorch file: {first}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
