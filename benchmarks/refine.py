"""Time until refinement explains the measured siemens star, beside pty-chi's LSQML.

From the file's analytic probe guess, one mode, to which both get the same two more. Snapshots are
taken as they go, with the clock stopped, and judged afterwards by the same R-factor tool. pty-chi
runs in an environment of its own, named by ``--ptychi-python``; without it that column is missing.

    python benchmarks/refine.py --data DIR --tools DIR [--ptychi-python PATH] [--start flat|network]
"""

import argparse
import bz2
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.reconstruct.refine import Refiner
from ptycho_stream.reconstruct.refine_beam import with_modes
from ptycho_stream.reconstruct.refine_file import measured_photons, predicted_image
from ptycho_stream.reconstruct.refine_settings import RefineSettings

FRAMES_FILE = "siemens-star-small.npz.bz2"
REFERENCE_FILE = "siemens-star-reference.npz"
LIMIT = 0.022
PTYCHI = Path(__file__).parent / "refine_ptychi.py"


def tool(folder: Path, name: str) -> ModuleType:
    """One of the judging programs, as a module."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"there is no {name}.py in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Judge:
    """The two tools, and the frames and the reference that they compare with."""

    def __init__(self, tools: Path, data: Path, counts: NDArray[Any]) -> None:
        self._r_factor, self._score = tool(tools, "r_factor"), tool(tools, "score_object")
        self._counts = counts
        with np.load(data / REFERENCE_FILE) as held:
            self._reference = held["object"]

    def excess(self, result: Any) -> float:
        """R beyond that of Poisson noise."""
        return float(self._r_factor.evaluate(result, self._counts, "centre")["excess"])

    def all(self, result: Any) -> dict[str, float]:
        """What both tools say."""
        figures = self._r_factor.evaluate(result, self._counts, "centre")
        score = self._score.score(result["object"], self._reference)
        names = ("nrmse", "phase_ssim", "frc_half")
        return {
            **{name: round(float(score[name]), 4) for name in names},
            **{name: round(float(figures[name]), 4) for name in ("r_factor", "excess", "deviance")},
        }

    def first_below(self, snapshots: list[Any]) -> Any | None:
        """The first snapshot that reaches the limit; they improve."""
        return next((shot for shot in snapshots if self.excess(shot) <= LIMIT), None)


def load(data: Path) -> tuple[NDArray[np.uint16], NDArray[np.float64], Probe]:
    """Counts (M, N, N) with zero frequency at N // 2, positions of the centre in px, the guess."""
    with np.load(io.BytesIO(bz2.decompress((data / FRAMES_FILE).read_bytes()))) as held:
        counts = np.fft.fftshift(np.rint(held["data"][0]), axes=(-2, -1)).astype(np.uint16)
        guess = Probe(held["probe"].reshape(1, *held["probe"].shape[-2:]).astype(np.complex64))
        position = held["scan"][0].astype(np.float64) + (counts.shape[-1] - 1) / 2
    return counts, position, guess.normalised(measured_photons(counts))


def snapshot(refiner: Refiner, wall_s: float, cpu_s: float) -> dict[str, Any]:
    """What the tools read, and the time it took."""
    image = refiner.image()
    return {
        "object": image.object_yx,
        "origin_yx_m": np.asarray(image.corner_yx_px, float),
        "pixel_yx_m": np.ones(2),
        "probe": refiner.probe.modes,
        "positions_yx_m": refiner.position_yx_px,
        "frame_numbers": refiner.keys,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
    }


def ours(
    counts: NDArray[Any],
    position: NDArray[np.float64],
    probe: Probe,
    settings: RefineSettings,
    sweeps: float,
    network: bool,
) -> list[dict[str, Any]]:
    """Snapshots after every half sweep; the network's time counts."""
    wall, cpu = time.perf_counter(), time.process_time()
    refiner = Refiner(counts, probe, settings)
    refiner.add(np.arange(len(counts)), position)
    if network:
        model, _ = ModelRegistry().load("default")
        top = position - (counts.shape[-1] - 1) / 2
        corner = np.rint(top)
        image, at = predicted_image(
            Predictor(model, probe), counts, corner.astype(np.int64), top - corner
        )
        refiner.start_from(image, at)
    spent_wall, spent_cpu = time.perf_counter() - wall, time.process_time() - cpu
    shots: list[dict[str, Any]] = []
    half = 0.5
    while refiner.sweeps < sweeps:
        wall, cpu = time.perf_counter(), time.process_time()
        while refiner.sweeps < half:
            refiner.step()
        spent_wall += time.perf_counter() - wall
        spent_cpu += time.process_time() - cpu
        shots.append(snapshot(refiner, spent_wall, spent_cpu))
        half += 0.5
    return shots


def theirs(
    python: Path, counts: NDArray[Any], position: NDArray[np.float64], probe: Probe, args: Any
) -> list[Any]:
    """pty-chi's snapshots, in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.npz", Path(folder) / "out"
        out.mkdir()
        modes = with_modes(probe, args.modes).modes
        np.savez(source, counts=counts, probe=modes, position_yx_px=position)
        command = [python, "-W", "ignore", PTYCHI, source, out, "--epochs", args.epochs]
        command += ["--batch", args.ptychi_batch, "--threads", args.threads]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
        return [dict(np.load(path)) for path in sorted(out.iterdir())]


def report(judge: Judge, shots: list[Any]) -> dict[str, Any]:
    """Time to the limit and the figures at the end."""
    reached = judge.first_below(shots)
    end = shots[-1]
    return {
        "wall_s_to_limit": None if reached is None else round(float(reached["wall_s"]), 2),
        "cpu_s_to_limit": None if reached is None else round(float(reached["cpu_s"]), 2),
        "wall_s": round(float(end["wall_s"]), 2),
        "cpu_s": round(float(end["cpu_s"]), 2),
        **judge.all(end),
    }


def show(figures: dict[str, Any]) -> None:
    """Print one row a program, then all figures as JSON."""
    names = ("wall_s_to_limit", "cpu_s_to_limit", "wall_s", "cpu_s", "excess", "deviance")
    names += ("nrmse", "phase_ssim", "frc_half")
    print(" " * 8 + "".join(f"{name:>17}" for name in names))
    for who in ("ours", "ptychi"):
        if who in figures:
            row = figures[who]
            print(f"{who:8}" + "".join(f"{row[name] or 'not reached':>17}" for name in names))
    print(json.dumps(figures, indent=1))


def main() -> int:
    """Print a table and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PTYCHO_STREAM_DATA"))
    parser.add_argument("--tools", type=Path, required=True, help="folder of the judging programs")
    parser.add_argument("--ptychi-python", type=Path, help="interpreter that has pty-chi")
    parser.add_argument("--ptychi-batch", type=int, default=44)
    parser.add_argument("--epochs", type=int, default=40, help="of pty-chi")
    parser.add_argument("--sweeps", type=float, default=12, help="of ours")
    parser.add_argument("--modes", type=int, default=3)
    parser.add_argument("--method", choices=("lsqml", "rpie"), default="lsqml")
    parser.add_argument("--noise", choices=("gaussian", "poisson"), default="gaussian")
    parser.add_argument("--start", choices=("flat", "network"), default="flat")
    parser.add_argument("--batch", type=int, default=RefineSettings().batch_frames)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data or set PTYCHO_STREAM_DATA")
    torch.set_num_threads(args.threads)
    counts, position, probe = load(args.data)
    judge = Judge(args.tools, args.data, counts)
    settings = RefineSettings(
        method=args.method, noise=args.noise, modes=args.modes, batch_frames=args.batch
    )
    shots = ours(counts, position, probe, settings, args.sweeps, args.start == "network")
    figures: dict[str, Any] = {
        "excess_limit": LIMIT,
        "threads": args.threads,
        "start": args.start,
        "ours": report(judge, shots),
    }
    if args.ptychi_python is None:
        print("pty-chi is left out: name an interpreter that has it by --ptychi-python")
    else:
        peer = report(judge, theirs(args.ptychi_python, counts, position, probe, args))
        figures["ptychi"] = peer
        for clock in ("wall", "cpu"):
            mine, other = (figures[who][f"{clock}_s_to_limit"] for who in ("ours", "ptychi"))
            if mine and other:
                figures[f"times_faster_{clock}"] = round(other / mine, 1)
    show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
