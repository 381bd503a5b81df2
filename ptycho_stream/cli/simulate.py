"""``ptycho-stream simulate``: write a simulated scan, with the truth behind it, to a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ptycho_stream.cli.options import AsJson
from ptycho_stream.files.npz import save_arrays, save_scan


def _above_zero(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is not a number above 0")
    return value


def simulate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Scan file (NPZ) to write.")],
    frames: Annotated[int, typer.Option(min=1, help="Number of frames.")] = 1000,
    size: Annotated[int, typer.Option(min=8, help="Frame size in pixels.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of sample, path and noise.")] = 0,
    photons: Annotated[
        float, typer.Option(callback=_above_zero, help="Of the unattenuated beam, a frame.")
    ] = 5e5,
    step_px: Annotated[
        float | None,
        typer.Option(
            callback=_above_zero, help="Distance of neighbours in object pixels. [size / 12]"
        ),
    ] = None,
    jitter: Annotated[
        float, typer.Option(min=0, max=10, help="Displacement of positions, in steps.")
    ] = 0.25,
    energy_ev: Annotated[float, typer.Option(callback=_above_zero, help="Photon energy.")] = 8800.0,
    distance_m: Annotated[
        float, typer.Option(callback=_above_zero, help="From sample to detector.")
    ] = 2.0,
    probe_out: Annotated[
        Path | None, typer.Option(help="Write the probe to a file of its own, too (NPZ).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a scan: Poisson photons of a known sample along a jittered raster.

    Example: ptycho-stream simulate --out scan.npz --frames 1000 --size 128 --seed 1
    --probe-out probe.npz
    """
    # Importing torch takes a second, which --help should not wait for.
    from ptycho_stream.simulate.experiment import simulate_experiment
    from ptycho_stream.simulate.scan_file import scan_file_of

    with Console(stderr=True).status(f"simulating {frames} frames of {size} x {size} pixels"):
        experiment = simulate_experiment(
            seed=seed,
            frames=frames,
            size_px=size,
            photons=photons,
            step_px=step_px,
            jitter=jitter,
            photon_energy_eV=energy_ev,
            detector_distance_m=distance_m,
        )
        scan = scan_file_of(experiment)
        save_scan(out, scan)
        if probe_out is not None:
            save_arrays(probe_out, {"probe": scan.probe})
    if as_json:
        report = {
            "out": str(out),
            "frames": len(scan),
            "shape_yx": scan.frame_shape_yx,
            "pixel_yx_m": scan.pixel_yx_m,
            "probe_out": str(probe_out) if probe_out else None,
        }
        typer.echo(json.dumps(report))
    else:
        typer.echo(f"{out}: {len(scan)} frames of {size} x {size} pixels, seed {seed}")
