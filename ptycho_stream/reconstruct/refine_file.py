"""Refine a scan file without any daemon: frames and positions in, object and probe out.

For programs and notebooks, where no network is wanted or none fits the frames; the benchmark of
refinement uses its parts. ::

    result = refine_file(Path("scan.npz"), seconds=15)
    result.save(Path("refined.npz"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.errors import GeometryError, ProbeError
from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.npz import save_arrays
from ptycho_stream.geometry import patch_corners
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.canvas import Canvas, half_of
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.refine import Refiner
from ptycho_stream.reconstruct.refine_settings import RefineSettings
from ptycho_stream.results import Tile, stitch

_TILE_PX = 128
_PHOTON_PERCENTILE = 90
"""Of the frames' sums: what passes where the sample is thin."""


@dataclass(frozen=True)
class RefinedScan:
    """Outcome of :func:`refine_file`.

    Attributes:
        object_yx: complex64 (H, W), NaN where unseen.
        weight_yx: float32 (H, W), illumination; 1 = one frame at the probe's peak.
        origin_yx_m: world position of the centre of object_yx[0, 0].
        pixel_yx_m: of the object.
        probe: refined modes.
        positions_yx_m: float64 (M, 2), corrected if that was asked for.
        frame_numbers: int64 (M,).
        misfit: float32 (M,) at the last visit of each frame (:attr:`Refiner.misfit`).
        sweeps: visits of a frame on average.
        unusable: frames left out, by reason.
        metadata: of the scan.
    """

    object_yx: NDArray[np.complex64]
    weight_yx: NDArray[np.float32]
    origin_yx_m: tuple[float, float]
    pixel_yx_m: tuple[float, float]
    probe: Probe
    positions_yx_m: NDArray[np.float64]
    frame_numbers: NDArray[np.int64]
    misfit: NDArray[np.float32]
    sweeps: float
    unusable: Mapping[str, int]
    metadata: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write an NPZ with the keys of every image that ptycho-stream saves.

        Raises:
            FileFormatError: the path cannot be written.
        """
        told = {"origin": "refined", "sweeps": self.sweeps, "unusable": dict(self.unusable)}
        metadata = {**self.metadata, "ptycho_stream": told}
        save_arrays(
            path,
            {
                "object": self.object_yx,
                "weight": self.weight_yx,
                "origin_yx_m": np.asarray(self.origin_yx_m),
                "pixel_yx_m": np.asarray(self.pixel_yx_m),
                "probe": self.probe.modes,
                "positions_yx_m": self.positions_yx_m,
                "frame_numbers": self.frame_numbers,
                "misfit": self.misfit,
                "metadata": np.array(json.dumps(metadata, default=str)),
            },
        )


def refine_file(
    path: Path | str,
    *,
    seconds: float = 15.0,
    probe: Probe | None = None,
    photons: float | None = None,
    model: str | None = None,
    settings: RefineSettings | None = None,
    valid: NDArray[np.bool_] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> RefinedScan:
    """Reconstruct a measured scan (:mod:`ptycho_stream.files.measured`) by refinement.

    Args:
        path: of the file.
        seconds: to refine for, after loading.
        probe: starting probe; None: the file's own.
        photons: of the unattenuated beam, a frame; None: a high percentile of the frames' sums.
        model: network whose stitched image is the start (``default`` is the one in use); None:
            the start is an object of 1.
        settings: how to refine.
        valid: bool (N, N), False where the detector has no answer; None: as the file says.
        device: where to compute.
        seed: of the order of visits.

    Raises:
        FileFormatError: the file is not a scan file.
        ProbeError: neither the file nor the call has a probe.
        GeometryError: frames are not square, do not fit the probe, the pixel size is not known, or
            positions are unusable.
    """
    scan = load_measured(Path(path))
    counts = np.asarray(scan.counts)
    if valid is None and scan.bad_pixels is not None:
        valid = ~scan.bad_pixels
    if probe is None:
        if scan.probe is None:
            raise ProbeError(f"{path} holds no probe: give one, a guess from the optics will do")
        probe = Probe(scan.probe)
    size = probe.size_px
    if scan.frame_shape_yx != (size, size):
        raise GeometryError(f"{path} holds frames of {scan.frame_shape_yx}, the probe has {size}")
    pixel_yx_m = scan.pixel_for(size)
    probe = probe.normalised(photons or measured_photons(counts, valid))
    refiner = Refiner(counts, probe, settings, valid=valid, device=device, seed=seed)
    refiner.add(np.arange(len(scan)), scan.positions_yx_m / np.asarray(pixel_yx_m))
    if model is not None:
        network, _ = ModelRegistry().load(model)
        predictor = Predictor(network, probe, device)
        corner, shift = patch_corners(scan.positions_yx_m, pixel_yx_m, size)
        refiner.start_from(*predicted_image(predictor, counts, corner, shift, valid))
    refiner.sweep(seconds)
    image = refiner.image()
    origin = np.asarray(image.corner_yx_px) * np.asarray(pixel_yx_m)
    return RefinedScan(
        object_yx=image.object_yx,
        weight_yx=image.weight_yx,
        origin_yx_m=(float(origin[0]), float(origin[1])),
        pixel_yx_m=pixel_yx_m,
        probe=refiner.probe,
        positions_yx_m=refiner.position_yx_px * np.asarray(pixel_yx_m),
        frame_numbers=scan.frame_numbers,
        misfit=refiner.misfit,
        sweeps=refiner.sweeps,
        unusable=dict(refiner.unusable),
        metadata=scan.metadata,
    )


def measured_photons(counts: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> float:
    """Photons of the unattenuated beam, from frames (M, N, N)."""
    kept = counts if valid is None else np.where(valid, counts, 0)
    return max(float(np.percentile(kept.sum((1, 2), dtype=np.float64), _PHOTON_PERCENTILE)), 1.0)


def predicted_image(
    predictor: Predictor,
    counts: NDArray[Any],
    corner_yx_px: NDArray[np.int64],
    shift_yx_px: NDArray[np.floating[Any]],
    valid: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.complex64], tuple[int, int]]:
    """The network's stitched image of frames (M, N, N), and the canvas pixel of its [0, 0]."""
    canvas = Canvas(_TILE_PX)
    numbers = np.arange(len(counts))
    for start in range(0, len(counts), predictor.batch_size):
        part = slice(start, start + predictor.batch_size)
        patches, weights = predictor.predict(counts[part], shift_yx_px[part], valid)
        canvas.add(patches, weights, corner_yx_px[part], half_of(numbers[part]))
    tiles = {index: Tile(1, *canvas.object_tile(index)) for index in canvas.versions}
    image, _, corner = stitch(tiles, _TILE_PX)
    return image, corner
