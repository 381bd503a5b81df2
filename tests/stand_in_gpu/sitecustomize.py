"""A GPU that fails when a test says so: on the path of a daemon's processes it stands in for CUDA.

The file that ``PTYCHO_STREAM_TEST_GPU`` names says how the device is: ``fine``, ``failing`` (every
kernel ends with a CUDA error) or ``lost`` (as on a machine without one). The numbers are the CPU's.
"""

import os
import sys
from pathlib import Path


def _condition():
    return Path(os.environ["PTYCHO_STREAM_TEST_GPU"]).read_text()


def _install():
    import torch

    from ptycho_stream.reconstruct import patches, recipe
    from ptycho_stream.reconstruct.predict import Predictor

    class StandIn(Predictor):
        def __init__(self, network, probe, device="cpu", batch_size=16):
            self.stands_in = torch.device(device).type == "cuda"
            super().__init__(network, probe, "cpu", batch_size)

        def predict_judged(self, *arguments):
            if self.stands_in and _condition() == "failing":
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
            return super().predict_judged(*arguments)

    real = recipe.usable_device

    def usable_device(name, *key):
        if name == "cuda" and _condition() != "lost":
            return torch.device("cuda")
        return real(name, *key)

    recipe.usable_device = usable_device
    recipe.Predictor = patches.Predictor = StandIn


if "ptycho_streamd.reconstruct" in sys.orig_argv:
    _install()
