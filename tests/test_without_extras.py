"""Live inference needs neither Lightning nor MLflow, and says nothing of their absence."""

import subprocess
import sys

_PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "pytorch_lightning", "mlflow", "tensorboard"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import numpy as np
import ptycho_stream, ptycho_stream.client
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.simulate.experiment import simulate_experiment

network, _ = ModelRegistry().load()
scan = simulate_experiment(frames=2, size_px=32)
patches, weights = Predictor(network, scan.probe).predict(scan.counts, np.zeros((2, 2)))
assert np.isfinite(patches).all() and weights.max() > 0
try:
    import lightning
except ModuleNotFoundError:
    print("fine without")
"""


def test_live_inference_works_with_lightning_and_mlflow_blocked():
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "fine without", done.stderr
