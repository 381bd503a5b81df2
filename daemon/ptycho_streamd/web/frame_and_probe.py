"""A diffraction frame and the probe as bytes, for the small pictures beside the image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.wire.stored import StoredFrame

FRAME_PX = 256
PROBE_PX = 128
MAX_MODES = 8
_PHASES = 64
"""Steps of a turn: finer ones cannot be told by their hue."""
_DARK = 3
"""Amplitudes below this level are sent as none: their phases are noise, which deflates badly."""


def frame_bytes(frame: StoredFrame) -> tuple[dict[str, Any], bytes]:
    """The logarithm of a frame's counts.

    Returns:
        Words, among them ``high``, and bytes (h, w): 0 where nothing was measured, else 1 + 254
        times log10(1 + counts) / ``high``.
    """
    bin_px = -(-max(frame.counts_yx.shape) // FRAME_PX)
    counts = _summed(frame.counts_yx, bin_px)
    valid = _summed(frame.valid_yx.astype(np.float32), bin_px) > 0
    scale = np.log10(1 + np.maximum(counts, 0))
    high = max(float(scale.max(initial=0.0)), 0.1)
    levels = np.where(valid, 1 + np.rint(scale * (254 / high)), 0).astype(np.uint8)
    words = {
        "scan_id": frame.scan_id,
        "frame": frame.frame,
        "frames": frame.frames,
        "position_yx_m": frame.position_yx_m,
        "dark": frame.dark,
        "look": frame.look,
        "bin_px": bin_px * frame.bin_px,
        "total": float(frame.counts_yx.sum(dtype=np.float64)),
        "most": float(frame.counts_yx.max(initial=0.0)),
        "masked": float(1 - frame.valid_yx.mean()),
        "shape": list(levels.shape),
        "high": high,
    }
    return words, levels.tobytes()


def probe_bytes(probe: NDArray[np.complex64]) -> tuple[dict[str, Any], bytes]:
    """The modes of a probe.

    Returns:
        Words, among them the ``shares`` of the modes in all photons, and for each mode sent its
        amplitude, relative to its largest, and its phase, 256 to a turn from -pi on, bytes (h, w)
        each.
    """
    power = np.abs(probe).astype(np.float64) ** 2
    shares = power.sum((1, 2)) / max(float(power.sum()), 1e-30)
    step = -(-probe.shape[-1] // PROBE_PX)
    shown = probe[:MAX_MODES, ::step, ::step]
    parts: list[bytes] = []
    for mode in shown:
        amplitude = np.abs(mode)
        light = np.rint(255 * amplitude / max(float(amplitude.max()), 1e-30)).astype(np.uint8)
        light[light < _DARK] = 0
        turn = np.rint((np.angle(mode) / (2 * np.pi) + 0.5) * _PHASES).astype(np.int64) % _PHASES
        turn[light == 0] = 0
        parts += [light.tobytes(), (turn * (256 // _PHASES)).astype(np.uint8).tobytes()]
    words = {
        "modes": len(probe),
        "shape": list(shown.shape),
        "step_px": step,
        "shares": [round(float(share), 4) for share in shares],
    }
    return words, b"".join(parts)


def _summed(values: NDArray[np.float32], bin_px: int) -> NDArray[np.float64]:
    """Sums over bins; the last ones may be of fewer pixels."""
    rows = np.add.reduceat(values, np.arange(0, values.shape[0], bin_px), 0, np.float64)
    return np.add.reduceat(rows, np.arange(0, values.shape[1], bin_px), 1)
