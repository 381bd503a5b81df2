"""What becomes of a GPU that fails: the stage starts anew, then the CPU takes over.

A CUDA error usually leaves the process unable to use the device, so that only another process can
tell whether it still works. The count is therefore kept in a file of the daemon's own folder, over
restarts of the stage. Used by the reconstruct stage.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from ptycho_stream.errors import DeviceError
from ptycho_stream.settings import Settings

MAX_FAILURES = 3
"""So many failures, each within ``MEMORY_S`` of the one before, and the CPU takes over."""
MEMORY_S = 600.0

log = logging.getLogger(__name__)


class DeviceWatch:
    """Failures of the device since the daemon's start, or the last reload.

    Args:
        folder: of this run of the daemon.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "device-failures"
        self._failures, self._last_s, self._words = self._read()

    def _read(self) -> tuple[int, float, str]:
        try:
            held: dict[str, Any] = json.loads(self._path.read_text())
            return int(held["failures"]), float(held["last_s"]), str(held["words"])
        except (FileNotFoundError, ValueError, KeyError):  # the stage may have died amid writing
            return 0, 0.0, ""

    def settings(self, settings: Settings) -> Settings:
        """The settings to load a recipe with: on the CPU where the GPU has failed too often."""
        if not self.given_up(settings):
            return settings
        reconstruct = settings.reconstruct.model_copy(update={"device": "cpu"})
        return settings.model_copy(update={"reconstruct": reconstruct})

    def given_up(self, settings: Settings) -> bool:
        """Whether the CPU has taken over."""
        return settings.reconstruct.fallback_to_cpu and self._failures >= MAX_FAILURES

    def problem(self, settings: Settings) -> str:
        """What to say of it; empty while the device is used that the settings name."""
        if not self.given_up(settings):
            return ""
        return (
            f"{settings.reconstruct.device} has failed {self._failures} times ({self._words}): "
            "images are made on the CPU; when the device is sound again, "
            "`ptycho-stream ctl reload` goes back to it"
        )

    def failed(self, error: Exception) -> None:
        """Count a failure of the device."""
        now_s = time.monotonic()
        if now_s - self._last_s > MEMORY_S:
            self._failures = 0
        self._failures += 1
        self._last_s, self._words = now_s, (str(error).splitlines() or [repr(error)])[0]
        held = {"failures": self._failures, "last_s": now_s, "words": self._words}
        self._path.write_text(json.dumps(held))

    def lost(self, error: RuntimeError, device: torch.device | None) -> DeviceError:
        """Count a failure amid work; the error with which the stage is to end.

        Raises:
            RuntimeError: ``error`` itself, where it is not of a GPU.
        """
        if device is None or device.type == "cpu":
            raise error
        self.failed(error)
        return DeviceError(f"{device} failed: {self._words}; the stage starts again")

    def forget(self) -> None:
        """Try the device anew."""
        self._failures = 0
        self._path.unlink(missing_ok=True)
