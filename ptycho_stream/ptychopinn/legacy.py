"""PtychoPINN's legacy parameters: one flat dict with dotted keys, made from a configuration.

For programs that still read such a dict. Nothing in this package reads one, so there is none that
has to be filled first, and none that is shared.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from ptycho_stream.ptychopinn.config import Config, plain

KEY_MAPPINGS: dict[str, str] = {
    "object_big": "object.big",
    "probe_big": "probe.big",
    "probe_mask": "probe.mask",
    "probe_trainable": "probe.trainable",
    "intensity_scale_trainable": "intensity_scale.trainable",
    "positions_provided": "positions.provided",
    "output_dir": "output_prefix",
    "train_data_file": "train_data_file_path",
    "test_data_file": "test_data_file_path",
}
"""Canonical names that are not the legacy ones."""

NOT_LEGACY = frozenset({"architecture", "backend"})
"""They choose a program, which the legacy dict's reader is already."""


def legacy_dict(config: Config) -> dict[str, Any]:
    """The configuration by legacy keys; paths are text, what is not set is None."""
    return {
        KEY_MAPPINGS.get(name, name): value
        for name, value in plain(config).items()
        if name not in NOT_LEGACY
    }


def update_legacy_dict(target: MutableMapping[str, Any], config: Config) -> None:
    """Make ``target`` say what ``config`` says.

    Every setting of ``config`` is written, None too: a value that an earlier configuration left
    does not survive the one that has none.
    """
    target.update(legacy_dict(config))
