"""What ``ptycho-stream doctor`` and ``config check`` find out about positions known beforehand.

Those of a file or a generated path can be looked at before a scan: whether there are any, and
whether frames would be left out because of where they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.cli.checkup import Finding
from ptycho_stream.errors import FileFormatError
from ptycho_stream.scans.join import Join, PositionLimits
from ptycho_stream.settings import GeneratedSettings, Settings
from ptycho_stream.wire.generated_positions import path_yx_m
from ptycho_stream.wire.positions_file import load_positions

MAX_POINTS = 1_000_000
"""Of a generated path that are looked at."""
ENDLESS_POINTS = 100_000
"""Of one without an end."""


def check_known_positions(settings: Settings) -> list[Finding]:
    """A finding where positions are known beforehand; none where they come in a stream."""
    positions = settings.positions
    if positions.generated is not None:
        return [check_generated(positions.generated, settings)]
    if positions.source == "file" and positions.path is not None:
        return [_check_file(settings)]
    return []


def check_generated(path: GeneratedSettings, settings: Settings) -> Finding:
    """Where a generated path goes."""
    points = ENDLESS_POINTS
    if path.shape_yx is not None:
        points = path.shape_yx[0] * path.shape_yx[1]
    numbers = np.arange(min(points, MAX_POINTS), dtype=np.int64)
    where = path_yx_m(path.model_copy(update={"frames_per_point": 1}), numbers)
    known = ~np.isnan(where[:, 0])
    finding = _judge("positions.generated", path.kind, numbers[known], where[known], settings)
    if path.kind == "spiral" and path.radius_m is None:
        detail = "it has no end: every frame has a place"
        return Finding("positions.generated", "OK", path.kind, detail)
    return finding


def _check_file(settings: Settings) -> Finding:
    path = settings.positions.path
    assert path is not None
    try:
        held = load_positions(path)
    except FileFormatError as error:
        state = "unusable" if path.is_file() else "missing"
        return Finding("positions.path", state, str(path), str(error), ok=False)
    return _judge("positions.path", str(path), held.numbers, held.position_yx_m, settings)


def _judge(
    subject: str,
    target: str,
    numbers: NDArray[np.int64],
    where: NDArray[np.float64],
    settings: Settings,
) -> Finding:
    limits = settings.reconstruct
    join = Join(PositionLimits(limits.max_extent_m, limits.max_step_m), len(numbers) + 1)
    join.positions(numbers, where, 0)
    told = [
        f"{count} of its {len(numbers)} positions are {what}: their frames would be left out of "
        f"the image; correct the path, or set {key} (now {limit:g})"
        for count, what, key, limit in (
            (join.out_of_extent, "too far out", "reconstruct.max_extent_m", limits.max_extent_m),
            (
                join.jumps,
                "too far from the one before",
                "reconstruct.max_step_m",
                limits.max_step_m,
            ),
        )
        if count
    ]
    if told:
        return Finding(subject, "doubtful", target, "; ".join(told), ok=False)
    height_m, width_m = np.ptp(where[np.isfinite(where).all(axis=1)], axis=0)
    size = f"{height_m * 1e6:.4g} x {width_m * 1e6:.4g} um"
    return Finding(subject, "OK", target, f"{len(numbers)} positions within {size}")
