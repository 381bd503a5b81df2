"""The PtychoPINN face: this project for people and programs that already speak PtychoPINN.

Everything is in the modules, and the names that programs call are here too, the same objects
(docs/ptychopinn.md tells how to use them, docs/specs/ptychopinn-backend.md what they promise).
Lightning is loaded by ``fit`` alone, which is not imported here.
"""

from ptycho_stream.ptychopinn.bridge import (
    inference_config_from_torch,
    training_config_from_torch,
)
from ptycho_stream.ptychopinn.bundle import Bundle, load_bundle, registry_bundle, save
from ptycho_stream.ptychopinn.config import InferenceConfig, ModelConfig, TrainingConfig
from ptycho_stream.ptychopinn.execution import ExecutionConfig
from ptycho_stream.ptychopinn.legacy import KEY_MAPPINGS, legacy_dict, update_legacy_dict
from ptycho_stream.ptychopinn.model import PtychoModel, load_inference_bundle
from ptycho_stream.ptychopinn.model_inputs import model_inputs
from ptycho_stream.ptychopinn.raw_data import RawData, RawDataTorch
from ptycho_stream.ptychopinn.reassembly import extract, reassemble, reassemble_position
from ptycho_stream.ptychopinn.reconstruction import predict, reconstruct
from ptycho_stream.ptychopinn.training import TrainingResult, train

SPEC_VERSION = "1.0"
"""Of docs/specs/ptychopinn-backend.md: the second number grows with what is added, the first with
what programs have to follow."""

__all__ = [
    "KEY_MAPPINGS",
    "SPEC_VERSION",
    "Bundle",
    "ExecutionConfig",
    "InferenceConfig",
    "ModelConfig",
    "PtychoModel",
    "RawData",
    "RawDataTorch",
    "TrainingConfig",
    "TrainingResult",
    "extract",
    "inference_config_from_torch",
    "legacy_dict",
    "load_bundle",
    "load_inference_bundle",
    "model_inputs",
    "predict",
    "reassemble",
    "reassemble_position",
    "reconstruct",
    "registry_bundle",
    "save",
    "train",
    "training_config_from_torch",
    "update_legacy_dict",
]
