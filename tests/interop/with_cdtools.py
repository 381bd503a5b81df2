"""What cdtools makes of our CXI files, and a file of its own: run by ``test_readers.py``.

``python with_cdtools.py read CXI OUT.npz CORNER_Y CORNER_X`` reads the file with cdtools' own
dataset and simulates the frames with its own model; CORNER is the object pixel at which the probe's
window lies furthest up and left. ``python with_cdtools.py write CXI COPY`` writes it anew.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import h5py
import numpy as np
import torch
from cdtools.datasets import Ptycho2DDataset
from cdtools.models import SimplePtycho
from cdtools.tools import interactions, measurements, propagators


def read(cxi: str, out: str, *corner: str) -> dict[str, Any]:
    dataset = Ptycho2DDataset.from_cxi(cxi)
    model = SimplePtycho.from_dataset(dataset)
    translations = interactions.translations_to_pixel(
        torch.as_tensor(model.probe_basis, dtype=torch.float32), dataset.translations
    )
    with h5py.File(cxi) as file:
        probe = torch.as_tensor(file["entry_1/image_1/data"][0])
        obj = torch.as_tensor(file["entry_1/image_2/data"][0])
    start = torch.tensor([float(at) for at in corner])
    waves = interactions.ptycho_2D_sinc(
        probe, obj, translations - translations.min(0).values + start, multiple_modes=True
    )
    intensity = measurements.incoherent_sum(propagators.far_field(waves))
    np.savez(
        out,
        patterns=dataset.patterns.numpy(),
        mask=dataset.mask.numpy(),
        translation_yx_px=translations.numpy(),
        simulated=intensity.numpy(),
    )
    basis = model.probe_basis.numpy()
    return {
        "wavelength_m": float(dataset.wavelength),
        "distance_m": float(dataset.detector_geometry["distance"]),
        "pixel_yx_m": np.linalg.norm(basis, axis=0).tolist(),
        "sample": (dataset.sample_info or {}).get("name"),
        "title": dataset.entry_info.get("title"),
    }


def write(cxi: str, copy: str) -> dict[str, Any]:
    Ptycho2DDataset.from_cxi(cxi).to_cxi(copy)
    return {}


if __name__ == "__main__":
    print(json.dumps({"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])))
