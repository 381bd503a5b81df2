"""Draw the contact sheets of docs/simulation.md: every kind of sample and probe, and detectors.

Run from anywhere after a change of the simulators; writes beside itself. The same every time.

    python docs/pictures/draw_simulation.py
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ptycho_stream.pictures import grey_levels
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.optics import OPTICS
from ptycho_stream.simulate.probes import probe_of_kind, zone_plate_probe
from ptycho_stream.simulate.samples import SAMPLE_KINDS, sample_of_kind
from ptycho_stream.simulate.scan_paths import PATH_KINDS
from ptycho_stream.simulate.sensor import SensorSettings

TILE_PX, LABEL_PX, GAP_PX = 128, 14, 4
Tile = NDArray[np.uint8]

DETECTORS = {
    "1e2 photons": (1e2, SensorSettings()),
    "1e4 photons": (1e4, SensorSettings()),
    "1e7 photons": (1e7, SensorSettings()),
    "module gaps": (1e6, SensorSettings(gap_px=5, module_px=48)),
    "hot and dead": (1e6, SensorSettings(hot=0.01, dead=0.02)),
    "beam stop": (1e6, SensorSettings(beam_stop_px=10)),
    "background": (1e5, SensorSettings(background=20)),
    "saturation": (1e6, SensorSettings(saturation=60)),
}


def samples() -> dict[str, Tile]:
    """Phase of one sample of each kind."""
    rows: dict[str, Tile] = {}
    for kind in SAMPLE_KINDS:
        made = sample_of_kind(np.random.default_rng(3), (TILE_PX, TILE_PX), kind)
        rows[kind] = grey_levels(np.angle(made))
    return rows


def probes() -> dict[str, Tile]:
    """Amplitude at the sample and, to its right, on the detector."""
    rows: dict[str, Tile] = {}
    drawn = {kind: probe_of_kind(np.random.default_rng(1), TILE_PX, kind) for kind in OPTICS}
    for kind, probe in {"(the default)": zone_plate_probe(TILE_PX), **drawn}.items():
        near = np.abs(probe.modes[0])
        far = np.fft.fftshift(np.abs(np.fft.fft2(probe.modes[0])))
        rows[kind] = np.hstack([(255 * a / a.max()).astype(np.uint8) for a in (near, far)])
    return rows


def paths() -> dict[str, Tile]:
    """Positions of 400 frames, the later the darker."""
    rows: dict[str, Tile] = {}
    for name, kind in PATH_KINDS.items():
        points = kind.draw(np.random.default_rng(2), 400, 5.0, kind.jitter)
        tile = np.full((TILE_PX, TILE_PX), 255, np.uint8)
        y, x = np.clip(np.rint(points + TILE_PX / 2).astype(int), 1, TILE_PX - 2).T
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            tile[y + dy, x + dx] = np.linspace(170, 0, len(points)).astype(np.uint8)
        rows[name] = tile
    return rows


def detectors() -> dict[str, Tile]:
    """Logarithm of one frame, as counted."""
    rows: dict[str, Tile] = {}
    for name, (photons, sensor) in DETECTORS.items():
        scan = simulate_experiment(
            seed=5, frames=1, size_px=TILE_PX, photons=photons, sensor=sensor
        )
        logarithm = np.log1p(scan.counts[0].astype(np.float32))
        rows[name] = (255 * logarithm / logarithm.max()).astype(np.uint8)
    return rows


def sheet(tiles: dict[str, Tile], columns: int) -> Image.Image:
    """Tiles with their names below, row by row."""
    width = max(tile.shape[1] for tile in tiles.values()) + GAP_PX
    height = TILE_PX + LABEL_PX + GAP_PX
    rows = -(-len(tiles) // columns)
    page = Image.new("L", (columns * width - GAP_PX, rows * height), 255)
    pen = ImageDraw.Draw(page)
    for number, (name, tile) in enumerate(tiles.items()):
        left, top = number % columns * width, number // columns * height
        page.paste(Image.fromarray(tile), (left, top))
        pen.text((left + 2, top + TILE_PX + 1), name, fill=0)
    return page


def main() -> int:
    """Write the four sheets and say how large they are."""
    folder = Path(__file__).parent
    for name, tiles, columns in (
        ("simulated-samples", samples(), 7),
        ("simulated-probes", probes(), 4),
        ("simulated-paths", paths(), 4),
        ("simulated-detectors", detectors(), 4),
    ):
        path = folder / f"{name}.png"
        sheet(tiles, columns).quantize(32).save(path, optimize=True)
        sys.stdout.write(f"{path.name}: {path.stat().st_size} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
