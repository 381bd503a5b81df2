"""Checkpoints that are whole or not there, whatever kills the process that writes them.

Used by every Trainer of this package and by jobs that resume.
"""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import ModelError


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; Lightning's own may be left torn."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; it has reached the disk when this returns."""
        held = io.BytesIO()
        torch.save(checkpoint, held)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            file.write(held.getbuffer())


def steps_of(checkpoint: Path) -> int:
    """Optimiser steps done when a checkpoint was written.

    Raises:
        ModelError: there is none.
    """
    if not checkpoint.is_file():
        raise ModelError(f"no checkpoint at {checkpoint}; give the last.ckpt of the earlier run")
    held = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return int(held["global_step"])
