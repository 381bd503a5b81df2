"""What ptychodus makes of our files, and files of its own: run by ``test_readers.py``.

``python with_ptychodus.py read PRODUCT DIFFRACTION CXI OUT.npz`` reads them with ptychodus' own
functions, simulates the frames with its own forward model, and prints JSON.
``python with_ptychodus.py write SCAN.npz FOLDER`` writes products and diffraction files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ptychodus.api.assemble import AssembledDiffractionData
from ptychodus.api.geometry import PixelGeometry
from ptychodus.api.io import (
    load_diffraction_data,
    load_product,
    save_diffraction_data,
    save_product,
)
from ptychodus.api.object import Object, ObjectCenter
from ptychodus.api.probe import ProbeSequence
from ptychodus.api.probe_positions import ProbePosition, ProbePositionSequence
from ptychodus.api.product import LossValue, Product, ProductMetadata
from ptychodus.api.simulate.diffraction import generate_diffraction_data
from ptychodus.plugins.cxi_file import CXIDiffractionFileReader, CXIProductFileIO
from ptychodus.plugins.npz_product_file import NPZProductFileIO


def of_product(product: Product, prefix: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a product says, and its arrays with the frames that follow from it."""
    metadata, geometry = product.metadata, product.object_.get_geometry()
    simulated = generate_diffraction_data(product)
    told = {
        "name": metadata.name,
        "comments": metadata.comments,
        "distance_m": metadata.detector_distance_m,
        "energy_eV": metadata.photon_energy_eV,
        "photons": metadata.probe_photon_count,
        "exposure_s": metadata.exposure_time_s,
        "angle_deg": metadata.tomography_angle_deg,
        "object_pixel_yx_m": [geometry.pixel_height_m, geometry.pixel_width_m],
        "object_center_yx_m": [geometry.center_y_m, geometry.center_x_m],
        "probe_pixel_yx_m": [
            product.probes.get_pixel_geometry().height_m,
            product.probes.get_pixel_geometry().width_m,
        ],
        "simulated_pixel_yx_m": [
            simulated.get_pixel_geometry().height_m,
            simulated.get_pixel_geometry().width_m,
        ],
        "losses": [[int(loss.epoch), float(loss.value)] for loss in product.losses],
    }
    positions = product.probe_positions
    arrays = {
        "object": product.object_.get_array(),
        "probe": product.probes.get_array(),
        "index": positions.get_indexes(),
        "x_m": positions.get_coordinates_x_m(),
        "y_m": positions.get_coordinates_y_m(),
        "simulated": simulated.get_patterns(),
    }
    return told, {f"{prefix}.{name}": values for name, values in arrays.items()}


def read(product: str, diffraction: str, cxi: str, out: str) -> dict[str, Any]:
    held = load_diffraction_data(Path(diffraction))
    told, arrays = of_product(load_product(Path(product)), "h5")
    from_cxi, more = of_product(CXIProductFileIO().read(Path(cxi)), "cxi")
    dataset = CXIDiffractionFileReader().read(Path(cxi))
    metadata = dataset.get_metadata()
    arrays |= more | {
        "patterns": held.get_patterns(),
        "indexes": held.get_indexes(),
        "bad_pixels": held.get_bad_pixels(),
        "cxi_patterns": np.concatenate([array.get_patterns() for array in dataset]),
        "cxi_bad_pixels": dataset.get_bad_pixels(),
    }
    np.savez(out, **arrays)
    pixel = held.get_pixel_geometry()
    return {
        "h5": told,
        "cxi": from_cxi,
        "detector_pixel_yx_m": [pixel.height_m, pixel.width_m],
        "cxi_detector_pixel_yx_m": [
            metadata.detector_pixel_geometry.height_m,
            metadata.detector_pixel_geometry.width_m,
        ],
        "cxi_energy_eV": metadata.photon_energy_eV,
        "cxi_distance_m": metadata.detector_distance_m,
    }


def write(scan: str, folder: str) -> dict[str, Any]:
    with np.load(scan) as held:
        given = {name: held[name] for name in held.files}
    pixel = PixelGeometry(height_m=given["pixel_yx_m"][0], width_m=given["pixel_yx_m"][1])
    positions = zip(given["numbers"], *given["position_yx_m"].T, strict=True)
    product = Product(
        metadata=ProductMetadata(
            "star",
            "by ptychodus",
            float(given["distance_m"]),
            float(given["energy_eV"]),
            1e6,
            0.1,
            0.0,
            30.0,
        ),
        probe_positions=ProbePositionSequence(
            [ProbePosition(int(n), float(x), float(y)) for n, y, x in positions]
        ),
        probes=ProbeSequence(given["probe"], None, pixel),
        object_=Object(
            given["object"],
            pixel,
            ObjectCenter(y_m=given["center_yx_m"][0], x_m=given["center_yx_m"][1]),
        ),
        losses=[LossValue(1, 0.5)],
    )
    detector = given["detector_pixel_yx_m"]
    data = AssembledDiffractionData(
        given["numbers"],
        given["counts"],
        PixelGeometry(height_m=detector[0], width_m=detector[1]),
        given["bad_pixels"],
    )
    into = Path(folder)
    save_product(into / "product.h5", product)
    save_diffraction_data(into / "diffraction.h5", data)
    NPZProductFileIO().write(into / "product.npz", product)
    np.savez(
        into / "diffraction.npz",
        indexes=data.get_indexes(),
        patterns=data.get_patterns(),
        bad_pixels=data.get_bad_pixels(),
    )
    return {"files": sorted(path.name for path in into.iterdir())}


if __name__ == "__main__":
    print(json.dumps({"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])))
