"""Short trainings of the unrolled network in several shapes, with the same frames and steps.

Each line is one run from nothing with the same seed: validation error of single frames, weights,
and the time of a training step in this run. Short runs rank shapes, they do not make models; what
was learned from them is in docs/models.md.

    python benchmarks/ablations.py [--steps 300] [--only plain,narrow]
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from ptycho_stream.networks.unrolled import UnrolledSettings
from ptycho_stream.training.budget import Budget
from ptycho_stream.training.pretrain import pretrain
from ptycho_stream.training.synthetic import SyntheticSettings

PLAIN = UnrolledSettings()
SHAPES = {
    "plain": PLAIN,
    "2 steps": replace(PLAIN, steps=2),
    "8 steps": replace(PLAIN, steps=8),
    "3 stages": replace(PLAIN, stages=3),
    "narrow": replace(PLAIN, channels=(12, 20, 24)),
    "wide": replace(PLAIN, channels=(32, 48, 64)),
    "little memory": replace(PLAIN, memory=4),
}


def main() -> int:
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="names of shapes, separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wanted = args.only.split(",") if args.only else list(SHAPES)
    data = SyntheticSettings(sizes_px=(64,), frames=16)
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            result = pretrain(
                Path(folder),
                Budget(steps=args.steps),
                settings=SHAPES[name],
                data=data,
                validate_every=args.steps,
                progress=False,
            )
            step_s = (time.monotonic() - started) / args.steps
        weights = sum(p.numel() for p in result.network.parameters())
        error = result.metrics["val_nrmse"]
        print(f"{name:14} {weights:8d} weights {error:.4f} {step_s:.3f} s a step", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
