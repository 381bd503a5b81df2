"""Reconstruct a file of frames with a bundle, as an inference configuration says.

Used by programs that speak PtychoPINN; the steps are all public, for those that do them one by one.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.atomic_file import make_folder
from ptycho_stream.errors import PtychoPinnError
from ptycho_stream.files.measured_choice import Domain
from ptycho_stream.files.npz import save_arrays
from ptycho_stream.physics.probe import Probe
from ptycho_stream.ptychopinn.config import InferenceConfig, ModelConfig
from ptycho_stream.ptychopinn.execution import ExecutionConfig
from ptycho_stream.ptychopinn.model import PtychoModel, load_inference_bundle
from ptycho_stream.ptychopinn.model_inputs import model_inputs
from ptycho_stream.ptychopinn.raw_data import FrameSet, GroupedData, RawData
from ptycho_stream.ptychopinn.reassembly import Reassembled, listed, reassemble

OBJECT_FILE = "object.npz"
PATCHES_FILE = "patches.npz"


def predict(model: PtychoModel, data: FrameSet, grouped: GroupedData) -> NDArray[np.complex64]:
    """Patches (B, C, N, N) of grouped data.

    Args:
        model: to predict with.
        data: that the groups are of; its probe and mask are used.
        grouped: what its ``generate_grouped_data`` gave.

    Raises:
        PtychoPinnError: the data do not fit the model.
    """
    x, positions = model_inputs(grouped)
    scale = np.full(len(x), model.bundle.input_scale_factor, np.float32)
    return model.diffraction_to_obj(x, positions, data.probeGuess, scale, data.valid).numpy()


def reconstruct(
    config: InferenceConfig,
    *,
    execution: ExecutionConfig | None = None,
    measurement_domain: Domain | None = None,
) -> Reassembled:
    """Reconstruct every frame of ``test_data_file`` and put the patches together.

    ``output_dir`` gets ``object.npz``: ``object`` complex64 (H, W), ``weight`` float32 (H, W) and
    ``corner_yx_px`` (2,), all in pixels as the file's coordinates; with ``debug`` also
    ``patches.npz``: ``patches`` complex64 (B, C, N, N) and the arrays of the grouped data that say
    where they lie.

    Args:
        config: which bundle and file; its model has to be the bundle's (N = 0: any).
        execution: where to compute.
        measurement_domain: of the frames, if the file does not tell.

    Raises:
        PtychoPinnError: a path is not set, or model, file and bundle do not fit each other.
        ModelError: the bundle cannot be read.
        FileFormatError: the file cannot be read, or the output not written.
    """
    if config.model_path is None or config.test_data_file is None:
        raise PtychoPinnError("model_path and test_data_file have to be set")
    execution = execution or ExecutionConfig()
    model, trained = load_inference_bundle(config.model_path, execution)
    _check_same(config.model, trained.model)
    data = RawData.from_file(config.test_data_file, measurement_domain)
    grouped = data.generate_grouped_data(
        trained.model.N,
        trained.neighbor_count,
        len(data),
        gridsize=trained.model.gridsize,
        seed=trained.subsample_seed or 0,
        sequential_sampling=True,
    )
    obj = predict(model, data, grouped)
    patches, centre_xy_px = listed(obj, grouped["coords_nn"])
    found = reassemble(
        patches,
        centre_xy_px,
        trained.model.N,
        power=Probe(data.probeGuess).power_yx,
        workers=execution.workers,
    )
    arrays = {
        "object": found.object_yx,
        "weight": found.weight_yx,
        "corner_yx_px": np.array(found.corner_yx_px),
    }
    make_folder(config.output_dir)
    save_arrays(config.output_dir / OBJECT_FILE, arrays)
    if config.debug:
        places = {name: grouped[name] for name in ("nn_indices", "coords_nn", "coords_relative")}
        save_arrays(config.output_dir / PATCHES_FILE, {"patches": obj, **places})
    return found


def _check_same(asked: ModelConfig, trained: ModelConfig) -> None:
    if asked.N == 0:
        asked = replace(asked, N=trained.N)
    other = [
        f"{each.name} {getattr(asked, each.name)!r} (the bundle: {getattr(trained, each.name)!r})"
        for each in fields(ModelConfig)
        if getattr(asked, each.name) != getattr(trained, each.name)
    ]
    if other:
        raise PtychoPinnError(
            f"InferenceConfig.model is not the bundle's: {', '.join(other)}; give the model of the "
            "configuration that load_inference_bundle gives"
        )
