"""A result as a CXI file (1.60): probe, object, translations and, if they are at hand, its frames.

Paths are those of :mod:`ptycho_stream.files.cxi_names`; translations are x, y, z in metres. Used by
:mod:`ptycho_stream.files.products`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray

from ptycho_stream import __version__
from ptycho_stream.files import cxi_names as names
from ptycho_stream.files.hdf5_output import Progress, hdf5_output, write_frames
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.ptychodus_output import Losses
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

_SOURCE = "/entry_1/instrument_1/source_1"


def save_cxi(
    path: Path,
    image: Image,
    geometry: DetectorGeometry,
    frames: ScanFile | None = None,
    losses: Losses = (),
    progress: Progress | None = None,
) -> None:
    """Write an image as CXI; the file is there whole or not at all.

    Args:
        path: of the file.
        image: the result.
        geometry: energy, distance and detector pixel, as far as they are known.
        frames: of the image, in the order of its ``frame_numbers``; None: the file has none.
        losses: of the reconstruction.
        progress: told of the frames that are written.

    Raises:
        FileFormatError: the path cannot be written.
        StoreError: the frames cannot be read.
    """
    with hdf5_output(path) as file:
        file[names.VERSION] = names.NEWEST_VERSION
        file["number_of_entries"] = 1
        _write_words(file, image)
        if geometry.photon_energy_eV is not None:
            file[names.ENERGY] = geometry.photon_energy_eV * names.JOULES_PER_EV
        _write_detector(file, geometry, frames, progress)
        _write_positions(file, image.positions_yx_m)
        _write_image(file, names.PROBE, image.probe[None], image, "coherent:incoherent:y:x")
        _write_image(file, names.OBJECT, whole_object(image)[None], image, "layer:y:x")
        _write_extras(file, image, geometry, losses)


def _write_words(file: Any, image: Image) -> None:
    metadata = image.metadata
    words = {
        "/entry_1/title": word(metadata, "sample", "name") or image.scan_id,
        "/entry_1/sample_1/name": word(metadata, "sample", "name"),
        "/entry_1/experiment_description": word(metadata, "comment", "comments"),
        "/entry_1/experiment_identifier": word(metadata, "proposal"),
        "/entry_1/start_time": word(metadata, "start_time", "start_date"),
        "/entry_1/process_1/program": "ptycho-stream",
        "/entry_1/process_1/version": __version__,
    }
    for place, text in words.items():
        if text:
            file[place] = text


def _write_detector(
    file: Any, geometry: DetectorGeometry, frames: ScanFile | None, progress: Progress | None
) -> None:
    detector = file.require_group(names.DETECTOR)
    if geometry.detector_distance_m is not None:
        detector["distance"] = geometry.detector_distance_m
    pixel = geometry.detector_pixel_yx_m if frames is None else frames.detector_pixel_yx_m
    if pixel is not None:
        detector["y_pixel_size"], detector["x_pixel_size"] = pixel
    if frames is None:
        return
    dataset = write_frames(detector, "data", frames, progress)
    dataset.attrs["axes"] = "translation:y:x"
    if frames.bad_pixels is not None:
        detector["mask"] = np.where(frames.bad_pixels, names.INVALID, 0).astype(np.uint32)
    file[names.DATA] = h5py.SoftLink(dataset.name)


def _write_positions(file: Any, position_yx_m: NDArray[np.float64]) -> None:
    translation = np.zeros((len(position_yx_m), 3))
    translation[:, :2] = position_yx_m[:, ::-1]
    file[names.TRANSLATION] = translation
    for link in (names.TRANSLATION_LINK, f"{names.DETECTOR}/translation"):
        file[link] = h5py.SoftLink(names.TRANSLATION)


def _write_image(
    file: Any, place: str, values: NDArray[np.complex64], image: Image, axes: str
) -> None:
    group = file.create_group(place)
    group["data"] = values
    group["data"].attrs["axes"] = axes
    group["data_type"] = "amplitude"
    group["data_space"] = "real"
    height_m, width_m = np.multiply(values.shape[-2:], image.pixel_yx_m)
    group["image_size"] = np.array([width_m, height_m, 0.0])
    group["detector_1"] = h5py.SoftLink(names.DETECTOR)
    if _SOURCE in file:
        group["source_1"] = h5py.SoftLink(_SOURCE)


def _write_extras(file: Any, image: Image, geometry: DetectorGeometry, losses: Losses) -> None:
    (center_y, center_x), (pixel_y, pixel_x) = object_center_yx_m(image), image.pixel_yx_m
    metadata = image.metadata
    extras: dict[str, Any] = {
        "probe_position_indexes": image.frame_numbers,
        "probe_photon_count": photons(image),
        "exposure_time_s": geometry.count_time_s or 0.0,
        "tomography_angle_deg": number(metadata, "tomography_angle_deg", "angle_deg", "angle"),
        "object_center_y_m": center_y,
        "object_center_x_m": center_x,
        "loss_epochs": np.array([epoch for epoch, _ in losses], np.int64),
        "loss_values": np.array([value for _, value in losses], np.float64),
    }
    for what in ("object", "probe"):
        extras |= {f"{what}_pixel_height_m": pixel_y, f"{what}_pixel_width_m": pixel_x}
    for name, value in extras.items():
        file[f"{names.EXTRAS}/{name}"] = value
    file[f"{names.OURS}/object_weight"] = image.weight_yx
    file[f"{names.OURS}/description"] = described(image)
