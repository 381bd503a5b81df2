"""``ptycho-stream simulate``: write a simulated scan, with the truth behind it, to a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console

from ptycho_stream.cli import simulate_options as given
from ptycho_stream.cli.options import AsJson
from ptycho_stream.files.npz import ScanFile, save_arrays, save_scan
from ptycho_stream.files.ptychopinn_npz import save_ptychopinn
from ptycho_stream.geometry import object_pixel_yx_m
from ptycho_stream.simulate.samples import sample_of_kind, showcase_sample

if TYPE_CHECKING:
    from ptycho_stream.physics.probe import Probe
    from ptycho_stream.simulate.experiment import SampleOf

DETECTOR_PIXEL_M = 75e-6
DEFAULT_SIZE_PX = 128


def simulate(
    out: Annotated[Path, typer.Option("--out", "-o", help="File (NPZ) to write.")],
    frames: given.Frames = 1000,
    size: given.Size = None,
    seed: given.Seed = 0,
    file_format: given.Format = "native",
    probe_out: Annotated[
        Path | None, typer.Option(help="Write the probe to a file of its own, too (NPZ).")
    ] = None,
    path: given.ScanPath = "jittered-raster",
    step_px: given.Step = None,
    jitter: given.Jitter = None,
    energy_ev: given.Energy = 8800.0,
    distance_m: given.Distance = 2.0,
    sample: given.Sample = "showcase",
    phase_rad: given.Phase = None,
    absorption: given.Absorption = None,
    relation: given.Relation = None,
    probe: given.ProbeName = None,
    probe_in: given.ProbeIn = None,
    modes: given.Modes = None,
    zone_plate: given.ZonePlateOption = None,
    photons: given.Photons = 5e5,
    gaps: given.Gaps = 0,
    hot: given.Hot = 0.0,
    dead: given.Dead = 0.0,
    beam_stop: given.BeamStop = 0.0,
    background: given.Background = 0.0,
    saturation: given.Saturation = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a scan: Poisson photons of a known sample under a known probe.

    The same options give the same counts.

    Example: ptycho-stream simulate --out scan.npz --frames 1000 --size 128 --seed 1
    --probe-out probe.npz

    Example: ptycho-stream simulate --out train.npz --sample polyhedra --probe zernike
    --path spiral --photons 1e5 --gaps 4 --beam-stop 3 --format ptychopinn

    Example: ptycho-stream simulate --out fly.npz --path fly --zone-plate 160,0.06,60,400
    """
    # Importing torch takes a second, which --help should not wait for.
    from ptycho_stream.simulate.experiment import simulate_experiment
    from ptycho_stream.simulate.scan_file import scan_file_of
    from ptycho_stream.simulate.sensor import SensorSettings

    draw = _sample(sample, {"phase_rad": phase_rad, "absorption": absorption, "relation": relation})
    beam_options = _Beam(probe, probe_in, modes, zone_plate)
    beam = beam_options.probe(size, seed, energy_ev, distance_m)
    sensor = SensorSettings(
        gap_px=gaps,
        hot=hot,
        dead=dead,
        beam_stop_px=beam_stop,
        background=background,
        saturation=saturation,
    )
    with Console(stderr=True).status(f"simulating {frames} frames of {beam.size_px} pixels square"):
        experiment = simulate_experiment(
            seed=seed,
            frames=frames,
            size_px=beam.size_px,
            photons=photons,
            step_px=step_px,
            jitter=jitter,
            path=path,
            probe=beam,
            sample=draw,
            sensor=sensor,
            photon_energy_eV=energy_ev,
            detector_distance_m=distance_m,
            detector_pixel_yx_m=(DETECTOR_PIXEL_M, DETECTOR_PIXEL_M),
            notes={"sample_kind": sample, "probe_kind": beam_options.name},
        )
        scan = scan_file_of(experiment)
        (save_scan if file_format == "native" else save_ptychopinn)(out, scan)
        if probe_out is not None:
            save_arrays(probe_out, {"probe": scan.probe})
    _tell(out, scan, probe_out, as_json=as_json)


def _tell(out: Path, scan: ScanFile, probe_out: Path | None, *, as_json: bool) -> None:
    dose = float(scan.metadata["dose_photons"])
    if as_json:
        report = {
            "out": str(out),
            "frames": len(scan),
            "shape_yx": scan.frame_shape_yx,
            "pixel_yx_m": scan.pixel_yx_m,
            "dose_photons": dose,
            "bad_pixels": 0 if scan.bad_pixels is None else int(scan.bad_pixels.sum()),
            "probe_out": str(probe_out) if probe_out else None,
        }
        typer.echo(json.dumps(report))
    else:
        rows, columns = scan.frame_shape_yx
        typer.echo(
            f"{out}: {len(scan)} frames of {rows} x {columns} pixels, {dose:.4g} photons a frame"
        )


def _sample(kind: str, strength: dict[str, Any]) -> SampleOf:
    """What draws the sample that the options ask for."""
    told = {name: value for name, value in strength.items() if value is not None}
    if kind == "random" and told:
        raise typer.BadParameter(
            f"a random sample draws its own {', '.join(told)}: leave the options out, or name a "
            "kind with --sample"
        )
    if kind == "showcase" and not told:
        return showcase_sample
    return partial(sample_of_kind, kind=kind, **told)


@dataclass(frozen=True)
class _Beam:
    """The options that choose a probe."""

    kind: str | None
    file: str | None
    modes: int | None
    zone_plate: str | None

    def __post_init__(self) -> None:
        """Refuse options that would do nothing."""
        if self.file is not None and self.kind not in (None, given.MEASURED):
            raise typer.BadParameter(f"--probe-in brings a probe: leave out --probe {self.kind}")
        if self.kind == given.MEASURED and self.file is None:
            raise typer.BadParameter("--probe measured needs --probe-in FILE")
        if self.zone_plate is not None and (
            self.file is not None or self.kind not in (None, "zone-plate")
        ):
            raise typer.BadParameter("--zone-plate makes a probe: leave out --probe and --probe-in")
        drawn = self.file is None and self.zone_plate is None and self.kind is not None
        if self.modes is not None and not drawn:
            raise typer.BadParameter(
                "--modes is for probes that are drawn: name one with --probe; the default zone "
                "plate has one mode, a measured probe its own"
            )

    @property
    def name(self) -> str:
        """The kind of probe that comes of the options."""
        return self.kind or ("zone-plate" if self.file is None else given.MEASURED)

    def probe(self, size: int | None, seed: int, energy_ev: float, distance_m: float) -> Probe:
        from ptycho_stream.physics.optics import ZonePlate
        from ptycho_stream.physics.probe import load_probe
        from ptycho_stream.simulate.probes import probe_of_kind, zone_plate_probe

        if self.file is not None:
            loaded = load_probe(self.file)
            if size not in (None, loaded.size_px):
                raise typer.BadParameter(
                    f"the probe of {self.file} has {loaded.size_px} px, not --size {size}: leave "
                    "out --size"
                )
            return loaded
        size = size or DEFAULT_SIZE_PX
        if self.zone_plate is not None:
            diameter, zone, stop, defocus = given.zone_plate_m(self.zone_plate)
            pixels = (DETECTOR_PIXEL_M, DETECTOR_PIXEL_M)
            pixel_m = object_pixel_yx_m(energy_ev, distance_m, pixels, size)[0]
            plate = ZonePlate.of_optics(
                diameter_m=diameter,
                outermost_zone_m=zone,
                stop_diameter_m=stop,
                defocus_m=defocus,
                photon_energy_eV=energy_ev,
                pixel_m=pixel_m,
            )
            return zone_plate_probe(size, plate=plate)
        if self.kind is None:
            return zone_plate_probe(size)
        # A stream of its own: the same seed scans the same sample with another probe.
        return probe_of_kind(
            np.random.default_rng((seed, 1)), size, self.kind, modes=self.modes or 1
        )
