"""Run pty-chi's LSQML for ``benchmarks/refine.py``, in an environment that has pty-chi.

Needs numpy, torch and ptychi only, nothing of this project. Reads an NPZ of frames, positions and
probe modes, writes the image after every few epochs with the time spent so far.

    python benchmarks/refine_ptychi.py IN.npz OUT_FOLDER --epochs 40 --every 1 --batch 44
"""

import argparse
import sys
import time
import types
from pathlib import Path

import numpy as np


class _NoBlur:
    """Stands for torchvision's blur, which pty-chi imports and this run does not use."""


def stand_in_for_torchvision() -> None:
    """Spare the CPU build of torchvision, which pty-chi wants for one blur."""
    package, transforms = types.ModuleType("torchvision"), types.ModuleType("transforms")
    transforms.GaussianBlur = _NoBlur  # type: ignore[attr-defined]
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules.setdefault("torchvision", package)
    sys.modules.setdefault("torchvision.transforms", transforms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--batch", type=int, default=44)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    stand_in_for_torchvision()
    import torch
    from ptychi import api
    from ptychi.api.task import PtychographyTask

    torch.set_num_threads(args.threads)
    with np.load(args.source) as held:
        counts, modes, position = held["counts"], held["probe"], held["position_yx_px"]
    size = counts.shape[-1]
    centred = position - (position.max(0) + position.min(0)) / 2
    # Even, so that where pty-chi puts position 0 is not a matter of rounding.
    shape = tuple(2 * int(v) for v in (np.ceil(np.ptp(centred, axis=0)) + size + 40) // 2)
    options = api.LSQMLOptions()
    options.data_options.data = counts
    options.object_options.initial_guess = torch.ones((1, *shape), dtype=torch.complex64)
    options.object_options.optimizable = True
    options.probe_options.initial_guess = (modes[None] / size).astype(np.complex64)
    options.probe_options.optimizable = True
    options.probe_options.orthogonalize_incoherent_modes.enabled = True
    options.probe_position_options.position_y_px = centred[:, 0].astype(np.float32)
    options.probe_position_options.position_x_px = centred[:, 1].astype(np.float32)
    options.probe_position_options.optimizable = False
    options.reconstructor_options.num_epochs = args.epochs
    options.reconstructor_options.batch_size = args.batch
    options.reconstructor_options.default_device = api.Devices.CPU
    options.reconstructor_options.random_seed = 1
    task = PtychographyTask(options)
    wall = cpu = 0.0
    for epoch in range(args.every, args.epochs + 1, args.every):
        started, used = time.perf_counter(), time.process_time()
        task.run(args.every)
        wall += time.perf_counter() - started
        cpu += time.process_time() - used
        obj = task.get_data_to_cpu("object", as_numpy=True)[0]
        probe = task.get_data_to_cpu("probe", as_numpy=True)[0] * size
        np.savez(
            args.out / f"{epoch:04d}.npz",
            object=obj,
            probe=probe,
            origin_yx_m=-(np.array(obj.shape) - 1) / 2,
            pixel_yx_m=np.ones(2),
            positions_yx_m=centred,
            frame_numbers=np.arange(len(counts)),
            wall_s=wall,
            cpu_s=cpu,
        )


if __name__ == "__main__":
    main()
