"""PtychoPINN's configuration: its three dataclasses, with its names, defaults and limits.

Values are checked whenever they are set, also after construction, and a name that does not exist
cannot be set. Used by everything in this package, by people's programs, and (translated) by
``bridge`` and ``legacy``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from ptycho_stream.errors import PtychoPinnError
from ptycho_stream.ptychopinn.checked import (
    Checked,
    flag,
    not_negative,
    one_of,
    optional_path,
    optional_whole,
    path,
    positive,
    power_of_two,
    share,
    whole,
)
from ptycho_stream.training.job import TRAINABLE

ModelType = Literal["pinn", "supervised"]
AmpActivation = Literal["sigmoid", "swish", "softplus", "relu"]
Backend = Literal["pytorch", "tensorflow"]


@dataclass
class ModelConfig(Checked):
    """The network and the physics behind it.

    What each setting does here, and which values only the legacy dict can carry, is in
    docs/specs/ptychopinn-backend.md.

    Attributes:
        N: side of a frame, pixels; 0: that of the data.
        gridsize: frames go through the network in groups of its square.
        n_filters_scale: factor on the filters of every layer.
        model_type: ``pinn`` learns from frames alone, ``supervised`` from known patches.
        architecture: ``cnn``, PtychoPINN's encoder-decoder, or ``unrolled``.
        amp_activation: makes the amplitude.
        object_big: overlapping patches are stitched before they are compared with frames.
        probe_big: the probe may fill the window.
        probe_mask: the probe is cut to a disc.
        pad_object: patches fill the window.
        probe_scale: scale of the probe.
        gaussian_smoothing_sigma: of a blur of the object, pixels.
    """

    N: Annotated[int, whole(0)] = 64
    gridsize: Annotated[int, whole(1)] = 1
    n_filters_scale: Annotated[int, whole(1)] = 2
    model_type: Annotated[ModelType, one_of(get_args(ModelType))] = "pinn"
    architecture: Annotated[str, one_of(sorted(TRAINABLE))] = "cnn"
    amp_activation: Annotated[AmpActivation, one_of(get_args(AmpActivation))] = "sigmoid"
    object_big: Annotated[bool, flag] = True
    probe_big: Annotated[bool, flag] = True
    probe_mask: Annotated[bool, flag] = False
    pad_object: Annotated[bool, flag] = True
    probe_scale: Annotated[float, positive] = 4.0
    gaussian_smoothing_sigma: Annotated[float, not_negative] = 0.0


def _model(value: Any) -> ModelConfig:
    if not isinstance(value, ModelConfig):
        raise ValueError("give a ModelConfig")
    return value


@dataclass
class TrainingConfig(Checked):
    """A training.

    Attributes:
        model: what is trained.
        train_data_file: NPZ to learn from.
        test_data_file: NPZ that judges.
        batch_size: groups of a step, a power of two.
        nepochs: so often every group is seen.
        mae_weight: share of the absolute error of amplitudes in the loss.
        nll_weight: share of the Poisson likelihood.
        realspace_mae_weight: share of an error of patches.
        realspace_weight: share of a prior on patches.
        nphotons: of a frame on average.
        n_groups: groups drawn of the training frames.
        n_subsample: use only so many frames, drawn at random; None: all.
        subsample_seed: of all draws; None: 0.
        neighbor_count: K, a group is drawn from so many nearest neighbours.
        positions_provided: the files tell positions.
        probe_trainable: the probe is fitted too.
        intensity_scale_trainable: the beam's flux is fitted too.
        sequential_sampling: groups about the first frames instead of random ones.
        output_dir: gets the model and the curves.
        backend: whose archive is meant.
    """

    model: Annotated[ModelConfig, _model] = field(default_factory=ModelConfig)
    train_data_file: Annotated[Path | None, optional_path] = None
    test_data_file: Annotated[Path | None, optional_path] = None
    batch_size: Annotated[int, power_of_two] = 16
    nepochs: Annotated[int, whole(1)] = 50
    mae_weight: Annotated[float, share] = 0.0
    nll_weight: Annotated[float, share] = 1.0
    realspace_mae_weight: Annotated[float, share] = 0.0
    realspace_weight: Annotated[float, share] = 0.0
    nphotons: Annotated[float, positive] = 1e9
    n_groups: Annotated[int, whole(1)] = 512
    n_subsample: Annotated[int | None, optional_whole(1)] = None
    subsample_seed: Annotated[int | None, optional_whole(0)] = None
    neighbor_count: Annotated[int, whole(1)] = 4
    positions_provided: Annotated[bool, flag] = True
    probe_trainable: Annotated[bool, flag] = False
    intensity_scale_trainable: Annotated[bool, flag] = True
    sequential_sampling: Annotated[bool, flag] = False
    output_dir: Annotated[Path, path] = Path("training_outputs")
    backend: Annotated[Backend, one_of(get_args(Backend))] = "pytorch"


@dataclass
class InferenceConfig(Checked):
    """A reconstruction with a trained model.

    Attributes:
        model: that the bundle has to be.
        model_path: folder with ``wts.h5.zip``.
        test_data_file: NPZ to reconstruct.
        debug: keep single patches and their positions beside the object.
        output_dir: gets the object.
    """

    model: Annotated[ModelConfig, _model] = field(default_factory=ModelConfig)
    model_path: Annotated[Path | None, optional_path] = None
    test_data_file: Annotated[Path | None, optional_path] = None
    debug: Annotated[bool, flag] = False
    output_dir: Annotated[Path, path] = Path("inference_outputs")


Config = ModelConfig | TrainingConfig | InferenceConfig


def flat(config: Config) -> dict[str, Any]:
    """The settings by their canonical names, those of a nested model among the others."""
    found: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        found |= flat(value) if isinstance(value, ModelConfig) else {each.name: value}
    return found


def plain(config: Config) -> dict[str, Any]:
    """The :func:`flat` settings as JSON has them: paths are text."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in flat(config).items()
    }


def training_config(values: dict[str, Any]) -> TrainingConfig:
    """The configuration whose :func:`flat` settings these are; what is missing has its default.

    Raises:
        PtychoPinnError: a name is unknown, or a value is out of its limits.
    """
    return cast("TrainingConfig", _nested(TrainingConfig, values))


def inference_config(values: dict[str, Any]) -> InferenceConfig:
    """The configuration whose :func:`flat` settings these are; what is missing has its default.

    Raises:
        PtychoPinnError: a name is unknown, or a value is out of its limits.
    """
    return cast("InferenceConfig", _nested(InferenceConfig, values))


def _nested(
    kind: type[TrainingConfig | InferenceConfig], values: dict[str, Any]
) -> TrainingConfig | InferenceConfig:
    of_model = {each.name for each in fields(ModelConfig)}
    own = {each.name for each in fields(kind)} - {"model"}
    if unknown := sorted(values.keys() - of_model - own):
        raise PtychoPinnError(
            f"{kind.__name__} and its model have no settings {', '.join(unknown)}; they have "
            f"{', '.join(sorted(of_model | own))}"
        )
    model = ModelConfig(**{name: values[name] for name in values.keys() & of_model})
    return kind(model=model, **{name: values[name] for name in values.keys() & own})
