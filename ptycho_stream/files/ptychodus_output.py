"""A result as ptychodus' product, and its frames as the diffraction file beside it.

Attributes have both their names, of version 1.7 and of older ones. Positions are the probe's
centres; the object's centre is the middle of its array, index (n - 1) / 2. Used by
:mod:`ptycho_stream.files.products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.hdf5_output import Progress, hdf5_output, write_frames
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.result_values import (
    described,
    number,
    object_center_yx_m,
    photons,
    whole_object,
    word,
)
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.results import Image

Losses = Sequence[tuple[int, float]]
"""Of a reconstruction: epoch and value, in order."""


def save_product(path: Path, image: Image, geometry: DetectorGeometry, losses: Losses = ()) -> None:
    """Write an image as ptychodus' product; the file is there whole or not at all.

    Raises:
        FileFormatError: energy or distance are not known, or the path cannot be written.
    """
    energy, distance = required_geometry(path, geometry)
    metadata = image.metadata
    attributes: dict[str, Any] = {
        "name": word(metadata, "sample", "name") or image.scan_id,
        "comments": word(metadata, "comment", "comments"),
        "detector_object_distance_m": distance,
        "photon_energy_eV": energy,
        "probe_energy_eV": energy,
        "probe_photon_count": photons(image),
        "exposure_time_s": geometry.count_time_s or 0.0,
        "mass_attenuation_m2_per_kg": number(metadata, "mass_attenuation_m2_per_kg"),
        "mass_attenuation_m2_kg": number(metadata, "mass_attenuation_m2_per_kg"),
        "tomography_angle_deg": number(metadata, "tomography_angle_deg", "angle_deg", "angle"),
    }
    (y_m, x_m), (pixel_y, pixel_x) = object_center_yx_m(image), image.pixel_yx_m
    pixels = {"pixel_height_m": pixel_y, "pixel_width_m": pixel_x}
    with hdf5_output(path) as file:
        file.attrs.update(attributes)
        file["probe_position_indexes"] = image.frame_numbers
        file["probe_position_x_m"] = image.positions_yx_m[:, 1]
        file["probe_position_y_m"] = image.positions_yx_m[:, 0]
        file["probe"] = image.probe[None]
        file["probe"].attrs.update(pixels)
        file["object"] = whole_object(image)[None]
        file["object"].attrs.update({**pixels, "center_y_m": y_m, "center_x_m": x_m})
        file["object_layer_spacing_m"] = np.zeros(0)
        file["loss_epochs"] = np.array([epoch for epoch, _ in losses], np.int64)
        file["loss_values"] = np.array([value for _, value in losses], np.float64)
        file["object_weight"] = image.weight_yx  # ours: 0 where the object was never seen
        file["ptycho_stream"] = described(image)


def required_geometry(path: Path, geometry: DetectorGeometry) -> tuple[float, float]:
    """Photon energy and detector distance of a product.

    Raises:
        FileFormatError: they are not known.
    """
    energy, distance = geometry.photon_energy_eV, geometry.detector_distance_m
    if energy is None or distance is None:
        raise FileFormatError(
            f"{path}: ptychodus needs photon energy and detector distance, which the scan does not "
            "tell: give them (under [geometry]), or write NPZ or CXI"
        )
    return energy, distance


def save_diffraction(path: Path, scan: ScanFile, progress: Progress | None = None) -> None:
    """Write frames as ptychodus' diffraction file; it is there whole or not at all.

    Raises:
        FileFormatError: the size of a detector pixel is not known, or the path cannot be written.
        StoreError: the frames cannot be read.
    """
    pixel = scan.detector_pixel_yx_m
    if pixel is None:
        raise FileFormatError(
            f"{path}: ptychodus needs the size of a detector pixel, which the scan does not tell: "
            "set geometry.detector_pixel_yx_m"
        )
    bad = scan.bad_pixels
    with hdf5_output(path) as file:
        file["indexes"] = scan.frame_numbers
        file["bad_pixels"] = np.zeros(scan.frame_shape_yx, bool) if bad is None else bad
        patterns = write_frames(file, "patterns", scan, progress)
        patterns.attrs["detector_pixel_height_m"] = pixel[0]
        patterns.attrs["detector_pixel_width_m"] = pixel[1]
