"""Which configurations can be run here, and the network that one describes.

A setting that this implementation would not heed is refused before anything is computed, with what
to do instead; the dataclasses and the legacy dict carry all of them. Used by training.
"""

from __future__ import annotations

import copy
from typing import Any

from ptycho_stream.errors import PtychoPinnError
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry, build
from ptycho_stream.networks.cnn import CnnSettings
from ptycho_stream.networks.network import Network
from ptycho_stream.ptychopinn.config import ModelConfig, TrainingConfig, flat

ONLY: dict[str, tuple[Any, str]] = {
    "probe_big": (True, "patches fill the window"),
    "pad_object": (True, "patches fill the window"),
    "probe_mask": (False, "cut the probe in the file"),
    "probe_scale": (4.0, "the probe's scale follows from nphotons"),
    "gaussian_smoothing_sigma": (0.0, "patches are not blurred"),
    "realspace_mae_weight": (0.0, "supervised training has no other error than that of patches"),
    "realspace_weight": (0.0, "there is no prior on patches"),
    "probe_trainable": (False, "refine the probe first (ptycho_stream.reconstruct.refine_file)"),
    "positions_provided": (True, "frames without positions cannot be placed"),
    "backend": ("pytorch", "this is the backend pytorch; run the other one for tensorflow"),
}
"""By canonical name: the only value that runs here, and what to do or to know instead."""

_OF_CNN = {"gridsize": 1, "n_filters_scale": 2, "amp_activation": "sigmoid"}


def check_runnable(config: TrainingConfig) -> None:
    """Refuse a training that would not be what its configuration says.

    Raises:
        PtychoPinnError: a setting has a value that is not implemented here, or settings contradict
            each other; all of them are named.
    """
    told = flat(config)
    wrong = [
        f"{name} is {told[name]!r} and only {value!r} runs here: {advice}"
        for name, (value, advice) in ONLY.items()
        if told[name] != value
    ]
    if config.model.architecture != "cnn":
        wrong += [
            f"{name} is {told[name]!r}, which is the cnn's: leave it at {value!r} or take the cnn"
            for name, value in _OF_CNN.items()
            if told[name] != value
        ]
    if config.model.model_type == "pinn" and config.mae_weight + config.nll_weight == 0:
        wrong.append("mae_weight and nll_weight are both 0: there is nothing to learn")
    if wrong:
        raise PtychoPinnError("; ".join(wrong))


def new_network(model: ModelConfig) -> Network:
    """The network to train: a ``cnn`` from nothing, or a copy of the ``unrolled`` that ships.

    Raises:
        ModelError: its settings make no network.
    """
    if model.architecture != "cnn":
        return copy.deepcopy(ModelRegistry().load()[0])
    settings = CnnSettings(
        size_px=model.N,
        gridsize=model.gridsize,
        n_filters_scale=model.n_filters_scale,
        amp_activation=model.amp_activation,
    )
    return build(Manifest("new", model.architecture, settings.to_json()))
