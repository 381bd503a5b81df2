"""From the names of PtychoPINN's torch flavour to the canonical ones of ``config``.

The only place that knows the torch names. Used by people's programs that hold a torch
configuration; the table in docs/specs/ptychopinn-backend.md is this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ptycho_stream.errors import PtychoPinnError
from ptycho_stream.ptychopinn.config import (
    InferenceConfig,
    ModelConfig,
    TrainingConfig,
    inference_config,
    training_config,
)


def _gridsize(value: Any) -> Any:
    try:
        rows, columns = value
    except TypeError as error:
        raise ValueError("give (rows, columns)") from error
    if rows != columns:
        raise ValueError("groups are square, give as many rows as columns")
    return rows


def _model_type(value: Any) -> str:
    known = {"Unsupervised": "pinn", "Supervised": "supervised"}
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"give one of {', '.join(known)}")
    return known[value]


def _nll_weight(value: Any) -> float:
    if not isinstance(value, bool):
        raise ValueError("give True or False; a share is nll_weight")
    return 1.0 if value else 0.0


def _amp_activation(value: Any) -> Any:
    return "swish" if value == "silu" else value


def _probe_mask(value: Any) -> bool:
    return value if isinstance(value, bool) else value is not None


RENAMED: dict[str, str] = {
    "grid_size": "gridsize",
    "mode": "model_type",
    "epochs": "nepochs",
    "K": "neighbor_count",
    "nll": "nll_weight",
}
"""Torch names that are not the canonical ones; all other settings are called the same."""

_CONVERTED: dict[str, Callable[[Any], Any]] = {
    "grid_size": _gridsize,
    "mode": _model_type,
    "nll": _nll_weight,
    "amp_activation": _amp_activation,
    "probe_mask": _probe_mask,
}
"""By torch name: what turns its values into canonical ones."""


def canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by canonical names.

    Args:
        values: by torch name, for example ``vars()`` of a torch configuration; settings that torch
            does not know (``mae_weight``) by canonical name.

    Raises:
        PtychoPinnError: a name is unknown, two names say the same, or a value has no counterpart.
    """
    known = {
        each.name
        for kind in (ModelConfig, TrainingConfig, InferenceConfig)
        for each in fields(kind)
    } - {"model"}
    found: dict[str, Any] = {}
    for name, value in values.items():
        target = RENAMED.get(name, name)
        if target not in known:
            raise PtychoPinnError(
                f"{name} has no counterpart among PtychoPINN's canonical settings: leave it out; "
                f"torch names are {', '.join(RENAMED)}, the others {', '.join(sorted(known))}"
            )
        if target in found:
            raise PtychoPinnError(f"{name} and {target} say the same: give one of them")
        try:
            found[target] = _CONVERTED[name](value) if name in _CONVERTED else value
        except ValueError as error:
            raise PtychoPinnError(f"{name} is {value!r}: {error}") from error
    return found


def training_config_from_torch(values: Mapping[str, Any]) -> TrainingConfig:
    """The training that torch settings, data's and model's among them, describe.

    Raises:
        PtychoPinnError: as of :func:`canonical`, or a value is out of its limits.
    """
    return training_config(canonical(values))


def inference_config_from_torch(values: Mapping[str, Any]) -> InferenceConfig:
    """The reconstruction that torch settings, data's and model's among them, describe.

    Raises:
        PtychoPinnError: as of :func:`canonical`, or a value is out of its limits.
    """
    return inference_config(canonical(values))
