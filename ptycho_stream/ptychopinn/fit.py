"""Trains a model on two sets of frames, in this process, as a configuration says.

Used by the program that ``training.train`` runs, and by hosts that lend their own process, for
frames of the scan store for one. Loads Lightning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.atomic_file import make_folder
from ptycho_stream.errors import PtychoPinnError
from ptycho_stream.geometry import patch_corners
from ptycho_stream.networks.network import Network
from ptycho_stream.physics.probe import Probe
from ptycho_stream.ptychopinn.bundle import Bundle
from ptycho_stream.ptychopinn.config import TrainingConfig, plain
from ptycho_stream.ptychopinn.execution import ExecutionConfig
from ptycho_stream.ptychopinn.raw_data import FrameSet
from ptycho_stream.ptychopinn.runnable import check_runnable, new_network
from ptycho_stream.reconstruct.recipe import usable_device
from ptycho_stream.training.epoch_figures import EpochFigures
from ptycho_stream.training.group_fit import GroupFit, Groups, fit_groups, is_first_process
from ptycho_stream.training.group_objectives import KnownPatches, Misfit
from ptycho_stream.training.loggers import make_loggers
from ptycho_stream.training.trainer import Machine

_log = logging.getLogger(__name__)

_PHOTONS_TOLERANCE = 0.1
"""``nphotons`` may differ by so much from what the data tell."""

_BEAM_PERCENTILE = 90
"""Of the frames' sums: what passes where the sample is thin is taken for the beam."""

_MOST_COLLAPSED = 0.5
"""Share of the patches."""

_BATCH_FRAMES = 256


@dataclass(frozen=True, eq=False)
class _PhotonFrames:
    """A set's frames in photons, where training wants them."""

    data: FrameSet
    root_photons: float
    probe: Probe
    valid: NDArray[np.bool_]
    corner_yx_px: NDArray[np.int64]
    shift_yx_px: NDArray[np.float32]

    def counts(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        return np.square(self.data.amplitude(indices) * np.float32(self.root_photons))


def fit(
    train: FrameSet,
    test: FrameSet,
    config: TrainingConfig,
    execution: ExecutionConfig | None = None,
) -> tuple[Bundle, list[EpochFigures]]:
    """Train in this process.

    Args:
        train: to learn from.
        test: to judge each epoch by; of the same window and photons.
        config: what to train; its files are not looked at.
        execution: where. With several devices Lightning starts the host's own program once more
            for each; ``training.train`` has a program for that.

    Returns:
        The model, and the figures of each epoch.

    Raises:
        PtychoPinnError: a setting does not run here, or the data do not fit it or each other.
        ModelError: the settings make no network, or this machine lacks the device.
        TrainingError: the loss is not finite, or Lightning refuses the machine.
        FileFormatError: ``output_dir`` cannot be made.
    """
    execution = execution or ExecutionConfig()
    check_runnable(config)
    config = _of_data(config, train, test)
    seed = config.subsample_seed or 0
    if config.n_subsample is not None:
        train = train.subsample(config.n_subsample, seed)
    probe, sums = Probe(train.probeGuess), _sums(train)
    config = replace(config, nphotons=_photons(config, train, sums))
    beam_ratio = float(np.percentile(sums, _BEAM_PERCENTILE) / sums.mean())
    beam = probe.normalised(config.nphotons * beam_ratio)
    groups = _groups(train, sums, config, beam, config.n_groups)
    judges = _groups(test, _sums(test), config, beam, min(len(test), config.n_groups))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = new_network(config.model)
    with execution.applied():
        epochs = _fit(network, groups, judges, config, execution)
    best = min(epochs, key=lambda figures: figures.validation)
    _warn(best)
    return Bundle(network, config, probe, beam_ratio * best.flux, _metrics(best)), epochs


def _fit(
    network: Network,
    groups: Groups,
    judges: Groups,
    config: TrainingConfig,
    execution: ExecutionConfig,
) -> list[EpochFigures]:
    folder = config.output_dir
    make_folder(folder)
    names = execution.loggers if is_first_process() else ()
    return fit_groups(
        network,
        _objective(config),
        groups,
        judges,
        GroupFit(config.nepochs, config.batch_size, config.subsample_seed or 0),
        folder=folder,
        machine=_machine(execution),
        told=plain(config),
        loggers=make_loggers(names, folder, run=folder.name, mlflow_uri=execution.mlflow_uri),
    )


def _metrics(figures: EpochFigures) -> dict[str, float]:
    return {
        "val_loss": figures.validation,
        "spread": figures.spread,
        "collapsed": figures.collapsed,
        "best_epoch": float(figures.epoch),
    }


def _warn(figures: EpochFigures) -> None:
    if figures.collapsed > _MOST_COLLAPSED:
        _log.warning(
            "the model's patches vary too little for their frames (spread %.3f): it has collapsed "
            "to a constant; train longer, on more groups, or with a larger gridsize",
            figures.spread,
        )


def _of_data(config: TrainingConfig, train: FrameSet, test: FrameSet) -> TrainingConfig:
    """The configuration with N filled in, if it left that to the data."""
    size = train.size_px
    if config.model.N not in (0, size):
        raise PtychoPinnError(f"N is {config.model.N}, the frames have {size} pixels")
    if test.size_px != size:
        raise PtychoPinnError(f"frames to train on have {size} pixels, to test {test.size_px}")
    return replace(config, model=replace(config.model, N=size))


def _sums(data: FrameSet) -> NDArray[np.float64]:
    """Sum of squared amplitudes of every frame (M,)."""
    sums = np.empty(len(data))
    for first in range(0, len(data), _BATCH_FRAMES):
        part = np.arange(first, min(first + _BATCH_FRAMES, len(data)))
        sums[part] = np.square(data.amplitude(part), dtype=np.float64).sum((1, 2))
    if not sums.mean() > 0:
        raise PtychoPinnError("all frames are dark: there is nothing to learn from")
    return sums


def _photons(config: TrainingConfig, data: FrameSet, sums: NDArray[np.float64]) -> float:
    """Photons of a mean frame: as the data tell, if they do, else as the configuration says."""
    told = float(sums.mean()) if data.measurement_domain == "counts" else data.nphotons
    if told is None:
        return config.nphotons
    if abs(config.nphotons / told - 1) > _PHOTONS_TOLERANCE:
        raise PtychoPinnError(
            f"nphotons is {config.nphotons:g} and the frames have {told:.4g} on average, by which "
            f"their noise is judged: set TrainingConfig.nphotons={told:.4g}"
        )
    return told


def _groups(
    data: FrameSet,
    sums: NDArray[np.float64],
    config: TrainingConfig,
    beam: Probe,
    count: int,
) -> Groups:
    """The groups that a configuration draws from frames."""
    supervised = config.model.model_type == "supervised"
    if supervised and data.known_patches(np.zeros(1, np.int64)) is None:
        raise PtychoPinnError(
            "supervised training needs known patches: Y, or an objectGuess in whose pixels the "
            "positions are and that holds every window"
        )
    corner, shift = _places(data)
    frames = _PhotonFrames(
        data=data,
        root_photons=_root_photons(data, sums, config),
        probe=beam,
        valid=data.valid,
        corner_yx_px=corner,
        # Known patches lie at the frames' own positions, not on the grid.
        shift_yx_px=np.zeros_like(shift) if supervised else shift,
    )
    indices = data.draw_groups(
        config.neighbor_count,
        count,
        gridsize=config.model.gridsize,
        seed=config.subsample_seed or 0,
        sequential_sampling=config.sequential_sampling,
    )
    return Groups(frames, indices, _truth(data) if supervised else None)


def _root_photons(data: FrameSet, sums: NDArray[np.float64], config: TrainingConfig) -> float:
    """What makes amplitudes the root of photons; every file of amplitudes has a unit of its own."""
    if data.measurement_domain == "counts":
        return 1.0
    return float(np.sqrt((data.nphotons or config.nphotons) / sums.mean()))


def _places(data: FrameSet) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    # Canvas pixels count from their centres, PtychoPINN's coordinates from the edge of the first.
    centre_yx_px = data.coords_xy[:, ::-1] - 0.5
    return patch_corners(centre_yx_px, (1.0, 1.0), data.size_px)


def _truth(data: FrameSet) -> Callable[[NDArray[np.integer[Any]]], NDArray[np.complex64]]:
    def patches(indices: NDArray[np.integer[Any]]) -> NDArray[np.complex64]:
        known = data.known_patches(indices)
        assert known is not None
        return known

    return patches


def _objective(config: TrainingConfig) -> Misfit | KnownPatches:
    if config.model.model_type == "supervised":
        return KnownPatches()
    return Misfit(
        nll_weight=config.nll_weight,
        mae_weight=config.mae_weight,
        stitched=config.model.object_big,
        fit_flux=config.intensity_scale_trainable,
    )


def _machine(execution: ExecutionConfig) -> Machine:
    device = usable_device(execution.device, "ExecutionConfig.device")
    if device.type == "cpu" and execution.precision == "16-mixed":
        raise PtychoPinnError("16-mixed needs a GPU: use bf16-mixed or 32-true on a CPU")
    return Machine(device, execution.devices, execution.precision, strategy=execution.strategy)
