"""A GPU that fails when a test says so: on the path of a daemon's processes it stands in for CUDA.

The file that ``PTYCHO_STREAM_TEST_GPU`` names says how the device is: ``fine``, ``failing`` (every
kernel ends with a CUDA error) or ``lost`` (as on a machine without one). Patches go the way that
they go on a GPU; the numbers are the CPU's.
"""

import os
import sys
from pathlib import Path


def _condition():
    return Path(os.environ["PTYCHO_STREAM_TEST_GPU"]).read_text()


def _install():
    import torch

    from ptycho_stream.reconstruct import device_canvas, devices, generation, patches, recipe
    from ptycho_stream.reconstruct.predict import Predictor

    host = torch.device("cpu")
    like_a_gpu = False  # only while something for the stand-in is made

    class StandIn(Predictor):
        def __init__(self, network, probe, device="cpu", batch_size=16):
            nonlocal like_a_gpu
            self.stands_in = like_a_gpu = torch.device(device).type == "cuda"
            try:
                super().__init__(network, probe, host, batch_size)
            finally:
                like_a_gpu = False

        def predict_judged(self, *arguments):
            if self.stands_in and _condition() == "failing":
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
            return super().predict_judged(*arguments)

    def canvas_on(device, tile_px):
        if torch.device(device).type == "cuda":
            return device_canvas.DeviceCanvas(tile_px, host)
        return device_canvas.canvas_on(device, tile_px)

    devices.computes_on_host = lambda device: device.type == "cpu" and not like_a_gpu
    generation.canvas_on = canvas_on
    real = recipe.usable_device

    def usable_device(name, *key):
        if name == "cuda" and _condition() != "lost":
            return torch.device("cuda")
        return real(name, *key)

    recipe.usable_device = usable_device
    recipe.Predictor = patches.Predictor = StandIn


if "ptycho_streamd.reconstruct" in sys.orig_argv:
    _install()
