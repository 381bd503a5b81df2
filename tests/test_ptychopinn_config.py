"""PtychoPINN's configuration: names, defaults, limits, the torch names and the legacy dict."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from ptycho_stream.errors import PtychoPinnError, PtychoStreamError
from ptycho_stream.ptychopinn.bridge import (
    RENAMED,
    canonical,
    inference_config_from_torch,
    training_config_from_torch,
)
from ptycho_stream.ptychopinn.config import (
    InferenceConfig,
    ModelConfig,
    TrainingConfig,
    flat,
    training_config,
)
from ptycho_stream.ptychopinn.execution import ExecutionConfig
from ptycho_stream.ptychopinn.legacy import KEY_MAPPINGS, legacy_dict, update_legacy_dict
from ptycho_stream.ptychopinn.runnable import ONLY, check_runnable


@pytest.fixture
def golden(data_folder):
    return json.loads((data_folder / "ptychopinn_legacy_params.json").read_text())


def by_canonical_name(golden):
    back = {legacy: name for name, legacy in KEY_MAPPINGS.items()}
    return {back.get(key, key): value for key, value in golden.items()}


def test_defaults_are_those_of_the_contract():
    assert flat(ModelConfig()) == {
        "N": 64,
        "gridsize": 1,
        "n_filters_scale": 2,
        "model_type": "pinn",
        "architecture": "cnn",
        "amp_activation": "sigmoid",
        "object_big": True,
        "probe_big": True,
        "probe_mask": False,
        "pad_object": True,
        "probe_scale": 4.0,
        "gaussian_smoothing_sigma": 0.0,
    }
    of_model = flat(ModelConfig()).keys()
    own = {name: v for name, v in flat(TrainingConfig()).items() if name not in of_model}
    assert own == {
        "train_data_file": None,
        "test_data_file": None,
        "batch_size": 16,
        "nepochs": 50,
        "mae_weight": 0.0,
        "nll_weight": 1.0,
        "realspace_mae_weight": 0.0,
        "realspace_weight": 0.0,
        "nphotons": 1e9,
        "n_groups": 512,
        "n_subsample": None,
        "subsample_seed": None,
        "neighbor_count": 4,
        "positions_provided": True,
        "probe_trainable": False,
        "intensity_scale_trainable": True,
        "sequential_sampling": False,
        "output_dir": Path("training_outputs"),
        "backend": "pytorch",
    }
    assert [each.name for each in fields(InferenceConfig)] == [
        "model",
        "model_path",
        "test_data_file",
        "debug",
        "output_dir",
    ]


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        (ModelConfig, "N", -1, "at least 0"),
        (ModelConfig, "N", 64.0, "whole number"),
        (ModelConfig, "gridsize", True, "whole number"),
        (ModelConfig, "gridsize", 0, "at least 1"),
        (ModelConfig, "model_type", "Unsupervised", "pinn, supervised"),
        (ModelConfig, "amp_activation", "silu", "sigmoid, swish, softplus, relu"),
        (ModelConfig, "architecture", "fno", "cnn, unrolled"),
        (ModelConfig, "object_big", 1, "True or False"),
        (ModelConfig, "probe_scale", 0, "above 0"),
        (ModelConfig, "gaussian_smoothing_sigma", -0.1, "at least 0"),
        (TrainingConfig, "batch_size", 12, "power of two"),
        (TrainingConfig, "mae_weight", 1.1, "from 0 to 1"),
        (TrainingConfig, "nll_weight", -0.1, "from 0 to 1"),
        (TrainingConfig, "nll_weight", True, "give a number"),
        (TrainingConfig, "nphotons", float("nan"), "give a number"),
        (TrainingConfig, "n_subsample", 0, "at least 1"),
        (TrainingConfig, "output_dir", None, "path"),
        (TrainingConfig, "backend", "jax", "pytorch, tensorflow"),
        (TrainingConfig, "model", {"N": 64}, "ModelConfig"),
        (InferenceConfig, "debug", "yes", "True or False"),
        (ExecutionConfig, "device", "gpu", "cuda"),
        (ExecutionConfig, "precision", "64-true", "32-true"),
        (ExecutionConfig, "strategy", "fsdp", "auto, ddp"),
        (ExecutionConfig, "workers", 0, "at least 1"),
        (ExecutionConfig, "loggers", ("csv", "wandb"), "wandb"),
        (ExecutionConfig, "mlflow_uri", 3, "text"),
    ],
)
def test_values_out_of_their_limits_are_refused_when_they_are_set(kind, name, value, said):
    with pytest.raises(PtychoPinnError, match=said) as refusal:
        kind(**{name: value})
    assert f"{kind.__name__}.{name}" in str(refusal.value)
    config = kind()
    before = getattr(config, name)
    with pytest.raises(ValueError, match=said):
        setattr(config, name, value)
    assert getattr(config, name) == before
    assert issubclass(PtychoPinnError, PtychoStreamError)


def test_a_setting_that_does_not_exist_cannot_be_set():
    """Trap: knobs accepted and ignored."""
    config = TrainingConfig()
    with pytest.raises(PtychoPinnError, match="no setting nepoch"):
        config.nepoch = 3
    with pytest.raises(PtychoPinnError, match="no settings nepoch"):
        training_config({"nepoch": 3})


def test_programs_may_fill_in_the_size_when_they_know_it():
    """As ptychodus 1.7 does: N = 0 and empty paths first, the rest once the data are there."""
    config = TrainingConfig(
        model=ModelConfig(N=0), train_data_file=Path(), test_data_file=None, output_dir=Path()
    )
    assert config.train_data_file is None
    config.model.N = 128
    assert flat(config)["N"] == 128


# The torch names


def test_torch_names_and_values_become_canonical_ones():
    config = training_config_from_torch(
        {
            "N": 128,
            "grid_size": (2, 2),
            "mode": "Supervised",
            "amp_activation": "silu",
            "probe_mask": None,
            "epochs": 7,
            "K": 6,
            "nll": False,
            "mae_weight": 1.0,
            "nphotons": 1e6,
            "batch_size": 8,
            "object_big": False,
        }
    )
    told = flat(config)
    expected = {
        "N": 128,
        "gridsize": 2,
        "model_type": "supervised",
        "amp_activation": "swish",
        "probe_mask": False,
        "nepochs": 7,
        "neighbor_count": 6,
        "nll_weight": 0.0,
        "mae_weight": 1.0,
        "batch_size": 8,
        "object_big": False,
    }
    assert told | expected == told
    assert told["n_filters_scale"] == 2, "what is not told has its default"


def test_a_probe_mask_is_whether_there_is_one():
    assert canonical({"probe_mask": object()}) == {"probe_mask": True}
    assert canonical({"probe_mask": False}) == {"probe_mask": False}
    assert canonical({"nll": True}) == {"nll_weight": 1.0}
    assert canonical({"mode": "Unsupervised"}) == {"model_type": "pinn"}
    assert canonical({"amp_activation": "sigmoid"}) == {"amp_activation": "sigmoid"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"grid_size": (2, 3)}, r"grid_size is \(2, 3\): groups are square"),
        ({"grid_size": 2}, r"give \(rows, columns\)"),
        ({"mode": "unsupervised"}, "Unsupervised, Supervised"),
        ({"nll": 0.7}, "nll_weight"),
        ({"C": 4}, "C has no counterpart.*grid_size"),
        ({"cbam_encoder": True}, "cbam_encoder has no counterpart"),
        ({"K": 4, "neighbor_count": 6}, "say the same"),
        ({"epochs": 0}, "nepochs is 0"),
    ],
)
def test_what_torch_says_without_a_counterpart_is_refused(values, said):
    with pytest.raises(PtychoPinnError, match=said):
        training_config_from_torch(values)


def test_a_training_s_setting_is_none_of_an_inference():
    assert inference_config_from_torch({"debug": True, "grid_size": (1, 1)}).debug
    with pytest.raises(PtychoPinnError, match="nepochs"):
        inference_config_from_torch({"epochs": 3})


def test_renamed_settings_exist():
    known = flat(TrainingConfig()).keys() | flat(InferenceConfig()).keys()
    assert set(RENAMED.values()) | set(KEY_MAPPINGS) <= known
    assert not set(RENAMED) & known


# The legacy dict


def test_the_legacy_dict_is_the_golden_one(golden):
    """Training, then inference, as PtychoPINN applies them; inputs by inverting the mapping."""
    told = by_canonical_name(golden)
    of_model = {each.name for each in fields(ModelConfig)} & told.keys()
    model = ModelConfig(**{name: told[name] for name in of_model})

    def config(kind):
        own = {each.name for each in fields(kind)} & told.keys()
        return kind(model=model, **{name: told[name] for name in own})

    found = {}
    training = replace(config(TrainingConfig), test_data_file=None, output_dir=Path("elsewhere"))
    update_legacy_dict(found, training)
    update_legacy_dict(found, config(InferenceConfig))
    assert len(golden) == 31
    assert found == golden
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in golden.items()
    }


def test_the_torch_names_lead_to_the_golden_dict(golden):
    told = by_canonical_name(golden)
    back = {
        "gridsize": ("grid_size", (told["gridsize"],) * 2),
        "model_type": ("mode", "Unsupervised"),
        "amp_activation": ("amp_activation", "silu"),
        "nepochs": ("epochs", told["nepochs"]),
        "neighbor_count": ("K", told["neighbor_count"]),
        "probe_mask": ("probe_mask", object()),
    }
    of_inference = {"model_path", "debug"}
    torch_names = dict(
        back.get(name, (name, value)) for name, value in told.items() if name not in of_inference
    )
    found = legacy_dict(training_config_from_torch(torch_names))
    assert found == {key: v for key, v in golden.items() if key not in of_inference}


def test_none_leaves_no_stale_value():
    """Trap: None skipped on update, so that an earlier configuration's value survives."""
    legacy = {"key.of.others": 1}
    update_legacy_dict(legacy, TrainingConfig(n_subsample=64, subsample_seed=5))
    assert legacy["n_subsample"] == 64
    update_legacy_dict(legacy, TrainingConfig())
    assert legacy["n_subsample"] is None and legacy["subsample_seed"] is None
    assert legacy["key.of.others"] == 1


def test_configurations_share_nothing():
    """Trap: a global dict that has to be set first."""
    first, second = TrainingConfig(), TrainingConfig()
    first.model.N = 256
    first.nepochs = 1
    assert second == TrainingConfig()
    assert legacy_dict(second)["N"] == 64
    assert legacy_dict(first) is not legacy_dict(first)


# What runs here


def test_defaults_run():
    check_runnable(TrainingConfig())


@pytest.mark.parametrize("name", ONLY)
def test_what_would_be_ignored_is_refused(name):
    """Trap: knobs accepted and ignored."""
    value, advice = ONLY[name]
    flipped = {True: False, False: True, "pytorch": "tensorflow"}
    other = 0.5 if isinstance(value, float) else flipped[value]
    changed = training_config(flat(TrainingConfig()) | {name: other})
    with pytest.raises(PtychoPinnError, match=name) as refusal:
        check_runnable(changed)
    assert advice in str(refusal.value)
    assert other in legacy_dict(changed).values() or name == "backend", "the dict carries it"


def test_the_other_backend_is_refused_by_both_names():
    with pytest.raises(PtychoPinnError, match=r"'tensorflow'.*'pytorch'"):
        check_runnable(TrainingConfig(backend="tensorflow"))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(PtychoPinnError, match="nothing to learn"):
        check_runnable(TrainingConfig(nll_weight=0, mae_weight=0))
    with pytest.raises(PtychoPinnError, match="gridsize is 2, which is the cnn's"):
        check_runnable(TrainingConfig(model=ModelConfig(architecture="unrolled", gridsize=2)))
